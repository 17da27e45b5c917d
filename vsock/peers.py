"""The connections of a server: served as far as each allows, and ended when their time has come."""

import select
import time
from collections import deque
from collections.abc import Callable

from vsock.connection import Connection
from vsock.rpc import Limits, Message
from vsock.stream import Stream

__all__ = ("Peers",)

_READ_BYTES = 64 * 1024
#: A peer that takes nothing for this long is cut off.
_STALL_SECONDS = 30.0


class Peers:
    """Connections registered with an epoll set that belongs to the caller.

    All of it is for the thread of the server, but for ``attend`` and ``all``.
    """

    def __init__(
        self,
        epoll: select.epoll,
        limits: Limits,
        *,
        max_in_flight: int,
        hello_seconds: float | None,
        take: Callable[[Connection, Message], None],
        wake: Callable[[], object],
        report: Callable[[str], None],
    ) -> None:
        """``take`` gets each message; ``wake`` has the thread call ``settle_attended``."""
        self._epoll = epoll
        self._limits = limits
        self._max_in_flight = max_in_flight
        self._hello_seconds = hello_seconds
        self._take = take
        self._wake = wake
        self._report = report
        self._connections: dict[int, Connection] = {}
        self._events: dict[int, int] = {}
        self._attention: deque[Connection] = deque()
        #: Monotonic time at which ``look_around`` is due, None for never.
        self.look_at: float | None = None

    def __len__(self) -> int:
        return len(self._connections)

    def all(self) -> list[Connection]:
        """Return those that are there now. From any thread."""
        return list(self._connections.values())

    def find(self, fd: int) -> Connection | None:
        """Return the connection with descriptor ``fd``, None if there is none."""
        return self._connections.get(fd)

    @property
    def idle(self) -> bool:
        """True when nothing is owed to any of them."""
        return all(connection.idle for connection in self._connections.values())

    def add(
        self, stream: Stream, *, must_introduce: bool, on_close: Callable[[], None] | None = None
    ) -> None:
        """Take over ``stream``. ``must_introduce``: it ends if no hello comes in time."""
        stream.setblocking(False)
        connection = Connection(
            stream,
            self._limits,
            max_in_flight=self._max_in_flight,
            must_introduce=must_introduce and self._hello_seconds is not None,
            attend=self.attend,
        )
        self._connections[stream.fileno()] = connection
        if on_close is not None:
            connection.on_close(on_close)
        if connection.must_introduce and self._hello_seconds is not None:
            self._look_by(connection.heard_at + self._hello_seconds)
        self._settle(connection)

    def serve(self, connection: Connection, events: int) -> None:
        """Write, read and take messages, as ``events`` and the connection allow."""
        broken = events & (select.EPOLLHUP | select.EPOLLERR)
        try:
            if connection.outbox.pending_bytes and (broken or events & select.EPOLLOUT):
                connection.outbox.flush()
            if connection.wants_input and (broken or events & select.EPOLLIN):
                self._read(connection)
            self._take_messages(connection)
        except BlockingIOError:
            pass
        except OSError as error:
            self._drop(connection, str(error))
            return
        self._settle(connection)

    def attend(self, connection: Connection) -> None:
        """Have the thread of the server look at ``connection``. From any thread."""
        self._attention.append(connection)
        self._wake()

    def settle_attended(self) -> None:
        """Look at those that ``attend`` was called for."""
        while self._attention:
            self._settle(self._attention.popleft())

    def look_around(self) -> None:
        """See to what time alone brings about, if it is due."""
        now = time.monotonic()
        if self.look_at is None or now < self.look_at:
            return
        self.look_at = None
        for connection in self.all():
            self._look_at_connection(connection, now)

    def close(self) -> None:
        """End every connection."""
        for connection in self.all():
            self._drop(connection, "the server ends")

    def _read(self, connection: Connection) -> None:
        data = connection.stream.recv(_READ_BYTES)
        if not data:
            connection.end_of_input()
            return
        messages = connection.decoder.feed(data)
        if messages:
            connection.heard_at = time.monotonic()
            connection.messages.extend(messages)

    def _take_messages(self, connection: Connection) -> None:
        # one read may ask for more than the peer can take: the rest waits until it has
        while connection.messages and not connection.must_read:
            self._take(connection, connection.messages.popleft())

    def _settle(self, connection: Connection) -> None:
        """End the connection if its time has come, else wait for what it waits for."""
        if connection.closed:
            return
        if connection.doom is not None:
            self._drop(connection, connection.doom)
            return
        if connection.read_ended and connection.idle:
            self._drop(connection, "the peer ended it")
            return
        pending_bytes = connection.outbox.pending_bytes
        wanted = select.EPOLLOUT if pending_bytes else 0
        if connection.wants_input:
            wanted |= select.EPOLLIN
        if pending_bytes:
            self._look_by(connection.outbox.progress_at + _STALL_SECONDS)
        self._watch(connection.stream.fileno(), wanted)

    def _watch(self, fd: int, wanted: int) -> None:
        # with nothing wanted it is taken out: epoll reports a hang-up to whoever asks or not
        before = self._events.get(fd, 0)
        if wanted == before:
            return
        if not before:
            self._epoll.register(fd, wanted)
        elif wanted:
            self._epoll.modify(fd, wanted)
        else:
            self._epoll.unregister(fd)
        self._events[fd] = wanted

    def _drop(self, connection: Connection, why: str) -> None:
        fd = connection.stream.fileno()
        self._watch(fd, 0)
        self._events.pop(fd, None)
        self._report(f"connection {connection.id} with {connection.peer} ended: {why}")
        try:
            connection.end()
        finally:
            # last, so that who sees the count fall can rely on the descriptor being closed
            del self._connections[fd]

    def _look_by(self, at: float) -> None:
        self.look_at = at if self.look_at is None else min(at, self.look_at)

    def _look_at_connection(self, connection: Connection, now: float) -> None:
        if connection.outbox.pending_bytes:
            stalled_at = connection.outbox.progress_at + _STALL_SECONDS
            if now >= stalled_at:
                self._drop(connection, f"it took nothing for {_STALL_SECONDS:.0f} s")
                return
            self._look_by(stalled_at)
        if connection.must_introduce and not connection.said_hello:
            assert self._hello_seconds is not None
            if connection.owes_answers:
                connection.heard_at = now
            silent_at = connection.heard_at + self._hello_seconds
            if now >= silent_at:
                self._drop(connection, f"it was silent for {self._hello_seconds:g} s")
                return
            self._look_by(silent_at)
