"""What the kernel logged while something was being done: the reason that an errno cannot carry.

``KernelLog`` keeps one open /dev/kmsg and the last lines of it. ``mark()`` before a step and
``since(mark)`` after its failure give the lines between. Where the log cannot be read (no device,
no privilege) there are no lines, and no error: it only ever explains another one.

Source: Documentation/ABI/testing/dev-kmsg.
"""

import collections
import errno
import os
import threading

__all__ = ("KernelLog", "parse_record")

_RECORD_MAX_BYTES = 8 * 1024
_KEPT_LINES = 256
#: A reader must not be kept busy by a kernel that logs faster than it reads.
_RECORDS_AT_ONCE = 2048
_DEBUG_LEVEL = 7


def parse_record(record: bytes) -> tuple[int, str] | None:
    """Return (sequence number, text) of a kernel message; None for other senders and debug text."""
    head, semicolon, rest = record.partition(b";")
    fields = head.split(b",")
    if not semicolon or len(fields) < 3 or not fields[0].isdigit() or not fields[1].isdigit():
        return None
    priority = int(fields[0])
    if priority >> 3 or priority & 7 >= _DEBUG_LEVEL:  # facility 0 is the kernel's
        return None
    # lines after the first hold KEY=VALUE; control characters come escaped as \xNN
    return int(fields[1]), rest.split(b"\n", 1)[0].decode("utf-8", "backslashreplace")


class KernelLog:
    """The kernel log from now on. Safe to use from several threads; ``close()`` it at the end."""

    def __init__(self, path: str = "/dev/kmsg") -> None:
        self._lock = threading.Lock()
        self._lines: collections.deque[tuple[int, str]] = collections.deque(maxlen=_KEPT_LINES)
        self._next = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._fd = -1
            return
        os.lseek(self._fd, 0, os.SEEK_END)

    def mark(self) -> int:
        """Return a point in the log: now."""
        with self._lock:
            self._drain()
            return self._next

    def since(self, mark: int) -> tuple[str, ...]:
        """Return the kernel's lines after ``mark``, oldest first, as many as are kept."""
        with self._lock:
            self._drain()
            return tuple(text for sequence, text in self._lines if sequence >= mark)

    def close(self) -> None:
        """Close the log; it is empty from then on. Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

    def _drain(self) -> None:
        if self._fd < 0:
            return
        for _ in range(_RECORDS_AT_ONCE):
            try:
                record = os.read(self._fd, _RECORD_MAX_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.EPIPE:  # overwritten before we read it: go on behind
                    continue
                raise
            if not record:
                return
            parsed = parse_record(record)
            if parsed is not None:
                self._lines.append(parsed)
                self._next = parsed[0] + 1
