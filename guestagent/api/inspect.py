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

from collections.abc import Mapping

from guestagent.api.checks import MAX_BYTES, check_choice, check_range, check_word
from vsock.record import Record

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
#: What a reply carries by itself; more comes in chunks.
REPLY_DATA_BYTES = 32 * 1024
ACL_KINDS = ("access", "default")
_WINDOW_MAX_CHUNKS = 1024
_NAME_MAX_BYTES = 255


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


class StreamRequest(PathRequest):
    """A path inside, and an answer that comes in chunks."""

    window_chunks: int = 0

    def check(self) -> None:
        super().check()
        check_range("window_chunks", self.window_chunks, 0, _WINDOW_MAX_CHUNKS)


class ChecksumsRequest(StreamRequest):
    """Hash every regular file of a tree.

    Entries are ``[path, type, size, value]`` with the path relative to the request's, and value the
    digest in hexadecimal digits for files, the target for symlinks, ``MAJOR:MINOR`` for device
    nodes and the empty text for others. The top directory itself has no entry.
    """

    algorithm: str = "sha256"

    def check(self) -> None:
        super().check()
        check_choice("algorithm", self.algorithm, CHECKSUM_ALGORITHMS)


class ChecksumsReply(Record):
    """What was found; ``read_bytes`` is the content that was hashed."""

    chunks: int
    files: int
    directories: int
    links: int
    others: int
    read_bytes: int
    timings_ms: Mapping[str, float]


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


class StatReply(Record):
    """What lstat says. ``mode`` has the permission bits alone, ``kind`` is a letter of
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


class ReadlinkReply(Record):
    target: bytes


class Xattr(Record):
    name: bytes
    value: bytes


class XattrsReply(Record):
    """Extended attributes, sorted by name."""

    xattrs: tuple[Xattr, ...]


class AclRequest(PathRequest):
    """``acl`` is access, or default for that which a directory hands on."""

    acl: str = "access"

    def check(self) -> None:
        super().check()
        check_choice("acl", self.acl, ACL_KINDS)


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


class ExistsReply(Record):
    """Whether something is there, symlinks followed."""

    exists: bool


class PreadRequest(PathRequest):
    """A range of a regular file, at most 32 KiB."""

    offset_bytes: int = 0
    size_bytes: int = REPLY_DATA_BYTES

    def check(self) -> None:
        super().check()
        check_range("offset_bytes", self.offset_bytes, 0, MAX_BYTES - REPLY_DATA_BYTES)
        check_range("size_bytes", self.size_bytes, 1, REPLY_DATA_BYTES)


class HeadRequest(PathRequest):
    lines: int = 10

    def check(self) -> None:
        super().check()
        check_range("lines", self.lines, 1, REPLY_DATA_BYTES)


class DataReply(Record):
    """Bytes of a file that is ``size_bytes`` long in all. ``is_whole`` is false where there was
    more of what was asked for than a reply carries."""

    data: bytes
    size_bytes: int
    is_whole: bool


class ReadFileRequest(StreamRequest):
    """A whole regular file, refused with ``resource`` where it is longer than ``max_bytes``."""

    max_bytes: int = 4 * 1024 * 1024

    def check(self) -> None:
        super().check()
        check_range("max_bytes", self.max_bytes, 0, MAX_BYTES)


class DownloadRequest(StreamRequest):
    """A regular file of any size, or a range of it; None is up to the end."""

    offset_bytes: int = 0
    size_bytes: int | None = None

    def check(self) -> None:
        super().check()
        check_range("offset_bytes", self.offset_bytes, 0, MAX_BYTES)
        check_range("size_bytes", self.size_bytes, 0, MAX_BYTES)


class DownloadReply(Record):
    """The chunks hold ``size_bytes`` of data in all."""

    chunks: int
    size_bytes: int
    timings_ms: Mapping[str, float]


class ListReply(Record):
    """The chunks hold so many ``entries``.

    Those of ``fs.ls`` are ``[name]``, in the kernel's order. Those of ``fs.readdir`` are ``[name,
    kind, mode, uid, gid, size_bytes, links, inode, mtime_ns, rdev, target]`` as in ``StatReply``.
    Those of ``fs.find`` are ``[path, kind]``, with the path relative to the request's.
    """

    chunks: int
    entries: int
    timings_ms: Mapping[str, float]


class FindRequest(StreamRequest):
    """Everything below a directory.

    ``name`` admits names that match, where ``*`` stands for any bytes and ``?`` for one;
    ``kind`` admits one letter of ``ENTRY_TYPES``; ``max_depth`` 1 stays in the directory itself.
    """

    name: str | bytes | None = None
    kind: str | None = None
    max_depth: int | None = None

    def check(self) -> None:
        super().check()
        check_choice("kind", self.kind, tuple(ENTRY_TYPES))
        check_range("max_depth", self.max_depth, 1, PATH_MAX_BYTES)
        check_range("name length", len(self.name_bytes or b"x"), 1, _NAME_MAX_BYTES)

    @property
    def name_bytes(self) -> bytes | None:
        return self.name.encode() if isinstance(self.name, str) else self.name


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


class ChecksumRequest(PathRequest):
    """Hash a regular file."""

    algorithm: str = "sha256"

    def check(self) -> None:
        super().check()
        check_choice("algorithm", self.algorithm, CHECKSUM_ALGORITHMS)


class ChecksumReply(Record):
    """``digest`` in hexadecimal digits."""

    digest: str
    size_bytes: int
    timings_ms: Mapping[str, float]


class TarOutRequest(StreamRequest):
    """A directory as a tar archive (POSIX pax), paths relative to it. ``xattrs`` also says whether
    access control lists are part of it."""

    xattrs: bool = True


class TarOutReply(Record):
    """The chunks hold an archive of ``size_bytes``. ``skipped`` counts what tar cannot hold:
    sockets."""

    chunks: int
    size_bytes: int
    entries: int
    skipped: int
    timings_ms: Mapping[str, float]


class MoreRequest(Record):
    """All chunks before ``sequence`` of the request ``msgid`` have been dealt with."""

    msgid: int
    sequence: int


class MoreReply(Record):
    """``known`` is false when no such request is in flight on this connection."""

    known: bool
