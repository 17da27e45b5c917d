r"""The ``lowerdir`` option of overlayfs, written and read back. Pure but for a readlink.

In ``lowerdir=`` a colon ends a path and a comma ends the option; a backslash takes either's meaning
away, and its own. ``lowerdir+=`` holds one path as it is.
"""

import os

from guestagent.storage.mountinfo import Mount

__all__ = ("escape", "lowerdirs_of", "split_lowerdir")


def escape(path: str) -> str:
    """Escape what overlayfs would take for the end of a path or of an option."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def split_lowerdir(value: str) -> tuple[str, ...]:
    """Undo ``escape`` and the joining with colons. ``::`` parts data-only layers, also listed."""
    paths = [""]
    letters = iter(value)
    for letter in letters:
        if letter == "\\":
            paths[-1] += next(letters, "")
        elif letter == ":":
            paths.append("")
        else:
            paths[-1] += letter
    return tuple(path for path in paths if path)


def lowerdirs_of(mount: Mount) -> tuple[str, ...]:
    """Return the lower directories of a mounted overlay, topmost first.

    Short names are looked up in the directory of links that is the overlay's source; where that is
    gone they are returned as they are.
    """
    paths: list[str] = []
    for option in mount.super_options:
        key, _, value = option.partition("=")
        if key == "lowerdir":
            paths.extend(split_lowerdir(value))
        elif key == "lowerdir+":
            paths.append(value)
    return tuple(_resolve_link(mount.source, path) for path in paths)


def _resolve_link(source: str, path: str) -> str:
    if path.startswith("/") or not source.startswith("/"):
        return path
    try:
        return os.readlink(f"{source}/{path}")
    except OSError:
        return path
