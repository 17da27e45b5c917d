"""What happened, numbered: a bounded log that subscribers follow and latecomers catch up from."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

import msgpack

from guestagent.api import Event
from guestagent.engine.journal import Journal
from vsock.record import wire_fields

__all__ = ("EventLog",)

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
                device=device,
                block=block,
                detail=detail[:1024],
                traceparent=traceparent,
            )
            # as an answer would tell it, where a name is no UTF-8
            packed = msgpack.packb(event, default=wire_fields, unicode_errors="backslashreplace")
            self._events.append(packed)
            for listener in list(self._listeners.values()):
                listener(event)
        return event

    def since(self, sequence: int) -> tuple[tuple[Event, ...], int]:
        """Return the events after ``sequence`` that are kept, and how many are no longer."""
        with self._lock:
            # the last one kept has the number of the counter, and none is left out
            count = min(len(self._events), max(0, self._counter.value - sequence))
            packed = list(itertools.islice(self._events, len(self._events) - count, None))
            oldest = self._counter.value + 1 - count
        kept = tuple(Event.from_wire(msgpack.unpackb(each)) for each in packed)
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
