"""The kernel's device events, read from its own netlink socket.

A reader of one message format is 100 lines; the netlink library that could do it costs a small
guest more memory (24 MiB) than the whole agent may take, so that this is our own.

Only the kernel is believed: messages from other senders (any process with the privilege may send)
are dropped. When the kernel could not queue all events, ``receive`` puts one ``Uevent`` with the
action ``lost`` in place: whoever waits for a state must then look at the state itself.
"""

import _socket
import errno
import os
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
    parts = message.split(b"\0")
    action, at, devpath = os.fsdecode(parts[0]).partition("@")
    if not at or not action or not devpath.startswith("/"):
        return None
    fields: dict[str, str] = {}
    for part in parts[1:]:
        key, equals, value = os.fsdecode(part).partition("=")
        if equals:
            fields[key] = value
    return Uevent(
        action=action, devpath=devpath, subsystem=fields.get("SUBSYSTEM", ""), fields=fields
    )


class UeventSocket(Owner):
    """A subscription; events count from its making on. Use as a context manager."""

    def __init__(self) -> None:
        kind = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        self._socket = _socket.socket(_socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
        try:
            self._grow_queue()
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
