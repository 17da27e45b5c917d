"""The host's handle on one agent for asyncio: the twin of ``GuestAgent``.

async with AsyncGuestAgent("hybrid:///run/vm.vsock:1024") as guest:
    await guest.layer_mount(LayerSpec(layer_id="base", device=PmemDevice(number=0), ...))
    async for name in await guest.fs_ls("/", layer_id="base"):
        ...
"""

from collections.abc import Mapping
from typing import Self

from guestagent import __version__
from guestagent.api import Empty, Event, EventsReply, EventsRequest, HelloReply, SubscribeReply
from guestagent.api.observe import LogReply, LogRequest
from guestagent.host.client.aio_inspect import AsyncInspectMethods
from guestagent.host.client.aio_inspect_devices import AsyncDeviceMethods
from guestagent.host.client.aio_link import AsyncLink
from guestagent.host.client.aio_methods import AsyncAgentMethods
from guestagent.host.client.aio_streams import AsyncStreams
from guestagent.host.client.events import ALL_EVENTS, EventCallback, EventHub
from guestagent.host.client.handle import LogCallback
from guestagent.host.client.link import HELLO_MS, Traceparent
from vsock.address import Address
from vsock.aio import AsyncClient
from vsock.client import ClosedHandleError
from vsock.record import Record

__all__ = ("AsyncGuestAgent",)


class AsyncGuestAgent(AsyncAgentMethods, AsyncInspectMethods, AsyncDeviceMethods):
    """A connection to an agent, for the tasks of one event loop. Connects when it is entered.

    The methods are those of ``GuestAgent``, as coroutines, with the same arguments, replies and
    errors; methods that answer piece by piece return an asynchronous iterator, which is a context
    manager, too. Callbacks are plain functions, called by the event loop.
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
    ) -> None:
        """As ``GuestAgent``, but for connecting.

        Raises:
            ValueError: the address is none.
        """
        self._deadline_ms = deadline_ms
        self._hub = EventHub()
        self._held: list[Event] | None = None
        self._is_subscribed = False
        self._on_log: LogCallback | None = None
        self._log_level = "info"
        self._log_place = 0
        self._link = AsyncLink(
            address,
            name=name,
            connect_seconds=connect_seconds,
            reconnect=reconnect,
            traceparent=traceparent,
            on_notification=self._notified,
            on_reconnect=self._catch_up,
        )
        self._streams = AsyncStreams(self._link)

    @property
    def hello(self) -> HelloReply:
        """What the agent answered to hello: version, features, limits, boot."""
        if self._link.hello is None:
            raise ClosedHandleError(f"the handle of {self._link.address} is not open")
        return self._link.hello

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> Self:
        """Connect and say hello, trying for ``connect_seconds``.

        Raises:
            ConnectionClosed: nobody answered in time.
        """
        await self._link.open()
        return self

    async def close(self) -> None:
        """End the connection; calls in flight raise ``ClosedHandleError``. Idempotent."""
        await self._link.close()

    @property
    def closed(self) -> bool:
        """True once no call can succeed any more; with ``reconnect``, while nobody is there."""
        return self._link.client is None or self._link.client.closed

    @property
    def reconnects(self) -> int:
        """How often a lost connection was made again."""
        return self._link.reconnects

    async def call(
        self, method: str, request: Record, *, deadline_ms: int | None = None
    ) -> dict[str, object]:
        """Send any request of the contract and return the reply as a plain map."""
        reply = await self._link.call(
            method, request.to_sparse_wire(), deadline_ms=deadline_ms or self._deadline_ms
        )
        assert isinstance(reply, dict)
        return reply

    # --- events

    async def subscribe(self, callback: EventCallback, mask: int = ALL_EVENTS) -> SubscribeReply:
        """Call ``callback`` with each event from now on whose bit is in ``mask``.

        The reply has the number of the last event before.
        """
        self._hub.add(callback, mask)
        return await self._subscribe()

    async def set_event_callback(self, callback: EventCallback, mask: int = ALL_EVENTS) -> int:
        """As ``subscribe``; return what ``delete_event_callback`` takes.

        ``event_mask("layer_corrupted", ...)`` makes a mask.

        Raises:
            ValueError: the mask holds no bits of events, or others.
        """
        number = self._hub.add(callback, mask)
        if not self._is_subscribed:
            await self._subscribe()
        return number

    async def delete_event_callback(self, number: int) -> bool:
        """Call it no more; return False when there is no such callback."""
        return self._hub.remove(number)

    async def follow_log(
        self, callback: LogCallback, *, since: int | None = None, level: str = "info"
    ) -> LogReply:
        """Call ``callback`` with each line of the log from now on, of ``level`` and above.

        With ``since``, first those after that number; negative, so many from the end. The reply
        holds none of them. A second call replaces the callback.
        """
        start = (await self.log(-1, level="error")).next if since is None else since
        self._on_log, self._log_level = callback, level
        request = LogRequest(since=start, level=level, follow=True)
        reply = LogReply.from_wire(await self.call("agent.log", request), "reply")
        self._take_log(reply)
        return reply.replace(lines=())

    # --- inside

    async def _subscribe(self) -> SubscribeReply:
        self._is_subscribed = True
        reply = SubscribeReply.from_wire(await self.call("agent.subscribe", Empty()), "reply")
        self._hub.begin(reply.sequence)
        return reply

    def _notified(self, method: str, params: Mapping[str, object]) -> None:
        if method == "agent.event":
            event = Event.from_wire(params, "event")
            if self._held is None:
                self._hub.deliver(event)
            else:
                self._held.append(event)
        elif method == "agent.chunk":
            self._streams.chunk(params)
        elif method == "agent.progress":
            self._streams.progress(params)
        elif method == "agent.log":
            self._take_log(LogReply.from_wire(params, "log"))

    def _take_log(self, reply: LogReply) -> None:
        for line in reply.lines:
            if self._on_log is not None and line.number > self._log_place:
                self._on_log(line)
        self._log_place = max(self._log_place, reply.next)

    async def _catch_up(self, client: AsyncClient) -> None:
        """Follow events and log on a new connection, and hand on what was missed before it."""
        if self._is_subscribed:
            self._held = []
            try:
                await client.call("agent.subscribe", {}, deadline_ms=HELLO_MS)
                missed = await self._missed(client)
            finally:
                held, self._held = self._held, None
            for event in (*missed, *held):
                self._hub.deliver(event)
        if self._on_log is not None:
            request = LogRequest(since=self._log_place, level=self._log_level, follow=True)
            answer = await client.call("agent.log", request.to_wire(), deadline_ms=HELLO_MS)
            reply = LogReply.from_wire(answer, "reply")
            if reply.next < self._log_place:  # of another boot
                self._log_place = 0
            self._take_log(reply)

    async def _missed(self, client: AsyncClient) -> tuple[Event, ...]:
        since = EventsRequest(since=self._hub.sequence).to_wire()
        reply = await client.call("agent.events", since, deadline_ms=HELLO_MS)
        missed = EventsReply.from_wire(reply, "reply")
        if missed.sequence < self._hub.sequence:  # another boot counts from 1 again
            self._hub.sequence = 0
            again = await client.call("agent.events", {"since": 0}, deadline_ms=HELLO_MS)
            missed = EventsReply.from_wire(again, "reply")
        if missed.events and missed.dropped:
            first = missed.events[0].replace(dropped=missed.dropped)
            return (first, *missed.events[1:])
        return missed.events
