"""The last lines of the log in a file of fixed size, for whoever comes after a crash.

Each line has a slot, written in place by one system call: what was logged is there whatever kills
the agent at the next instant. In a tmpfs that costs memory, for the slots that were used.
"""

import os

import msgpack

from vsock.log import LEVELS, Line, field_text

__all__ = ("SLOTS", "Recorder", "read_recorded")

SLOTS = 256
_SLOT_BYTES = 512
_HEAD_BYTES = 2
#: So many fit, whatever they are: an escape of six bytes each.
_LEAST_TEXT_CHARACTERS = 60


class Recorder:
    """A sink. Slots are written by many threads, each line to its own."""

    def __init__(self, path: str) -> None:
        """Write to ``path``, keeping what is there until it is overwritten.

        Raises:
            OSError: as open(2).
        """
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def __call__(self, line: Line) -> None:
        data = _packed(line)
        slot = len(data).to_bytes(_HEAD_BYTES, "little") + data
        try:
            os.pwrite(self._fd, slot, line.number % SLOTS * _SLOT_BYTES)
        except OSError:  # no space, or closed already: a log never fails who writes it
            return

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_recorded(path: str) -> tuple[Line, ...]:
    """Return the lines that a recorder left, oldest first; none where there was no recorder."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return ()
    try:
        data = os.pread(fd, SLOTS * _SLOT_BYTES, 0)
    finally:
        os.close(fd)
    slots = (data[at : at + _SLOT_BYTES] for at in range(0, len(data), _SLOT_BYTES))
    lines = [line for line in map(_unpacked, slots) if line is not None]
    return tuple(sorted(lines, key=lambda line: line.number))


def _packed(line: Line) -> bytes:
    """Pack a line so that it fits: the longest fields are cut until it does."""
    fields = {name: field_text(name, value) for name, value in line.fields.items()}
    text = line.text
    bound = _SLOT_BYTES
    while True:
        row = [line.number, line.uptime_seconds, line.unix_ms, LEVELS.index(line.level)]
        data = bytes(msgpack.packb([*row, text, fields], unicode_errors="backslashreplace"))
        if len(data) <= _SLOT_BYTES - _HEAD_BYTES:
            return data
        bound //= 2
        text = text[: bound // 4 or _LEAST_TEXT_CHARACTERS]
        fields = {name: value[:bound] for name, value in fields.items()} if bound else {}


def _unpacked(slot: bytes) -> Line | None:
    size = int.from_bytes(slot[:_HEAD_BYTES], "little")
    if not size:
        return None
    try:
        row = msgpack.unpackb(slot[_HEAD_BYTES : _HEAD_BYTES + size])
        number, uptime_seconds, unix_ms, level, text, fields = row
        return Line(
            number=number,
            uptime_seconds=uptime_seconds,
            unix_ms=unix_ms,
            level=LEVELS[level],
            text=text,
            fields=fields,
        )
    except (ValueError, TypeError, IndexError, msgpack.UnpackException):
        return None
