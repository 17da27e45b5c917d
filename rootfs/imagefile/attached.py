"""Whether an image is attached to a loop device, or mounted.

Changing such an image corrupts what is read from it, without an error. Neither a loop device nor a
mount takes a lock that ``imagelock`` would see.
"""

import contextlib
import errno
import fcntl
import os
import signal

from vsock.errors import CallError

__all__ = ("refuse_attached",)

_BLOCK_DEVICES = "/sys/block"
#: Only devices that have a size: of hundreds of loop devices, those that are attached.
_PARTITIONS = "/proc/partitions"
_MOUNTINFO = "/proc/self/mountinfo"


def refuse_attached(fd: int, path: str) -> None:
    """See that no block device and no mount of this machine is made of an open image.

    Raises:
        CallError: ``busy``, and by what.
    """
    if _is_open_elsewhere(fd):
        _refuse_loop_device(fd, path)
        _refuse_mount(fd, path)


def _is_open_elsewhere(fd: int) -> bool:
    """Say whether anything but ``fd`` may have the file open; False is certain.

    A write lease is granted only if no process, loop device or mount has the file open. It is given
    back at once. If the file is opened in between, the kernel sends SIGURG, which is ignored by
    default; SIGIO, which it would send otherwise, kills.

    Source: fcntl(2), F_SETLEASE; fs/locks.c, check_conflicting_open (Linux 6.1).
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:  # it is, or this file system has no leases, or the file is not ours
        return True
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _refuse_loop_device(fd: int, path: str) -> None:
    image = os.fstat(fd)
    for name in _attached_loop_devices():
        with contextlib.suppress(OSError):  # detached meanwhile, or its file is out of our sight
            with open(f"{_BLOCK_DEVICES}/{name}/loop/backing_file", "rb") as attribute:
                backing = os.stat(attribute.read().rstrip(b"\n"))
            if os.path.samestat(backing, image):
                raise _busy(path, f"it is attached to /dev/{name}", errno.EBUSY)


def _attached_loop_devices() -> list[str]:
    with open(_PARTITIONS) as partitions:
        names = [name for name in partitions.read().split() if name.startswith("loop")]
    return [name for name in names if name.removeprefix("loop").isdigit()]


def _refuse_mount(fd: int, path: str) -> None:
    source = _escaped(os.readlink(f"/proc/self/fd/{fd}"))
    with open(_MOUNTINFO, "rb") as mounts:
        content = mounts.read()
    if source not in content:
        return
    for line in content.splitlines():
        fields, _, rest = line.partition(b" - ")
        if rest.split(b" ")[1:2] == [source]:
            target = os.fsdecode(fields.split(b" ")[4])
            raise _busy(path, f"it is mounted on {target!r}", errno.EBUSY)


def _escaped(path: str) -> bytes:
    """Return a path as mountinfo has it: white space and backslashes in octal."""
    source = os.fsencode(path)
    for special in (b"\\", b" ", b"\t", b"\n"):
        source = source.replace(special, b"\\%03o" % special[0])
    return source


def _busy(path: str, reason: str, number: int) -> CallError:
    return CallError(
        "busy", f"cannot change {path!r}: {reason}", errno=number, step="lock image", object=path
    )
