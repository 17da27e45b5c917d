"""The connection under a handle. Where asked, a lost connection is made again."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from guestagent.api.agent import PROTOCOL_VERSIONS, AgentHello, HelloReply
from vsock.address import Address, parse_address
from vsock.client import Client, ClosedHandleError, NotificationCallback, PendingCall
from vsock.deadline import Deadline
from vsock.dial import connect
from vsock.errors import CallError, ConnectionClosed, RpcError
from vsock.retry import retry
from vsock.threads import start_thread

__all__ = (
    "FIRST_PAUSE_SECONDS",
    "HELLO_MS",
    "MOST_PAUSE_SECONDS",
    "DisconnectCallback",
    "Link",
    "LinkCore",
    "LinkSettings",
    "Traceparent",
    "is_lost",
)

#: Gets the reason why a connection that had said hello ended.
DisconnectCallback = Callable[[ConnectionClosed], None]
#: W3C text that every request carries, or what returns it for each.
Traceparent = str | Callable[[], str | None] | None

HELLO_MS = 10_000
_HELLO_SECONDS = (5.0, 60.0)
#: Pauses between attempts to say hello, which double; each attempt dials repeatedly by itself.
FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 0.1, 2.0


def is_lost(error: BaseException) -> bool:
    """Return whether a connection ended before its hello was answered.

    An agent that is about to die, or about to be there, still or already takes connections.
    Nothing was asked of it yet, so that asking again does no harm.
    """
    return isinstance(error, ConnectionClosed) and not isinstance(error, ClosedHandleError)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """What the connection under a handle is made with; see ``GuestAgent``."""

    address: str | Address
    name: str
    connect_seconds: float
    reconnect: bool
    traceparent: Traceparent
    on_notification: NotificationCallback
    on_disconnect: DisconnectCallback


class LinkCore:
    """The state of the connection under a handle, whatever it waits with."""

    def __init__(self, settings: LinkSettings) -> None:
        address = settings.address
        self.address = parse_address(address) if isinstance(address, str) else address
        self._settings = settings
        self._hello = AgentHello(versions=PROTOCOL_VERSIONS, client=settings.name)
        #: What an agent that is connected to gets to say hello in.
        self._hello_seconds = max(
            _HELLO_SECONDS[0], min(_HELLO_SECONDS[1], settings.connect_seconds)
        )
        self._closed = False
        self._is_up = False
        #: Why there is no connection.
        self._why: Exception | None = None
        #: How often the connection was made again.
        self.reconnects = 0

    def _params(
        self, method: str, params: Mapping[str, object], deadline_ms: int | None
    ) -> dict[str, object]:
        """Add the parameters that every request has.

        Raises:
            CallError: ``timeout``; ``deadline_ms`` is 0.
        """
        if deadline_ms == 0:
            text = f"no time is left for {method}: its deadline is 0 ms"
            raise CallError("timeout", text, step="send the request")
        trace = self._settings.traceparent
        value = trace() if callable(trace) else trace
        return dict(params) if value is None else {**params, "traceparent": value}

    def _closed_error(self) -> ClosedHandleError:
        return ClosedHandleError(f"the handle of {self.address} is not open")

    def _down_error(self) -> ConnectionClosed:
        return ConnectionClosed(f"no connection to {self.address}: {self._why}")


class Link(LinkCore):
    """Thread-safe. With ``reconnect`` a thread of its own makes a lost connection again."""

    def __init__(
        self,
        settings: LinkSettings,
        *,
        on_reconnect: Callable[[Client], None],
        until: Deadline | None = None,
    ) -> None:
        """Connect and say hello. ``on_reconnect`` is told of each later connection.

        When ``until`` passes or is cancelled, connecting ends, and so does the connection.
        """
        super().__init__(settings)
        self._on_reconnect = on_reconnect
        self._until = until
        #: For connecting: passes and is cancelled with ``until``, and is cancelled by ``close``.
        self._ending = Deadline() if until is None else until.part()
        self._changed = threading.Condition()
        self._is_lost = False
        self._reviver: threading.Thread | None = None
        try:
            self.client, self.hello = self._connect()
        except BaseException:
            self._ending.close()
            raise
        if not settings.reconnect:
            self._ending.close()
        else:
            self._reviver = threading.Thread(target=self._revive, name="reconnect", daemon=True)
            start_thread(self._reviver)

    def start_call(
        self, method: str, params: Mapping[str, object], *, deadline_ms: int | None = None
    ) -> PendingCall:
        """Send a request; see ``Client.start_call``."""
        params = self._params(method, params, deadline_ms)
        return self._usable().start_call(method, params, deadline_ms=deadline_ms)

    def wait_for_callbacks(self, seconds: float) -> bool:
        """See ``Client.wait_for_callbacks``."""
        return self.client.wait_for_callbacks(seconds)

    def close(self) -> None:
        """Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._ending.cancel()
        self.client.close()
        if self._reviver is not None and self._reviver is not threading.current_thread():
            self._reviver.join()
            self.client.close()  # a connection made meanwhile

    def _connect(self) -> tuple[Client, HelloReply]:
        """Connect and say hello; again where the connection is lost before hello is answered."""
        with self._ending.part(self._settings.connect_seconds) as whole:
            try:
                return retry(
                    partial(self._connect_once, whole),
                    whole,
                    when=is_lost,
                    step=f"connect to {self.address}",
                    first_seconds=FIRST_PAUSE_SECONDS,
                    most_seconds=MOST_PAUSE_SECONDS,
                )
            except CallError as error:
                if error.code != "cancelled":
                    raise
                raise ConnectionClosed(f"cannot connect to {self.address}: {error}") from error

    def _connect_once(self, whole: Deadline) -> tuple[Client, HelloReply]:
        with self._changed:
            self._is_lost = False
        client = Client(
            self.address,
            stream=connect(self.address, self._settings.connect_seconds, whole),
            on_notification=self._settings.on_notification,
            on_end=self._ended,
            until=self._until,
        )
        try:
            request = self._hello
            reply = client.call(
                request.method, request.to_wire(), timeout_seconds=self._hello_seconds
            )
            hello = request.read_reply(reply)
            with self._changed:
                self._is_up = not self._is_lost
                why = self._why
            if not self._is_up and isinstance(why, ConnectionClosed):
                self._settings.on_disconnect(why)  # it ended as soon as it had answered
            return client, hello
        except BaseException:
            client.close()
            raise

    def _usable(self) -> Client:
        """Return the connection; wait for it, for as long as connecting may take.

        Raises:
            ClosedHandleError: the handle was closed.
            ConnectionClosed: there is none, and will be none soon.
        """
        if self._closed:
            raise self._closed_error()
        if not self._settings.reconnect or not self.client.closed:
            return self.client
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self.client.closed, self._settings.connect_seconds
            )
            if self._closed:
                raise self._closed_error()
            if self.client.closed:
                raise self._down_error()
            return self.client

    def _ended(self, why: ConnectionClosed) -> None:
        with self._changed:
            was_up, self._is_up = self._is_up, False
            self._is_lost = True
            self._why = why
            self._changed.notify_all()
        if was_up:
            self._settings.on_disconnect(why)

    def _revive(self) -> None:
        with self._ending:
            while self._revive_once():
                pass

    def _revive_once(self) -> bool:
        """Wait for a loss and make the connection again; False when the handle needs none."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._is_lost)
            if self._closed:
                return False
        self.client.close()
        try:
            client = retry(
                self._make_again,
                self._ending,
                when=lambda error: isinstance(error, (RpcError, OSError)),
                step=f"connect to {self.address}",
                first_seconds=FIRST_PAUSE_SECONDS,
                most_seconds=MOST_PAUSE_SECONDS,
            )
        except (RpcError, OSError):
            return False  # the handle was closed, or its time is over
        # in use by now, because callbacks may ask; a loss meanwhile is noticed as any other
        with contextlib.suppress(RpcError, OSError):
            self._on_reconnect(client)
        return True

    def _make_again(self) -> Client:
        try:
            client, hello = self._connect()
        except (RpcError, OSError) as error:
            with self._changed:
                self._why = error
            raise
        with self._changed:
            self.client, self.hello = client, hello
            self.reconnects += 1
            self._changed.notify_all()
        return client
