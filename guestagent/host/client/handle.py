"""The host's handle on one agent: typed methods, one for each RPC.

    with GuestAgent("hybrid:///run/vm.vsock:1024") as guest:
        guest.layer_mount(LayerSpec(layer_id="base", device=PmemDevice(number=0), ...))

Requests and replies are the records of ``guestagent.api``. ``guestagent.host.client.aio`` has
the twin for asyncio.
"""

from collections.abc import Callable, Mapping

from guestagent import __version__
from guestagent.api import Empty, Event, EventsReply, EventsRequest, SubscribeReply
from guestagent.api.observe import LogLine, LogReply, LogRequest
from guestagent.host.client.events import ALL_EVENTS, EventCallback, EventHub
from guestagent.host.client.inspect import InspectMethods
from guestagent.host.client.inspect_devices import DeviceMethods
from guestagent.host.client.link import HELLO_MS, Link, Traceparent
from guestagent.host.client.methods import AgentMethods
from guestagent.host.client.streams import Streams
from vsock.address import Address
from vsock.client import Client
from vsock.deadline import Deadline
from vsock.record import Record

__all__ = ("GuestAgent", "LogCallback")

LogCallback = Callable[[LogLine], None]


class GuestAgent(AgentMethods, InspectMethods, DeviceMethods):
    """A connection to an agent that has said hello. A context manager.

    Every method may be called from any thread; calls from several threads are in flight at once.
    Each RPC has a method of its name: ``layer.mount`` is ``layer_mount``, ``agent.status`` is
    ``status``. All of them raise:

        CallError         the agent's answer: ``code`` (decide by it), ``message`` (for a person),
                          ``errno`` (this machine's number, or None), ``step``, ``object``, ``hint``
                          and ``kernel_log``; code ``timeout`` also when no answer came in time
        ConnectionClosed  the connection ended before the answer; what was asked may have been done
        ClosedHandleError (a ConnectionClosed) the handle was closed; nothing was sent

    Callbacks run on a thread of the handle's, one at a time, and may call its methods. One that
    raises ends all callbacks of this connection, and ``threading.excepthook`` hears of it.

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
            name: what the agent may log of who is there.
            until: when it passes or is cancelled, connecting ends, and so does the connection;
                calls in flight raise ``ConnectionClosed``. For who gives up from another thread.

        Raises:
            ValueError: the address is none.
            ConnectionClosed: nobody answered in time, or ``until`` was over.
        """
        self._deadline_ms = deadline_ms
        self._hub = EventHub()
        self._is_subscribed = False
        self._on_log: LogCallback | None = None
        self._log_level = "info"
        self._log_place = 0
        self._link = Link(
            address,
            name=name,
            connect_seconds=connect_seconds,
            reconnect=reconnect,
            traceparent=traceparent,
            on_notification=self._notified,
            on_reconnect=self._catch_up,
            until=until,
        )
        self._streams = Streams(self._link)
        #: What the agent answered to the first hello: version, features, limits, boot.
        self.hello = self._link.hello

    def __enter__(self) -> "GuestAgent":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; calls in flight raise ``ClosedHandleError``. Idempotent."""
        self._link.close()

    @property
    def closed(self) -> bool:
        """True once no call can succeed any more; with ``reconnect``, while nobody is there."""
        return self._link.client.closed

    @property
    def reconnects(self) -> int:
        """How often a lost connection was made again."""
        return self._link.reconnects

    @property
    def _client(self) -> Client:
        return self._link.client

    def call(
        self, method: str, request: Record, *, deadline_ms: int | None = None
    ) -> dict[str, object]:
        """Send any request of the contract and return the reply as a plain map."""
        reply = self._link.call(
            method, request.to_sparse_wire(), deadline_ms=deadline_ms or self._deadline_ms
        )
        assert isinstance(reply, dict)
        return reply

    # --- events

    def subscribe(self, callback: EventCallback, mask: int = ALL_EVENTS) -> SubscribeReply:
        """Call ``callback`` with each event from now on whose bit is in ``mask``.

        The reply has the number of the last event before.
        """
        self._hub.add(callback, mask)
        return self._subscribe()

    def set_event_callback(self, callback: EventCallback, mask: int = ALL_EVENTS) -> int:
        """As ``subscribe``; return what ``delete_event_callback`` takes.

        ``event_mask("layer_corrupted", ...)`` makes a mask.

        Raises:
            ValueError: the mask holds no bits of events, or others.
        """
        number = self._hub.add(callback, mask)
        if not self._is_subscribed:
            self._subscribe()
        return number

    def delete_event_callback(self, number: int) -> bool:
        """Call it no more; return False when there is no such callback."""
        return self._hub.remove(number)

    def follow_log(
        self, callback: LogCallback, *, since: int | None = None, level: str = "info"
    ) -> LogReply:
        """Call ``callback`` with each line of the log from now on, of ``level`` and above.

        With ``since``, first those after that number; negative, so many from the end. The reply
        holds none of them. A second call replaces the callback.
        """
        start = self.log(-1, level="error").next if since is None else since
        self._on_log, self._log_level = callback, level
        request = LogRequest(since=start, level=level, follow=True)
        reply = LogReply.from_wire(self.call("agent.log", request), "reply")
        self._take_log(reply)
        return reply.replace(lines=())

    # --- inside

    def _subscribe(self) -> SubscribeReply:
        self._is_subscribed = True
        reply = SubscribeReply.from_wire(self.call("agent.subscribe", Empty()), "reply")
        self._hub.begin(reply.sequence)
        return reply

    def _notified(self, method: str, params: Mapping[str, object]) -> None:
        if method == "agent.event":
            self._hub.deliver(Event.from_wire(params, "event"))
        elif method == "agent.chunk":
            self._streams.chunk(params)
        elif method == "agent.progress":
            self._streams.progress(params)
        elif method == "agent.log":
            self._take_log(LogReply.from_wire(params, "log"))

    def _take_log(self, reply: LogReply) -> None:
        callback = self._on_log
        with self._hub.order:
            for line in reply.lines:
                if callback is not None and line.number > self._log_place:
                    callback(line)
            self._log_place = max(self._log_place, reply.next)

    def _catch_up(self, client: Client) -> None:
        """Follow events and log on a new connection, and hand on what was missed before it."""
        with self._hub.order:
            if self._is_subscribed:
                client.call("agent.subscribe", {}, deadline_ms=HELLO_MS)
                for event in self._missed(client):
                    self._hub.deliver(event)
        if self._on_log is not None:
            request = LogRequest(since=self._log_place, level=self._log_level, follow=True)
            answer = client.call("agent.log", request.to_wire(), deadline_ms=HELLO_MS)
            reply = LogReply.from_wire(answer, "reply")
            if reply.next < self._log_place:  # of another boot
                self._log_place = 0
            self._take_log(reply)

    def _missed(self, client: Client) -> tuple[Event, ...]:
        since = EventsRequest(since=self._hub.sequence).to_wire()
        reply = client.call("agent.events", since, deadline_ms=HELLO_MS)
        missed = EventsReply.from_wire(reply, "reply")
        if missed.sequence < self._hub.sequence:  # another boot counts from 1 again
            self._hub.sequence = 0
            again = client.call("agent.events", {"since": 0}, deadline_ms=HELLO_MS)
            missed = EventsReply.from_wire(again, "reply")
        if missed.events and missed.dropped:
            first = missed.events[0].replace(dropped=missed.dropped)
            return (first, *missed.events[1:])
        return missed.events
