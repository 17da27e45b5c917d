"""Getting a tar, compressed or not, from a file or stream into a seekable file, hashed on the way.

A plain tar in a regular file is used where it lies. Everything else goes to a file without a name,
at most ``max_bytes`` of it: what a compressed stream grows to is bounded before it fills a disk.
"""

import contextlib
import hashlib
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import zstandard

from rootfs.image.tree import CHUNK_BYTES, Progress
from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.output import unnamed_file
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("DEFAULT_MAX_BYTES", "Spool", "spooled")

#: What a layer may grow to when it is decompressed, unless said otherwise.
DEFAULT_MAX_BYTES = 64 << 30
_GZIP_MAGIC = b"\x1f\x8b"
#: What an inflater is given at once: at the end of each gzip member the rest of it is copied, and
#: a member may be as short as 20 bytes.
_GZIP_SLICE_BYTES = 16 << 10
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
#: Four bytes are enough for a block of 128 KiB, and all blocks of a slice come at once: 32 MiB.
_ZSTD_SLICE_BYTES = 1 << 10
#: A frame that needs a larger window is refused: bounds the decompressor's memory.
_ZSTD_WINDOW_BYTES = 512 << 20
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x04\x22\x4d\x18": "lz4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spool:
    """A plain tar: ``size_bytes`` at ``start_bytes`` of ``fd``. ``digest`` is of those bytes,
    ``source_digest`` of what they were read from; ``sha256:HEX`` both."""

    fd: int
    start_bytes: int
    size_bytes: int
    digest: str
    source_digest: str
    compression: str | None


@contextlib.contextmanager
def spooled(
    fd: int,
    *,
    directory: str | os.PathLike[str],
    start_bytes: int | None = None,
    size_bytes: int | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    progress: Progress | None = None,
    cancel: Deadline | None = None,
) -> Iterator[Spool]:
    """Make a tar seekable for the time of a ``with`` block.

    Reads ``size_bytes`` at ``start_bytes`` of ``fd`` (borrowed), or ``fd`` from where it is to its
    end. ``directory`` is where a spool file goes. Progress counts bytes read.

    Raises:
        CallError: ``integrity``, a damaged or cut compressed stream; ``resource``, over
            ``max_bytes``, or a full disk; ``unsupported``, a compression; by errno; by ``cancel``.
    """
    with contextlib.ExitStack() as stack:
        ending = cancel or stack.enter_context(contextlib.closing(Deadline()))
        source = _Source(fd, start_bytes, size_bytes, progress, ending)
        with OsErrors("read the source"):
            spool = _spool(source, stack, directory, max_bytes)
        yield spool


def _spool(
    source: "_Source",
    stack: contextlib.ExitStack,
    directory: str | os.PathLike[str],
    max_bytes: int,
) -> Spool:
    compression = _compression_of(source.peek())
    if compression is None and source.is_regular:
        if (source.total_bytes or 0) > max_bytes:
            raise _too_large(max_bytes)
        for _ in source:
            pass
        fd, start, size, digest = source.fd, source.start_bytes, source.count, source.digest
    else:
        fd, start = stack.enter_context(unnamed_file(directory)), 0
        size, digest = _store(_decompress(compression, source), fd, max_bytes)
    return Spool(
        fd=fd,
        start_bytes=start,
        size_bytes=size,
        digest=digest,
        source_digest=source.digest,
        compression=compression,
    )


class _Source:
    """Iterates over the pieces of the source and hashes them; ``digest`` is final at the end."""

    def __init__(
        self,
        fd: int,
        start_bytes: int | None,
        size_bytes: int | None,
        progress: Progress | None,
        cancel: Deadline,
    ) -> None:
        facts = os.fstat(fd)
        self.is_regular = stat.S_ISREG(facts.st_mode)
        self.start_bytes = start_bytes or 0
        if start_bytes is None and self.is_regular:
            self.start_bytes = os.lseek(fd, 0, os.SEEK_CUR)
        whole = facts.st_size - self.start_bytes if self.is_regular else None
        self.total_bytes = whole if size_bytes is None else size_bytes
        self.count = 0
        self.fd = fd
        self._hash = hashlib.sha256()
        self._head = b""
        self._progress = progress
        self._cancel = cancel

    def peek(self) -> bytes:
        """Return the first bytes without taking them: at least 16 unless the source is shorter."""
        while len(self._head) < 16:
            piece = self._read(len(self._head))
            if not piece:
                break
            self._head += piece
        return self._head[:16]

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self._cancel.check("read the source")
            piece, self._head = self._head or self._read(self.count), b""
            if not piece:
                return
            self._hash.update(piece)
            self.count += len(piece)
            if self._progress is not None:
                self._progress(self.count, self.total_bytes or 0)
            yield piece

    def _read(self, at: int) -> bytes:
        if not self.is_regular:
            return self._read_stream()
        left = CHUNK_BYTES
        if self.total_bytes is not None:
            left = min(left, self.total_bytes - at)
        return os.pread(self.fd, left, self.start_bytes + at)

    def _read_stream(self) -> bytes:
        self._cancel.wait([self.fd], "read the source")
        return os.read(self.fd, CHUNK_BYTES)

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


def _compression_of(head: bytes) -> str | None:
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if head.startswith(_ZSTD_MAGIC) or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise CallError(
                "unsupported",
                f"cannot read the source: it is compressed with {name}; gzip and zstd are known",
                step="read the source",
            )
    return None


def _decompress(compression: str | None, source: _Source) -> Iterable[bytes]:
    if compression == "gzip":
        return _gunzip(source)
    return _unzstd(source) if compression == "zstd" else source


def _unzstd(source: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress all frames of a zstd stream, over skippable ones."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    frame = decompressor.decompressobj()
    for data in _sliced(source, _ZSTD_SLICE_BYTES):
        while data:
            if frame.eof:
                frame = decompressor.decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as problem:
                raise _damaged("zstd", str(problem)) from None
            data = frame.unused_data
    if not frame.eof:
        raise _damaged("zstd", "it ends early: the stream is cut short")


def _gunzip(source: _Source) -> Iterator[bytes]:
    """Decompress all members of a gzip stream; zeros behind the last are padding."""
    inflater = zlib.decompressobj(wbits=31)
    begun = False
    for data in _sliced(source, _GZIP_SLICE_BYTES):
        while data:
            if inflater.eof:
                inflater = zlib.decompressobj(wbits=31)
                begun = False
            if not begun and not data.strip(b"\0"):
                break
            begun = True
            try:
                yield inflater.decompress(data, CHUNK_BYTES)
            except zlib.error as problem:
                raise _damaged("gzip", str(problem)) from None
            data = inflater.unconsumed_tail or inflater.unused_data
    if begun and not inflater.eof:
        raise _damaged("gzip", "it ends early: the stream is cut short")


def _sliced(pieces: Iterable[bytes], size_bytes: int) -> Iterator[bytes]:
    for piece in pieces:
        for at in range(0, len(piece), size_bytes):
            yield piece[at : at + size_bytes]


def _store(pieces: Iterable[bytes], target: int, max_bytes: int) -> tuple[int, str]:
    """Write pieces to ``target``; return how many bytes, and their digest."""
    digest = hashlib.sha256()
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        digest.update(piece)
        view = memoryview(piece)
        while view:
            view = view[os.write(target, view) :]
    return size, "sha256:" + digest.hexdigest()


def _too_large(max_bytes: int) -> CallError:
    return CallError(
        "resource",
        f"cannot read the source: it has more than {max_bytes} bytes uncompressed",
        step="read the source",
        hint="raise the limit if the source is trusted",
    )


def _damaged(compression: str, why: str) -> CallError:
    return CallError(
        "integrity", f"cannot read the {compression} stream: {why}", step="read the source"
    )
