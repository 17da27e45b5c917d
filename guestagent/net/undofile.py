"""What a request for the network may change, as it was, in a file of the state directory.

The file is empty when nothing is unfinished. Its lock makes one child of any agent change the
network at a time, one that has outlived its agent, too.
"""

import errno
import fcntl
import os
import struct

import msgpack

from vsock.closeable import FdOwner
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record, wire_fields
from vsock.retry import has_errno, retry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    Kind = TypeVar("Kind", bound=Record)

__all__ = ("UndoFile", "is_unfinished", "undo_path")

_LENGTH = struct.Struct("<Q")
_MAX_BYTES = 16 << 20


def undo_path(state_directory: str) -> str:
    return f"{state_directory}/network"


def is_unfinished(state_directory: str) -> bool:
    """Say whether a request for the network was cut short."""
    try:
        return os.stat(undo_path(state_directory)).st_size > 0
    except FileNotFoundError:
        return False


class UndoFile(FdOwner):
    """Owns a descriptor of the file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def lock(self, deadline: Deadline) -> None:
        """Wait until no other child changes the network.

        Raises:
            CallError: ``timeout`` or ``cancelled``.
            BlockingIOError: another one still does when the time is over.
        """

        def attempt() -> None:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

        retry(attempt, deadline, when=has_errno(errno.EWOULDBLOCK), step="lock the network")

    def read(self, kind: "type[Kind]") -> "Kind | None":
        """Return what was written; None when that was struck out, or never was whole.

        Raises:
            CallError: it is damaged.
        """
        raw = os.pread(self._fd, _MAX_BYTES, 0)
        length = _LENGTH.unpack_from(raw)[0] if len(raw) >= _LENGTH.size else 0
        if not length:
            return None
        try:
            value = msgpack.unpackb(raw[_LENGTH.size : _LENGTH.size + length])
        except (ValueError, msgpack.UnpackException) as error:
            text = f"what is written down of the network cannot be read: {error}"
            raise CallError("internal", text, step="restore", object="network") from None
        return kind.from_wire(value, "network")

    def write(self, record: Record) -> None:
        """Write down what is to be restored; from the last write on it counts.

        Raises:
            OSError: there is no room.
        """
        packed = msgpack.packb(record, default=wire_fields)
        if len(packed) > _MAX_BYTES - _LENGTH.size:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        os.ftruncate(self._fd, 0)
        if os.pwrite(self._fd, packed, _LENGTH.size) != len(packed):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.pwrite(self._fd, _LENGTH.pack(len(packed)), 0)

    def clear(self) -> None:
        """Strike it out: there is nothing to restore."""
        os.ftruncate(self._fd, 0)
