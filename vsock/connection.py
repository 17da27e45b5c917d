"""One peer of a server: what it has asked, what it has been answered, and whether it is there."""

import errno
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.loop import Timer
from vsock.record import Record
from vsock.rpc import (
    ERROR_METHOD,
    Decoder,
    Limits,
    Message,
    Request,
    encode_notification,
    encode_response,
)
from vsock.stream import Stream

__all__ = ("Budget", "Call", "Connection", "Later", "Outbox", "OutboxFull", "Outcome")

#: What a connection may hold without a share of the budget: short requests and short answers go on
#: when other connections have used it up.
_FREE_INPUT_BYTES, _FREE_OUTPUT_BYTES = 4 * 1024, 16 * 1024
_PAUSE_BYTES = 256 * 1024
#: Below the pause, so that a peer which takes bulk data slowly can still cancel it.
_BULK_BYTES = 128 * 1024

_numbers = itertools.count(1)


class Budget:
    """Memory that all connections of a server share, in bytes. Usable from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self.used_bytes = 0

    def has_room(self, count: int) -> bool:
        """Say whether ``take`` would be True."""
        return self.used_bytes + count <= self._max_bytes

    def take(self, count: int) -> bool:
        """Take ``count`` bytes; False, and nothing is taken, if they are not there."""
        with self._lock:
            if not self.has_room(count):
                return False
            self.used_bytes += count
            return True

    def give_back(self, count: int) -> None:
        with self._lock:
            self.used_bytes -= count


class _Share:
    """The part of a budget that one holder has. The first ``free_bytes`` are not counted."""

    def __init__(self, budget: Budget, free_bytes: int) -> None:
        self._budget = budget
        self._free_bytes = free_bytes
        self._taken_bytes = 0

    def hold(self, count: int) -> bool:
        """Have a share for ``count`` bytes in all; False, and no change, if they are not there."""
        more = max(0, count - self._free_bytes) - self._taken_bytes
        if more > 0 and not self._budget.take(more):
            return False
        if more < 0:
            self._budget.give_back(-more)
        self._taken_bytes += more
        return True


class Outcome:
    """What a handler answers: an error map, or a result."""

    __slots__ = ("error", "result")

    def __init__(self, error: Mapping[str, object] | None, result: object) -> None:
        self.error = error
        self.result = result


class Later:
    """What a handler answers while the call waits: no thread is held, and the handler runs again.

    The handler hands this to what it waits for, which calls ``resume`` or ``finish``. Both may be
    called from any thread, also before the handler has returned; only the first has an effect.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun_at = time.monotonic()
        self._runs: tuple[Callable[[], object], Callable[[], object]] | None = None
        self._number: int | None = None
        #: How long it took; 0 before.
        self.seconds = 0.0

    def resume(self) -> None:
        """Have a worker run the handler again."""
        self._end(0)

    def finish(self) -> None:
        """Run the handler here and now: the deadline is over, and nothing in it waits."""
        self._end(1)

    def attach(self, again: Callable[[], object], now: Callable[[], object]) -> None:
        """For the server: say what ``resume`` and ``finish`` do."""
        with self._lock:
            self._runs = again, now
            number = self._number
        if number is not None:
            self._runs[number]()

    def _end(self, number: int) -> None:
        with self._lock:
            if self._number is not None:
                return
            self._number = number
            self.seconds = time.monotonic() - self._begun_at
            runs = self._runs
        if runs is not None:
            runs[number]()


class Call:
    """A request on its way through a handler.

    ``params`` is without the parameters that every request may have: ``deadline_ms`` has become
    ``deadline``, and ``traceparent`` is text in W3C form, or None.
    """

    __slots__ = (
        "_cancel_on_disconnect",
        "_taken",
        "connection",
        "deadline",
        "held_bytes",
        "later",
        "method",
        "msgid",
        "on_withdraw",
        "params",
        "traceparent",
        "waited_seconds",
    )

    def __init__(self, request: Request, connection: "Connection", held_bytes: int) -> None:
        """Check the common parameters and take them out.

        ``held_bytes`` is what the call has taken of the server's budget.

        Raises:
            CallError: ``invalid``.
        """
        params = request.params
        self.traceparent = _traceparent(params.pop("traceparent", None))
        self.deadline = _deadline(
            params.pop("deadline_ms", None), connection.limits.max_deadline_ms
        )
        self.msgid = request.msgid
        self.method = request.method
        self.params = params
        self.held_bytes = held_bytes
        self.connection = connection
        #: Called where the call was taken before a thread came to it.
        self.on_withdraw: Callable[[Call], None] | None = None
        #: What its handler waited for when it last ran, None before; and how long in all.
        self.later: Later | None = None
        self.waited_seconds = 0.0
        self._cancel_on_disconnect = False
        self._taken = threading.Lock()

    def take(self) -> bool:
        """Return True to the first thread that asks: that thread runs or answers the call."""
        return self._taken.acquire(blocking=False)

    def give_back(self) -> None:
        """Let the next thread that asks take the call, which its handler has left for later."""
        self._taken.release()

    def withdraw(self) -> bool:
        """Take the call if no thread has come to it, and free its place in the queue."""
        if not self.take():
            return False
        if self.on_withdraw is not None:
            self.on_withdraw(self)
        return True

    @property
    def cancel_on_disconnect(self) -> bool:
        """Whether the end of what the peer sends cancels the call.

        False at first: a call that has begun is finished even if the peer is gone. A handler sets
        it for a call that only waits, so that no thread waits for a peer that is gone.
        """
        return self._cancel_on_disconnect

    @cancel_on_disconnect.setter
    def cancel_on_disconnect(self, value: bool) -> None:
        self._cancel_on_disconnect = value
        if value and (self.connection.closed or self.connection.read_ended):
            self.deadline.cancel()


class OutboxFull(Exception):
    """There is no memory for more unsent bytes. Nothing was queued or written."""


class Outbox:
    """Bytes on their way to one stream, in the order of ``put``. Usable from several threads."""

    def __init__(self, stream: Stream, max_bytes: int, budget: Budget) -> None:
        """Send on ``stream``, which is non-blocking and stays the caller's."""
        self._stream = stream
        self._max_bytes = max_bytes
        self._share = _Share(budget, _FREE_OUTPUT_BYTES)
        self._lock = threading.Lock()
        self._chunks: deque[bytes | memoryview] = deque()
        self._closed = False
        #: Bytes taken and not written yet.
        self.pending_bytes = 0
        #: Monotonic time at which the stream last took something, while bytes are pending.
        self.progress_at = 0.0

    def put(self, data: bytes, *, max_bytes: int | None = None) -> int:
        """Write ``data``, or queue what does not fit now; return the bytes pending.

        Raises:
            OutboxFull: more than ``max_bytes`` (by default the bound of this outbox) would pend, or
                the budget is used up.
            OSError: the stream is closed or broken.
        """
        bound = self._max_bytes if max_bytes is None else max_bytes
        with self._lock:
            if self._closed:
                raise BrokenPipeError(errno.EPIPE, "the connection is closed")
            pending_bytes = self.pending_bytes + len(data)
            if self._chunks and pending_bytes > bound:
                raise OutboxFull("it does not read its answers")
            if not self._share.hold(pending_bytes):
                raise OutboxFull("the memory for unsent answers is used up")
            rest = data if self._chunks else self._write(data)
            if rest:
                if not self._chunks:
                    self.progress_at = time.monotonic()
                self._chunks.append(rest)
            self._set_pending(self.pending_bytes + len(rest))
            return self.pending_bytes

    def flush(self) -> int:
        """Write what the stream takes now; return the bytes still pending.

        Raises:
            OSError: the stream is closed or broken.
        """
        with self._lock:
            pending_bytes = self.pending_bytes
            while self._chunks and not self._closed:
                chunk = self._chunks.popleft()
                rest = self._write(chunk)
                pending_bytes -= len(chunk) - len(rest)
                if rest:
                    self._chunks.appendleft(rest)
                    break
            if pending_bytes != self.pending_bytes:
                self.progress_at = time.monotonic()
            self._set_pending(pending_bytes)
            return pending_bytes

    def close(self) -> None:
        """Drop what pends; no byte is written to the stream from now on."""
        with self._lock:
            self._closed = True
            self._chunks.clear()
            self._set_pending(0)

    def _set_pending(self, count: int) -> None:
        self.pending_bytes = count
        self._share.hold(count)  # never more than it holds

    def _write(self, data: "bytes | memoryview") -> "bytes | memoryview":
        """Return the part that did not fit."""
        rest = data
        try:
            while rest:
                taken = self._stream.send(rest)
                if taken == len(rest):
                    return b""
                rest = memoryview(rest)[taken:]
        except BlockingIOError:
            pass
        return rest


class Connection:
    """A peer. ``cancel``, ``notify``, ``on_close`` and ``close`` may be called from any thread."""

    def __init__(
        self,
        stream: Stream,
        limits: Limits,
        *,
        input_budget: Budget,
        output_budget: Budget,
        max_in_flight: int,
        must_introduce: bool,
        request_service: "Callable[[Connection], None]",
    ) -> None:
        """Take over ``stream``; ``request_service`` has the server thread serve this."""
        self.id = next(_numbers)
        self.peer = stream.peer
        self.point_to_point = stream.point_to_point
        #: Set by the handler once the peer has introduced itself.
        self.said_hello = False
        self.must_introduce = must_introduce
        self.stream = stream
        self.limits = limits
        self._decoder = Decoder(limits, has_room=input_budget.has_room)
        self._input_share = _Share(input_budget, _FREE_INPUT_BYTES)
        #: True while there may be whole messages that wait until the peer has read its answers.
        self.has_more = False
        # below one reply, so that there is always room for one more
        self._pause_bytes = min(_PAUSE_BYTES, limits.max_reply_bytes)
        self.outbox = Outbox(stream, 2 * limits.max_reply_bytes, output_budget)
        self.closed = False
        self.read_ended = False
        #: Why the server is to end this connection, None while it is to live.
        self.close_reason: str | None = None
        #: For the server: the events that it waits for, and the timer that ends the connection.
        self.watched_events = 0
        self.timer: Timer | None = None
        self.timer_at = 0.0
        self.heard_at = time.monotonic()
        #: Monotonic time at which an unfinished message began; None without one.
        self.unfinished_at: float | None = None
        self._max_in_flight = max_in_flight
        self._request_service = request_service
        self._lock = threading.Lock()
        self._calls: dict[int, Call] = {}
        self._unanswered = 0
        self._on_close: list[Callable[[], None]] = []

    def cancel(self, msgid: int) -> bool:
        """Cancel a request of this peer; False if none with that msgid is in flight."""
        with self._lock:
            call = self._calls.get(msgid)
        if call is None:
            return False
        call.deadline.cancel()
        if call.withdraw():
            self.answer_over(call)
        return True

    def notify(self, method: str, params: Mapping[str, object] | Record | None = None) -> bool:
        """Send a notification if the peer keeps up; False if it was dropped.

        Raises:
            LocalProtocolError: the parameters have no place in MessagePack.
        """
        return self.send_notification(encode_notification(method, params))

    def send_notification(self, data: bytes) -> bool:
        """Send an encoded notification, or drop it where replies could lose their room to it."""
        return self._send(data, droppable=True)

    def notify_wait(
        self, method: str, params: Mapping[str, object] | None, deadline: Deadline
    ) -> None:
        """Send a notification as soon as the peer has taken most of what pends; never drop it.

        For bulk data, on a thread that may wait. The call that it belongs to should have
        ``cancel_on_disconnect`` set, so that the end of the connection ends the wait.

        Raises:
            CallError: ``timeout`` or ``cancelled``, also when the connection has ended.
            LocalProtocolError: the parameters have no place in MessagePack.
        """
        data = encode_notification(method, params)
        step = f"send {method} to {self.peer}"
        gone = CallError("cancelled", f"the connection has ended while: {step}", step=step)
        bound_bytes = min(_BULK_BYTES, self._pause_bytes // 2)
        try:
            while self.outbox.flush() > bound_bytes:
                fd = self.stream.fileno()
                if self.closed or fd < 0:
                    raise gone
                deadline.wait((), step, writable=(fd,))
        except OSError as error:
            self.close(f"cannot write: {error}")
            raise gone from error
        deadline.check(step)
        if not self.send_notification(data):
            raise gone

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on the thread of the server when the connection has ended.

        It must not block. On a connection that has ended it is called here and now.
        """
        with self._lock:
            if not self.closed:
                self._on_close.append(callback)
                return
        callback()

    def close(self, why: str = "closed by the server") -> None:
        """Have the server end the connection. Idempotent."""
        if self.close_reason is None:
            self.close_reason = why
        self._request_service(self)

    # What follows is for the server.

    @property
    def idle(self) -> bool:
        """True when nothing is owed to the peer."""
        return not (self._unanswered or self.has_more or self.outbox.pending_bytes)

    @property
    def is_stranger(self) -> bool:
        """True while the peer has yet to introduce itself."""
        return self.must_introduce and not self.said_hello

    @property
    def has_callbacks(self) -> bool:
        """True when ``on_close`` was called for it."""
        return bool(self._on_close)

    @property
    def must_read(self) -> bool:
        """True when the peer has to read before anything else is done for it."""
        return self.outbox.pending_bytes >= self._pause_bytes

    @property
    def wants_input(self) -> bool:
        return not (self.read_ended or self.has_more or self.must_read)

    @property
    def owes_answers(self) -> bool:
        return self._unanswered > 0

    def receive(self, data: bytes) -> None:
        """Take bytes in, for ``next_message`` to read; no bytes are the end of the input."""
        if data:
            self._decoder.feed(data)
        else:
            self.end_of_input()

    def next_message(self) -> Message | None:
        """Return the next message of the peer, None when there is no whole one."""
        decoder, limits = self._decoder, self.limits
        decoder.max_bytes = limits.max_hello_bytes if self.is_stranger else limits.max_request_bytes
        message = decoder.next()
        if message is not None:
            self.heard_at = time.monotonic()
        if message is not None or not decoder.buffered_bytes:
            self.unfinished_at = None
        elif self.unfinished_at is None:
            self.unfinished_at = time.monotonic()
        return message

    def hold_input(self) -> None:
        """Account for the bytes that wait for the rest of their message.

        Raises:
            CallError: ``resource``, when there is no memory for them.
        """
        if not self._input_share.hold(self._decoder.buffered_bytes):
            raise CallError(
                "resource",
                f"no memory for {self._decoder.buffered_bytes} bytes of an unfinished message",
                step="receive message",
                hint="other connections hold it; try again later",
            )

    def begin(self, request: Request, held_bytes: int) -> Call:
        """Begin the call of a request.

        Raises:
            CallError: ``invalid`` or ``resource``; there is no call.
        """
        call = Call(request, self, held_bytes)
        with self._lock:
            if request.msgid in self._calls:
                raise CallError(
                    "invalid", f"msgid {request.msgid} is in flight already", step="accept request"
                )
            if len(self._calls) >= self._max_in_flight:
                raise CallError(
                    "resource",
                    f"{self._max_in_flight} requests of this connection are in flight",
                    step="accept request",
                    hint="wait for an answer before the next request",
                )
            self._calls[request.msgid] = call
            self._unanswered += 1
        return call

    def answer(self, call: Call, outcome: Outcome) -> None:
        """Send the one answer of a call that was begun; its msgid is free again."""
        data = encode_response(call.msgid, outcome.error, outcome.result, self.limits)
        with self._lock:
            # before the answer goes out, because the peer may use the msgid again after it
            self._calls.pop(call.msgid, None)
        call.deadline.close()
        self._send(data)
        with self._lock:
            self._unanswered -= 1
        if self.read_ended:
            self._request_service(self)

    def answer_over(self, call: Call) -> None:
        """Answer a call whose deadline passed, or that was cancelled, before it was run."""
        try:
            call.deadline.check(f"wait for a thread to run {call.method}")
        except CallError as error:
            self.answer(call, Outcome(error.to_wire(), None))

    def answer_error(self, msgid: int | None, error: CallError) -> None:
        """Answer what was never begun: with a response, or ``rpc.error`` without a msgid."""
        if msgid is None:
            self._send(encode_notification(ERROR_METHOD, error.to_wire()))
        else:
            self._send(encode_response(msgid, error.to_wire(), None, self.limits))

    def end_of_input(self) -> None:
        """Take no more from the peer."""
        self.read_ended = True
        self._decoder.clear()
        self._cancel_waits()

    def end(self) -> None:
        """Close for good. Calls that no thread has taken are dropped, for no peer waits."""
        with self._lock:
            self.closed = True
            callbacks, self._on_close = self._on_close, []
        self.outbox.close()
        self._input_share.hold(0)
        self.stream.close()
        self._cancel_waits()
        with self._lock:
            calls = list(self._calls.values())
        for call in calls:
            call.withdraw()
        for callback in callbacks:
            callback()

    def _cancel_waits(self) -> None:
        with self._lock:
            calls = list(self._calls.values())
        for call in calls:
            if call.cancel_on_disconnect:
                call.deadline.cancel()

    def _send(self, data: bytes, *, droppable: bool = False) -> bool:
        room = self.limits.max_reply_bytes if droppable else None
        try:
            pending_bytes = self.outbox.put(data, max_bytes=room)
        except OutboxFull as problem:
            if not droppable:
                self.close(str(problem))
            return False
        except OSError as error:
            self.close(f"cannot write: {error}")
            return False
        if pending_bytes:
            self._request_service(self)
        return True


def _deadline(value: object, max_ms: int) -> Deadline:
    if value is None:
        return Deadline(None)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= max_ms:
        raise CallError(
            "invalid",
            f"deadline_ms {value!r:.40} is no number from 1 to {max_ms}",
            step="decode",
            object="params.deadline_ms",
        )
    return Deadline(value / 1000)


def _traceparent(value: object) -> str | None:
    """Check the form ``version-trace_id-parent_id-flags`` in lower-case hexadecimal digits.

    Source: https://www.w3.org/TR/trace-context/#traceparent-header
    """
    if value is None:
        return None
    if isinstance(value, str) and _is_traceparent(value):
        return value
    raise CallError(
        "invalid",
        f"traceparent {value!r:.80} is not of the form 00-<32 hex>-<16 hex>-<2 hex>",
        step="decode",
        object="params.traceparent",
    )


def _is_traceparent(text: str) -> bool:
    if len(text) > 255:
        return False
    parts = text.split("-")
    if [len(part) for part in parts[:4]] != [2, 32, 16, 2]:
        return False
    if not all(c in "0123456789abcdef" for part in parts[:4] for c in part):
        return False
    version, trace_id, parent_id = parts[:3]
    if version == "ff" or (version == "00" and len(parts) != 4):
        return False
    return trace_id.strip("0") != "" and parent_id.strip("0") != ""
