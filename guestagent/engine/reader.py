"""Reading what is, or will be, below a layer's mount: a block device, or ranges of it."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from guestagent.api import ByteRange
from vsock.closeable import FdOwner

__all__ = ("Reader",)


class Reader(FdOwner):
    """Reads a block device, or ranges of it put together, never past the end. A context manager."""

    def __init__(self, node: str, *, size_bytes: int, ranges: Sequence[ByteRange] = ()) -> None:
        """Open ``node``. ``size_bytes`` is that of all ``ranges``; with none it is read from 0."""
        self.node = node
        self.size_bytes = size_bytes
        self._ranges = ranges
        #: Where each range begins, counted as ``read_at`` does.
        self._starts_bytes = [0, *accumulate(part.size_bytes for part in ranges)]
        self._fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Return the descriptor; the caller must not close it."""
        return self._fd

    def device_bytes(self) -> int:
        """Return how large the whole device is now."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    def read_at(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Return what is there, fewer bytes than asked at the end of the range."""
        size_bytes = min(size_bytes, self.size_bytes - offset_bytes)
        if offset_bytes < 0 or size_bytes <= 0:
            return b""
        if not self._ranges:
            return os.pread(self._fd, size_bytes, offset_bytes)
        data, number = b"", bisect_right(self._starts_bytes, offset_bytes) - 1
        while len(data) < size_bytes:
            part = self._ranges[number]
            skip_bytes = offset_bytes + len(data) - self._starts_bytes[number]
            wanted_bytes = min(size_bytes - len(data), part.size_bytes - skip_bytes)
            piece = os.pread(self._fd, wanted_bytes, part.offset_bytes + skip_bytes)
            data += piece
            if len(piece) < wanted_bytes:  # the device ends here
                break
            number += 1
        return data

    def read_padded(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Return exactly ``size_bytes``, with zeros for what is past the end."""
        return self.read_at(offset_bytes, size_bytes).ljust(size_bytes, b"\0")
