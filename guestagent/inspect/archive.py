"""A directory as a tar archive, written as it is read."""

import os
import stat
from contextlib import closing

from guestagent.api.inspect import FsTarOut, TarOutReply
from guestagent.engine.transaction import Transaction
from guestagent.inspect import pax
from guestagent.inspect.acl import parse_acl, show_acl
from guestagent.inspect.metadata import xattrs_of
from guestagent.inspect.place import Place
from guestagent.inspect.reading import Meter, Reader
from guestagent.inspect.sink import Sink
from guestagent.inspect.walk import walk
from guestagent.storage.openat import reopen
from vsock.errors import CallError

__all__ = ("tar_out",)

#: Files with several links that are remembered; of those beyond, each link becomes a file.
_MAX_REMEMBERED = 32 * 1024
_KINDS = {
    stat.S_IFREG: "0",
    stat.S_IFLNK: "2",
    stat.S_IFCHR: "3",
    stat.S_IFBLK: "4",
    stat.S_IFDIR: "5",
    stat.S_IFIFO: "6",
}
_ACLS = {
    b"system.posix_acl_access": b"SCHILY.acl.access",
    b"system.posix_acl_default": b"SCHILY.acl.default",
}


def tar_out(place: Place, request: FsTarOut, op: Transaction, sink: Sink) -> TarOutReply:
    """Send a directory as a tar archive."""
    writer = _Writer(place, request, op, sink)
    path = request.path_bytes
    with place.errors(path), closing(walk(place.root.open_directory(path))) as entries:
        writer.add(b".", place.root.resolve(path))
        for found in entries:
            op.deadline.check("write an archive")
            try:
                path_fd = found.open_path()
            except FileNotFoundError:
                continue  # a writable overlay may change under the walk
            except OSError as error:
                error.filename = found.path
                raise
            writer.add(b"./" + found.path, path_fd)
        writer.end()
        chunks = sink.finish()
    return TarOutReply(
        chunks=chunks,
        size_bytes=writer.size_bytes,
        entries=writer.entries,
        skipped=writer.skipped,
        timings_ms=op.timings_ms,
    )


class _Writer:
    """Writes members to a sink."""

    def __init__(self, place: Place, request: FsTarOut, op: Transaction, sink: Sink) -> None:
        self.size_bytes = 0
        self.entries = 0
        self.skipped = 0
        self._place = place
        self._with_xattrs = request.xattrs
        self._sink = sink
        self._reader = Reader(place.error_of, op, Meter(sink))
        self._seen: dict[tuple[int, int], bytes] = {}

    def add(self, path: bytes, path_fd: int) -> None:
        """Write what an O_PATH descriptor, which is taken over, stands for."""
        try:
            status = os.fstat(path_fd)
            flag = _KINDS.get(stat.S_IFMT(status.st_mode))
            if flag is None:
                self.skipped += 1
                return
            self.entries += 1
            self._add(path, path_fd, status, flag)
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(path_fd)

    def end(self) -> None:
        """Write what ends the archive."""
        self._put(pax.end_of_archive(self.size_bytes))

    def _add(self, path: bytes, path_fd: int, status: os.stat_result, flag: str) -> None:
        link = os.fsencode(os.readlink("", dir_fd=path_fd)) if flag == "2" else b""
        first = self._first_link(path, status) if flag != "5" else None
        if first is not None:
            flag, link = "1", first
        size_bytes = status.st_size if flag == "0" else 0
        is_node = flag in "34"
        self._put(
            pax.header(
                pax.Member(
                    path=path + b"/" if flag == "5" else path,
                    type=flag,
                    mode=stat.S_IMODE(status.st_mode),
                    uid=status.st_uid,
                    gid=status.st_gid,
                    size_bytes=size_bytes,
                    mtime_ns=status.st_mtime_ns,
                    link=link,
                    major=os.major(status.st_rdev) if is_node else 0,
                    minor=os.minor(status.st_rdev) if is_node else 0,
                    records=self._records(path_fd) if flag != "1" else (),
                )
            )
        )
        if flag == "0":
            self._put_content(path, path_fd, size_bytes)

    def _first_link(self, path: bytes, status: os.stat_result) -> bytes | None:
        """Return the path that a file was written under before; None if this is the first."""
        if status.st_nlink < 2:
            return None
        key = (status.st_dev, status.st_ino)
        if key not in self._seen:
            if len(self._seen) < _MAX_REMEMBERED:
                self._seen[key] = path
            return None
        return self._seen[key]

    def _records(self, path_fd: int) -> tuple[tuple[bytes, bytes], ...]:
        if not self._with_xattrs:
            return ()
        records = []
        for name, value in xattrs_of(path_fd):
            if name in _ACLS:
                records.append((_ACLS[name], show_acl(parse_acl(value), ",").encode()))
            elif b"=" not in name:  # a pax keyword ends at the first
                records.append((b"SCHILY.xattr." + name, value))
        return tuple(records)

    def _put_content(self, path: bytes, path_fd: int, size_bytes: int) -> None:
        fd = reopen(os.dup(path_fd), stat.S_IFREG, path)
        try:
            left_bytes = size_bytes
            for piece in self._reader.pieces(fd, path, 0, size_bytes):
                self._put(piece)
                left_bytes -= len(piece)
        finally:
            os.close(fd)
        if left_bytes:
            # the header is out, and says another length: nothing can be made of the rest
            raise CallError(
                "conflict", f"{path!r} became {left_bytes} bytes shorter while it was read"
            )
        self._put(pax.padding(size_bytes))

    def _put(self, data: "bytes | memoryview") -> None:
        self._sink.data(data)
        self.size_bytes += len(data)
