"""Output files on the host: each whole or not at all, and in place of a regular file only."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vsock.errors import CallError

__all__ = ("atomic_write",)

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


def _check(text: str) -> None:
    # pathlib drops a slash at the end, which says that a directory is meant
    if os.path.basename(text) in ("", ".", "..") or "\0" in text:
        raise _refused(text, "it is no name of a file")
    try:
        mode = os.lstat(text).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise _refused(text, f"it is {kind}, and only a regular file is ever replaced")


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def _refused(text: str, why: str) -> CallError:
    return CallError("invalid", f"cannot write {text!r}: {why}", step="write", object=text)
