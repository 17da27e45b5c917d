"""The kernel's device events, read from its own netlink socket.

A reader of one message format is 100 lines; the netlink library that could do it costs a small
guest more memory (24 MiB) than the whole agent may take, so that this is our own.

Only the kernel is believed: messages from other senders (any process with the privilege may send)
are dropped. When the kernel could not queue all events, ``receive`` puts one ``Uevent`` with the
action ``lost`` in place: whoever waits for a state must then look at the state itself.
"""

import _socket
import ctypes
import errno
import struct
from collections.abc import Mapping

from vsock.owner import Owner
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
_KEEP, _DROP = 0xFFFFFFFF, 0


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


class UeventSocket(Owner):
    """A subscription; events count from its making on. Use as a context manager."""

    def __init__(self, *, is_about_disks: bool = False) -> None:
        """Subscribe; ``is_about_disks`` leaves out the coming and going of device-mapper's devices
        (not their changes), and of what is no device: a mount alone makes eight of these, each of
        which would wake the reader."""
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
        """Return the descriptor to wait on; it stays ours."""
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
    """Return a socket filter that drops ``add`` and ``remove`` of /devices/virtual/{bdi/,block/dm}
    and of what is not below /devices, and keeps the rest."""
    added, removed = _lifecycle_filter(len("add@")), _lifecycle_filter(len("remove@"))
    return b"".join((
        _INSTRUCTION.pack(_LOAD, 0, 0, 0),
        _INSTRUCTION.pack(_COMPARE, 2, 0, _word("add@")),
        _INSTRUCTION.pack(_COMPARE, 1 + len(added) // _INSTRUCTION.size, 0, _word("remo")),
        _INSTRUCTION.pack(_RETURN, 0, 0, _KEEP),
        added,
        removed,
    ))  # fmt: skip


def _lifecycle_filter(path_at: int) -> bytes:
    """Return the part for one action, whose path begins at byte ``path_at``."""
    below = path_at + len("/devices/virtual/")
    return b"".join((
        _INSTRUCTION.pack(_LOAD, 0, 0, path_at),
        _INSTRUCTION.pack(_COMPARE, 0, 8, _word("/dev")),
        _INSTRUCTION.pack(_LOAD, 0, 0, path_at + len("/devices")),
        _INSTRUCTION.pack(_COMPARE, 0, 5, _word("/vir")),
        _INSTRUCTION.pack(_LOAD, 0, 0, below),
        _INSTRUCTION.pack(_COMPARE, 4, 0, _word("bdi/")),
        _INSTRUCTION.pack(_COMPARE, 0, 2, _word("bloc")),
        _INSTRUCTION.pack(_LOAD, 0, 0, below + len("bloc")),
        _INSTRUCTION.pack(_COMPARE, 1, 0, _word("k/dm")),
        _INSTRUCTION.pack(_RETURN, 0, 0, _KEEP),
        _INSTRUCTION.pack(_RETURN, 0, 0, _DROP),
    ))  # fmt: skip


def _word(text: str) -> int:
    return int.from_bytes(text.encode("ascii"), "big")
