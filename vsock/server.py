"""A MessagePack-RPC server: one thread for all connections, others for what takes time.

The thread of ``serve_forever`` accepts, reads, decodes, and runs the methods named in ``quick``
in place, because a hand-over costs more than such a method. Every other request goes to a worker
thread, which a handler that waits for long gives back (``Later``). No thread waits for a peer: an
answer is written at once as far as it fits, the rest when the peer reads, and a peer that does not
read is cut off.

What a peer may count on:

- Each request is answered once. A malformed one is answered too, and the connection lives. After
  a message past a limit, or bytes that are not MessagePack, it is answered and closed. Where no
  msgid can be read, the answer is the notification ``rpc.error`` with the error map.
- The connection above ``max_connections`` gets ``rpc.error`` with code ``resource`` and is closed.
  A serial line has a place of its own.
- A connection on which no hello was said, no message came for ``hello_seconds`` and no answer is
  awaited is closed; not so a serial line or a stream that we dialled, which no other peer wants.
- Half-close is honoured: what is in flight is answered, then the connection is closed.
- A request in flight outlives its connection unless its handler set ``cancel_on_disconnect``.
"""

import contextlib
import errno
import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from vsock.calls import Calls, Handler
from vsock.connection import Budget, Call, Connection, Later, Outcome
from vsock.errors import CallError
from vsock.log import log
from vsock.loop import Loop
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

__all__ = ("Call", "Connection", "Later", "Outcome", "Server")

#: What cancelled requests get for undoing what they made, when the server stops.
_UNDO_SECONDS = 5.0

#: Called when a connection has ended.
OnClose = Callable[[], None] | None
NotificationHandler = Callable[[Connection, Notification], None]
#: How long accepting pauses when it fails, as it does with no descriptor left.
_ACCEPT_PAUSE_SECONDS = 0.5
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
        self._hello_seconds = hello_seconds
        self._idle_seconds = idle_seconds
        self._max_memory_bytes = max_memory_bytes
        # apart, so that answers which are not read leave room for requests
        self._input_budget = Budget(max_memory_bytes * 3 // 8)
        self._output_budget = Budget(max_memory_bytes * 5 // 8)
        self._on_notification = on_notification
        self._report = report or (lambda line: None)
        self._calls = Calls(
            handler,
            quick=quick,
            urgent=urgent,
            workers=workers,
            budget=self._input_budget,
            on_end=self._call_ended,
            on_resume=self._resume,
        )
        self._loop = Loop()
        self._waker = Waker()
        self._loop.add(self._waker.fd, select.EPOLLIN, self._woken)
        self._listeners: list[Listener] = []
        self._is_accepting = True
        self._connections: set[Connection] = set()
        # from other threads
        self._new: deque[tuple[Listener | Stream, OnClose]] = deque()
        self._requested: deque[Connection] = deque()
        self._resumed: deque[Call] = deque()
        self._expire_at: float | None = None
        self._stop_at: float | None = None
        self._closed = False

    def add_listener(self, listener: Listener) -> None:
        """Serve the peers of ``listener``, which the server takes over. From any thread.

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
        at what its handler has done. The descriptor stays the server's."""
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
                    self._loop.poll(block=True)
                self._finish()
        finally:
            self.close()

    def close(self) -> None:
        """Close every listener and connection. For a server that is not running. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._close_listeners()
        for connection in list(self._connections):
            self._drop(connection, "the server ends")
        self._calls.close()
        self._loop.close()
        self._waker.close()
        self._refuse_new()

    def _finish(self) -> None:
        """Let what is in flight come to an end, then make it."""
        assert self._stop_at is not None
        self._calls.close_admission()
        self._close_listeners()
        while self._serve_before(self._stop_at):
            pass
        self._calls.cancel_all()
        undone_at = time.monotonic() + _UNDO_SECONDS
        while self._serve_before(undone_at):
            pass

    def _serve_before(self, at: float) -> bool:
        """Serve what comes; False when ``at`` has passed, or nothing is in flight or unsent."""
        left_seconds = at - time.monotonic()
        is_idle = not len(self._calls) and all(c.idle for c in self._connections)
        if is_idle or left_seconds <= 0:
            return False
        timer = self._loop.call_later(left_seconds, lambda: None)
        self._loop.poll(block=True)
        timer.cancel()
        return True

    def _call_ended(self) -> None:
        if self._stop_at is not None:
            self._waker.wake()

    # -- what comes from other threads

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

    def _request_service(self, connection: Connection) -> None:
        """Have the server's thread look at ``connection``. From any thread."""
        self._requested.append(connection)
        self._waker.wake()

    def _resume(self, call: Call) -> None:
        """Have the server's thread start a call again. From any thread."""
        self._resumed.append(call)
        self._waker.wake()

    def _woken(self, _events: int) -> None:
        self._waker.clear()
        if self._stop_at is not None:
            self._refuse_new()
        while self._new:
            new, on_close = self._new.popleft()
            if isinstance(new, Listener):
                self._listeners.append(new)
                if self._is_accepting:
                    self._accept_on(new)
            else:
                self._add_connection(new, must_introduce=False, on_close=on_close)
        while self._resumed:
            self._expire_by(self._calls.start(self._resumed.popleft()))
        while self._requested:
            self._update_interest(self._requested.popleft())

    # -- listeners

    def _accept_on(self, listener: Listener) -> None:
        self._loop.add(listener.fileno(), select.EPOLLIN, partial(self._accept, listener))

    def _accept(self, listener: Listener, _events: int) -> None:
        try:
            stream = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ECONNABORTED:
                self._report(f"cannot accept on {listener.address}: {error}")
                self._pause_accepting()
            return
        # a wired stream that is refused would be accepted anew at once, and so on for ever
        is_full = not stream.point_to_point and len(self._connections) >= self._max_connections
        if is_full and not self._drop_idle():
            self._refuse(stream)
        else:
            self._add_connection(stream, must_introduce=not stream.point_to_point)

    def _pause_accepting(self) -> None:
        """Leave the listeners alone for a moment: they stay ready while accepting fails."""
        self._is_accepting = False
        for listener in self._listeners:
            self._loop.remove(listener.fileno())
        self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self._resume_accepting)

    def _resume_accepting(self) -> None:
        self._is_accepting = True
        for listener in self._listeners:
            self._accept_on(listener)

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            if self._is_accepting:
                self._loop.remove(listener.fileno())
            listener.close()
        self._listeners.clear()

    def _drop_idle(self) -> bool:
        """End the connection that has been idle for the longest time, if it is long enough.

        A connection that has something to do at its end, such as a subscription, goes after those
        that have not. Before hello a tenth of the time is long enough.
        """
        idle_seconds, now = self._idle_seconds, time.monotonic()
        idle = (c for c in self._connections if c.idle and not c.point_to_point)
        late = (c for c in idle if now - c.heard_at >= idle_seconds / (10 if c.is_stranger else 1))
        oldest = min(late, key=lambda c: (c.has_callbacks, c.heard_at), default=None)
        if oldest is None:
            return False
        self._drop(oldest, "it was idle, and its place was needed")
        return True

    def _refuse(self, stream: Stream) -> None:
        text = f"{self._max_connections} connections are open"
        self._report(f"refused {stream.peer}: {text}")
        error = CallError("resource", text, step="accept connection")
        # a peer that has gone already needs no answer
        with stream, contextlib.suppress(OSError):
            stream.send(encode_notification(ERROR_METHOD, error.to_wire()))

    # -- connections

    def _add_connection(
        self, stream: Stream, *, must_introduce: bool, on_close: OnClose = None
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
            request_service=self._request_service,
        )
        self._connections.add(connection)
        if on_close is not None:
            connection.on_close(on_close)
        self._update_interest(connection)

    def _serve(self, connection: Connection, events: int) -> None:
        """Write, read and take messages, as ``events`` and the connection allow."""
        broken = events & (select.EPOLLHUP | select.EPOLLERR)
        try:
            if connection.outbox.pending_bytes and (broken or events & select.EPOLLOUT):
                connection.outbox.flush()
            if connection.wants_input and (broken or events & select.EPOLLIN):
                connection.receive(connection.stream.recv(_READ_BYTES))
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

    def _take_messages(self, connection: Connection) -> None:
        # one read may ask for more than the peer can take: the rest waits until the peer has read
        while not connection.must_read:
            message = connection.next_message()
            if message is None:
                connection.has_more = False
                return
            self._take(connection, message)
        connection.has_more = True

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

    def _request(self, connection: Connection, request: Request) -> None:
        try:
            call = self._calls.admit(connection, request)
        except CallError as error:
            connection.answer_error(request.msgid, error)
            return
        self._expire_by(self._calls.start(call))

    def _expire_by(self, at: float | None) -> None:
        if at is not None and (self._expire_at is None or at < self._expire_at):
            self._expire_at = at
            self._loop.call_later(max(0.0, at - time.monotonic()), self._expire)

    def _expire(self) -> None:
        self._expire_at = None
        self._expire_by(self._calls.expire())

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
        wanted = select.EPOLLOUT if connection.outbox.pending_bytes else 0
        if connection.wants_input:
            wanted |= select.EPOLLIN
        self._watch(connection, wanted)
        self._set_timer(connection)

    def _watch(self, connection: Connection, wanted: int) -> None:
        # with nothing wanted it is taken out: epoll reports a hang-up even to a waiter for nothing
        before, connection.watched_events = connection.watched_events, wanted
        fd = connection.stream.fileno()
        if not before and wanted:
            self._loop.add(fd, wanted, partial(self._serve, connection))
        elif before and not wanted:
            self._loop.remove(fd)
        elif before != wanted:
            self._loop.modify(fd, wanted)

    def _drop(self, connection: Connection, why: str) -> None:
        self._watch(connection, 0)
        if connection.timer is not None:
            connection.timer.cancel()
        self._report(f"connection {connection.id} with {connection.peer} ended: {why}")
        try:
            connection.end()
        finally:
            # last: a thread that sees the count fall can rely on the descriptor being closed
            self._connections.discard(connection)

    # -- what a connection has to do in time

    def _deadlines(self, connection: Connection) -> Iterator[tuple[float, str]]:
        """Yield the times at which the connection ends unless something happens, and why."""
        if connection.outbox.pending_bytes:
            at = connection.outbox.progress_at + _STALL_SECONDS
            yield at, f"it took nothing for {_STALL_SECONDS:.0f} s"
        if connection.unfinished_at is not None:
            at = connection.unfinished_at + _MESSAGE_SECONDS
            yield at, f"its message was not whole after {_MESSAGE_SECONDS:.0f} s"
        if connection.is_stranger:
            assert self._hello_seconds is not None
            at = connection.heard_at + self._hello_seconds
            yield at, f"it was silent for {self._hello_seconds:g} s"

    def _set_timer(self, connection: Connection) -> None:
        """Have a timer run by the first deadline. A timer that runs too early is set again."""
        first = min(self._deadlines(connection), default=None)
        if first is None or (connection.timer is not None and connection.timer_at <= first[0]):
            return
        if connection.timer is not None:
            connection.timer.cancel()
        connection.timer_at = first[0]
        seconds = max(0.0, first[0] - time.monotonic())
        connection.timer = self._loop.call_later(seconds, partial(self._check_times, connection))

    def _check_times(self, connection: Connection) -> None:
        connection.timer = None
        now = time.monotonic()
        if connection.owes_answers:
            connection.heard_at = now
        first = min(self._deadlines(connection), default=None)
        if first is not None and now >= first[0]:
            self._drop(connection, first[1])
        else:
            self._set_timer(connection)
