"""Reading files and devices, in bounded memory, under a deadline, saying which byte failed."""

import os
import time
from collections.abc import Callable, Iterator

from guestagent.api.inspect import (
    REPLY_DATA_BYTES,
    ChecksumReply,
    DataReply,
    DownloadReply,
    FsChecksum,
    FsDownload,
    FsHead,
    FsPread,
    FsReadFile,
)
from guestagent.engine.transaction import Transaction
from guestagent.inspect.place import Place, show_path
from guestagent.inspect.sink import Sink
from guestagent.storage.hashing import new_hash
from vsock.errors import CallError

__all__ = ("WHOLE", "Meter", "Reader", "checksum", "download", "head", "pread", "read_file")

#: The interpreter hashes this much without letting another thread run.
_READ_BYTES = 64 * 1024
#: How often a waiting caller is told the progress.
_TELL_SECONDS = 0.25
#: An end that no file reaches.
WHOLE = 1 << 63

#: Makes the error to tell from an OSError, a path and a byte.
ErrorOf = Callable[[OSError, bytes, int], CallError]


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
    """Reads files into one buffer that is used again and again."""

    def __init__(self, error_of: ErrorOf, op: Transaction, meter: Meter) -> None:
        self._error_of = error_of
        self._op = op
        self._meter = meter
        self._buffer = memoryview(bytearray(_READ_BYTES))

    def pieces(
        self, fd: int, path: bytes, offset_bytes: int = 0, end_bytes: int = WHOLE
    ) -> Iterator[memoryview]:
        """Yield the bytes of an open file in a range, or up to where it ends.

        A piece is valid until the next is asked for.

        Raises:
            CallError: ``timeout``, ``cancelled``; ``integrity`` or ``device``, with the byte that
                could not be read.
        """
        while offset_bytes < end_bytes:
            self._op.deadline.check("read")
            room = self._buffer[: min(_READ_BYTES, end_bytes - offset_bytes)]
            try:
                size_bytes = os.preadv(fd, [room], offset_bytes)
            except OSError as error:
                raise self._error_of(error, path, offset_bytes) from error
            if not size_bytes:
                return
            offset_bytes += size_bytes
            self._meter.add(size_bytes)
            yield room[:size_bytes]

    def digest(self, fd: int, path: bytes, algorithm: str) -> tuple[int, str]:
        """Return how many bytes there are, and their digest. Raises as ``pieces``."""
        digest = new_hash(algorithm)
        size_bytes = 0
        for piece in self.pieces(fd, path):
            digest.update(piece)
            size_bytes += len(piece)
        return size_bytes, digest.hexdigest()


class _File:
    """A regular file of a place, open. A context manager."""

    def __init__(self, place: Place, path: bytes) -> None:
        self.path = path
        with place.errors(path):
            self.fd = place.root.open_file(path)
        self.size_bytes = os.fstat(self.fd).st_size

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def pread(place: Place, request: FsPread) -> DataReply:
    """Return a range of a file, shorter at its end."""
    path = request.path_bytes
    with _File(place, path) as file:
        data = _read_range(place, file, request.offset_bytes, request.size_bytes)
        return DataReply(data=data, size_bytes=file.size_bytes, is_whole=True)


def head(place: Place, request: FsHead) -> DataReply:
    """Return the first lines of a file, with their ends."""
    with _File(place, request.path_bytes) as file:
        data = _read_range(place, file, 0, REPLY_DATA_BYTES)
        end = 0
        for _ in range(request.lines):
            newline = data.find(b"\n", end)
            if newline < 0:
                is_end = len(data) < REPLY_DATA_BYTES or file.size_bytes == len(data)
                return DataReply(data=data, size_bytes=file.size_bytes, is_whole=is_end)
            end = newline + 1
        return DataReply(data=data[:end], size_bytes=file.size_bytes, is_whole=True)


def _read_range(place: Place, file: _File, offset_bytes: int, size_bytes: int) -> bytes:
    parts = []
    while size_bytes > 0:
        try:
            part = os.pread(file.fd, size_bytes, offset_bytes)
        except OSError as error:
            raise place.error_of(error, file.path, offset_bytes) from error
        if not part:
            break
        parts.append(part)
        offset_bytes += len(part)
        size_bytes -= len(part)
    return b"".join(parts)


def download(place: Place, request: FsDownload, op: Transaction, sink: Sink) -> DownloadReply:
    """Send a file, or a range of it."""
    with _File(place, request.path_bytes) as file:
        start = min(request.offset_bytes, file.size_bytes)
        rest_bytes = file.size_bytes - start
        size_bytes = rest_bytes if request.size_bytes is None else request.size_bytes
        end = WHOLE if request.size_bytes is None else start + size_bytes
        return _send(place, file, start, end, min(size_bytes, rest_bytes), op, sink)


def read_file(place: Place, request: FsReadFile, op: Transaction, sink: Sink) -> DownloadReply:
    """Send a whole file, if it is not too long."""
    with _File(place, request.path_bytes) as file:
        if file.size_bytes > request.max_bytes:
            raise CallError(
                "resource",
                f"{show_path(file.path)} of {place.name} has {file.size_bytes} bytes, "
                f"more than {request.max_bytes}",
                object=show_path(file.path),
                hint="download takes files of any size",
            )
        return _send(place, file, 0, request.max_bytes, file.size_bytes, op, sink)


def _send(
    place: Place,
    file: _File,
    start: int,
    end: int,
    total_bytes: int,
    op: Transaction,
    sink: Sink,
) -> DownloadReply:
    meter = Meter(sink, total_bytes)
    for piece in Reader(place.error_of, op, meter).pieces(file.fd, file.path, start, end):
        sink.data(piece)
    return DownloadReply(
        chunks=sink.finish(), size_bytes=meter.read_bytes, timings_ms=op.timings_ms
    )


def checksum(place: Place, request: FsChecksum, op: Transaction, sink: Sink) -> ChecksumReply:
    """Hash a file."""
    with _File(place, request.path_bytes) as file:
        reader = Reader(place.error_of, op, Meter(sink, file.size_bytes))
        size_bytes, digest = reader.digest(file.fd, file.path, request.algorithm)
    return ChecksumReply(digest=digest, size_bytes=size_bytes, timings_ms=op.timings_ms)
