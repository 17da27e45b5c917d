"""Whether an image is in use: locked, attached to a loop device, or mounted.

Changing a mounted image corrupts what reads it, and no error says so. The lock keeps two tools
apart; loop devices and file-backed mounts take no lock and are looked for.
"""

import contextlib
import errno
import fcntl
import os

from vsock.errors import CallError

__all__ = ("hold",)

_BLOCK_DEVICES = "/sys/block"
_MOUNTINFO = "/proc/self/mountinfo"


def hold(fd: int, path: str, *, exclusive: bool) -> None:
    """Lock an open image until ``fd`` is closed: for writing (``exclusive``), or for reading.

    Readers do not mind mounts; a writer is refused what anything else uses.

    Raises:
        CallError: ``busy``, and by what.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno != errno.EWOULDBLOCK:
            return  # a file system without locks
        raise _busy(path, "another process has locked it", problem.errno) from None
    if exclusive:
        _refuse_loop_device(fd, path)
        _refuse_mount(path)


def _refuse_loop_device(fd: int, path: str) -> None:
    image = os.fstat(fd)
    with contextlib.suppress(FileNotFoundError):  # no sysfs here, so no loop devices either
        for name in os.listdir(_BLOCK_DEVICES):
            if not name.startswith("loop"):
                continue
            with contextlib.suppress(OSError):  # not attached, or its file is out of our sight
                with open(f"{_BLOCK_DEVICES}/{name}/loop/backing_file", "rb") as attribute:
                    backing = os.stat(attribute.read().rstrip(b"\n"))
                if os.path.samestat(backing, image):
                    raise _busy(path, f"it is attached to /dev/{name}", errno.EBUSY)


def _refuse_mount(path: str) -> None:
    # mountinfo escapes white space and backslashes in octal
    source = os.fsencode(os.path.realpath(path))
    for special in (b"\\", b" ", b"\t", b"\n"):
        source = source.replace(special, b"\\%03o" % special[0])
    with open(_MOUNTINFO, "rb") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(b" - ")
            if rest.split(b" ")[1:2] == [source]:
                target = os.fsdecode(fields.split(b" ")[4])
                raise _busy(path, f"it is mounted on {target!r}", errno.EBUSY)


def _busy(path: str, reason: str, number: int) -> CallError:
    return CallError(
        "busy", f"cannot change {path!r}: {reason}", errno=number, step="lock image", object=path
    )
