"""A MessagePack-RPC server: one thread for all connections, others for what takes time.

The thread of ``serve_forever`` accepts, reads, decodes, and runs the methods named in ``quick``
in place, because a hand-over costs more than such a method. Every other request goes to a worker
thread. Nobody waits for a peer: an answer is written at once as far as it fits, the rest when the
peer reads, and a peer that does not read is cut off.

What a peer may count on:

- Each request is answered once. A malformed one is answered too, and the connection lives. After
  a message past a limit, or bytes that are not MessagePack, it is answered and closed. Where no
  msgid can be read, the answer is the notification ``rpc.error`` with the error map.
- The connection above ``max_connections`` gets ``rpc.error`` with code ``resource`` and is closed.
  A serial line has a place of its own.
- Who sends no whole message for ``hello_seconds``, has said no hello and waits for no answer is
  closed. That does not hold on a serial line or a stream that we dialled: nobody else wants those.
- Half-close is honoured: what is in flight is answered, then the connection is closed.
- A request in flight outlives its connection unless its handler set ``cancel_on_disconnect``.
"""

import contextlib
import errno
import select
import time
from collections import deque
from collections.abc import Callable

from vsock.calls import Calls, Handler
from vsock.connection import Budget, Call, Connection, Outcome
from vsock.errors import CallError
from vsock.log import log
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
from vsock.threads import Waker

__all__ = ("Acceptor", "Call", "Connection", "Outcome", "Server")

#: What cancelled requests get for undoing what they made, when the server stops.
_UNDO_SECONDS = 5.0

#: Called when a connection has ended.
OnClose = Callable[[], None] | None
NotificationHandler = Callable[[Connection, Notification], None]
#: How long accepting rests when it fails, as it does with no descriptor left.
_REST_SECONDS = 0.5
_READ_BYTES = 64 * 1024
#: A peer that takes nothing for this long is cut off.
_STALL_SECONDS = 30.0
#: A peer that takes longer to send one message is cut off: 256 KiB at 2 KiB/s.
_MESSAGE_SECONDS = 128.0


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
        urgent: frozenset[str] = frozenset(),
        max_memory_bytes: int = 8 * 1024 * 1024,
        max_connections: int = 64,
        max_in_flight: int = 256,
        workers: int = 16,
        hello_seconds: float | None = 10.0,
        idle_seconds: float = 10.0,
        on_notification: NotificationHandler | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """``urgent`` methods have worker threads that no other calls can take.

        ``max_memory_bytes`` bounds what all connections together hold of half-received messages,
        requests in flight and unsent answers. A connection that is idle for ``idle_seconds`` may
        have to go when ``max_connections`` are open and another one comes. ``report`` takes one
        line for each thing that a person may want to know of.
        """
        self._limits = limits or Limits()
        self._max_connections = max_connections
        self._max_in_flight = max_in_flight
        self._idle_seconds = idle_seconds
        self._max_memory_bytes = max_memory_bytes
        # apart, so that answers which are not read leave room for requests
        input_budget = Budget(max_memory_bytes * 3 // 8)
        output_budget = Budget(max_memory_bytes * 5 // 8)
        self._on_notification = on_notification
        self._report = report or (lambda line: None)
        self._calls = Calls(
            handler,
            quick=quick,
            urgent=urgent,
            workers=workers,
            budget=input_budget,
            on_end=self._call_ended,
        )
        self._epoll = select.epoll()
        self._acceptor = Acceptor(self._epoll, self._report)
        self._waker = Waker()
        self._epoll.register(self._waker.fd, select.EPOLLIN)
        self._peers = Peers(
            self._epoll,
            self._limits,
            input_budget=input_budget,
            output_budget=output_budget,
            max_in_flight=max_in_flight,
            hello_seconds=hello_seconds,
            take=self._take,
            wake=self._waker.wake,
            report=self._report,
        )
        self._new: deque[tuple[Listener | Stream, OnClose]] = deque()
        self._expiry_at: float | None = None
        self._stop_at: float | None = None
        self._closed = False

    def add_listener(self, listener: Listener) -> None:
        """Serve who connects to ``listener``, which the server takes over. From any thread.

        A server that has been closed closes it at once.
        """
        self._add(listener, None)

    def add_stream(self, stream: Stream, on_close: OnClose = None) -> None:
        """Serve a connected stream, which the server takes over. From any thread.

        ``on_close`` is called when the connection has ended, as of ``Connection.on_close``; that is
        here and now where the server has been closed.
        """
        self._add(stream, on_close)

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
        return len(self._peers)

    @property
    def requests_in_flight(self) -> int:
        return len(self._calls)

    def limits(self) -> dict[str, int]:
        """Return every limit by name, as a peer may want to know them."""
        return {
            **vars(self._limits),
            "max_memory_bytes": self._max_memory_bytes,
            "max_connections": self._max_connections,
            "max_in_flight": self._max_in_flight,
        }

    def serve_forever(self) -> None:
        """Serve until ``stop``. Everything is closed on return."""
        try:
            with log.in_background():
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
        self._peers.close()
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
        return not len(self._calls) and self._peers.idle

    def _turn(self, until: float | None = None) -> None:
        """Wait for something to happen, and see to it."""
        due = (until, self._acceptor.resume_at, self._peers.timer_at, self._expiry_at)
        times = [at for at in due if at is not None]
        seconds = max(0.0, min(times) - time.monotonic()) if times else None
        for fd, events in self._epoll.poll(seconds):
            connection = self._peers.find(fd)
            if connection is not None:
                self._peers.serve(connection, events)
            elif fd == self._waker.fd:
                self._woken()
            else:
                stream = self._acceptor.accept(fd)
                if stream is not None:
                    self._accepted(stream)
        if times and time.monotonic() >= min(times):
            self._run_timers()

    def _run_timers(self) -> None:
        """See to everything that time alone brings about."""
        now = time.monotonic()
        if self._acceptor.resume_at is not None and now >= self._acceptor.resume_at:
            self._acceptor.resume()
        self._peers.run_timers()
        if self._expiry_at is not None and now >= self._expiry_at:
            self._expiry_at = self._calls.expire()

    def _add(self, new: Listener | Stream, on_close: OnClose) -> None:
        self._new.append((new, on_close))
        if not self._waker.wake():
            self._refuse_new()

    def _refuse_new(self) -> None:
        while True:
            try:
                new, on_close = self._new.popleft()
            except IndexError:  # perhaps another thread was as quick
                return
            new.close()
            if on_close is not None:
                on_close()

    def _woken(self) -> None:
        self._waker.clear()
        if self._stop_at is not None:
            self._refuse_new()
        while self._new:
            new, on_close = self._new.popleft()
            if isinstance(new, Listener):
                self._acceptor.add(new)
            else:
                self._peers.add(new, must_introduce=False, on_close=on_close)
        self._peers.serve_requested()

    def _accepted(self, stream: Stream) -> None:
        # a wired stream that is refused would be accepted anew at once, and so on for ever
        is_full = not stream.point_to_point and len(self._peers) >= self._max_connections
        if not is_full or self._peers.drop_idle(self._idle_seconds):
            self._peers.add(stream, must_introduce=not stream.point_to_point)
            return
        text = f"{self._max_connections} connections are open"
        self._report(f"refused {stream.peer}: {text}")
        error = CallError("resource", text, step="accept connection")
        # a peer that has gone already needs no answer
        with stream, contextlib.suppress(OSError):
            stream.send(encode_notification(ERROR_METHOD, error.to_wire()))

    def _request(self, connection: Connection, request: Request) -> None:
        try:
            call = self._calls.admit(connection, request)
        except CallError as error:
            connection.answer_error(request.msgid, error)
            return
        expiry_at = self._calls.start(call)
        if expiry_at is not None:
            earlier = self._expiry_at
            self._expiry_at = expiry_at if earlier is None else min(earlier, expiry_at)

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


class Acceptor:
    """Listeners registered with an epoll set that belongs to the caller."""

    def __init__(self, epoll: select.epoll, report: Callable[[str], None]) -> None:
        self._epoll = epoll
        self._report = report
        self._listeners: dict[int, Listener] = {}
        #: Monotonic time at which ``resume`` is due, None while accepting goes on.
        self.resume_at: float | None = None

    def add(self, listener: Listener) -> None:
        """Take over ``listener``."""
        self._listeners[listener.fileno()] = listener
        if self.resume_at is None:
            self._epoll.register(listener.fileno(), select.EPOLLIN)

    def accept(self, fd: int) -> Stream | None:
        """Return the next stream of the listener with descriptor ``fd``, None if there is none.

        A listener stays ready while its accept fails, so that watching it would be a busy loop:
        after a failure all of them rest for a moment.
        """
        listener = self._listeners.get(fd)
        if listener is None:
            return None
        try:
            return listener.accept()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ECONNABORTED:
                self._report(f"cannot accept on {listener.address}: {error}")
                self._rest()
            return None

    def resume(self) -> None:
        """Accept again."""
        self.resume_at = None
        for fd in self._listeners:
            self._epoll.register(fd, select.EPOLLIN)

    def close(self) -> None:
        """Close every listener."""
        if self.resume_at is None:
            for fd in self._listeners:
                self._epoll.unregister(fd)
        self.resume_at = None
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()

    def _rest(self) -> None:
        if self.resume_at is None:
            self.resume_at = time.monotonic() + _REST_SECONDS
            for fd in self._listeners:
                self._epoll.unregister(fd)


class Peers:
    """Connections registered with an epoll set that belongs to the caller.

    All of it is for the thread of the server, but for ``request_service`` and ``all``.
    """

    def __init__(
        self,
        epoll: select.epoll,
        limits: Limits,
        *,
        input_budget: Budget,
        output_budget: Budget,
        max_in_flight: int,
        hello_seconds: float | None,
        take: Callable[[Connection, Message], None],
        wake: Callable[[], object],
        report: Callable[[str], None],
    ) -> None:
        """``take`` gets each message; ``wake`` has the thread call ``serve_requested``."""
        self._epoll = epoll
        self._limits = limits
        self._input_budget = input_budget
        self._output_budget = output_budget
        self._max_in_flight = max_in_flight
        self._hello_seconds = hello_seconds
        self._take = take
        self._wake = wake
        self._report = report
        self._connections: dict[int, Connection] = {}
        self._events: dict[int, int] = {}
        self._requested: deque[Connection] = deque()
        #: Monotonic time at which ``run_timers`` is due, None for never.
        self.timer_at: float | None = None

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
            input_budget=self._input_budget,
            output_budget=self._output_budget,
            max_in_flight=self._max_in_flight,
            must_introduce=must_introduce and self._hello_seconds is not None,
            request_service=self.request_service,
        )
        self._connections[stream.fileno()] = connection
        if on_close is not None:
            connection.on_close(on_close)
        if connection.must_introduce and self._hello_seconds is not None:
            self._set_timer(connection.heard_at + self._hello_seconds)
        self._update_interest(connection)

    def serve(self, connection: Connection, events: int) -> None:
        """Write, read and take messages, as ``events`` and the connection allow."""
        broken = events & (select.EPOLLHUP | select.EPOLLERR)
        try:
            if connection.outbox.pending_bytes and (broken or events & select.EPOLLOUT):
                connection.outbox.flush()
            if connection.wants_input and (broken or events & select.EPOLLIN):
                self._read(connection)
            self._take_messages(connection)
            connection.hold_input()
        except BlockingIOError:
            pass
        except CallError as error:
            connection.answer_error(None, error)
            connection.end_of_input()
        except OSError as error:
            self._drop(connection, str(error))
            return
        self._update_interest(connection)

    def request_service(self, connection: Connection) -> None:
        """Have the thread of the server look at ``connection``. From any thread."""
        self._requested.append(connection)
        self._wake()

    def serve_requested(self) -> None:
        """Look at those that ``request_service`` was called for."""
        while self._requested:
            self._update_interest(self._requested.popleft())

    def run_timers(self) -> None:
        """See to what time alone brings about, if it is due."""
        now = time.monotonic()
        if self.timer_at is None or now < self.timer_at:
            return
        self.timer_at = None
        for connection in self.all():
            self._check_times(connection, now)

    def drop_idle(self, seconds: float) -> bool:
        """End the connection that has been idle for the longest time, and for ``seconds`` at least.

        A connection that has something to do at its end, such as a subscription, goes after those
        that have not. False if there is no such connection.
        """
        before = time.monotonic() - seconds
        idle = [c for c in self.all() if c.idle and c.heard_at <= before and not c.point_to_point]
        if not idle:
            return False
        oldest = min(idle, key=lambda c: (c.has_callbacks, c.heard_at))
        self._drop(oldest, "it was idle, and its place was needed")
        return True

    def close(self) -> None:
        """End every connection."""
        for connection in self.all():
            self._drop(connection, "the server ends")

    def _read(self, connection: Connection) -> None:
        data = connection.stream.recv(_READ_BYTES)
        if not data:
            connection.end_of_input()
            return
        connection.receive(data)

    def _take_messages(self, connection: Connection) -> None:
        # one read may ask for more than the peer can take: the rest waits until the peer has read
        while not connection.must_read:
            message = connection.next_message()
            if message is None:
                connection.has_more = False
                return
            self._take(connection, message)
        connection.has_more = True

    def _update_interest(self, connection: Connection) -> None:
        """End the connection if its time has come, else wait for what it waits for."""
        if connection.closed:
            return
        if connection.close_reason is not None:
            self._drop(connection, connection.close_reason)
            return
        if connection.read_ended and connection.idle:
            self._drop(connection, "the peer ended it")
            return
        pending_bytes = connection.outbox.pending_bytes
        wanted = select.EPOLLOUT if pending_bytes else 0
        if connection.wants_input:
            wanted |= select.EPOLLIN
        if pending_bytes:
            self._set_timer(connection.outbox.progress_at + _STALL_SECONDS)
        if connection.unfinished_at is not None:
            self._set_timer(connection.unfinished_at + _MESSAGE_SECONDS)
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

    def _set_timer(self, at: float) -> None:
        self.timer_at = at if self.timer_at is None else min(at, self.timer_at)

    def _check_times(self, connection: Connection, now: float) -> None:
        if connection.outbox.pending_bytes:
            stalled_at = connection.outbox.progress_at + _STALL_SECONDS
            if now >= stalled_at:
                self._drop(connection, f"it took nothing for {_STALL_SECONDS:.0f} s")
                return
            self._set_timer(stalled_at)
        if connection.unfinished_at is not None:
            late_at = connection.unfinished_at + _MESSAGE_SECONDS
            if now >= late_at:
                self._drop(connection, f"its message was not whole after {_MESSAGE_SECONDS:.0f} s")
                return
            self._set_timer(late_at)
        if connection.must_introduce and not connection.said_hello:
            assert self._hello_seconds is not None
            if connection.owes_answers:
                connection.heard_at = now
            silent_at = connection.heard_at + self._hello_seconds
            if now >= silent_at:
                self._drop(connection, f"it was silent for {self._hello_seconds:g} s")
                return
            self._set_timer(silent_at)
