"""Events as bits, and who is called for which."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from guestagent.api import EVENT_KINDS, Event

__all__ = ("ALL_EVENTS", "EVENT_BITS", "EventCallback", "EventHub", "event_mask")

EventCallback = Callable[[Event], None]

#: Kind of event -> its bit.
EVENT_BITS: dict[str, int] = {kind: 1 << place for place, kind in enumerate(EVENT_KINDS)}
ALL_EVENTS = (1 << len(EVENT_KINDS)) - 1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    callback: EventCallback
    mask: int


class EventHub:
    """Calls the callbacks whose mask has an event's bit; one event after the other, each once.

    What comes twice, because a connection was lost between the two, is known by its number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Held while events are handed on, so that those caught up on come before later ones.
        self.order = threading.RLock()
        self._entries: dict[int, _Entry] = {}
        self._next = 1
        #: The number of the last event that was handed on.
        self.sequence = 0

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, callback: EventCallback, mask: int) -> int:
        """Return the number by which ``remove`` knows the callback.

        Raises:
            ValueError: the mask has no bit of an event, or others too.
        """
        if not 0 < mask <= ALL_EVENTS:
            raise ValueError(f"mask {mask:#x} is not made of EVENT_BITS")
        with self._lock:
            number = self._next
            self._next += 1
            self._entries[number] = _Entry(callback=callback, mask=mask)
            return number

    def remove(self, number: int) -> bool:
        """Return False when there is no such callback."""
        with self._lock:
            return self._entries.pop(number, None) is not None

    def begin(self, sequence: int) -> None:
        """Note that events up to ``sequence`` were before anyone asked."""
        with self.order:
            self.sequence = max(self.sequence, sequence)

    def deliver(self, event: Event) -> None:
        """Hand on an event that was not handed on before."""
        with self.order:
            if event.sequence <= self.sequence:
                return
            self.sequence = event.sequence
            bit = EVENT_BITS.get(event.kind, 0)
            with self._lock:
                wanted = [entry for entry in self._entries.values() if entry.mask & bit]
            for entry in wanted:
                entry.callback(event)
