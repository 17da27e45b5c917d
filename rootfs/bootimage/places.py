"""Where the project and its cache are: in a checkout, or in an installation."""

import os
from pathlib import Path

__all__ = ("CACHE_DIR", "IS_CHECKOUT", "PROJECT")

#: Where the packages are: a checkout, or the site-packages of an installation.
PROJECT = Path(__file__).resolve().parents[2]
IS_CHECKOUT = (PROJECT / "scripts/setup").is_file()


def _cache_directory() -> Path:
    """Return ``.cache`` of a checkout; of an installation, the user's cache directory (XDG)."""
    if IS_CHECKOUT:
        return PROJECT / ".cache"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "guestagent"


#: Kernels, boot images, and what is known of this machine's accelerators.
CACHE_DIR = _cache_directory()
