"""One thread's wait: callbacks for the events of descriptors, and a heap of timers."""

import _heapq as heapq  # the standard one is this and examples, whose import costs a guest time
import itertools
import math
import select
import time
from collections.abc import Callable

__all__ = ("Loop", "Timer")

#: Fewer cancelled timers than this are not worth a look.
_FEW_TIMERS = 64


class Timer:
    """A call to come. ``cancel`` is idempotent, and harmless after the call."""

    __slots__ = ("_call", "_on_cancel")

    def __init__(self, call: Callable[[], None], on_cancel: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call
        self._on_cancel = on_cancel

    def cancel(self) -> None:
        if self._call is not None:
            self._call = None
            self._on_cancel()

    @property
    def cancelled(self) -> bool:
        return self._call is None

    def fire(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class Loop:
    """Calls handlers with the events of their descriptors. Not safe for threads, nor re-entrant."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._fresh: set[int] = set()
        self._timers: list[tuple[float, int, Timer]] = []
        self._cancelled = 0  # of these, at most
        self._sequence = itertools.count()

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call ``handler(events)`` on every event of ``fd`` from now on."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler
        self._fresh.add(fd)

    def modify(self, fd: int, events: int) -> None:
        """Call the handler of ``fd`` on these events alone from now on."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget ``fd``; to be called before it is closed."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call, self._timer_cancelled)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._sequence), timer))
        return timer

    def poll(self, *, block: bool) -> None:
        """Serve what is due; wait for an event or a timer first, if ``block``."""
        self._fresh.clear()
        for fd, events in self._epoll.poll(self._timeout() if block else 0):
            handler = self._handlers.get(fd)
            # A handler may have closed a later one's descriptor, whose number is then reused.
            if handler is not None and fd not in self._fresh:
                handler(events)
        if self._timers:
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2].fire()

    def close(self) -> None:
        self._epoll.close()

    def _timer_cancelled(self) -> None:
        """Drop cancelled timers once they are more than the others, so that none pile up."""
        self._cancelled += 1
        if self._cancelled > _FEW_TIMERS and 2 * self._cancelled > len(self._timers):
            self._timers = [entry for entry in self._timers if not entry[2].cancelled]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def _timeout(self) -> float | None:
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        seconds = max(0.0, self._timers[0][0] - time.monotonic())
        return math.ceil(seconds * 1000) / 1000
