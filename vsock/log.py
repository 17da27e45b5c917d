"""A structured log that costs nothing to import: lines of key=value, kept in a ring, sent to sinks.

The stdlib's logging takes 15 ms to import and knows no fields. Here a line is a value: sinks get
it whole and render it as they like, and the last lines are kept from the first moment of boot for
whoever asks later. Writing a line never raises and never blocks on a lock held by a slow sink for
longer than that sink's own write.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable

from vsock.record import Record

__all__ = ("LEVELS", "Line", "Log", "log", "render")

LEVELS = ("debug", "info", "warning", "error")


class Line(Record):
    """One line; ``uptime_seconds`` is CLOCK_BOOTTIME, as in the kernel's own log."""

    number: int
    uptime_seconds: float
    unix_ms: int
    level: str
    text: str
    fields: dict[str, object]


Sink = Callable[[Line], None]


class Log:
    """Thread-safe. ``level`` bounds what sinks get; the ring keeps everything."""

    def __init__(self, *, capacity: int = 2000, level: str = "info") -> None:
        self._lock = threading.Lock()
        self._ring: deque[Line] = deque(maxlen=capacity)
        self._sinks: list[Sink] = []
        self._number = 0
        self._threshold = LEVELS.index(level)

    def set_level(self, level: str) -> None:
        self._threshold = LEVELS.index(level)

    def add_sink(self, sink: Sink, *, replay: bool = False) -> Callable[[], None]:
        """Send lines to ``sink`` from now on, first the kept ones if asked; returns what stops it."""
        with self._lock:
            self._sinks.append(sink)
            kept = tuple(self._ring) if replay else ()
        for line in kept:
            sink(line)

        def stop() -> None:
            with self._lock:
                if sink in self._sinks:
                    self._sinks.remove(sink)

        return stop

    def tail(self, count: int) -> tuple[Line, ...]:
        """Return the last ``count`` lines, oldest first."""
        with self._lock:
            return tuple(self._ring)[-count:]

    def debug(self, text: str, **fields: object) -> None:
        self._write(0, text, fields)

    def info(self, text: str, **fields: object) -> None:
        self._write(1, text, fields)

    def warning(self, text: str, **fields: object) -> None:
        self._write(2, text, fields)

    def error(self, text: str, **fields: object) -> None:
        self._write(3, text, fields)

    def _write(self, level: int, text: str, fields: dict[str, object]) -> None:
        with self._lock:
            self._number += 1
            line = Line(
                number=self._number,
                uptime_seconds=round(time.clock_gettime(time.CLOCK_BOOTTIME), 6),
                unix_ms=time.time_ns() // 1_000_000,
                level=LEVELS[level],
                text=text,
                fields=fields,
            )
            self._ring.append(line)
            sinks = tuple(self._sinks) if level >= self._threshold else ()
        for sink in sinks:
            sink(line)


def render(line: Line) -> str:
    """Return a line as text: uptime, level, words, then key=value with quotes where needed."""
    fields = "".join(f" {name}={_value(value)}" for name, value in line.fields.items())
    return f"[{line.uptime_seconds:12.6f}] {line.level}: {line.text}{fields}"


def fd_sink(fd: int) -> Sink:
    """Return a sink that writes rendered lines to a descriptor (borrowed); errors are ignored."""

    def sink(line: Line) -> None:
        try:
            os.write(fd, (render(line) + "\n").encode("utf-8", "backslashreplace"))
        except OSError:  # a console that went away must not take the agent with it
            return

    return sink


def _value(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    plain = text.isprintable() and not any(c in ' "=' for c in text)
    return text if plain and text else repr(text)


#: The log of this process.
log = Log()
