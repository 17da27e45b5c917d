"""Connections as numbers and states: no socket, no ring, no clock. All of it is pure.

Source: VIRTIO 1.2, section 5.10.6.3 (buffer space management) and 5.10.6.5 (stream sockets).
"""

from collections.abc import Iterator
from enum import Enum, auto
from typing import Generic, TypeVar

from vsock.device.packet import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_SHUTDOWN,
    Header,
)

__all__ = ("Connection", "ConnectionTable", "State", "Window")

_U32 = 0xFFFFFFFF
#: Host ports that the device assigns start here, well above what services use.
_FIRST_HOST_PORT = 1 << 30


class Window:
    """Credit in both directions. Counters are free-running and wrap at 32 bits, as on the wire."""

    __slots__ = (
        "_forwarded",
        "_guest_buffer",
        "_guest_forwarded",
        "_received",
        "_reported",
        "_sent",
        "buffer_bytes",
    )

    def __init__(self, buffer_bytes: int) -> None:
        """``buffer_bytes`` is what the device is ready to hold for a slow host peer."""
        self.buffer_bytes = buffer_bytes
        self._received = self._forwarded = self._reported = 0
        self._sent = self._guest_buffer = self._guest_forwarded = 0

    def learn(self, header: Header) -> None:
        """Take the guest's side of the credit from any packet of this connection."""
        self._guest_buffer = header.buf_alloc
        self._guest_forwarded = header.fwd_cnt

    def sendable(self) -> int:
        """Return how many bytes the guest has room for; 0 also when its numbers make no sense."""
        return max(0, self._guest_buffer - ((self._sent - self._guest_forwarded) & _U32))

    def send(self, length: int) -> None:
        self._sent = (self._sent + length) & _U32

    def receive(self, length: int) -> bool:
        """Account for bytes of the guest; False when it sent more than it had credit for."""
        if ((self._received - self._forwarded) & _U32) + length > self.buffer_bytes:
            return False
        self._received = (self._received + length) & _U32
        return True

    def forward(self, length: int) -> None:
        """Account for bytes that left our buffer."""
        self._forwarded = (self._forwarded + length) & _U32

    def update_due(self) -> bool:
        """Say whether the guest should be told of room that it does not know of.

        A quarter of the buffer at a time: a guest that waits for room has used all of it, so that
        the update comes well before it could wait in vain.
        """
        return ((self._forwarded - self._reported) & _U32) * 4 >= self.buffer_bytes

    def report(self) -> int:
        """Return the count that the next packet carries, and remember that the guest knows it."""
        self._reported = self._forwarded
        return self._forwarded


class State(Enum):
    """REQUESTED waits for the guest's answer, DIALLING for the host's listener."""

    REQUESTED = auto()
    DIALLING = auto()
    ESTABLISHED = auto()
    CLOSING = auto()
    CLOSED = auto()


class Connection:
    """One stream between a host port and a guest port, and what is to be said about it.

    ``shutdown`` holds the directions that we ended, ``guest_shutdown`` those that the guest ended.
    """

    __slots__ = (
        "_unsaid",
        "guest_port",
        "guest_shutdown",
        "host_port",
        "request_sent",
        "shutdown",
        "stalled",
        "state",
        "window",
    )

    def __init__(self, *, host_port: int, guest_port: int, state: State, buffer_bytes: int) -> None:
        self.host_port = host_port
        self.guest_port = guest_port
        self.state = state
        self.window = Window(buffer_bytes)
        self.shutdown = 0
        self.guest_shutdown = 0
        self.request_sent = False
        #: True from the time when we found no credit until the guest gives some.
        self.stalled = False
        self._unsaid: set[int] = set()

    @property
    def key(self) -> tuple[int, int]:
        return self.host_port, self.guest_port

    def say(self, op: int) -> None:
        """Have ``op`` sent to the guest; a second time before it is sent changes nothing."""
        self._unsaid.add(op)

    @property
    def has_unsaid(self) -> bool:
        return bool(self._unsaid)

    def next_unsaid(self) -> int:
        """Take the next control operation to send: what opens, then credit, then what closes."""
        for op in _SAYING_ORDER:
            if op in self._unsaid:
                self._unsaid.remove(op)
                if op == OP_REQUEST:
                    self.request_sent = True
                return op
        raise LookupError("nothing to say")

    def said_credit(self) -> None:
        """A packet with our credit goes out: an update of its own is not needed any more."""
        self._unsaid.discard(OP_CREDIT_UPDATE)

    def learn(self, header: Header) -> bool:
        """Take the guest's credit; True when that ends a stall."""
        self.window.learn(header)
        if self.stalled and self.window.sendable():
            self.stalled = False
            return True
        return False

    def header(self, op: int, *, cid: int, host_cid: int, length: int = 0) -> Header:
        """Return the header of the next packet to the guest, with our credit in it."""
        self.said_credit()
        return Header(
            src_cid=host_cid,
            dst_cid=cid,
            src_port=self.host_port,
            dst_port=self.guest_port,
            length=length,
            op=op,
            flags=self.shutdown if op == OP_SHUTDOWN else 0,
            buf_alloc=self.window.buffer_bytes,
            fwd_cnt=self.window.report(),
        )


_SAYING_ORDER = (OP_REQUEST, OP_RESPONSE, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_SHUTDOWN)

C = TypeVar("C", bound=Connection)


class ConnectionTable(Generic[C]):
    """The live connections by (host port, guest port), and the choice of host ports."""

    def __init__(self) -> None:
        self._connections: dict[tuple[int, int], C] = {}
        self._next_port = _FIRST_HOST_PORT

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[C]:
        return iter(tuple(self._connections.values()))

    def get(self, host_port: int, guest_port: int) -> C | None:
        return self._connections.get((host_port, guest_port))

    def add(self, connection: C) -> None:
        assert connection.key not in self._connections
        self._connections[connection.key] = connection

    def remove(self, connection: C) -> None:
        del self._connections[connection.key]

    def choose_host_port(self, guest_port: int) -> int:
        """Return a host port that is not in use with ``guest_port``."""
        while True:
            port = self._next_port
            self._next_port = port + 1 if port < _U32 - 1 else _FIRST_HOST_PORT
            if (port, guest_port) not in self._connections:
                return port
