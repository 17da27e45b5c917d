"""The last lines of the log and the requests in flight, in a file that outlives the agent.

Each record is appended by one write: it is there whatever ends the agent at the next instant. A
file that is full becomes the old one, and the new one begins with the requests in flight.
"""

import os
import threading

import msgpack

from vsock.log import LEVELS, Line, field_text

__all__ = ("LINES_MAX", "REQUESTS_MAX", "Recorder", "read_recorded")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any  # of a file that may hold anything

LINES_MAX, REQUESTS_MAX = 256, 64
_OLD = ".old"
_FILE_BYTES = 64 * 1024
_RECORD_BYTES = 512
#: So many characters fit whatever they are: an escape takes six bytes.
_LEAST_TEXT_CHARACTERS = 60


class Recorder:
    """A sink of the log, and the list of requests in flight. Thread-safe."""

    def __init__(self, path: str) -> None:
        """Append to ``path``; the requests that another process left in it are in flight no more.

        Raises:
            OSError: as open(2).
        """
        self._path = path
        self._lock = threading.Lock()
        self._in_flight: dict[int, str] = {}
        self._number = 0
        self._held = b""  # written with the next record
        self._fd = self._open()
        self._size_bytes = os.fstat(self._fd).st_size
        self._append(_packed())

    def __call__(self, line: Line) -> None:
        data = _packed_line(line)
        with self._lock:
            self._append(data)

    def begin(self, text: str) -> int:
        """Note a request that is being worked on; return its number, 0 if there are too many."""
        with self._lock:
            if len(self._in_flight) >= REQUESTS_MAX:
                return 0
            self._number += 1
            self._in_flight[self._number] = text[: _RECORD_BYTES // 2]
            self._append(_packed(self._number, self._in_flight[self._number]))
            return self._number

    def end(self, number: int) -> None:
        """The request is answered. That is written with what comes next: a line about it."""
        with self._lock:
            if self._in_flight.pop(number, None) is not None:
                self._held += _packed(number)

    def requests(self) -> tuple[str, ...]:
        """Return the texts of the requests in flight."""
        with self._lock:
            return tuple(self._in_flight.values())

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._path, flags, 0o600)

    def _append(self, data: bytes) -> None:
        if self._fd < 0:
            return
        data, self._held = self._held + data, b""
        try:
            if self._size_bytes + len(data) > _FILE_BYTES:
                os.rename(self._path, self._path + _OLD)
                os.close(self._fd)
                self._fd = -1
                self._fd = self._open()
                begun = (_packed(number, text) for number, text in self._in_flight.items())
                data = b"".join((_packed(), *begun, data))
                self._size_bytes = 0
            self._size_bytes += os.write(self._fd, data)
        except OSError:  # no space: what is logged is not worth failing for
            return


def read_recorded(path: str) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """Return the last lines, oldest first, and the requests in flight, that a recorder left."""
    lines: dict[int, Line] = {}
    requests: dict[int, str] = {}
    for file in (path + _OLD, path):
        unpacker = msgpack.Unpacker()
        unpacker.feed(_content(file))
        try:
            for record in unpacker:
                _take(record, lines, requests)
        except (ValueError, TypeError, IndexError, msgpack.UnpackException):
            continue  # damaged: what comes after it cannot be told apart
    return tuple(lines[number] for number in sorted(lines)[-LINES_MAX:]), tuple(requests.values())


def _take(record: "Any", lines: dict[int, Line], requests: dict[int, str]) -> None:
    match record:
        case [int(number), uptime_seconds, unix_ms, level, text, fields]:
            lines[number] = Line(
                number=number,
                uptime_seconds=uptime_seconds,
                unix_ms=unix_ms,
                level=LEVELS[level],
                text=text,
                fields=fields,
            )
        case [int(number), str(text)]:
            requests[number] = text
        case [int(number)]:
            requests.pop(number, None)
        case []:
            requests.clear()
        case _:
            raise ValueError("no record")


def _content(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return b""
    try:
        return os.read(fd, 2 * _FILE_BYTES)
    finally:
        os.close(fd)


def _packed(*record: object) -> bytes:
    return bytes(msgpack.packb(record, unicode_errors="backslashreplace"))


def _packed_line(line: Line) -> bytes:
    """Pack a line so that it is not too long: the longest fields are cut until it is not."""
    fields = {name: field_text(name, value) for name, value in line.fields.items()}
    text = line.text
    bound = _RECORD_BYTES
    level = LEVELS.index(line.level)
    while True:
        data = _packed(line.number, line.uptime_seconds, line.unix_ms, level, text, fields)
        if len(data) <= _RECORD_BYTES:
            return data
        bound //= 2
        text = text[: bound // 4 or _LEAST_TEXT_CHARACTERS]
        fields = {name: value[:bound] for name, value in fields.items()} if bound else {}
