"""A structured log that costs nothing to import: lines with fields, kept in a ring, sent to sinks.

The stdlib's logging takes 15 ms to import and knows no fields. Here a line is a value: sinks get
it whole and render it as they like, and the last lines are kept from the first moment of boot for
a reader that comes later. Writing a line never raises.

A line, the ring, and the queue of a slow sink are bounded in bytes, because what a peer sends gets
into lines. While ``in_background`` is entered, slow sinks are written to by a thread of their own,
so that a serial console at its speed keeps no other thread waiting.

What must stay secret does not get into a line: bytes are told by their length, and a field whose
name says that it is a secret is not told at all.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from vsock.record import Record
from vsock.threads import start_thread

__all__ = (
    "FORMATS",
    "LEVELS",
    "Line",
    "Log",
    "fd_sink",
    "field_text",
    "json_object",
    "log",
    "render",
    "render_json",
    "words_of",
)

LEVELS = ("debug", "info", "warning", "error")
#: A longer text loses its middle: a traceback is known by its ends.
_MAX_TEXT_CHARACTERS = 2048
_MAX_RING_BYTES = 1024 * 1024
#: What a line takes beside its texts.
_LINE_BYTES = 400
#: Lines that wait for slow sinks.
_MAX_QUEUED_BYTES = 256 * 1024
_FLUSH_SECONDS = 2.0
SECRETS = frozenset(("passphrase", "password", "private_key", "secret", "signature", "token"))


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
    """Thread-safe. ``level`` bounds what sinks get; the ring keeps the last lines of all levels."""

    def __init__(self, *, capacity: int = 2000, level: str = "info") -> None:
        self._lock = threading.Lock()
        self._capacity = capacity
        self._ring: deque[Line] = deque()
        self._ring_bytes = 0
        self._sinks: list[tuple[Sink, int | None, bool]] = []
        self._writer = _Writer(self)
        self._outward: Callable[[Line], Line | None] | None = None
        self._number = 0
        self._threshold = LEVELS.index(level)
        #: Lines of each level so far, kept or not.
        self.counts = dict.fromkeys(LEVELS, 0)

    @property
    def number(self) -> int:
        """The number of the last line, 0 before the first."""
        return self._number

    def set_level(self, level: str) -> None:
        self._threshold = LEVELS.index(level)

    def add_sink(
        self,
        sink: Sink,
        *,
        replay: bool = False,
        level: str | None = None,
        is_slow: bool = False,
    ) -> Callable[[], None]:
        """Send lines to ``sink`` from now on, first the kept ones if asked; returns what stops it.

        It gets lines of ``level`` and above; without one, as the log is set. It is called by the
        thread that writes the line, unless it ``is_slow`` and ``in_background`` is entered.
        """
        entry = (sink, None if level is None else LEVELS.index(level), is_slow)
        with self._lock:
            self._sinks.append(entry)
            kept = tuple(self._ring) if replay else ()
        for line in self.shown(kept):
            if LEVELS.index(line.level) >= self._threshold_of(entry):
                sink(line)

        def stop() -> None:
            with self._lock:
                if entry in self._sinks:
                    self._sinks.remove(entry)

        return stop

    def restrict(self, outward: Callable[[Line], Line | None]) -> None:
        """Have sinks get what ``outward`` makes of a line, or nothing where that is None. The ring
        keeps all of it: what is read from there is to be given out by ``shown`` alone."""
        self._outward = outward

    def shown(self, lines: Iterable[Line]) -> Iterator[Line]:
        """Yield lines of the ring as they may be given out."""
        outward = self._outward
        if outward is None:
            yield from lines
            return
        for line in lines:
            shown = outward(line)
            if shown is not None:
                yield shown

    def in_background(self) -> "_Writer":
        """Return a context in which slow sinks are written to by a thread of their own.

        On leaving it, they are waited for, 2 s at most. Lines that do not fit the queue are dropped
        for these sinks; the log tells how many.
        """
        return self._writer

    def after_fork(self) -> None:
        """Forget the threads and locks of the parent, of which this process has copies."""
        self._lock = threading.Lock()
        self._writer = _Writer(self)

    def tail(self, count: int) -> tuple[Line, ...]:
        """Return the last ``count`` lines, oldest first."""
        with self._lock:
            return tuple(self._ring)[-count:]

    def since(self, number: int) -> tuple[tuple[Line, ...], int]:
        """Return the lines after ``number`` that are kept, and how many are no longer."""
        with self._lock:
            first = self._ring[0].number if self._ring else self._number + 1
            kept = tuple(self._ring)[max(0, number + 1 - first) :]
        return kept, max(0, first - 1 - max(number, 0))

    def restore(self, lines: Iterable[Line]) -> None:
        """Put lines of an earlier process before the own lines, which get the numbers after them.

        Lines that both have, because this process was forked from the earlier one, are kept once.
        """
        old = tuple(lines)
        if not old:
            return
        known = {(line.uptime_seconds, line.text) for line in old}
        with self._lock:
            own = [line for line in self._ring if (line.uptime_seconds, line.text) not in known]
            self._number = old[-1].number
            self._ring.clear()
            self._ring_bytes = 0
            for line in old:
                self._keep(line)
            for line in own:
                self._number += 1
                self._keep(line.replace(number=self._number))

    def debug(self, text: str, **fields: object) -> None:
        self._write(0, text, fields)

    def info(self, text: str, **fields: object) -> None:
        self._write(1, text, fields)

    def warning(self, text: str, **fields: object) -> None:
        self._write(2, text, fields)

    def error(self, text: str, **fields: object) -> None:
        self._write(3, text, fields)

    def _threshold_of(self, entry: tuple[Sink, int | None, bool]) -> int:
        return self._threshold if entry[1] is None else entry[1]

    def _keep(self, line: Line) -> None:
        self._ring.append(line)
        self._ring_bytes += _size_bytes(line)
        while len(self._ring) > self._capacity or self._ring_bytes > _MAX_RING_BYTES:
            self._ring_bytes -= _size_bytes(self._ring.popleft())

    def _write(self, level: int, text: str, fields: dict[str, object]) -> None:
        fields = {name: _bounded(name, value) for name, value in fields.items()}
        with self._lock:
            self._number += 1
            self.counts[LEVELS[level]] += 1
            line = Line(
                number=self._number,
                uptime_seconds=round(time.clock_gettime(time.CLOCK_BOOTTIME), 6),
                unix_ms=time.time_ns() // 1_000_000,
                level=LEVELS[level],
                text=_cut(text),
                fields=fields,
            )
            self._keep(line)
            entries = [entry for entry in self._sinks if level >= self._threshold_of(entry)]
        if self._outward is not None and entries:
            shown = self._outward(line)
            if shown is None:
                return
            line = shown
        for sink, _, is_slow in entries:
            if not (is_slow and self._writer.put(sink, line)):
                sink(line)


class _Writer:
    """The thread for slow sinks, and its queue."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._ready = threading.Condition()
        self._queue: deque[tuple[Sink, Line]] = deque()
        self._queued_bytes = 0
        self._thread: threading.Thread | None = None
        self._users = 0
        self._dropped = 0

    def __enter__(self) -> None:
        with self._ready:
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._ready:
            self._users = max(0, self._users - 1)  # 0 in a process forked meanwhile
            thread = self._thread
            if self._users or thread is None:
                return
            self._ready.notify()
        thread.join(_FLUSH_SECONDS)

    def put(self, sink: Sink, line: Line) -> bool:
        """Have the thread write ``line``, or drop it; False if the caller is to write it."""
        with self._ready:
            if not self._users:
                return False
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="log", daemon=True)
                try:
                    start_thread(thread)
                except RuntimeError:  # a machine out of threads: late is better than not at all
                    return False
                self._thread = thread
            size_bytes = _size_bytes(line)
            if self._queued_bytes + size_bytes > _MAX_QUEUED_BYTES:
                self._dropped += 1
                return True
            self._queue.append((sink, line))
            self._queued_bytes += size_bytes
            self._ready.notify()
            return True

    def _run(self) -> None:
        while (item := self._next()) is not None:
            sink, line = item
            sink(line)
            with self._ready:
                self._queued_bytes -= _size_bytes(line)
                dropped = self._dropped if not self._queue else 0
                self._dropped -= dropped
            if dropped:
                self._log.warning("lines were not printed: a sink is slow", count=dropped)

    def _next(self) -> tuple[Sink, Line] | None:
        with self._ready:
            self._ready.wait_for(lambda: self._queue or not self._users)
            if self._queue:
                return self._queue.popleft()
            self._thread = None
            return None


def _cut(text: str) -> str:
    if len(text) <= _MAX_TEXT_CHARACTERS:
        return text
    half = _MAX_TEXT_CHARACTERS // 2
    return f"{text[:half]} [{len(text) - 2 * half} characters] {text[-half:]}"


def _bounded(name: str, value: object) -> object:
    """Return a field's value as it may be kept: bounded, no secret, and holding no other object."""
    if name in SECRETS:
        return "[secret]"
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= 64 else f"[{value.bit_length()} bits]"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"[{len(value)} bytes]"
    return _cut(str(value))


def _size_bytes(line: Line) -> int:
    """Return about what a line takes in memory."""
    texts = (line.text, *(value for value in line.fields.values() if isinstance(value, str)))
    return _LINE_BYTES + sum(len(text) * (1 if text.isascii() else 4) for text in texts)


def field_text(name: str, value: object) -> str:
    """Return a field's value as it may be shown."""
    if name in SECRETS:
        return "[secret]"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"[{len(value)} bytes]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def render(line: Line) -> str:
    """Return a line as text: uptime, level, words, then key=value with quotes where needed."""
    return f"[{line.uptime_seconds:12.6f}] {line.level}: {words_of(line)}"


def words_of(line: Line) -> str:
    """Return a line's words, then key=value with quotes where needed; no control characters."""
    fields = "".join(f" {name}={_value(name, value)}" for name, value in line.fields.items())
    return line.text + fields


def render_json(line: Line) -> str:
    """Return a line as one JSON object of ASCII characters; its fields are in ``fields``.

    The stdlib's encoder costs more to import than all of this module.
    """
    return (
        f'{{"number":{line.number},"uptime_seconds":{line.uptime_seconds:.6f},'
        f'"unix_ms":{line.unix_ms},"level":"{line.level}","text":{_quoted(line.text)},'
        f'"fields":{json_object(line.fields)}}}'
    )


def json_object(fields: Mapping[str, object]) -> str:
    """Return a flat map as a JSON object of ASCII characters; secrets are not told."""
    pairs = (f"{_quoted(name)}:{_json(name, value)}" for name, value in fields.items())
    return "{" + ",".join(pairs) + "}"


#: ``guestagent.log_format`` -> how a line is rendered.
FORMATS: dict[str, Callable[[Line], str]] = {"text": render, "json": render_json}


def fd_sink(fd: int, rendered: Callable[[Line], str] = render) -> Sink:
    """Return a sink that writes rendered lines to a descriptor (borrowed); errors are ignored."""

    def sink(line: Line) -> None:
        try:
            os.write(fd, (rendered(line) + "\n").encode("utf-8", "backslashreplace"))
        except OSError:  # a console that went away must not take the agent with it
            return

    return sink


def _value(name: str, value: object) -> str:
    text = field_text(name, value)
    plain = text.isprintable() and not any(c in ' "=' for c in text)
    return text if plain and text else repr(text)


def _json(name: str, value: object) -> str:
    if name in SECRETS:
        return _quoted(field_text(name, value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        # JSON has no word for what is not finite
        return f"{value:.6g}" if abs(value) < float("inf") else "null"
    return _quoted(field_text(name, value))


def _quoted(text: str) -> str:
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    units = text.encode("utf-16-be", "surrogatepass")
    codes = (int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2))
    return '"' + "".join(map(_escaped, codes)) + '"'


def _escaped(code: int) -> str:
    if code in (0x22, 0x5C):
        return "\\" + chr(code)
    return chr(code) if 0x20 <= code < 0x7F else f"\\u{code:04x}"


#: The log of this process.
log = Log()
os.register_at_fork(after_in_child=log.after_fork)
