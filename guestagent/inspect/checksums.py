"""Digests of files and of whole trees."""

import os
import stat
from contextlib import closing

from guestagent.api.inspect import ChecksumsReply, FsChecksums
from guestagent.engine.transaction import Transaction
from guestagent.inspect.place import Place
from guestagent.inspect.reading import Meter, Reader
from guestagent.inspect.sink import Sink
from guestagent.inspect.walk import Found, letter_of, rdev_of, walk
from guestagent.storage.openat import reopen

__all__ = ("checksum_tree",)


def checksum_tree(
    place: Place, request: FsChecksums, op: Transaction, sink: Sink
) -> ChecksumsReply:
    """Hash every regular file below a directory; the entries go to ``sink``."""
    meter = Meter(sink)
    hasher = _TreeHasher(Reader(place.error_of, op, meter), request.algorithm)
    counts = dict.fromkeys("fdlbcpsu", 0)
    path = request.path_bytes
    with place.errors(path), closing(walk(place.root.open_directory(path))) as entries:
        for found in entries:
            op.deadline.check("hash a tree")
            try:
                letter, size_bytes, value = hasher.describe(found)
            except FileNotFoundError:
                continue  # a writable overlay may change under the walk
            counts[letter] += 1
            sink.entry(found.path, letter, size_bytes, value)
        chunks = sink.finish()
    return ChecksumsReply(
        chunks=chunks,
        files=counts["f"],
        directories=counts["d"],
        links=counts["l"],
        others=sum(counts[letter] for letter in "bcpsu"),
        read_bytes=meter.read_bytes,
        timings_ms=op.timings_ms,
    )


class _TreeHasher:
    """Says of an entry what ``FsChecksums`` promises: type, size and value."""

    def __init__(self, reader: Reader, algorithm: str) -> None:
        self._reader = reader
        self._algorithm = algorithm

    def describe(self, found: Found) -> tuple[str, int, object]:
        """Raises OSError with the path as ``filename``, and CallError where reading fails."""
        try:
            if found.entry.is_dir(follow_symlinks=False):
                return "d", 0, ""
            if found.entry.is_symlink():
                target = found.readlink()
                return "l", len(target), target
            if found.entry.is_file(follow_symlinks=False):
                return "f", *self._hash(found)
            status = found.lstat()
        except OSError as error:
            error.filename = found.path
            raise
        letter = letter_of(status.st_mode)
        return letter, 0, rdev_of(status) or ""

    def _hash(self, found: Found) -> tuple[int, str]:
        fd = reopen(found.open_path(), stat.S_IFREG, found.path)
        try:
            return self._reader.digest(fd, found.path, self._algorithm)
        finally:
            os.close(fd)
