"""The kernel's device events, read from its own netlink socket.

A reader of one message format is 100 lines; the netlink library that could do it costs a small
guest more memory (24 MiB) than the whole agent may take, so that this is our own.

Only the kernel is believed: messages from other senders (any process with the privilege may send)
are dropped. When the kernel could not queue all events, ``receive`` puts one ``Uevent`` with the
action ``lost`` in place: a reader that waits for a state must then look at the state itself.
"""

import _socket
import ctypes
import errno
import struct
from collections.abc import Mapping

from vsock.closeable import Closeable
from vsock.record import Record

__all__ = ("LOST", "Uevent", "UeventSocket", "parse")

#: The action of the marker that stands for events the kernel dropped.
LOST = "lost"

_NETLINK_KOBJECT_UEVENT = 15  # include/uapi/linux/netlink.h
_KERNEL_GROUP = 1  # group 2 carries what udev has processed
_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h
_QUEUE_BYTES = 4 * 1024 * 1024
_MESSAGE_MAX_BYTES = 8 * 1024  # the kernel's UEVENT_BUFFER_SIZE is 2048
_SO_ATTACH_FILTER = 26
#: include/uapi/linux/filter.h: struct sock_filter (code, jump if true, if false, k); load a
#: big-endian word of the message, compare it, end. A message is kept whole or not at all.
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _COMPARE, _RETURN = 0x20, 0x15, 0x06
_KEPT, _DROPPED = (_INSTRUCTION.pack(_RETURN, 0, 0, length) for length in (0xFFFFFFFF, 0))
#: Of a minor number, which has 20 bits.
_DM_DIGITS = 7


class Uevent(Record):
    """One event: ``action`` is add, remove, change, move, bind, ... or ``lost``.

    ``devpath`` is below /sys. ``fields`` holds every KEY=VALUE of the message (DEVNAME, MAJOR...).
    """

    action: str
    devpath: str = ""
    subsystem: str = ""
    fields: Mapping[str, str] = {}


def parse(message: bytes) -> Uevent | None:
    """Parse ``ACTION@DEVPATH`` and its NUL-parted fields; None if it is not such a message."""
    head, *parts = message.decode("utf-8", "surrogateescape").split("\0")
    action, at, devpath = head.partition("@")
    if not at or not action or not devpath.startswith("/"):
        return None
    fields = dict(part.split("=", 1) for part in parts if "=" in part)
    return Uevent(
        action=action, devpath=devpath, subsystem=fields.get("SUBSYSTEM", ""), fields=fields
    )


class UeventSocket(Closeable):
    """A subscription; events count from its making on. Use as a context manager."""

    def __init__(self, *, is_about_disks: bool = False) -> None:
        """Subscribe; ``is_about_disks`` leaves out what a mount and an unmount make: the coming and
        going of dm devices and of what is no device, and that a dm device has a table. A dozen for
        each layer, each of which would wake the reader."""
        kind = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        self._socket = _socket.socket(_socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
        try:
            self._grow_queue()
            if is_about_disks:
                attach_disk_filter(self._socket)
            self._socket.bind((0, _KERNEL_GROUP))
        except OSError:
            self._socket.close()
            raise

    def _grow_queue(self) -> None:
        try:
            self._socket.setsockopt(_socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE_BYTES)
        except PermissionError:  # without CAP_NET_ADMIN the default size has to do
            self._socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVBUF, _QUEUE_BYTES)

    def fileno(self) -> int:
        """Return the descriptor to wait on; the caller must not close it."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the subscription. Idempotent."""
        self._socket.close()

    def receive(self) -> list[Uevent]:
        """Return the events queued now, oldest first; does not wait."""
        events: list[Uevent] = []
        while True:
            try:
                message, (port, _) = self._socket.recvfrom(_MESSAGE_MAX_BYTES)
            except BlockingIOError:
                return events
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                events.append(Uevent(action=LOST))
                continue
            event = parse(message) if port == 0 else None
            if event is not None:
                events.append(event)


def attach_disk_filter(socket: _socket.socket) -> None:
    """Have the kernel leave out what is not about disks; see ``UeventSocket``."""
    program = _disk_filter()
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog; the kernel copies what it points to
    fprog = struct.pack("@HP", len(program) // _INSTRUCTION.size, ctypes.addressof(code))
    socket.setsockopt(_socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)


def _disk_filter() -> bytes:
    """Return a socket filter that drops ``add`` and ``remove`` of what is not below /devices, of
    /devices/virtual/bdi/ and of dm devices, and the two kinds of ``change`` that each load of a dm
    table makes. Whatever else there is, or comes to be, is kept."""
    added, removed = _path_filter(len("add@"), _DROPPED), _path_filter(len("remove@"), _DROPPED)
    changed = _path_filter(len("change@"), _plain_change_filter())
    count = _INSTRUCTION.size
    return b"".join((
        _INSTRUCTION.pack(_LOAD, 0, 0, 0),
        _INSTRUCTION.pack(_COMPARE, 3, 0, _word("add@")),
        _INSTRUCTION.pack(_COMPARE, 2 + len(added) // count, 0, _word("remo")),
        _INSTRUCTION.pack(_COMPARE, 1 + (len(added) + len(removed)) // count, 0, _word("chan")),
        _KEPT,
        added,
        removed,
        changed,
    ))  # fmt: skip


def _path_filter(path_at: int, of_dm: bytes) -> bytes:
    """Return the part for one action, whose path begins at byte ``path_at``; it goes on with
    ``of_dm`` for dm devices."""
    below = path_at + len("/devices/virtual/")
    return b"".join((
        _INSTRUCTION.pack(_LOAD, 0, 0, path_at),
        _INSTRUCTION.pack(_COMPARE, 0, 7, _word("/dev")),
        _INSTRUCTION.pack(_LOAD, 0, 0, path_at + len("/devices")),
        _INSTRUCTION.pack(_COMPARE, 0, 6, _word("/vir")),
        _INSTRUCTION.pack(_LOAD, 0, 0, below),
        _INSTRUCTION.pack(_COMPARE, 3, 0, _word("bdi/")),
        _INSTRUCTION.pack(_COMPARE, 0, 3, _word("bloc")),
        _INSTRUCTION.pack(_LOAD, 0, 0, below + len("bloc")),
        _INSTRUCTION.pack(_COMPARE, 2, 1, _word("k/dm")),
        _DROPPED,
        _KEPT,
        of_dm,
    ))  # fmt: skip


def _plain_change_filter() -> bytes:
    """Return the part for a change of a dm device: dropped if it says no more than that.

    What an event is about stands behind ``SUBSYSTEM=block``: nothing, so that ``MAJOR=`` comes
    next, RESIZE=1, or DM_VERITY_ERR_BLOCK_NR. Where that is depends on the digits of the device.
    """
    program = b""
    for digits in range(_DM_DIGITS, 0, -1):
        path = "/devices/virtual/block/dm-" + digits * "0"
        at = len(f"change@{path} ACTION=change DEVPATH={path} SUBSYSTEM=block ")
        end = 3 * digits - 1  # instructions from the comparison that follows to the last but one
        program += _INSTRUCTION.pack(_LOAD, 0, 0, at)
        program += _INSTRUCTION.pack(_COMPARE, end, 0, _word("MAJO"))
        program += _INSTRUCTION.pack(_COMPARE, end - 1, 0, _word("RESI"))
    return program + _KEPT + _DROPPED


def _word(text: str) -> int:
    return int.from_bytes(text.encode("ascii"), "big")
