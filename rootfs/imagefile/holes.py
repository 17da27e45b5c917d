"""Sparse files: where they have data, freeing a range, copying without writing zeros."""

import ctypes
import errno
import os
from collections.abc import Iterator

from rootfs.imagefile.ranges import FileRange

__all__ = ("copy_range", "data_extents", "punch_hole")

_CHUNK_BYTES = 4 << 20
#: include/uapi/linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


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
