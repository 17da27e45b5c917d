"""The connection under a handle: one that ends with it, or, where asked, one that is made again."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping

from guestagent.api import PROTOCOL_VERSIONS, HelloReply, HelloRequest
from vsock.address import Address, parse_address
from vsock.client import Client, ClosedHandleError, NotificationCallback, PendingCall
from vsock.deadline import Deadline
from vsock.errors import ConnectionClosed, RpcError
from vsock.threads import start_thread

__all__ = (
    "HELLO_MS",
    "HELLO_PAUSE_SECONDS",
    "Link",
    "Traceparent",
    "common_params",
    "hello_seconds",
)

#: W3C text that every request carries, or what returns it for each.
Traceparent = str | Callable[[], str | None] | None

HELLO_MS = 10_000
_HELLO_SECONDS = (5.0, 60.0)
#: Before the next attempt, when a connection ended before hello was answered.
HELLO_PAUSE_SECONDS = 0.1
#: Pauses between attempts to make the connection again; each attempt dials again and again itself.
_PAUSES_SECONDS = (0.0, 0.2, 0.5, 1.0, 2.0)


def hello_seconds(connect_seconds: float) -> float:
    """Return what an agent that is connected to gets to say hello in."""
    return max(_HELLO_SECONDS[0], min(_HELLO_SECONDS[1], connect_seconds))


def common_params(traceparent: Traceparent) -> dict[str, object]:
    """Return the parameters of every request beside its own."""
    value = traceparent() if callable(traceparent) else traceparent
    return {} if value is None else {"traceparent": value}


class Link:
    """Thread-safe. With ``reconnect`` a thread of its own makes a lost connection again."""

    def __init__(
        self,
        address: str | Address,
        *,
        name: str,
        connect_seconds: float,
        reconnect: bool,
        traceparent: Traceparent,
        on_notification: NotificationCallback,
        on_reconnect: Callable[[Client], None],
        until: Deadline | None = None,
    ) -> None:
        """Connect and say hello. ``on_reconnect`` is told of each later connection.

        When ``until`` passes or is cancelled, connecting ends, and so does the connection.
        """
        self.address = parse_address(address) if isinstance(address, str) else address
        self._name = name
        self._connect_seconds = connect_seconds
        self._traceparent = traceparent
        self._on_notification = on_notification
        self._on_reconnect = on_reconnect
        self._until = until
        self._changed = threading.Condition()
        self._closed = False
        self._is_lost = False
        self._why: Exception | None = None
        self._reviver: threading.Thread | None = None
        self.reconnect = reconnect
        #: How often the connection was made again.
        self.reconnects = 0
        self.client, self.hello = self._connect()
        if reconnect:
            self._reviver = threading.Thread(target=self._revive, name="reconnect", daemon=True)
            start_thread(self._reviver)

    def call(self, method: str, params: Mapping[str, object], *, deadline_ms: int) -> object:
        """Call a method; see ``Client.call``."""
        client = self._usable()
        return client.call(method, self._with_common(params), deadline_ms=deadline_ms)

    def start_call(
        self, method: str, params: Mapping[str, object], *, deadline_ms: int | None = None
    ) -> PendingCall:
        """Send a request; see ``Client.start_call``."""
        client = self._usable()
        return client.start_call(method, self._with_common(params), deadline_ms=deadline_ms)

    def wait_for_callbacks(self, seconds: float) -> bool:
        """See ``Client.wait_for_callbacks``."""
        return self.client.wait_for_callbacks(seconds)

    def close(self) -> None:
        """Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.client.close()
        if self._reviver is not None and self._reviver is not threading.current_thread():
            self._reviver.join()
            self.client.close()  # the one that was made meanwhile

    def _with_common(self, params: Mapping[str, object]) -> dict[str, object]:
        return {**params, **common_params(self._traceparent)}

    def _connect(self) -> tuple[Client, HelloReply]:
        """Connect and say hello; again where the connection ends before that is answered.

        An agent that is about to die, or about to be there, still or already takes connections.
        Nothing was asked of it yet, so that asking again does no harm.
        """
        ends_at = time.monotonic() + self._connect_seconds
        while True:
            left = max(0.0, ends_at - time.monotonic())
            try:
                return self._connect_once(left)
            except ConnectionClosed:
                if self._is_over() or time.monotonic() + HELLO_PAUSE_SECONDS >= ends_at:
                    raise
            with self._changed:
                self._changed.wait_for(lambda: self._closed, HELLO_PAUSE_SECONDS)

    def _connect_once(self, connect_seconds: float) -> tuple[Client, HelloReply]:
        client = Client(
            self.address,
            connect_seconds=connect_seconds,
            on_notification=self._on_notification,
            on_end=self._ended,
            until=self._until,
        )
        try:
            request = HelloRequest(versions=PROTOCOL_VERSIONS, client=self._name).to_wire()
            seconds = hello_seconds(self._connect_seconds)
            reply = client.call("agent.hello", request, timeout_seconds=seconds)
            return client, HelloReply.from_wire(reply, "reply")
        except BaseException:
            client.close()
            raise

    def _is_over(self) -> bool:
        """Return whether there is to be no connection any more."""
        return self._closed or (self._until is not None and self._until.over)

    def _usable(self) -> Client:
        """Return the connection; wait for it, for as long as connecting may take.

        Raises:
            ClosedHandleError: the handle was closed.
            ConnectionClosed: there is none, and will be none soon.
        """
        if self._closed:
            raise ClosedHandleError(f"the handle of {self.address} is closed")
        if not self.reconnect or not self.client.closed:
            return self.client
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self.client.closed, self._connect_seconds
            )
            if self._closed:
                raise ClosedHandleError(f"the handle of {self.address} is closed")
            if self.client.closed:
                raise ConnectionClosed(f"no connection to {self.address}: {self._why}")
            return self.client

    def _ended(self, why: ConnectionClosed) -> None:
        with self._changed:
            self._is_lost = True
            self._why = why
            self._changed.notify_all()

    def _revive(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._is_lost)
                if self._closed:
                    return
            self.client.close()
            attempt = 0
            while not self._made_again():
                pause = _PAUSES_SECONDS[min(attempt, len(_PAUSES_SECONDS) - 1)]
                attempt += 1
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, pause):
                        return

    def _made_again(self) -> bool:
        """Make the connection again; return whether there is nothing left to do."""
        with self._changed:
            self._is_lost = False
        try:
            client, hello = self._connect()
        except (RpcError, OSError) as error:
            with self._changed:
                self._why = error
            return self._is_over()
        with self._changed:
            self.client, self.hello = client, hello
            self.reconnects += 1
            self._changed.notify_all()
        # in use by now, because callbacks may ask; a loss meanwhile is noticed as any other
        with contextlib.suppress(RpcError, OSError):
            self._on_reconnect(client)
        return True
