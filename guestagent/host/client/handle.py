"""The host's handle on one agent, for threads: a typed method for each RPC.

    with GuestAgent("hybrid:///run/vm.vsock:1023") as guest:
        guest.layer_mount(LayerSpec(layer_id="base", device=PmemDevice(number=0), ...))
        guest.call(LayerGet(layer_id="base"))  # any request of the contract, the same

Requests and replies are the records of ``guestagent.api``. ``guestagent.host.client.aio`` has the
handle for asyncio.
"""

from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from typing import Any, Generic, Self, TypeVar

from guestagent import __version__
from guestagent.api.agent import EventsReply, SubscribeReply
from guestagent.api.inspect import StreamRequest
from guestagent.api.observe import LogReply
from guestagent.api.request import Request
from guestagent.host.client.events import ALL_EVENTS, EventCallback, Following, LogCallback, Steps
from guestagent.host.client.fs import FsMethods
from guestagent.host.client.link import (
    HELLO_MS,
    DisconnectCallback,
    Link,
    LinkSettings,
    Traceparent,
)
from guestagent.host.client.methods import STREAM_DEADLINE_MS, AgentMethods
from guestagent.host.client.streams import (
    HAND_OVER_SECONDS,
    FsStream,
    ProgressCallback,
    StreamTable,
)
from guestagent.host.client.thin import ThinMethods
from vsock.address import Address
from vsock.client import MARGIN_SECONDS, Client
from vsock.closeable import Closeable
from vsock.deadline import Deadline
from vsock.errors import ConnectionClosed, RpcError
from vsock.record import Record

__all__ = ("GuestAgent", "LogCallback", "PendingReply")

R = TypeVar("R", bound=Record)
T = TypeVar("T")


class PendingReply(Generic[R]):
    """A request whose reply is on its way. Leaving the block before it is here cancels it.

    Every method may be called from any thread.
    """

    def __init__(
        self,
        link: Link,
        table: StreamTable,
        request: Request[R],
        *,
        deadline_ms: int,
        progress: ProgressCallback | None,
    ) -> None:
        """Send the request; see ``GuestAgent.start``."""
        self._link = link
        self._table = table
        self._request = request
        self._progress = progress
        self._timeout_seconds = deadline_ms / 1000 + MARGIN_SECONDS
        with table.lock if progress is not None else nullcontext():
            self._pending = link.start_call(
                request.method, request.to_sparse_wire(), deadline_ms=deadline_ms
            )
            table.add(self._pending.msgid, None, progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._pending.done:
            self.cancel()
        self._forget()

    @property
    def done(self) -> bool:
        """True once the reply or an error is here."""
        return self._pending.done

    def result(self) -> R:
        """Wait for the reply and return it. May be called again, and by many threads.

        Raises:
            CallError: the agent's answer; ``cancelled`` after ``cancel``; ``timeout``, also when no
                answer came within the deadline and five seconds.
            ConnectionClosed: the connection ended before the answer.
        """
        try:
            value = self._pending.result(self._timeout_seconds)
        except RpcError:
            self._forget()
            raise
        if self._progress is not None:  # what was told before the answer comes before it here
            self._link.wait_for_callbacks(HAND_OVER_SECONDS)
        return self._request.read_reply(value)

    def cancel(self) -> None:
        """Ask the agent to stop; ``result`` then raises ``cancelled``, or has what came first."""
        # where the agent cannot be asked any more, result() says so
        with suppress(ConnectionClosed):
            self._pending.cancel()

    def _forget(self) -> None:
        self._pending.forget()
        if self._progress is not None:
            self._table.drop(self._pending.msgid, None)


class GuestAgent(Closeable, Following, AgentMethods, FsMethods, ThinMethods):
    """A connection to an agent that has said hello. A context manager.

    Every method may be called from any thread; calls from several threads are in flight at once.
    ``call`` sends any request and returns its reply. Each RPC has a method of its name as well:
    ``layer.mount`` is ``layer_mount``, ``agent.status`` is ``status``. All of them raise:

        CallError         the agent's answer: ``code`` (decide by it), ``message`` (for a person),
                          ``errno`` (this machine's number, or None), ``step``, ``object``, ``hint``
                          and ``kernel_log``; code ``timeout`` also when no answer came in time
        ConnectionClosed  the connection ended before the answer; what was asked may have been done
        ClosedHandleError (a ConnectionClosed) the handle was closed; nothing was sent

    Callbacks run on a thread of the handle, one at a time, and may call its methods. If a callback
    raises, all callbacks of this connection end and ``threading.excepthook`` gets the exception.

        number = guest.set_event_callback(print, event_mask("layer_corrupted", "layer_device_lost"))
        guest.delete_event_callback(number)
        guest.layer_verify("base", progress=lambda done, total: print(done, "of", total))

    Nothing reconnects unless ``reconnect=True`` asks for it: then a lost connection is made again
    in the background, calls wait for it for up to ``connect_seconds``, event callbacks get what
    they missed, each event once and in order, and followers of the log the lines they missed. A
    call that was in flight still raises ``ConnectionClosed``: whether to ask again is for the
    caller to know.
    """

    def __init__(
        self,
        address: str | Address,
        *,
        connect_seconds: float = 10.0,
        deadline_ms: int = 60_000,
        reconnect: bool = False,
        traceparent: Traceparent = None,
        name: str = f"guestctl/{__version__}",
        on_disconnect: DisconnectCallback | None = None,
        until: Deadline | None = None,
    ) -> None:
        """Connect and say hello.

        Args:
            address: text as ``vsock.address.parse_address`` reads it, or an ``Address``.
            connect_seconds: how long to try while the machine boots.
            deadline_ms: the deadline of each request that names none itself; the agent holds it.
            reconnect: make a lost connection again.
            traceparent: W3C trace context for every request, or what returns it for each; the
                agent's log and events carry it.
            name: what the agent may log as the name of the client.
            on_disconnect: gets the reason, a ``ConnectionClosed``, each time when a connection that
                had said hello ends; a ``ClosedHandleError`` when the handle was closed. On a thread
                of the handle's; it must not wait.
            until: when it passes or is cancelled, connecting ends, and so does the connection;
                calls in flight raise ``ConnectionClosed``. For giving up from another thread.

        Raises:
            ValueError: the address is none.
            ConnectionClosed: no agent answered in time, or ``until`` was over.
        """
        super().__init__(on_disconnect)
        self._deadline_ms = deadline_ms
        settings = LinkSettings(
            address=address,
            name=name,
            connect_seconds=connect_seconds,
            reconnect=reconnect,
            traceparent=traceparent,
            on_notification=self._notified,
            on_disconnect=self._disconnected,
        )
        self._link = Link(settings, on_reconnect=self._catch_up, until=until)
        #: What the agent answered to the first hello: version, features, limits, boot.
        self.hello = self._link.hello
        self._feeds.connected(self.hello.boot.get("boot_id"))

    def close(self) -> None:
        """End the connection; calls in flight raise ``ClosedHandleError``. Idempotent."""
        self._link.close()

    @property
    def closed(self) -> bool:
        """True once no call can succeed any more; with ``reconnect``, while not connected."""
        return self._link.client.closed

    @property
    def reconnects(self) -> int:
        """How often a lost connection was made again."""
        return self._link.reconnects

    @property
    def _client(self) -> Client:
        return self._link.client

    def call(
        self,
        request: Request[R],
        *,
        deadline_ms: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> R:
        """Send a request and return its reply. An exception meanwhile cancels the request.

        ``deadline_ms`` is the handle's by default; with 0 nothing is sent, and the error is
        ``timeout``. ``progress`` gets (done_bytes, total_bytes) on a thread of the handle's, where
        0 in all means unknown.
        """
        with self.start(request, deadline_ms=deadline_ms, progress=progress) as pending:
            return pending.result()

    def start(
        self,
        request: Request[R],
        *,
        deadline_ms: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> "PendingReply[R]":
        """Send a request; wait for its reply, or cancel it from any thread, with what is returned.

        with guest.start(LayerVerify(layer_id="base")) as pending:
            ...  # another thread may call pending.cancel()
            reply = pending.result()
        """
        deadline_ms = self._deadline_ms if deadline_ms is None else deadline_ms
        return PendingReply(
            self._link, self._streams, request, deadline_ms=deadline_ms, progress=progress
        )

    def stream(
        self,
        request: StreamRequest[Record, T],
        *,
        deadline_ms: int = STREAM_DEADLINE_MS,
        progress: ProgressCallback | None = None,
    ) -> FsStream[T]:
        """Send a request whose answer comes in chunks; iterate over its items."""
        return FsStream(
            self._link, self._streams, request, deadline_ms=deadline_ms, progress=progress
        )

    # --- events

    def events(self, since: int = 0) -> EventsReply:
        """Return all kept events after a sequence number, and how many are no longer kept.

        The numbers are of one boot: see ``boot_id`` of the reply.
        """
        return self._run(self._feeds.kept_events(since))

    def subscribe(self, callback: EventCallback, mask: int = ALL_EVENTS) -> SubscribeReply:
        """Call ``callback`` with each event from now on whose bit is in ``mask``.

        The reply has the number of the last event before.
        """
        _, reply = self._run(self._feeds.subscribe(callback, mask, always=True))
        assert reply is not None
        return reply

    def set_event_callback(self, callback: EventCallback, mask: int = ALL_EVENTS) -> int:
        """As ``subscribe``; return what ``delete_event_callback`` takes.

        ``event_mask("layer_corrupted", ...)`` makes a mask, also of ``HANDLE_EVENTS``: the loss of
        a connection and the close of the handle, with the reason as ``detail``. These have the
        sequence 0 and come on the thread that noticed it, perhaps while another callback runs.

        Raises:
            ValueError: the mask holds no bits of events, or others.
        """
        return self._run(self._feeds.subscribe(callback, mask, always=False))[0]

    def follow_log(
        self, callback: LogCallback, *, since: int | None = None, level: str = "info"
    ) -> LogReply:
        """Call ``callback`` with each line of the log from now on, of ``level`` and above.

        With ``since``, first those after that number; negative, so many from the end. The reply
        holds none of them. A second call replaces the callback.
        """
        return self._run(self._feeds.follow_log(callback, since, level))

    # --- inside

    def _run(self, steps: Steps[T], client: Client | None = None) -> T:
        """Send the requests of some steps, on a new connection where one is given."""
        with closing(steps):
            go_on: Callable[[Any], Request[Record]] = steps.send
            answer: object = None
            while True:
                try:
                    request = go_on(answer)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                try:
                    go_on, answer = steps.send, self._answer(request, client)
                except RpcError as error:
                    go_on, answer = steps.throw, error

    def _answer(self, request: Request[Record], client: Client | None) -> Record:
        if client is None:
            return self.call(request)
        params = request.to_sparse_wire()
        return request.read_reply(client.call(request.method, params, deadline_ms=HELLO_MS))

    def _catch_up(self, client: Client) -> None:
        self._feeds.connected(self._link.hello.boot.get("boot_id"))
        self._run(self._feeds.catch_up(), client)
