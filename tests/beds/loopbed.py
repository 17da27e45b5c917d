"""Loop devices, attached and detached by ioctl, and files for them.

Uses nothing of the code under test.
"""

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

# linux/loop.h
LOOP_CLR_FD, LOOP_CONFIGURE, LOOP_CTL_GET_FREE = 0x4C01, 0x4C0A, 0x4C82
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR = 1, 4
_CONFIG_BYTES = 304
_FLAGS_OFFSET = 60  # of lo_info.lo_flags in struct loop_config


def sparse_file(path: Path, size_bytes: int) -> Path:
    """Make a file of zeros that takes no room; return its path."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def attach(
    image: Path, *, readonly: bool = True, block_size_bytes: int = 512, autoclear: bool = False
) -> tuple[str, int]:
    """Attach ``image``; return the path of the device and an open descriptor of it.

    With ``autoclear`` the device is detached when its last user closes it.
    """
    flags = (LO_FLAGS_READ_ONLY if readonly else 0) | (LO_FLAGS_AUTOCLEAR if autoclear else 0)
    with contextlib.ExitStack() as stack:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, control)
        backing = os.open(image, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
        stack.callback(os.close, backing)
        config = bytearray(_CONFIG_BYTES)
        struct.pack_into("<II", config, 0, backing, block_size_bytes)
        struct.pack_into("<I", config, _FLAGS_OFFSET, flags)
        while True:
            path = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, bytes(config))
            except OSError as problem:
                os.close(device)
                # somebody else took it between the two calls
                if problem.errno not in (errno.EBUSY, errno.EAGAIN):
                    raise
            else:
                return path, device


def detach(fd: int) -> None:
    """Detach the device that ``fd`` is open on, and close ``fd``; gone already is no error."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, LOOP_CLR_FD)
    os.close(fd)
