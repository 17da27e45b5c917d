"""Reading a file from end to end, in bounded memory, under a deadline."""

import os
import time
from collections.abc import Iterator

from guestagent.engine.inspection.place import Place
from guestagent.engine.inspection.sink import Sink
from guestagent.engine.operation import Operation

__all__ = ("READ_BYTES", "Meter", "Reader")

#: The interpreter hashes this much without letting another thread run.
READ_BYTES = 64 * 1024
#: How often somebody who waits is told how far it has come.
_TELL_SECONDS = 0.25


class Meter:
    """Counts what was read and tells of it, now and then. ``total_bytes`` 0 is unknown."""

    def __init__(self, sink: Sink, total_bytes: int = 0) -> None:
        self.read_bytes = 0
        self._sink = sink
        self._total_bytes = total_bytes
        self._told_at = time.monotonic()

    def add(self, size_bytes: int) -> None:
        self.read_bytes += size_bytes
        now = time.monotonic()
        if now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            self._sink.progress(self.read_bytes, self._total_bytes)


class Reader:
    """Reads files of one place into one buffer that is used again and again."""

    def __init__(self, place: Place, op: Operation, meter: Meter) -> None:
        self._place = place
        self._op = op
        self._meter = meter
        self._buffer = memoryview(bytearray(READ_BYTES))

    def pieces(
        self, fd: int, path: bytes, offset_bytes: int, end_bytes: int
    ) -> Iterator[memoryview]:
        """Yield the bytes of an open file in a range, or up to where it ends.

        A piece is valid until the next is asked for.

        Raises:
            CallError: ``timeout``, ``cancelled``; ``integrity`` or ``device``, with the byte that
                could not be read.
        """
        while offset_bytes < end_bytes:
            self._op.deadline.check("read a file")
            room = self._buffer[: min(READ_BYTES, end_bytes - offset_bytes)]
            try:
                size_bytes = os.preadv(fd, [room], offset_bytes)
            except OSError as error:
                raise self._place.error_of(error, path, offset_bytes) from error
            if not size_bytes:
                return
            offset_bytes += size_bytes
            self._meter.add(size_bytes)
            yield room[:size_bytes]
