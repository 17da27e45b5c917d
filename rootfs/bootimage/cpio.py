"""Writing cpio archives of the "newc" kind, which is what the kernel unpacks as an initramfs.

The same entries give the same bytes: sorted by path, times 0, owner root, inode numbers counted
from 1. Content is streamed; an archive is never held in memory as a whole.

Source: Documentation/driver-api/early-userspace/buffer-format.rst (Linux 6.1).
"""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = ("CpioEntry", "device", "directory", "regular", "symlink", "with_parents", "write_cpio")

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_ALIGN_BYTES = 4
_MAX_FIELD = 0xFFFFFFFF
_MAX_NAME_BYTES = 4096  # PATH_MAX, with the final NUL: the kernel skips longer names silently
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CpioEntry:
    """One member: ``path`` relative to the root, ``mode`` with the type bits of stat(2).

    ``content`` is the bytes of a file or the target of a symbolic link, or the path of a file to
    copy them from. ``rdev`` is (major, minor) of a device node.
    """

    path: str
    mode: int
    content: bytes | Path = b""
    rdev: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if self.path != "." and any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{self.path!r} is no plain path relative to the root")
        if "\0" in self.path or len(os.fsencode(self.path)) >= _MAX_NAME_BYTES:
            raise ValueError(f"{self.path[:80]!r}: NUL, or {_MAX_NAME_BYTES} bytes or more")
        if self.path == _TRAILER:
            raise ValueError(f"{_TRAILER!r} would end the archive")
        if not stat.S_IFMT(self.mode):
            raise ValueError(f"{self.path!r}: the mode {self.mode:#o} has no file type")
        if self.content and not (stat.S_ISREG(self.mode) or stat.S_ISLNK(self.mode)):
            raise ValueError(f"{self.path!r}: only files and symbolic links have content")

    @property
    def size_bytes(self) -> int:
        if isinstance(self.content, Path):
            return self.content.stat().st_size
        return len(self.content)


def directory(path: str, permissions: int = 0o755) -> CpioEntry:
    return CpioEntry(path=path, mode=stat.S_IFDIR | permissions)


def regular(path: str, content: bytes | Path, permissions: int = 0o644) -> CpioEntry:
    return CpioEntry(path=path, mode=stat.S_IFREG | permissions, content=content)


def symlink(path: str, target: str) -> CpioEntry:
    return CpioEntry(path=path, mode=stat.S_IFLNK | 0o777, content=os.fsencode(target))


def device(path: str, kind: int, major: int, minor: int, permissions: int = 0o600) -> CpioEntry:
    """``kind`` is stat.S_IFCHR or stat.S_IFBLK."""
    return CpioEntry(path=path, mode=kind | permissions, rdev=(major, minor))


def with_parents(entries: Iterable[CpioEntry]) -> list[CpioEntry]:
    """Return the entries sorted, with a directory for every parent that is missing.

    Raises:
        ValueError: a path is there twice, or something that is no directory has children.
    """
    by_path: dict[str, CpioEntry] = {}
    for entry in entries:
        if entry.path in by_path:
            raise ValueError(f"{entry.path!r} is there twice")
        by_path[entry.path] = entry
    for path in list(by_path):
        for parent in _parents(path):
            if not stat.S_ISDIR(by_path.setdefault(parent, directory(parent)).mode):
                raise ValueError(f"{path!r} lies below {parent!r}, which is no directory")
    return sorted(by_path.values(), key=_order)


def write_cpio(file: BinaryIO, entries: Iterable[CpioEntry]) -> int:
    """Write the entries as one archive; return its size in bytes.

    Parents that are missing are made. The size is a multiple of 4, as the kernel wants it of
    archives that follow each other; there is no padding to 512.

    Raises:
        ValueError: the entries contradict each other, or a file is larger than 4 GiB - 1.
        OSError: a file cannot be read, or changed its size while it was read.
    """
    written = 0
    for number, entry in enumerate(with_parents(entries), 1):
        written += _write_entry(file, entry, number)
    return written + _write_header(file, _TRAILER, 0, 0, 1, 0, (0, 0))


def _order(entry: CpioEntry) -> list[str]:
    # by components: a directory's own children come before a sibling such as "a-b" of "a"
    return entry.path.split("/")


def _parents(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _write_entry(file: BinaryIO, entry: CpioEntry, number: int) -> int:
    size = entry.size_bytes
    if size > _MAX_FIELD:
        raise ValueError(f"{entry.path!r} is too large for the format: {size} bytes")
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    written = _write_header(file, entry.path, number, entry.mode, links, size, entry.rdev)
    if isinstance(entry.content, Path):
        _copy(entry.content, file, size)
    else:
        file.write(entry.content)
    return written + size + _pad(file, size)


def _write_header(
    file: BinaryIO,
    path: str,
    number: int,
    mode: int,
    links: int,
    size: int,
    rdev: tuple[int, int],
) -> int:
    name = os.fsencode(path) + b"\0"
    fields = (number, mode, 0, 0, links, 0, size, 0, 0, *rdev, len(name), 0)
    header = _MAGIC + b"".join(b"%08x" % field for field in fields) + name
    file.write(header)
    return len(header) + _pad(file, len(header))


def _pad(file: BinaryIO, size: int) -> int:
    padding = -size % _ALIGN_BYTES
    file.write(b"\0" * padding)
    return padding


def _copy(source: Path, file: BinaryIO, size_bytes: int) -> None:
    left = size_bytes
    with open(source, "rb") as content:
        while left:
            data = content.read(min(left, _COPY_BYTES))
            if not data:
                raise OSError(f"{str(source)!r} shrank while it was read: {left} bytes missing")
            file.write(data)
            left -= len(data)
