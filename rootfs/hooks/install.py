"""What the hooks of initramfs-tools and dracut call: put the boot hook into an image being made.

    python3 -m rootfs.hooks.install --kernel VERSION [--with FEATURE,...] DIRECTORY

DIRECTORY is the root of the image. It gets the interpreter, its modules and its libraries, where
the distribution has not put them itself. The kernel modules are the distribution's to install;
their names are printed, one a line, each after those that it needs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from guestagent.api.layers import LAYER_FILESYSTEMS
from rootfs.bootimage.closure import ClosureError
from rootfs.bootimage.elf import ElfError
from rootfs.bootimage.features import FEATURES
from rootfs.bootimage.initramfs import feature_modules, feature_programs
from rootfs.bootimage.kernel import (
    MODULE_PLACES,
    KernelNotFoundError,
    ModuleIndex,
    ModuleNotFoundInKernelError,
    module_name,
)
from rootfs.bootimage.userland import PYTHON_DIR, userland

__all__ = ("DEFAULT_FEATURES", "install", "main")

ENTRY = "guestagent.boot.__main__"
DEFAULT_FEATURES = ("pmem", "virtio-blk", "scsi", "verity", *LAYER_FILESYSTEMS, "overlay")
#: What the boot scripts run: with -m the interpreter would need a quarter more of its library.
COMMAND = "usr/sbin/guestagent-mount-root"
_SCRIPT = f"""\
#!/usr/bin/python3 -IS
import sys
from {ENTRY} import main
sys.exit(main(sys.argv[1:]))
"""
#: Read by the boot scripts, which load what it names.
MODULE_NAMES = "etc/guestagent/module-names"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="rootfs.hooks.install", description=__doc__)
    parser.add_argument("--kernel", metavar="VERSION", required=True)
    parser.add_argument("--modules-root", metavar="DIRECTORY", type=Path, default=Path("/"))
    parser.add_argument("--with", dest="features", default=",".join(DEFAULT_FEATURES))
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(argv)
    features = tuple(name for name in options.features.split(",") if name)
    unknown = [name for name in features if name not in FEATURES]
    if unknown:
        parser.error(f"unknown feature {unknown[0]!r}; known: {', '.join(FEATURES)}")
    places = [options.modules_root / place / options.kernel for place in MODULE_PLACES]
    modules_dir = next((path for path in places if path.is_dir()), places[0])
    try:
        names = install(options.directory, features, ModuleIndex(modules_dir=modules_dir))
    except (OSError, ClosureError, ElfError, KernelNotFoundError, ModuleNotFoundInKernelError) as e:
        sys.stderr.write(f"guestagent: cannot install the boot hook: {e}\n")
        return 1
    sys.stdout.write("".join(f"{name}\n" for name in names))
    return 0


def install(directory: Path, features: tuple[str, ...], index: ModuleIndex) -> tuple[str, ...]:
    """Put the hook below ``directory``; return the names of the kernel modules that it needs.

    Raises:
        OSError: a file cannot be read or written.
        ClosureError, ElfError, KernelNotFoundError, ModuleNotFoundInKernelError: something needed
            is not on this machine.
    """
    names = tuple(
        module_name(file.name) for file in index.closure(feature_modules(features, index))
    )
    _, items = userland(ENTRY, programs=feature_programs(features))
    for item in items:
        _put(directory / item.path, item.build(item.read()), item.permissions)
    # the interpreter knows its prefix by this file, and complains without this directory
    _put(directory / PYTHON_DIR / "os.pyc", b"", 0o644)
    (directory / PYTHON_DIR / "lib-dynload").mkdir(exist_ok=True)
    _put(directory / COMMAND, _SCRIPT.encode(), 0o755)
    _put(directory / MODULE_NAMES, "".join(f"{name}\n" for name in names).encode(), 0o644)
    return names


def _put(path: Path, data: bytes, permissions: int) -> None:
    """Write a file, unless there is one: the distribution's own is the same, and newer at worst."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(permissions)


if __name__ == "__main__":
    sys.exit(main())
