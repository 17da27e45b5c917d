"""A MessagePack-RPC server: one thread for all connections, others for what takes time.

The thread of ``serve_forever`` accepts, reads, decodes, and runs the methods named in ``quick``
in place, because a hand-over costs more than such a method. Every other request goes to a worker
thread. Nobody waits for a peer: an answer is written at once as far as it fits, the rest when the
peer reads, and a peer that does not read is cut off.

What a peer may count on:

- Each request is answered once. A malformed one is answered too, and the connection lives; only
  bytes that are not MessagePack at all end it. Where no msgid can be read, the answer is the
  notification ``rpc.error`` with the error map.
- The connection above ``max_connections`` gets ``rpc.error`` with code ``resource`` and is closed.
  A serial line has a place of its own.
- Who sends no whole message for ``hello_seconds``, has said no hello and waits for no answer is
  closed. That does not hold on a serial line or a stream that we dialled: nobody else wants those.
- Half-close is honoured: what is in flight is answered, then the connection is closed.
- A request in flight outlives its connection unless its handler set ``cancel_on_disconnect``.
"""

import contextlib
import select
import time
from collections import deque
from collections.abc import Callable, Mapping

from vsock.acceptor import Acceptor
from vsock.calls import Calls, Handler
from vsock.connection import Call, Connection, Outcome
from vsock.errors import CallError
from vsock.rpc import (
    ERROR_METHOD,
    Limits,
    Malformed,
    Message,
    Notification,
    Request,
    encode_notification,
)
from vsock.stream import Listener, Stream
from vsock.waker import Waker

__all__ = ("Call", "Connection", "Outcome", "Server")

_READ_BYTES = 64 * 1024
#: A peer that takes nothing for this long is cut off.
_STALL_SECONDS = 30.0
#: What cancelled requests get for undoing what they made, when the server stops.
_UNDO_SECONDS = 5.0
#: Requests in flight, all connections together, may hold this many times one request's limit.
_IN_FLIGHT_REQUESTS = 16

NotificationHandler = Callable[[Connection, Notification], None]


class Server:
    """Serves ``handler`` on any number of listeners and streams.

    ``handler`` may raise CallError and nothing else. It is called from many threads, and for the
    methods in ``quick`` on the thread of the server, where it must not block. ``on_notification``
    is called there too; without it, notifications are refused.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        limits: Limits | None = None,
        quick: frozenset[str] = frozenset(),
        max_connections: int = 64,
        max_in_flight: int = 256,
        workers: int = 16,
        hello_seconds: float | None = 10.0,
        on_notification: NotificationHandler | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """``report`` takes one line for each thing that a person may want to know of."""
        self._limits = limits or Limits()
        self._max_connections = max_connections
        self._max_in_flight = max_in_flight
        self._hello_seconds = hello_seconds
        self._on_notification = on_notification
        self._report = report or (lambda line: None)
        self._calls = Calls(
            handler,
            quick=quick,
            workers=workers,
            max_bytes=_IN_FLIGHT_REQUESTS * self._limits.max_request_bytes,
            on_end=self._call_ended,
        )
        self._epoll = select.epoll()
        self._acceptor = Acceptor(self._epoll, self._report)
        self._waker = Waker()
        self._epoll.register(self._waker.fd, select.EPOLLIN)
        self._new: deque[Listener | Stream] = deque()
        self._on_close: dict[int, Callable[[], None]] = {}
        self._attention: deque[Connection] = deque()
        self._connections: dict[int, Connection] = {}
        self._events: dict[int, int] = {}
        self._look_at: float | None = None
        self._stop_at: float | None = None
        self._closed = False

    def add_listener(self, listener: Listener) -> None:
        """Serve who connects to ``listener``, which the server takes over. From any thread.

        A server that has been closed closes it at once.
        """
        self._add(listener)

    def add_stream(self, stream: Stream, on_close: Callable[[], None] | None = None) -> None:
        """Serve a connected stream, which the server takes over. From any thread.

        ``on_close`` is called when the connection has ended, as of ``Connection.on_close``; that is
        here and now where the server has been closed.
        """
        if on_close is not None:
            self._on_close[id(stream)] = on_close
        self._add(stream)

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Have ``serve_forever`` return.

        New requests are refused from now on. Those in flight get ``grace_seconds``, are then
        cancelled, and get a few seconds to undo. A second call can only shorten the grace. From any
        thread, and from a signal handler.
        """
        at = time.monotonic() + grace_seconds
        self._stop_at = at if self._stop_at is None else min(at, self._stop_at)
        self._waker.wake()

    @property
    def waker_fd(self) -> int:
        """For ``signal.set_wakeup_fd``: with that, no signal comes too late for the server to look
        at what its handler has done. The descriptor stays ours."""
        return self._waker.signal_fd

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    @property
    def requests_in_flight(self) -> int:
        return len(self._calls)

    def limits(self) -> dict[str, int]:
        """Return every limit by name, as a peer may want to know them."""
        return {
            "max_request_bytes": self._limits.max_request_bytes,
            "max_reply_bytes": self._limits.max_reply_bytes,
            "max_depth": self._limits.max_depth,
            "max_values": self._limits.max_values,
            "max_connections": self._max_connections,
            "max_in_flight": self._max_in_flight,
        }

    def broadcast(self, method: str, params: Mapping[str, object] | None = None) -> int:
        """Notify every peer that has said hello; return how many of them keep up and got it.

        Raises:
            LocalProtocolError: the parameters have no place in MessagePack.
        """
        data = encode_notification(method, params)
        peers = [peer for peer in list(self._connections.values()) if peer.said_hello]
        return sum(peer.send_notification(data) for peer in peers)

    def serve_forever(self) -> None:
        """Serve until ``stop``. Everything is closed on return."""
        try:
            while self._stop_at is None:
                self._turn()
            self._finish()
        finally:
            self.close()

    def close(self) -> None:
        """Close every listener and connection. For a server that is not running. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._acceptor.close()
        for connection in list(self._connections.values()):
            self._drop(connection, "the server ends")
        self._calls.close()
        self._epoll.close()
        self._waker.close()
        self._refuse_new()

    def _finish(self) -> None:
        """Let what is in flight come to an end, then make it."""
        assert self._stop_at is not None
        self._calls.close_admission()
        self._acceptor.close()
        while not self._at_rest() and time.monotonic() < self._stop_at:
            self._turn(self._stop_at)
        self._calls.cancel_all()
        undone_at = time.monotonic() + _UNDO_SECONDS
        while not self._at_rest() and time.monotonic() < undone_at:
            self._turn(undone_at)

    def _at_rest(self) -> bool:
        return not len(self._calls) and all(peer.idle for peer in self._connections.values())

    def _turn(self, until: float | None = None) -> None:
        """Wait for something to happen, and see to it."""
        times = [at for at in (until, self._acceptor.resume_at, self._look_at) if at is not None]
        seconds = max(0.0, min(times) - time.monotonic()) if times else None
        for fd, events in self._epoll.poll(seconds):
            connection = self._connections.get(fd)
            if connection is not None:
                self._serve(connection, events)
            elif fd == self._waker.fd:
                self._woken()
            else:
                stream = self._acceptor.accept(fd)
                if stream is not None:
                    self._accepted(stream)
        if times and time.monotonic() >= min(times):
            self._look_around()

    def _add(self, new: Listener | Stream) -> None:
        self._new.append(new)
        if not self._waker.wake():
            self._refuse_new()

    def _refuse_new(self) -> None:
        while True:
            try:
                new = self._new.popleft()
            except IndexError:  # perhaps another thread was as quick
                return
            new.close()
            on_close = self._on_close.pop(id(new), None)
            if on_close is not None:
                on_close()

    def _attend(self, connection: Connection) -> None:
        self._attention.append(connection)
        self._waker.wake()

    def _woken(self) -> None:
        self._waker.clear()
        if self._stop_at is not None:
            self._refuse_new()
        while self._new:
            new = self._new.popleft()
            if isinstance(new, Listener):
                self._acceptor.add(new)
            else:
                self._connect(new, must_introduce=False)
        while self._attention:
            self._settle(self._attention.popleft())

    def _accepted(self, stream: Stream) -> None:
        # a wired stream that is refused would be accepted anew at once, and so on for ever
        if stream.point_to_point or len(self._connections) < self._max_connections:
            self._connect(stream, must_introduce=not stream.point_to_point)
            return
        text = f"{self._max_connections} connections are open"
        self._report(f"refused {stream.peer}: {text}")
        error = CallError("resource", text, step="accept connection")
        # a peer that has gone already needs no answer
        with stream, contextlib.suppress(OSError):
            stream.send(encode_notification(ERROR_METHOD, error.to_wire()))

    def _connect(self, stream: Stream, *, must_introduce: bool) -> None:
        stream.setblocking(False)
        connection = Connection(
            stream,
            self._limits,
            max_in_flight=self._max_in_flight,
            must_introduce=must_introduce and self._hello_seconds is not None,
            attend=self._attend,
        )
        self._connections[stream.fileno()] = connection
        on_close = self._on_close.pop(id(stream), None)
        if on_close is not None:
            connection.on_close(on_close)
        if connection.must_introduce and self._hello_seconds is not None:
            self._look_by(connection.heard_at + self._hello_seconds)
        self._settle(connection)

    def _serve(self, connection: Connection, events: int) -> None:
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
        self._look_at = at if self._look_at is None else min(at, self._look_at)

    def _look_around(self) -> None:
        """See to everything that time alone brings about."""
        now = time.monotonic()
        if self._acceptor.resume_at is not None and now >= self._acceptor.resume_at:
            self._acceptor.resume()
        if self._look_at is None or now < self._look_at:
            return
        self._look_at = None
        for connection in list(self._connections.values()):
            self._look_at_connection(connection, now)
        expiry_at = self._calls.expire()
        if expiry_at is not None:
            self._look_by(expiry_at)

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

    def _request(self, connection: Connection, request: Request) -> None:
        try:
            call = self._calls.admit(connection, request)
        except CallError as error:
            connection.answer_error(request.msgid, error)
            return
        expiry_at = self._calls.start(call)
        if expiry_at is not None:
            self._look_by(expiry_at)

    def _call_ended(self) -> None:
        if self._stop_at is not None:
            self._waker.wake()

    def _take(self, connection: Connection, message: Message) -> None:
        if isinstance(message, Request):
            self._request(connection, message)
        elif isinstance(message, Malformed):
            msgid = message.msgid if message.kind == "request" else None
            connection.answer_error(msgid, message.error)
            if message.fatal:
                connection.end_of_input()
        elif isinstance(message, Notification) and self._on_notification is not None:
            self._on_notification(connection, message)
        else:
            name = "notifications" if isinstance(message, Notification) else "responses"
            refusal = CallError("unsupported", f"{name} have no place here", step="take message")
            connection.answer_error(None, refusal)
