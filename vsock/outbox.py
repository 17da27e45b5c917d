"""What a connection still has to send: written at once where it fits, kept within bounds else."""

import errno
import threading
import time
from collections import deque

from vsock.stream import Stream

__all__ = ("Outbox", "OutboxFull")


class OutboxFull(Exception):
    """The peer does not read, and its share of memory is used up. Nothing was queued."""


class Outbox:
    """Bytes on their way to one stream, in the order of ``put``. Usable from several threads."""

    def __init__(self, stream: Stream, max_bytes: int) -> None:
        """Send on ``stream``, which is non-blocking and stays the caller's."""
        self._stream = stream
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._chunks: deque[bytes | memoryview] = deque()
        self._closed = False
        #: Bytes taken and not written yet.
        self.pending_bytes = 0
        #: Monotonic time at which the stream last took something, while bytes are pending.
        self.progress_at = 0.0

    def put(self, data: bytes, *, max_bytes: int | None = None) -> int:
        """Write ``data``, or queue what does not fit now; return the bytes pending.

        Raises:
            OutboxFull: more than ``max_bytes`` (by default the bound of this outbox) would pend.
            OSError: the stream is closed or broken.
        """
        bound = self._max_bytes if max_bytes is None else max_bytes
        with self._lock:
            if self._closed:
                raise BrokenPipeError(errno.EPIPE, "the connection is closed")
            if self._chunks:
                if self.pending_bytes + len(data) > bound:
                    raise OutboxFull
                self._chunks.append(data)
                self.pending_bytes += len(data)
                return self.pending_bytes
            rest = self._write(data)
            if rest:
                self._chunks.append(rest)
                self.pending_bytes = len(rest)
                self.progress_at = time.monotonic()
            return self.pending_bytes

    def flush(self) -> int:
        """Write what the stream takes now; return the bytes still pending.

        Raises:
            OSError: the stream is closed or broken.
        """
        with self._lock:
            before = self.pending_bytes
            while self._chunks and not self._closed:
                chunk = self._chunks.popleft()
                rest = self._write(chunk)
                self.pending_bytes -= len(chunk) - len(rest)
                if rest:
                    self._chunks.appendleft(rest)
                    break
            if self.pending_bytes != before:
                self.progress_at = time.monotonic()
            return self.pending_bytes

    def close(self) -> None:
        """Drop what pends; no byte is written to the stream from now on."""
        with self._lock:
            self._closed = True
            self._chunks.clear()
            self.pending_bytes = 0

    def _write(self, data: "bytes | memoryview") -> "bytes | memoryview":
        """Return the part that did not fit."""
        rest = data
        try:
            while rest:
                taken = self._stream.send(rest)
                if taken == len(rest):
                    return b""
                rest = memoryview(rest)[taken:]
        except BlockingIOError:
            pass
        return rest
