"""The numbered, bounded log of events, and the connections that follow it."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

import msgpack

from guestagent.api import Event
from guestagent.engine.journal import Journal
from guestagent.policy.gate import Gate
from vsock.rpc import encode_notification

__all__ = ("EventLog", "Subscribers")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vsock.server import Connection

Listener = Callable[[Event], None]


class EventLog:
    """Sequence numbers start at 1 and never go back, also across a restart of the agent.

    Listeners are called one event after the other in sequence order; they must not block.
    """

    def __init__(self, journal: Journal, *, capacity: int = 4096) -> None:
        self._lock = threading.Lock()
        #: Packed: a third of the memory, and hardly any of them is ever asked for.
        self._events: deque[bytes] = deque(maxlen=capacity)
        self._listeners: dict[int, Listener] = {}
        self._next_listener = 1
        self._counter = journal.counter("events")
        #: The kernel's name for this boot, within which events are numbered.
        self.boot_id = _boot_id()

    @property
    def sequence(self) -> int:
        """The number of the last event, 0 before the first."""
        return self._counter.value

    def publish(
        self,
        kind: str,
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        pool_id: str | None = None,
        volume_id: str | None = None,
        device: str | None = None,
        block: int | None = None,
        detail: str = "",
        traceparent: str | None = None,
    ) -> Event:
        """Number an event, keep it, and hand it to every listener."""
        with self._lock:
            self._counter.store(self._counter.value + 1)
            event = Event(
                sequence=self._counter.value,
                kind=kind,
                unix_ms=time.time_ns() // 1_000_000,
                layer_id=layer_id,
                overlay_id=overlay_id,
                pool_id=pool_id,
                volume_id=volume_id,
                device=device,
                block=block,
                detail=detail[:1024],
                traceparent=traceparent,
                boot_id=self.boot_id,
            )
            kept = event.as_dict()
            del kept["boot_id"]  # the same for all
            # as an answer would tell it, where a name is no UTF-8
            packed = msgpack.packb(kept, unicode_errors="backslashreplace")
            self._events.append(packed)
            for listener in list(self._listeners.values()):
                listener(event)
        return event

    def since(self, sequence: int, *, at_most: int | None = None) -> tuple[tuple[Event, ...], int]:
        """Return kept events after ``sequence``, the oldest first, and how many are gone."""
        with self._lock:
            # the last one kept has the number of the counter, and none is left out
            count = min(len(self._events), max(0, self._counter.value - sequence))
            first = len(self._events) - count
            end = None if at_most is None else first + at_most
            packed = list(itertools.islice(self._events, first, end))
            oldest = self._counter.value + 1 - count
        boot = {"boot_id": self.boot_id}
        kept = tuple(Event.from_wire({**msgpack.unpackb(each), **boot}) for each in packed)
        return kept, max(0, oldest - 1 - max(sequence, 0))

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with each event from now on; returns what ends that. Idempotent."""
        with self._lock:
            number = self._next_listener
            self._next_listener += 1
            self._listeners[number] = listener

        def stop() -> None:
            with self._lock:
                self._listeners.pop(number, None)

        return stop

    def close(self) -> None:
        self._counter.close()


class Subscribers:
    """Sends every event to every connection that subscribed.

    A connection whose queue is full misses events; the next event that it gets says how many.
    """

    def __init__(self, events: EventLog, gate: Gate) -> None:
        self._gate = gate
        self._events = events
        self._starting = threading.Lock()
        self._is_listening = False
        self._lock = threading.Lock()
        self._followers: dict[int, _Follower] = {}
        #: Events that did not reach a subscriber, all of them together.
        self.dropped = 0

    def add(self, connection: "Connection") -> None:
        """Send events to ``connection`` until it ends. Idempotent."""
        with self._starting:  # not the lock that is taken below that of the log
            if not self._is_listening:
                self._events.listen(self._send)
                self._is_listening = True
        with self._lock:
            if connection.id in self._followers:
                return
            self._followers[connection.id] = _Follower(connection)

        def ended() -> None:
            with self._lock:
                self._followers.pop(connection.id, None)

        connection.on_close(ended)

    def _send(self, event: Event) -> None:
        # the log calls its listeners one event at a time, so that the counts need no lock
        with self._lock:
            followers = tuple(self._followers.values())
        if not followers:
            return
        shown = self._gate.shown_event(event)
        if shown is None:
            return
        event = shown
        data = encode_notification("agent.event", event)
        for follower in followers:
            told = data
            if follower.missed:
                told = encode_notification("agent.event", event.replace(dropped=follower.missed))
            if follower.connection.send_notification(told):
                follower.missed = 0
            else:
                follower.missed += 1
                self.dropped += 1


class _Follower:
    """A subscribed connection, and how many events it has missed since the last one sent."""

    __slots__ = ("connection", "missed")

    def __init__(self, connection: "Connection") -> None:
        self.connection = connection
        self.missed = 0


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
        return stream.read().strip()
