"""The events and the log that a handle follows, without input or output.

Both handles drive the same generators, which yield each request to send, are sent its reply or
thrown its error, and return the result.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

from guestagent.api.agent import (
    EVENT_KINDS,
    AgentEvents,
    AgentSubscribe,
    Event,
    EventsReply,
    SubscribeReply,
)
from guestagent.api.observe import AgentLog, LogLine, LogReply
from guestagent.api.request import Request
from guestagent.host.client.link import DisconnectCallback
from guestagent.host.client.streams import StreamTable
from vsock.client import ClosedHandleError
from vsock.errors import CallError, ConnectionClosed
from vsock.record import Record

__all__ = (
    "ALL_EVENTS",
    "EVENT_BITS",
    "HANDLE_EVENTS",
    "EventCallback",
    "Feeds",
    "Following",
    "LogCallback",
    "Steps",
    "event_mask",
)

EventCallback = Callable[[Event], None]
LogCallback = Callable[[LogLine], None]

T = TypeVar("T")
#: Yields requests, is sent their replies or thrown their errors, returns the result.
Steps = Generator[Request[Record], Any, T]

#: An agent keeps 4096 events and sends 1000 at once. An agent that never stops sending is cut off.
_MAX_PAGES = 64
#: What an agent may send while missed events are fetched; of more, the oldest are dropped.
_MAX_HELD = 4096

#: What happens to a handle and not in the guest: kind of event -> what happened.
HANDLE_EVENTS = {
    "connection_lost": "a connection that had said hello ended; `detail` is the reason",
    "handle_closed": "the handle was closed",
}
#: Kind of event -> its bit.
EVENT_BITS: dict[str, int] = {
    kind: 1 << place for place, kind in enumerate((*EVENT_KINDS, *HANDLE_EVENTS))
}
#: Every kind of event of the guest.
ALL_EVENTS = (1 << len(EVENT_KINDS)) - 1
_ALL_BITS = (1 << len(EVENT_BITS)) - 1


def event_mask(*kinds: str) -> int:
    """Return the bits of some kinds of events, for ``set_event_callback``.

    Raises:
        ValueError: there is no such kind.
    """
    mask = 0
    for kind in kinds:
        if kind not in EVENT_BITS:
            raise ValueError(f"unknown kind of event {kind!r}; known: {', '.join(EVENT_BITS)}")
        mask |= EVENT_BITS[kind]
    return mask


class Following:
    """What a handle hands on to callbacks, whatever it waits with."""

    def __init__(self, on_disconnect: DisconnectCallback | None) -> None:
        self._feeds = Feeds()
        self._streams = StreamTable()
        self._on_disconnect = on_disconnect

    def delete_event_callback(self, number: int) -> bool:
        """Call it no more; return False when there is no such callback."""
        return self._feeds.remove(number)

    def _notified(self, method: str, params: Mapping[str, object]) -> None:
        self._streams.notified(method, params)
        self._feeds.notified(method, params)

    def _disconnected(self, why: ConnectionClosed) -> None:
        self._feeds.ended(why)
        if self._on_disconnect is not None:
            self._on_disconnect(why)


class Feeds:
    """Hands events and lines of the log to callbacks: each once, in order, also over reconnects.

    Thread-safe. One callback runs at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Held while callbacks run, so that what was missed comes before what is new.
        self._order = threading.RLock()
        self._callbacks: dict[int, tuple[EventCallback, int]] = {}
        self._next_number = 1
        self._is_subscribed = False
        #: Events that arrived while missed ones are fetched, None outside of that.
        self._held: deque[Event] | None = None
        #: The number of the last event that was handed on.
        self.sequence = 0
        self._on_log: LogCallback | None = None
        self._log_level = "info"
        self._log_place = 0
        self._boot_id: object = None

    # --- events

    def subscribe(
        self, callback: EventCallback, mask: int, *, always: bool
    ) -> Steps[tuple[int, SubscribeReply | None]]:
        """Hand events to a callback; return its number for ``remove``, and the agent's reply.

        The agent is asked where it was not asked before, or ``always``; not for events of the
        handle alone. Where it refuses, the callback is removed.

        Raises:
            ValueError: the mask has no bit of an event, or others too.
        """
        number = self.add(callback, mask)
        if not always and (self._is_subscribed or not mask & ALL_EVENTS):
            return number, None
        reply: SubscribeReply | None = None
        try:
            reply = yield AgentSubscribe()
        finally:
            if reply is None:
                self.remove(number)
        self._is_subscribed = True
        with self._order:
            self.sequence = max(self.sequence, reply.sequence)
        return number, reply

    def add(self, callback: EventCallback, mask: int) -> int:
        """Return the number by which ``remove`` knows the callback.

        Raises:
            ValueError: the mask has no bit of an event, or others too.
        """
        if not 0 < mask <= _ALL_BITS:
            raise ValueError(f"mask {mask:#x} is not made of EVENT_BITS")
        with self._lock:
            number = self._next_number
            self._next_number += 1
            self._callbacks[number] = callback, mask
            return number

    def remove(self, number: int) -> bool:
        """Return False when there is no such callback."""
        with self._lock:
            return self._callbacks.pop(number, None) is not None

    def deliver(self, event: Event) -> None:
        """Hand on an event that was not handed on before."""
        with self._order:
            if event.sequence <= self.sequence:
                return
            self.sequence = event.sequence
            self._call(event)

    def ended(self, why: ConnectionClosed) -> None:
        """Hand on that the connection has ended, on the thread that noticed it: a callback that is
        running may be what waits for the end."""
        kind = "handle_closed" if isinstance(why, ClosedHandleError) else "connection_lost"
        fields = {"sequence": 0, "kind": kind, "unix_ms": time.time_ns() // 10**6}
        self._call(Event.from_wire({**fields, "detail": str(why)}, "event", strict=False))

    def _call(self, event: Event) -> None:
        # a kind that is unknown here is of a newer agent: for callbacks that want all
        bits = EVENT_BITS.get(event.kind, ALL_EVENTS)
        with self._lock:
            wanted = [
                callback for callback, mask in self._callbacks.values() if mask & bits == bits
            ]
        for callback in wanted:
            callback(event)

    def kept_events(self, since: int) -> Steps[EventsReply]:
        """Fetch all kept events after a number, page by page; the reply is one for all pages."""
        reply: EventsReply = yield AgentEvents(since=since)
        events, dropped = list(reply.events), reply.dropped
        for _ in range(_MAX_PAGES):
            if not reply.more or not reply.events:
                break
            reply = yield AgentEvents(since=events[-1].sequence)
            events += reply.events
            dropped += reply.dropped
        return reply.replace(events=tuple(events), dropped=dropped, more=False)

    # --- the log

    def follow_log(self, callback: LogCallback, since: int | None, level: str) -> Steps[LogReply]:
        """Ask for lines of the log after ``since``; None is from now on."""
        if since is None:
            last: LogReply = yield AgentLog(since=-1, level="error")
            since = last.next
        self._on_log, self._log_level = callback, level
        reply: LogReply = yield AgentLog(since=since, level=level, follow=True)
        self._take_log(reply)
        return reply.replace(lines=())

    def _take_log(self, reply: LogReply) -> None:
        callback = self._on_log
        with self._order:
            for line in reply.lines:
                if callback is not None and line.number > self._log_place:
                    callback(line)
            self._log_place = max(self._log_place, reply.next)

    # --- both

    def connected(self, boot_id: object) -> None:
        """Note the boot id of hello, None where the agent tells none.

        Events and lines are numbered within a boot: of another boot, none was handed on.
        """
        if boot_id != self._boot_id:
            self._boot_id = boot_id
            with self._order:
                self.sequence = self._log_place = 0

    def notified(self, method: str, params: Mapping[str, object]) -> None:
        """Take a notification ``agent.event`` or ``agent.log``; others are ignored."""
        if method == "agent.event":
            event = Event.from_wire(params, "event", strict=False)
            with self._lock:
                if self._held is not None:
                    self._held.append(event)
                    return
            self.deliver(event)
        elif method == "agent.log":
            self._take_log(LogReply.from_wire(params, "log", strict=False))

    def catch_up(self) -> Steps[None]:
        """Follow events and log on a new connection; hand on what was missed before it."""
        if self._is_subscribed:
            yield from self._catch_up_events()
        if self._on_log is not None:
            reply: LogReply = yield AgentLog(
                since=self._log_place, level=self._log_level, follow=True
            )
            if reply.next < self._log_place:  # another boot, of an agent that tells no boot id
                self._log_place = 0
            self._take_log(reply)

    def _catch_up_events(self) -> Steps[None]:
        held: deque[Event] = deque(maxlen=_MAX_HELD)
        with self._lock:
            self._held = held
        missed: tuple[Event, ...] = ()
        try:
            yield AgentSubscribe()
            missed = yield from self._missed()
        except CallError:
            pass  # the agent lives and does not tell them: what comes is better than nothing
        # where the connection is lost again, what comes stays held until the next one: it is then
        # fetched with what was missed before it
        with self._order:
            for event in missed:
                self.deliver(event)
            with self._lock:
                self._held = None
            for event in held:
                self.deliver(event)

    def _missed(self) -> Steps[tuple[Event, ...]]:
        reply = yield from self.kept_events(self.sequence)
        if reply.sequence < self.sequence:  # another boot, of an agent that tells no boot id
            self.sequence = 0
            reply = yield from self.kept_events(0)
        events = reply.events
        if events and reply.dropped:
            fields = {**events[0].to_wire(), "dropped": reply.dropped}
            return (Event.from_wire(fields, "event", strict=False), *events[1:])
        return events
