"""Byte ranges of image files: which are in use, which hold data, copying and freeing one.

Where the next layer goes in an image is pure arithmetic: first fit over the ranges in use. A sparse
file is copied without writing its zeros.
"""

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = (
    "FileRange",
    "copy_range",
    "data_extents",
    "first_fit",
    "free_ranges",
    "overlapping",
    "punch_hole",
    "round_up",
)

_CHUNK_BYTES = 4 << 20
#: include/uapi/linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class FileRange:
    """Bytes of a file, ``offset_bytes`` up to, but not with, ``end_bytes``; not empty. Unlike the
    ``ByteRange`` of a request it need not be whole sectors."""

    offset_bytes: int
    size_bytes: int

    def __post_init__(self) -> None:
        if self.offset_bytes < 0 or self.size_bytes <= 0:
            raise ValueError(f"no range: {self.size_bytes} bytes at {self.offset_bytes}")

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.size_bytes


def round_up(value: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is not below ``value``."""
    return -(-value // step) * step


def free_ranges(used: Iterable[FileRange], total_bytes: int) -> list[FileRange]:
    """Return the maximal unused ranges below ``total_bytes``, in ascending order.

    ``used`` may come in any order and may overlap.
    """
    free = []
    end = 0
    for taken in sorted(used):
        gap_end = min(taken.offset_bytes, total_bytes)
        if gap_end > end:
            free.append(FileRange(offset_bytes=end, size_bytes=gap_end - end))
        end = max(end, taken.end_bytes)
    if end < total_bytes:
        free.append(FileRange(offset_bytes=end, size_bytes=total_bytes - end))
    return free


def first_fit(used: Iterable[FileRange], size_bytes: int, alignment_bytes: int) -> int:
    """Return the lowest aligned offset with ``size_bytes`` unused; there is no upper bound."""
    offset = 0
    for taken in sorted(used):
        if offset + size_bytes <= taken.offset_bytes:
            return offset
        offset = max(offset, round_up(taken.end_bytes, alignment_bytes))
    return offset


def overlapping(ranges: Iterable[FileRange]) -> list[tuple[FileRange, FileRange]]:
    """Return the pairs of neighbours, by offset, that share bytes."""
    pairs = []
    widest: FileRange | None = None
    for current in sorted(ranges):
        if widest is not None and current.offset_bytes < widest.end_bytes:
            pairs.append((widest, current))
        if widest is None or current.end_bytes > widest.end_bytes:
            widest = current
    return pairs


def data_extents(fd: int, size_bytes: int) -> Iterator[FileRange]:
    """Yield the ranges below ``size_bytes`` that may hold something else than zeros, ascending.

    A file system that knows no holes reports one range.
    """
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as problem:
            if problem.errno == errno.ENXIO:
                return
            raise
        if start >= size_bytes:
            return
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size_bytes)
        if at <= start:
            return
        yield FileRange(offset_bytes=start, size_bytes=at - start)


def copy_range(source: int, extent: FileRange, target: int, offset_bytes: int) -> Iterator[int]:
    """Copy ``extent`` of ``source`` to ``offset_bytes`` of ``target``; yield each count of bytes.

    In the kernel where it can (shared extents on file systems that have them), else by hand.

    Raises:
        OSError: as the system calls; EIO when ``source`` ends before the extent does.
    """
    at, left, in_kernel = extent.offset_bytes, extent.size_bytes, True
    while left:
        size = min(left, _CHUNK_BYTES)
        if in_kernel:
            try:
                count = os.copy_file_range(source, target, size, at, offset_bytes)
            except OSError as problem:
                if problem.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                in_kernel = False
                continue
        else:
            count = os.pwrite(target, os.pread(source, size, at), offset_bytes)
        if not count:
            raise OSError(errno.EIO, f"the source ends at {at}")
        at, offset_bytes, left = at + count, offset_bytes + count, left - count
        yield count


def punch_hole(fd: int, extent: FileRange) -> None:
    """Make the range read as zeros, and give its blocks back where the file system can.

    Raises:
        OSError: as fallocate(2) or write(2).
    """
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    if _libc.fallocate(fd, mode, extent.offset_bytes, extent.size_bytes) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(number, os.strerror(number))
    end = min(extent.end_bytes, os.fstat(fd).st_size)
    for at in range(extent.offset_bytes, end, _CHUNK_BYTES):
        os.pwrite(fd, bytes(min(_CHUNK_BYTES, end - at)), at)
