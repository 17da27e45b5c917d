"""The kernels that tests, the demo and measurements run on: those of this machine's own release of
Debian, or those of the release that the environment variable GUESTAGENT_KERNELS names."""

import os
import shutil
from pathlib import Path

__all__ = ("CACHE", "kernel_cache", "user_mode_linux")

CACHE = Path(__file__).resolve().parents[2] / ".cache"


def kernel_cache() -> Path:
    """Return the directory whose ``kernel/`` holds the kernel for virtual machines.

    Raises:
        FileNotFoundError: the kernels of the release that is named are not fetched.
    """
    release = os.environ.get("GUESTAGENT_KERNELS", "")
    if not release:
        return CACHE
    place = CACHE / "kernels" / release
    if not place.is_dir():
        raise FileNotFoundError(f"no kernels of {release!r}: run scripts/setup {release}")
    return place


def user_mode_linux() -> tuple[Path, Path]:
    """Return the program and the directory of modules of User Mode Linux.

    Raises:
        FileNotFoundError: it is not installed, or not fetched.
    """
    place = kernel_cache()
    if place == CACHE:
        root, found = Path("/"), shutil.which("linux.uml")
    else:
        root, found = place / "uml", shutil.which(place / "uml/usr/bin/linux.uml")
    if found is None:
        raise FileNotFoundError("linux.uml is not installed (package user-mode-linux)")
    modules = sorted(root.glob("usr/lib/uml/modules/*/modules.dep"))
    if not modules:
        raise FileNotFoundError(
            f"no modules in {root}/usr/lib/uml/modules (package user-mode-linux)"
        )
    return Path(found), modules[-1].parent
