"""A MessagePack-RPC client: calls from any thread, many at once, on one connection.

One thread reads and hands each answer to the thread that waits for it; another runs the callbacks
for notifications, so that a callback may call back into the client.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Mapping

from vsock.address import Address, parse_address
from vsock.closeable import Closeable
from vsock.deadline import Deadline
from vsock.dial import connect
from vsock.errors import CallError, ConnectionClosed
from vsock.protocol import (
    MARGIN_SECONDS,
    ClientProtocol,
    ClosedHandleError,
    NotificationCallback,
    answer_seconds,
    no_answer,
)
from vsock.rpc import Limits, Notification
from vsock.stream import Stream
from vsock.threads import start_thread

__all__ = (
    "MARGIN_SECONDS",
    "Client",
    "ClosedHandleError",
    "NotificationCallback",
    "NotificationQueue",
    "PendingCall",
)

_READ_BYTES = 256 * 1024
#: How long a peer may leave a message unread before a call gives up on sending.
_SEND_SECONDS = 30.0
_LAST_WORDS_SECONDS = 2.0
_MAX_WAITING_MESSAGES = 4096
_MAX_WAITING_BYTES = 16 * 1024 * 1024


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
            assert timeout_seconds is not None
            raise no_answer(self.method, timeout_seconds)
        if self._error is not None:
            raise self._error
        return self._result

    def forget(self) -> None:
        """Give up on the answer: when it comes it is dropped. The peer is not told."""
        self._client._protocol.forget(self.msgid)

    def cancel(self) -> None:
        """Ask the peer to stop; the call then ends as ``cancelled``, or as it ended meanwhile.

        Raises:
            ConnectionClosed: the peer cannot be asked any more.
        """
        if not self.done:
            self._client._cancel(self.msgid)

    def settle(self, error: Exception | None, result: object) -> None:
        """Take the outcome. For the client."""
        self._error, self._result = error, result
        self._done.set()


class Client(Closeable):
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
        stream: Stream | None = None,
    ) -> None:
        """Connect, trying again for ``connect_seconds`` while no server is there yet.

        A ``stream`` that is connected to ``address`` already is taken over instead.

        When ``until`` passes or is cancelled, connecting ends, and so does the connection.
        ``on_notification`` runs on a thread of its own, one notification at a time; if it raises,
        ``threading.excepthook`` hears of it and no more are delivered. ``on_end`` is told once that
        the connection has ended, and why; it must not wait.

        Raises:
            ValueError: the address is not one.
            ConnectionClosed: no server was there in time, access is denied, or ``until`` was over.
        """
        self.address = parse_address(address) if isinstance(address, str) else address
        self._protocol = ClientProtocol(self.address, limits)
        self._on_notification = on_notification
        self._on_end = on_end
        self._cancel_method = cancel_method
        self._send_lock = threading.Lock()
        self._notifications = NotificationQueue()
        self._stream = stream or connect(self.address, connect_seconds, until)
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
        return self._protocol.closed

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
        pending = self.start_call(method, params, deadline_ms=deadline_ms)
        try:
            return pending.result(answer_seconds(deadline_ms, timeout_seconds))
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
        pending, data = self._protocol.start_call(
            method, params, deadline_ms, lambda msgid: PendingCall(self, msgid, method)
        )
        try:
            self._send(data)
        except BaseException:
            pending.forget()
            raise
        return pending

    def notify(self, method: str, params: Mapping[str, object] | None = None) -> None:
        """Send a notification.

        Raises:
            ConnectionClosed: the connection has ended.
            LocalProtocolError: the notification cannot be sent.
        """
        self._send(self._protocol.notification(method, params))

    def wait_for_callbacks(self, seconds: float) -> bool:
        """Wait until the callbacks have had every notification that is here now.

        At once from a callback, and where there are none. False if it takes longer.
        """
        if self._dispatcher is None or self._dispatcher is threading.current_thread():
            return True
        return self._notifications.wait_handled(seconds)

    def close(self) -> None:
        """End the connection; every pending call fails. Idempotent."""
        self._protocol.close()
        self._ended.cancel()
        self._notifications.close()
        for thread in (self._reader, self._dispatcher):
            if thread is None or thread.ident is None:  # never asked for, or not to be had
                continue
            if thread is not threading.current_thread():
                thread.join()
        with self._send_lock:
            self._stream.close()
        self._ended.close()

    def _send(self, data: bytes) -> None:
        try:
            with self._send_lock:
                self._write(data)
        except CallError as error:
            # half a message is out: no other may follow it
            self._ended.cancel()
            raise self._protocol.broken(error) from error
        except OSError as error:
            # what the peer said before it went is still to be read, and says more than EPIPE does
            if threading.current_thread() is not self._reader:
                self._reader.join(_LAST_WORDS_SECONDS)
            self._ended.cancel()
            raise self._protocol.broken(error) from error

    def _write(self, data: bytes) -> None:
        try:
            taken = self._stream.send(data)
        except BlockingIOError:
            taken = 0
        if taken == len(data):
            return
        with self._ended.part(_SEND_SECONDS) as deadline:
            self._stream.sendall(memoryview(data)[taken:], deadline)

    def _cancel(self, msgid: int) -> None:
        self.start_call(self._cancel_method, {"msgid": msgid})

    def _read(self) -> None:
        """Read until the connection ends; then fail the pending calls."""
        why = "the peer closed the connection"
        try:
            while data := self._receive():
                self._received(data)
        except CallError:
            why = self._why_ended()
        except (OSError, ConnectionClosed) as error:
            why = str(error)
        over = self._protocol.end(why)
        self._notifications.close()
        if self._on_end is not None and over is not None:
            self._on_end(over)

    def _received(self, data: bytes) -> None:
        for found in self._protocol.receive(data):
            if isinstance(found, bytes):
                self._send(found)
            elif self._on_notification is not None:
                self._notifications.put(found)

    def _why_ended(self) -> str:
        if self._protocol.over is None and self._protocol.closed:
            return "the client was closed"
        if self._until is not None and self._until.over:
            return "it was given up"
        return "sending failed"

    def _receive(self) -> bytes:
        while True:
            self._ended.wait((self._stream.fileno(),), "read")
            with contextlib.suppress(BlockingIOError):
                return self._stream.recv(_READ_BYTES)

    def _dispatch(self, callback: NotificationCallback) -> None:
        while (message := self._notifications.get()) is not None:
            callback(message.method, message.params)


class NotificationQueue:
    """Notifications that wait for their callback; past a bound the oldest are dropped."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._waiting: deque[Notification] = deque()
        self._waiting_bytes = 0
        self._closed = False
        self._put = 0
        self._handled = 0
        self.dropped = 0

    def put(self, message: Notification) -> None:
        with self._ready:
            self._put += 1
            self._waiting.append(message)
            self._waiting_bytes += message.memory_bytes
            while (
                len(self._waiting) > _MAX_WAITING_MESSAGES
                or self._waiting_bytes > _MAX_WAITING_BYTES
            ):
                self._waiting_bytes -= self._waiting.popleft().memory_bytes
                self.dropped += 1
            self._ready.notify_all()

    def get(self) -> Notification | None:
        """Return the next notification; None when there is none and will be none.

        Calling this marks the notification before as handled.
        """
        with self._ready:
            self._handled = self._put - len(self._waiting)
            self._ready.notify_all()
            self._ready.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            message = self._waiting.popleft()
            self._waiting_bytes -= message.memory_bytes
            return message

    def wait_handled(self, seconds: float) -> bool:
        """Wait until the notifications here now are handled; False if that takes longer."""
        with self._ready:
            last = self._put
            return self._ready.wait_for(lambda: self._handled >= last or self._closed, seconds)

    def close(self) -> None:
        with self._ready:
            self._closed = True
            self._ready.notify_all()
