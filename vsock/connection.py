"""One peer of a server: what it has asked, what it has been answered, and whether it is there."""

import errno
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record
from vsock.rpc import (
    ERROR_METHOD,
    Decoder,
    Limits,
    Request,
    encode_notification,
    encode_response,
)
from vsock.stream import Stream

__all__ = ("MAX_DEADLINE_MS", "Call", "Connection", "Outbox", "OutboxFull", "Outcome")

MAX_DEADLINE_MS = 86_400_000
_PAUSE_BYTES = 256 * 1024
#: Below the pause, so that a peer which takes bulk data slowly can still cancel it.
_BULK_BYTES = 128 * 1024

_numbers = itertools.count(1)


class Outcome:
    """What a handler answers: an error map, or a result."""

    __slots__ = ("error", "result")

    def __init__(self, error: Mapping[str, object] | None, result: object) -> None:
        self.error = error
        self.result = result


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
        "memory_bytes",
        "method",
        "msgid",
        "params",
        "traceparent",
    )

    def __init__(self, request: Request, connection: "Connection") -> None:
        """Check the common parameters and take them out.

        Raises:
            CallError: ``invalid``.
        """
        params = request.params
        self.traceparent = _traceparent(params.pop("traceparent", None))
        self.deadline = _deadline(params.pop("deadline_ms", None))
        self.msgid = request.msgid
        self.method = request.method
        self.params = params
        self.memory_bytes = request.memory_bytes
        self.connection = connection
        self._cancel_on_disconnect = False
        self._taken = threading.Lock()

    def take(self) -> bool:
        """Return True to the first who asks: that one runs or answers the call."""
        return self._taken.acquire(blocking=False)

    @property
    def cancel_on_disconnect(self) -> bool:
        """Whether the end of what the peer sends cancels the call.

        False at first: what was begun is brought to an end, whoever hears of it. A handler sets it
        for a call that only waits, so that no thread waits on behalf of nobody.
        """
        return self._cancel_on_disconnect

    @cancel_on_disconnect.setter
    def cancel_on_disconnect(self, value: bool) -> None:
        self._cancel_on_disconnect = value
        if value and (self.connection.closed or self.connection.read_ended):
            self.deadline.cancel()


class OutboxFull(Exception):
    """The peer does not read, and its share of memory is used up. Nothing was queued."""


class Outbox:
    """Bytes on their way to one stream, in the order of ``put``. Usable from several threads."""

    def __init__(self, stream: Stream, max_bytes: int) -> None:
        """Send on ``stream``, which is non-blocking and stays the caller's."""
        self._stream = stream
        self._max_bytes = max_bytes
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
            OutboxFull: more than ``max_bytes`` (by default the bound of this outbox) would pend.
            OSError: the stream is closed or broken.
        """
        bound = self._max_bytes if max_bytes is None else max_bytes
        with self._lock:
            if self._closed:
                raise BrokenPipeError(errno.EPIPE, "the connection is closed")
            if self._chunks:
                if self.pending_bytes + len(data) > bound:
                    raise OutboxFull
                self._chunks.append(data)
                self.pending_bytes += len(data)
                return self.pending_bytes
            rest = self._write(data)
            if rest:
                self._chunks.append(rest)
                self.pending_bytes = len(rest)
                self.progress_at = time.monotonic()
            return self.pending_bytes

    def flush(self) -> int:
        """Write what the stream takes now; return the bytes still pending.

        Raises:
            OSError: the stream is closed or broken.
        """
        with self._lock:
            before = self.pending_bytes
            while self._chunks and not self._closed:
                chunk = self._chunks.popleft()
                rest = self._write(chunk)
                self.pending_bytes -= len(chunk) - len(rest)
                if rest:
                    self._chunks.appendleft(rest)
                    break
            if self.pending_bytes != before:
                self.progress_at = time.monotonic()
            return self.pending_bytes

    def close(self) -> None:
        """Drop what pends; no byte is written to the stream from now on."""
        with self._lock:
            self._closed = True
            self._chunks.clear()
            self.pending_bytes = 0

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
        max_in_flight: int,
        must_introduce: bool,
        request_service: "Callable[[Connection], None]",
    ) -> None:
        """Take over ``stream``; ``request_service`` has the server thread serve this."""
        self.id = next(_numbers)
        self.peer = stream.peer
        #: Set by the handler once the peer has introduced itself.
        self.said_hello = False
        self.must_introduce = must_introduce
        self.stream = stream
        self.limits = limits
        self.decoder = Decoder(limits)
        #: True while there may be whole messages that wait until the peer has read its answers.
        self.has_more = False
        # below one reply, so that there is always room for one more
        self._pause_bytes = min(_PAUSE_BYTES, limits.max_reply_bytes)
        self.outbox = Outbox(stream, 2 * limits.max_reply_bytes)
        self.closed = False
        self.read_ended = False
        #: Why the server is to end this connection, None while it is to live.
        self.close_reason: str | None = None
        self.heard_at = time.monotonic()
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
        if call.take():  # no thread has come to it, and none needs to
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
    def must_read(self) -> bool:
        """True when the peer has to read before anything else is done for it."""
        return self.outbox.pending_bytes >= self._pause_bytes

    @property
    def wants_input(self) -> bool:
        return not (self.read_ended or self.has_more or self.must_read)

    @property
    def owes_answers(self) -> bool:
        return self._unanswered > 0

    def begin(self, request: Request) -> Call:
        """Enter a request into the books.

        Raises:
            CallError: ``invalid`` or ``resource``; it was not entered.
        """
        call = Call(request, self)
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
        """Send the one answer of a call that was begun, and strike it from the books."""
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
        """Note that the peer sends no more."""
        self.read_ended = True
        self._cancel_waits()

    def end(self) -> None:
        """Close for good. Calls that no thread has come to are dropped, for nobody waits."""
        with self._lock:
            self.closed = True
            callbacks, self._on_close = self._on_close, []
        self.outbox.close()
        self.stream.close()
        self._cancel_waits()
        with self._lock:
            calls = list(self._calls.values())
        for call in calls:
            call.take()
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
        except OutboxFull:
            if not droppable:
                self.close("it does not read its answers")
            return False
        except OSError as error:
            self.close(f"cannot write: {error}")
            return False
        if pending_bytes:
            self._request_service(self)
        return True


def _deadline(value: object) -> Deadline:
    if value is None:
        return Deadline(None)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_DEADLINE_MS:
        raise CallError(
            "invalid",
            f"deadline_ms {value!r:.40} is no number from 1 to {MAX_DEADLINE_MS}",
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
