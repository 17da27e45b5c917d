"""Advisory locks on images, which are never waited for.

These tools take ``flock(2)``: a shared lock to attach an image to a machine, an exclusive lock to
change it. QEMU takes OFD locks on the disks that it opens; a change is refused while there is one.
"""

import fcntl
import os
import stat
import struct
from pathlib import Path

from rootfs.imagefile.errors import OsErrors
from vsock.errors import CallError

__all__ = ("open_locked",)

#: struct flock of include/uapi/asm-generic/fcntl.h on 64-bit: type, whence, start, length, pid.
_FLOCK = struct.Struct("hh4xqqi4x")


def open_locked(path: Path, *, writable: bool) -> int:
    """Open a raw image and lock it: exclusively to write, shared to read. The caller owns the fd.

    Raises:
        CallError: ``busy``, another holds it; ``invalid``, no regular file; by errno.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    with OsErrors("open the image", path):
        fd = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CallError(
                "invalid",
                f"cannot open the image {str(path)!r}: not a regular file",
                step="open the image",
                object=str(path),
            )
        _lock(fd, path, writable)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, path: Path, exclusive: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as problem:
        raise _busy(path, "another process holds it", problem.errno) from problem
    if not exclusive:
        return
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    if kind != fcntl.F_UNLCK:
        raise _busy(path, "a virtual machine has it open", None)


def _busy(path: Path, why: str, number: int | None) -> CallError:
    return CallError(
        "busy",
        f"cannot lock the image {str(path)!r}: {why}",
        errno=number,
        step="lock the image",
        object=str(path),
    )
