"""A MessagePack-RPC client: calls from any thread, many at once, on one connection.

One thread reads and hands each answer to whoever waits for it; another runs the callbacks for
notifications, so that a callback may call back into the client.
"""

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Self

from vsock.address import Address, parse_address
from vsock.connect import connect
from vsock.deadline import Deadline
from vsock.errors import CallError, ConnectionClosed, LocalProtocolError
from vsock.inbox import Inbox
from vsock.rpc import (
    ERROR_METHOD,
    MAX_MSGID,
    Decoder,
    Limits,
    Malformed,
    Message,
    Notification,
    Request,
    Response,
    encode_notification,
    encode_request,
    encode_response,
)
from vsock.threads import start_thread

__all__ = ("Client", "ClosedHandleError", "NotificationCallback", "PendingCall")

log = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
#: What a peer may owe us in reading before a call gives up on sending.
_SEND_SECONDS = 30.0
_LAST_WORDS_SECONDS = 2.0
#: Beyond the deadline of a call, how long its answer may be on its way.
MARGIN_SECONDS = 5.0

#: Gets the method and the params of a notification.
NotificationCallback = Callable[[str, dict[str, object]], None]


class ClosedHandleError(ConnectionClosed):
    """The client has been closed on this side; nothing was sent."""


class PendingCall:
    """A call whose answer is on its way."""

    def __init__(self, client: "Client", msgid: int, method: str) -> None:
        self.msgid = msgid
        self.method = method
        self._client = client
        self._done = threading.Event()
        self._result: object = None
        self._error: Exception | None = None

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def result(self, timeout_seconds: float | None = None) -> object:
        """Wait for the answer and return its result. May be called again, and by many threads.

        Raises:
            CallError: what the peer answered; or ``timeout`` if ``timeout_seconds`` passed first,
                after which the answer may still come.
            ConnectionClosed: no answer will come.
        """
        if not self._done.wait(timeout_seconds):
            raise CallError(
                "timeout",
                f"no answer to {self.method} within {timeout_seconds:g} s",
                step=f"wait for the answer to {self.method}",
            )
        if self._error is not None:
            raise self._error
        return self._result

    def forget(self) -> None:
        """Give up on the answer: when it comes it is dropped. The peer is not told."""
        self._client._forget(self.msgid)

    def cancel(self) -> None:
        """Ask the peer to stop; the call then ends as ``cancelled``, or as it ended meanwhile.

        Raises:
            ConnectionClosed: the peer cannot be asked any more.
        """
        if not self.done:
            self._client._cancel(self.msgid)

    def _settle(self, error: Exception | None, result: object) -> None:
        self._error, self._result = error, result
        self._done.set()


class Client:
    """A connection to a server. A context manager; every method may be called from any thread."""

    def __init__(
        self,
        address: "str | Address",
        *,
        connect_seconds: float = 10.0,
        limits: Limits | None = None,
        on_notification: NotificationCallback | None = None,
        on_end: "Callable[[ConnectionClosed], None] | None" = None,
        cancel_method: str = "agent.cancel",
        until: Deadline | None = None,
    ) -> None:
        """Connect, trying again for ``connect_seconds`` while nobody is there yet.

        When ``until`` passes or is cancelled, connecting ends, and so does the connection.
        ``on_notification`` runs on a thread of its own, one notification at a time; if it raises,
        ``threading.excepthook`` hears of it and no more are delivered. ``on_end`` is told once that
        the connection has ended, and why; it must not wait.

        Raises:
            ValueError: the address is not one.
            ConnectionClosed: nobody answered in time, access is denied, or ``until`` was over.
        """
        self.address = parse_address(address) if isinstance(address, str) else address
        self._limits = limits or Limits()
        self._on_notification = on_notification
        self._on_end = on_end
        self._cancel_method = cancel_method
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._pending: dict[int, PendingCall] = {}
        self._msgids = itertools.count(1)
        self._closed = False
        self._over: ConnectionClosed | None = None
        self._complaint: CallError | None = None
        self._inbox = Inbox()
        self._stream = connect(self.address, connect_seconds, until)
        self._until = until
        self._ended = Deadline() if until is None else until.part()
        self._reader = threading.Thread(target=self._read, name="rpc-reader", daemon=True)
        self._dispatcher: threading.Thread | None = None
        try:
            start_thread(self._reader)
            if on_notification is not None:
                self._dispatcher = threading.Thread(
                    target=self._dispatch, args=(on_notification,), name="rpc-events", daemon=True
                )
                start_thread(self._dispatcher)
        except RuntimeError:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """True once no call can succeed any more."""
        return self._closed or self._over is not None

    @property
    def dropped_notifications(self) -> int:
        """How many notifications were dropped because callbacks did not keep up."""
        return self._inbox.dropped

    def call(
        self,
        method: str,
        params: Mapping[str, object] | None = None,
        *,
        deadline_ms: int | None = None,
        timeout_seconds: float | None = None,
    ) -> object:
        """Call ``method`` and return its result.

        ``deadline_ms`` is the peer's, which then answers ``timeout``; ``timeout_seconds`` is ours,
        by default a little more than the peer's, and unlimited without.

        Raises:
            CallError: the peer's answer; or ``timeout`` when ours passed.
            ConnectionClosed: the connection ended before the answer.
            LocalProtocolError: the request cannot be sent.
        """
        if timeout_seconds is None and deadline_ms is not None:
            timeout_seconds = deadline_ms / 1000 + MARGIN_SECONDS
        pending = self.start_call(method, params, deadline_ms=deadline_ms)
        try:
            return pending.result(timeout_seconds)
        finally:
            pending.forget()

    def start_call(
        self,
        method: str,
        params: Mapping[str, object] | None = None,
        *,
        deadline_ms: int | None = None,
    ) -> PendingCall:
        """Send a request; its answer is awaited by ``result`` of what is returned.

        Raises:
            ConnectionClosed: the connection has ended.
            LocalProtocolError: the request cannot be sent.
        """
        if deadline_ms is not None:
            params = {**(params or {}), "deadline_ms": deadline_ms}
        with self._lock:
            self._check_open()
            msgid = next(self._msgids) & MAX_MSGID
            while msgid in self._pending:
                msgid = next(self._msgids) & MAX_MSGID
            pending = self._pending[msgid] = PendingCall(self, msgid, method)
        try:
            self._send(encode_request(msgid, method, params))
        except BaseException:
            self._forget(msgid)
            raise
        return pending

    def notify(self, method: str, params: Mapping[str, object] | None = None) -> None:
        """Send a notification.

        Raises:
            ConnectionClosed: the connection has ended.
            LocalProtocolError: the notification cannot be sent.
        """
        with self._lock:
            self._check_open()
        self._send(encode_notification(method, params))

    def wait_for_callbacks(self, seconds: float) -> bool:
        """Wait until the callbacks have had every notification that is here now.

        At once from a callback, and where there are none. False if it takes longer.
        """
        if self._dispatcher is None or self._dispatcher is threading.current_thread():
            return True
        return self._inbox.wait_handled(seconds)

    def close(self) -> None:
        """End the connection; every pending call fails. Idempotent."""
        with self._lock:
            self._closed = True
        self._ended.cancel()
        self._inbox.close()
        for thread in (self._reader, self._dispatcher):
            if thread is None or thread.ident is None:  # never asked for, or not to be had
                continue
            if thread is not threading.current_thread():
                thread.join()
        with self._send_lock:
            self._stream.close()
        self._ended.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedHandleError(f"the client of {self.address} is closed")
        if self._over is not None:
            raise ConnectionClosed(str(self._over))

    def _send(self, data: bytes) -> None:
        if len(data) > self._limits.max_request_bytes:
            raise LocalProtocolError(
                f"a message of {len(data)} bytes is over {self._limits.max_request_bytes}"
            )
        try:
            with self._send_lock:
                self._write(data)
        except CallError as error:
            # half a message is out: no other may follow it
            self._ended.cancel()
            raise self._broken(error) from error
        except OSError as error:
            # what the peer said before it went is still to be read, and says more than EPIPE does
            if threading.current_thread() is not self._reader:
                self._reader.join(_LAST_WORDS_SECONDS)
            self._ended.cancel()
            raise self._broken(error) from error

    def _write(self, data: bytes) -> None:
        try:
            taken = self._stream.send(data)
        except BlockingIOError:
            taken = 0
        if taken == len(data):
            return
        with self._ended.part(_SEND_SECONDS) as deadline:
            self._stream.sendall(memoryview(data)[taken:], deadline)

    def _broken(self, error: Exception) -> ConnectionClosed:
        if self._closed:
            return ClosedHandleError(f"the client of {self.address} is closed")
        return ConnectionClosed(f"cannot send to {self.address}: {self._over or error}")

    def _cancel(self, msgid: int) -> None:
        self.start_call(self._cancel_method, {"msgid": msgid})

    def _forget(self, msgid: int) -> None:
        with self._lock:
            call = self._pending.pop(msgid, None)
        if call is not None:
            call._settle(given_up(call.method), None)

    def _read(self) -> None:
        """Read until the connection ends; then fail whatever is pending."""
        decoder = Decoder(self._limits, of_replies=True)
        why = "the peer closed the connection"
        try:
            while data := self._receive():
                decoder.feed(data)
                while (message := decoder.next()) is not None:
                    self._take(message)
        except CallError:
            why = self._why_ended()
        except (OSError, ConnectionClosed) as error:
            why = str(error)
        if self._complaint is not None:
            why = f"{why}, after {self._complaint}"
        kind = ClosedHandleError if self._closed else ConnectionClosed
        over = kind(f"connection to {self.address} ended: {why}")
        with self._lock:
            self._over = over
            pending, self._pending = list(self._pending.values()), {}
        for call in pending:
            call._settle(kind(f"{over} (before the answer to {call.method})"), None)
        self._inbox.close()
        if self._on_end is not None:
            self._on_end(over)

    def _why_ended(self) -> str:
        if self._closed:
            return "the client was closed"
        if self._until is not None and self._until.over:
            return "it was given up"
        return "sending failed"

    def _receive(self) -> bytes:
        while True:
            self._ended.wait((self._stream.fileno(),), "read")
            with contextlib.suppress(BlockingIOError):
                return self._stream.recv(_READ_BYTES)

    def _take(self, message: Message) -> None:
        if isinstance(message, Response):
            error = None if message.error is None else CallError.from_wire(message.error)
            self._answer(message.msgid, error, message.result)
        elif isinstance(message, Notification):
            self._notified(message)
        elif isinstance(message, Request):
            refusal = CallError("unsupported", "this side answers no requests", step="take message")
            self._send(encode_response(message.msgid, refusal.to_wire(), None, self._limits))
        else:
            self._malformed(message)

    def _answer(self, msgid: int, error: CallError | None, result: object) -> None:
        with self._lock:
            call = self._pending.pop(msgid, None)
        if call is None:
            log.debug("answer to msgid %d, which nobody waits for", msgid)
        else:
            call._settle(error, result)

    def _notified(self, message: Notification) -> None:
        if message.method == ERROR_METHOD:
            self._complaint = CallError.from_wire(message.params)
            log.warning("%s complains: %s", self.address, self._complaint)
        if self._on_notification is not None:
            self._inbox.put(message)

    def _malformed(self, message: Malformed) -> None:
        log.warning("%s sent what is no message: %s", self.address, message.error)
        if message.kind == "response" and message.msgid is not None:
            self._answer(message.msgid, message.error, None)
        if message.fatal:
            raise ConnectionClosed(str(message.error))

    def _dispatch(self, callback: NotificationCallback) -> None:
        while (message := self._inbox.get()) is not None:
            callback(message.method, message.params)


def given_up(method: str) -> CallError:
    """Return what a thread sees that still waits for a call which another has forgotten."""
    return CallError("cancelled", f"the answer to {method} was given up", step="wait for an answer")
