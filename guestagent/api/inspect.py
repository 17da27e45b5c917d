"""Looking into layers, overlays and block devices, read-only.

Every path is of the inside: it starts at the root of the layer or overlay, and symlinks resolve
in that root. Names are bytes: they travel as binary, and a request may also give text, which is
taken as UTF-8.

Bulk data comes as notifications ``agent.chunk {msgid, sequence, data}`` or ``{msgid, sequence,
entries}``, at most 32 KiB each, numbered from 0, in order, none left out; the reply comes after the
last and says in ``chunks`` how many there were. With ``window_chunks`` the agent sends so many
ahead of the last ``agent.more {msgid, sequence}``, which says that all before ``sequence`` were
dealt with; with 0 it sends as fast as the connection takes them. ``agent.progress`` may come in
between. ``agent.cancel`` ends it, and so does the end of the connection.
"""

import os
from collections.abc import Iterator, Mapping

from guestagent.api.checks import MAX_BYTES, check_choice, check_range, check_word
from guestagent.api.request import Item_co, R_co, Request, Streamed
from vsock.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Algorithms of checksums.
CHECKSUM_ALGORITHMS = ("sha256", "sha512", "sha1")
#: What a letter says about an entry, as find's %y.
ENTRY_TYPES = {
    "f": "regular file",
    "d": "directory",
    "l": "symbolic link",
    "b": "block device",
    "c": "character device",
    "p": "FIFO",
    "s": "socket",
    "u": "unknown",
}
#: The longest path, as the kernel has it (PATH_MAX with its NUL).
PATH_MAX_BYTES = 4095
#: What a reply carries by itself; more comes in chunks, each of which carries no more.
REPLY_DATA_BYTES = 32 * 1024
#: What a value costs on the wire beside its bytes, at most.
_VALUE_BYTES = 9
ACL_KINDS = ("access", "default")
_WINDOW_MAX_CHUNKS = 1024
_NAME_MAX_BYTES = 255


def wire_bytes(value: object) -> int:
    """Return the most that a value takes on the wire."""
    if isinstance(value, bytes):
        return len(value) + _VALUE_BYTES
    if isinstance(value, str):
        return 4 * len(value) + _VALUE_BYTES
    if isinstance(value, (list, tuple)):
        return sum(map(wire_bytes, value)) + _VALUE_BYTES
    if isinstance(value, Mapping):
        return wire_bytes(list(value.keys())) + wire_bytes(list(value.values()))
    return _VALUE_BYTES


class PlaceRequest(Record):
    """A layer or an overlay, one of them."""

    layer_id: str | None = None
    overlay_id: str | None = None

    def check(self) -> None:
        if (self.layer_id is None) == (self.overlay_id is None):
            raise ValueError("name either a layer_id or an overlay_id")
        check_word("layer_id", self.layer_id or "x")
        check_word("overlay_id", self.overlay_id or "x")


class PathRequest(PlaceRequest):
    """A path inside a layer or an overlay."""

    path: str | bytes = "/"

    def check(self) -> None:
        super().check()
        path = self.path_bytes
        if not 0 < len(path) <= PATH_MAX_BYTES:
            raise ValueError(f"path must have 1 to {PATH_MAX_BYTES} bytes, got {len(path)}")
        if b"\0" in path:
            raise ValueError(f"path holds a NUL: {path!r}")

    @property
    def path_bytes(self) -> bytes:
        """The path as the kernel takes it; always absolute."""
        path = self.path.encode() if isinstance(self.path, str) else self.path
        return path if path.startswith(b"/") or not path else b"/" + path


class StreamRequest(Request[R_co], Streamed[Item_co], PathRequest):
    """A path inside, and an answer that comes in chunks."""

    window_chunks: int = 0

    def check(self) -> None:
        super().check()
        check_range("window_chunks", self.window_chunks, 0, _WINDOW_MAX_CHUNKS)

    @classmethod
    def items(cls, chunk: Mapping[str, object]) -> "Iterator[Item_co]":
        """Return what an ``agent.chunk`` of the answer holds.

        An entry may be longer than is known here: a newer agent may add fields at its end.

        Raises:
            KeyError, TypeError, ValueError: the chunk is not of the contract.
        """
        raise NotImplementedError


class DataRequest(StreamRequest[R_co, bytes]):
    """A request whose answer is bytes."""

    @classmethod
    def items(cls, chunk: Mapping[str, object]) -> Iterator[bytes]:
        """Return the bytes of a chunk, as one item."""
        yield _bytes(chunk["data"])


class ChecksumsReply(Record):
    """What was found; ``read_bytes`` is the content that was hashed."""

    chunks: int
    files: int
    directories: int
    links: int
    others: int
    read_bytes: int
    timings_ms: Mapping[str, float]


class Checksum(Record):
    """An entry of a tree. ``kind`` is a letter of ``ENTRY_TYPES``.

    ``digest`` (hexadecimal digits) is that of a regular file. ``target`` is that of a symlink, as
    ``os.fsdecode`` has it: ``os.fsencode`` gives the bytes. ``device`` is MAJOR:MINOR of a node.
    """

    path: bytes
    kind: str
    size_bytes: int
    digest: str | None = None
    target: str | None = None
    device: str | None = None


class FsChecksums(StreamRequest[ChecksumsReply, Checksum], method="fs.checksums"):
    """Hash every regular file of a tree.

    Entries are ``[path, type, size, value]`` with the path relative to the request's, and value the
    digest in hexadecimal digits for files, the target for symlinks, ``MAJOR:MINOR`` for device
    nodes and the empty text for others. The top directory itself has no entry.
    """

    algorithm: str = "sha256"

    def check(self) -> None:
        super().check()
        check_choice("algorithm", self.algorithm, CHECKSUM_ALGORITHMS)

    @classmethod
    def items(cls, chunk: Mapping[str, object]) -> Iterator[Checksum]:
        """Return the entries of a chunk."""
        for path, kind, size_bytes, value, *_ in _entries(chunk):
            yield Checksum(
                path=path,
                kind=kind,
                size_bytes=size_bytes,
                digest=value if kind == "f" else None,
                target=os.fsdecode(value) if kind == "l" else None,
                device=value if kind in "bc" else None,
            )


class StatvfsReply(Record):
    """How large and how full a file system is."""

    filesystem: str
    size_bytes: int
    free_bytes: int
    available_bytes: int
    block_size: int
    inodes: int
    free_inodes: int
    name_max_bytes: int
    readonly: bool


class FsStatvfs(Request[StatvfsReply], PathRequest, method="fs.statvfs"):
    """Tell how full a file system is."""


class StatReply(Record):
    """What lstat says; a time beyond what 64 bits of nanoseconds hold is the nearest that they do.
    ``mode`` has the permission bits alone, ``kind`` is a letter of
    ``ENTRY_TYPES``, ``rdev`` MAJOR:MINOR of a device node, ``target`` that of a symlink."""

    kind: str
    mode: int
    uid: int
    gid: int
    size_bytes: int
    allocated_bytes: int
    links: int
    inode: int
    dev: str
    rdev: str | None
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    target: bytes | None


class FsLstat(Request[StatReply], PathRequest, method="fs.lstat"):
    """Describe a file or a symlink itself."""


class ReadlinkReply(Record):
    target: bytes


class FsReadlink(Request[ReadlinkReply], PathRequest, method="fs.readlink"):
    """Tell where a symlink leads."""


class Xattr(Record):
    name: bytes
    value: bytes


class XattrsReply(Record):
    """Extended attributes, sorted by name."""

    xattrs: tuple[Xattr, ...]


class FsGetxattrs(Request[XattrsReply], PathRequest, method="fs.getxattrs"):
    """List extended attributes."""


class AclEntry(Record):
    """``tag`` is user, group, mask or other; ``id`` that of a named user or group;
    ``permissions`` like "r-x"."""

    tag: str
    id: int | None
    permissions: str


class AclReply(Record):
    """The entries in the order they are stored in, and as text, one line each. What has no list of
    its own is answered from its mode; a default list that is not there is empty."""

    entries: tuple[AclEntry, ...]
    text: str


class FsAclGetFile(Request[AclReply], PathRequest, method="fs.acl_get_file"):
    """List an access control list.

    ``acl`` is access, or default for that which a directory hands on.
    """

    acl: str = "access"

    def check(self) -> None:
        super().check()
        check_choice("acl", self.acl, ACL_KINDS)


class ExistsReply(Record):
    """Whether something is there, symlinks followed."""

    exists: bool


class FsExists(Request[ExistsReply], PathRequest, method="fs.exists"):
    """Tell if something is there."""


class DataReply(Record):
    """Bytes of a file that is ``size_bytes`` long in all. ``is_whole`` is false where there was
    more of what was asked for than a reply carries."""

    data: bytes
    size_bytes: int
    is_whole: bool


class FsPread(Request[DataReply], PathRequest, method="fs.pread"):
    """Read a range of a regular file, at most 32 KiB."""

    offset_bytes: int = 0
    size_bytes: int = REPLY_DATA_BYTES

    def check(self) -> None:
        super().check()
        check_range("offset_bytes", self.offset_bytes, 0, MAX_BYTES - REPLY_DATA_BYTES)
        check_range("size_bytes", self.size_bytes, 1, REPLY_DATA_BYTES)


class FsHead(Request[DataReply], PathRequest, method="fs.head"):
    """Read the first lines of a file."""

    lines: int = 10

    def check(self) -> None:
        super().check()
        check_range("lines", self.lines, 1, REPLY_DATA_BYTES)


class DownloadReply(Record):
    """The chunks hold ``size_bytes`` of data in all."""

    chunks: int
    size_bytes: int
    timings_ms: Mapping[str, float]


class FsReadFile(DataRequest[DownloadReply], method="fs.read_file"):
    """Read a whole regular file.

    It is refused with ``resource`` where it is longer than ``max_bytes``.
    """

    max_bytes: int = 4 * 1024 * 1024

    def check(self) -> None:
        super().check()
        check_range("max_bytes", self.max_bytes, 0, MAX_BYTES)


class FsDownload(DataRequest[DownloadReply], method="fs.download"):
    """Read a regular file of any size, or a range of it.

    ``size_bytes`` None is up to the end.
    """

    offset_bytes: int = 0
    size_bytes: int | None = None

    def check(self) -> None:
        super().check()
        check_range("offset_bytes", self.offset_bytes, 0, MAX_BYTES)
        check_range("size_bytes", self.size_bytes, 0, MAX_BYTES)


class ListReply(Record):
    """The chunks hold so many ``entries``.

    Those of ``fs.ls`` are ``[name]``, in the kernel's order. Those of ``fs.readdir`` are ``[name,
    kind, mode, uid, gid, size_bytes, links, inode, mtime_ns, rdev, target]`` as in ``StatReply``.
    Those of ``fs.find`` are ``[path, kind]``, with the path relative to the request's.
    """

    chunks: int
    entries: int
    timings_ms: Mapping[str, float]


class FsLs(StreamRequest[ListReply, bytes], method="fs.ls"):
    """List the names in a directory."""

    @classmethod
    def items(cls, chunk: Mapping[str, object]) -> Iterator[bytes]:
        """Return the names of a chunk."""
        for name, *_ in _entries(chunk):
            yield _bytes(name)


class DirectoryEntry(Record):
    """An entry of a directory, as in ``StatReply``."""

    name: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    size_bytes: int
    links: int
    inode: int
    mtime_ns: int
    rdev: str | None
    target: bytes | None


class FsReaddir(StreamRequest[ListReply, DirectoryEntry], method="fs.readdir"):
    """List a directory with the status of each."""

    @classmethod
    def items(cls, chunk: Mapping[str, object]) -> Iterator[DirectoryEntry]:
        """Return the entries of a chunk."""
        for entry in _entries(chunk):
            yield DirectoryEntry(**dict(zip(DirectoryEntry._fields, entry, strict=False)))


class FoundEntry(Record):
    """Something below a directory; ``path`` is relative to it."""

    path: bytes
    kind: str


class FsFind(StreamRequest[ListReply, FoundEntry], method="fs.find"):
    """List what is below a directory.

    ``name`` admits names that match, where ``*`` stands for any bytes and ``?`` for one;
    ``kind`` admits one letter of ``ENTRY_TYPES``; ``max_depth`` 1 stays in the directory itself.
    """

    name: str | bytes | None = None
    kind: str | None = None
    max_depth: int | None = None

    def check(self) -> None:
        super().check()
        check_choice("kind", self.kind, ENTRY_TYPES)
        check_range("max_depth", self.max_depth, 1, PATH_MAX_BYTES)
        check_range("name length", len(self.name_bytes or b"x"), 1, _NAME_MAX_BYTES)

    @property
    def name_bytes(self) -> bytes | None:
        return self.name.encode() if isinstance(self.name, str) else self.name

    @classmethod
    def items(cls, chunk: Mapping[str, object]) -> Iterator[FoundEntry]:
        """Return the entries of a chunk."""
        for path, kind, *_ in _entries(chunk):
            yield FoundEntry(path=path, kind=kind)


class DuReply(Record):
    """What a tree takes; a file of many links counts once, unless ``is_exact`` is false: then there
    were too many of them to remember. ``size_bytes`` is the length of the regular files,
    ``allocated_bytes`` what everything takes on the file system."""

    size_bytes: int
    allocated_bytes: int
    files: int
    directories: int
    links: int
    others: int
    is_exact: bool
    timings_ms: Mapping[str, float]


class FsDu(Request[DuReply], PathRequest, method="fs.du"):
    """Add up what a tree takes."""


class ChecksumReply(Record):
    """``digest`` in hexadecimal digits."""

    digest: str
    size_bytes: int
    timings_ms: Mapping[str, float]


class FsChecksum(Request[ChecksumReply], PathRequest, method="fs.checksum"):
    """Hash a regular file."""

    algorithm: str = "sha256"

    def check(self) -> None:
        super().check()
        check_choice("algorithm", self.algorithm, CHECKSUM_ALGORITHMS)


class TarOutReply(Record):
    """The chunks hold an archive of ``size_bytes``. ``skipped`` counts what tar cannot hold:
    sockets."""

    chunks: int
    size_bytes: int
    entries: int
    skipped: int
    timings_ms: Mapping[str, float]


class FsTarOut(DataRequest[TarOutReply], method="fs.tar_out"):
    """Read a directory as a tar archive (POSIX pax), with paths relative to it.

    ``xattrs`` also says whether access control lists are part of it.
    """

    xattrs: bool = True


def _entries(chunk: Mapping[str, object]) -> "list[list[Any]]":
    entries = chunk["entries"]
    if not isinstance(entries, list):
        raise TypeError(f"entries are of type {type(entries).__name__}")
    return entries


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"expected bytes, got {type(value).__name__}")
    return value
