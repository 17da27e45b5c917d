"""Output files on the host: each whole or not at all, and in place of a regular file only."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vsock.errors import CallError

__all__ = ("atomic_write", "facts_of_output")

#: Of the final name, in the temporary one: with the rest it stays below 255 bytes.
_KEPT_NAME_BYTES = 200


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file beside ``path`` and move it there at the end; it goes if the block fails.

    It replaces a regular file or nothing: not a device, a FIFO, a directory or a symbolic link.

    Raises:
        CallError: ``invalid``, ``path`` is no name of a file, or something else is there.
        OSError: it cannot be written.
    """
    text = os.fspath(path)
    _check(text)
    final = Path(text)
    kept = os.fsdecode(os.fsencode(final.name)[:_KEPT_NAME_BYTES])
    part = final.with_name(f".{kept}.{secrets.token_hex(4)}.part")
    with part.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            _check(text)
            part.replace(final)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def facts_of_output(text: str) -> os.stat_result | None:
    """Return the facts of the regular file that an output would replace, None where there is none.

    Raises:
        ValueError: the path is no name of a file, or something else is there; says why.
        OSError: it cannot be looked at.
    """
    # pathlib drops a slash at the end, which says that a directory is meant
    if os.path.basename(text) in ("", ".", ".."):
        raise ValueError("it is no name of a file")
    try:
        found = os.lstat(text)
    except FileNotFoundError:
        return None
    except ValueError:  # a NUL byte
        raise ValueError("it is no name of a file") from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        target = f" to {os.path.realpath(text)!r}" if stat.S_ISLNK(found.st_mode) else ""
        raise ValueError(f"it is {kind}{target}, and only a regular file is ever replaced")
    return found


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def _check(text: str) -> None:
    try:
        facts_of_output(text)
    except ValueError as why:
        problem = f"cannot write {text!r}: {why}"
        raise CallError("invalid", problem, step="write", object=text) from None
