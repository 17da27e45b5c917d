"""Directories and trees, entry by entry."""

import os
import stat
from collections.abc import Generator
from contextlib import closing

from guestagent.api.devices import SECTOR_BYTES
from guestagent.api.inspect import DuReply, FsFind, ListReply, PathRequest
from guestagent.engine.transaction import Transaction
from guestagent.inspect.place import Place
from guestagent.inspect.sink import Sink
from guestagent.inspect.walk import Found, in_64_bits, letter_of, rdev_of, walk
from guestagent.storage.openat import reopen

__all__ = ("du", "find", "ls", "matches", "readdir")

#: Files with several links that are remembered, at some 100 bytes each.
_MAX_REMEMBERED = 32 * 1024
#: A waiting caller is told the progress after so many entries.
_TELL_ENTRIES = 10_000
_STAR, _ANY = b"*"[0], b"?"[0]


def _directory(
    place: Place, request: PathRequest, max_depth: int | None
) -> "closing[Generator[Found, None, None]]":
    """Walk a directory of a place; closed at once when the block ends, however it ends."""
    top_fd = place.root.open_directory(request.path_bytes)
    return closing(walk(top_fd, max_depth=max_depth))


def ls(place: Place, request: PathRequest, op: Transaction, sink: Sink) -> ListReply:
    """Send the names in a directory."""
    count = 0
    with place.errors(request.path_bytes), _directory(place, request, 1) as entries:
        for found in entries:
            op.deadline.check("list a directory")
            sink.entry(found.path)
            count += 1
        chunks = sink.finish()
    return ListReply(chunks=chunks, entries=count, timings_ms=op.timings_ms)


def readdir(place: Place, request: PathRequest, op: Transaction, sink: Sink) -> ListReply:
    """Send the names in a directory, with what lstat says of each."""
    count = 0
    with place.errors(request.path_bytes), _directory(place, request, 1) as entries:
        for found in entries:
            op.deadline.check("list a directory")
            try:
                fields = _fields(found)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise place.error_of(error, found.path) from error
            sink.entry(found.path, *fields)
            count += 1
        chunks = sink.finish()
    return ListReply(chunks=chunks, entries=count, timings_ms=op.timings_ms)


def _fields(found: Found) -> tuple[object, ...]:
    status = found.lstat()
    return (
        letter_of(status.st_mode),
        status.st_mode & 0o7777,
        status.st_uid,
        status.st_gid,
        status.st_size,
        status.st_nlink,
        status.st_ino,
        in_64_bits(status.st_mtime_ns),
        rdev_of(status),
        found.readlink() if found.entry.is_symlink() else None,
    )


def find(place: Place, request: FsFind, op: Transaction, sink: Sink) -> ListReply:
    """Send the paths below a directory that the request admits."""
    count = 0
    pattern, depth = request.name_bytes, request.max_depth
    with place.errors(request.path_bytes), _directory(place, request, depth) as entries:
        for found in entries:
            op.deadline.check("walk a tree")
            if pattern is not None and not matches(pattern, os.fsencode(found.name)):
                continue
            kind = _kind(found)
            if request.kind in (None, kind):
                sink.entry(found.path, kind)
                count += 1
        chunks = sink.finish()
    return ListReply(chunks=chunks, entries=count, timings_ms=op.timings_ms)


def _kind(found: Found) -> str:
    # the directory itself tells of these; a node has to be asked
    if found.entry.is_symlink():
        return "l"
    if found.entry.is_dir(follow_symlinks=False):
        return "d"
    if found.entry.is_file(follow_symlinks=False):
        return "f"
    try:
        return letter_of(found.lstat().st_mode)
    except FileNotFoundError:
        return "u"


def matches(pattern: bytes, name: bytes) -> bool:
    """Say whether a name matches a pattern of ``*`` and ``?``.

    On a mismatch only the last star is made to take more: what an earlier one could take instead
    changes nothing. So the time is at most the product of the lengths.
    """
    at = star_at = 0
    position, star = 0, -1
    while at < len(name):
        if position < len(pattern) and pattern[position] == _STAR:
            star, star_at = position, at
            position += 1
        elif position < len(pattern) and pattern[position] in (_ANY, name[at]):
            position += 1
            at += 1
        elif star >= 0:
            star_at += 1
            position, at = star + 1, star_at
        else:
            return False
    return pattern[position:].strip(b"*") == b""


class _Usage:
    """Adds up what a tree takes."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.allocated_bytes = 0
        self.counts = dict.fromkeys("fdlbcpsu", 0)
        self.is_exact = True
        self._seen: set[tuple[int, int]] = set()

    def add(self, status: os.stat_result) -> None:
        letter = letter_of(status.st_mode)
        self.counts[letter] += 1
        if letter != "d" and status.st_nlink > 1:
            key = (status.st_dev, status.st_ino)
            if key in self._seen:
                return
            if len(self._seen) < _MAX_REMEMBERED:
                self._seen.add(key)
            else:
                self.is_exact = False
        self.allocated_bytes += status.st_blocks * SECTOR_BYTES
        if letter == "f":
            self.size_bytes += status.st_size


def du(place: Place, request: PathRequest, op: Transaction, sink: Sink) -> DuReply:
    """Add up what a tree takes, or a single file."""
    usage = _Usage()
    path = request.path_bytes
    with place.errors(path):
        path_fd = place.root.resolve(path, follow=False)
        status = os.fstat(path_fd)
        usage.add(status)
        if stat.S_ISDIR(status.st_mode):
            _add_all(usage, reopen(path_fd, stat.S_IFDIR, path), place, op, sink)
        else:
            os.close(path_fd)
    counts = usage.counts
    return DuReply(
        size_bytes=in_64_bits(usage.size_bytes),
        allocated_bytes=in_64_bits(usage.allocated_bytes),
        files=counts["f"],
        directories=counts["d"],
        links=counts["l"],
        others=sum(counts[letter] for letter in "bcpsu"),
        is_exact=usage.is_exact,
        timings_ms=op.timings_ms,
    )


def _add_all(usage: _Usage, top_fd: int, place: Place, op: Transaction, sink: Sink) -> None:
    with closing(walk(top_fd)) as entries:
        for number, found in enumerate(entries, 1):
            op.deadline.check("walk a tree")
            try:
                usage.add(found.lstat())
            except FileNotFoundError:
                continue
            except OSError as error:
                raise place.error_of(error, found.path) from error
            if number % _TELL_ENTRIES == 0:
                sink.progress(in_64_bits(usage.size_bytes), 0)
