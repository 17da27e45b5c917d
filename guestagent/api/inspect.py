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

from guestagent.api.checks import check_choice, check_range, check_word
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
_WINDOW_MAX_CHUNKS = 1024


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


class MoreRequest(Record):
    """All chunks before ``sequence`` of the request ``msgid`` have been dealt with."""

    msgid: int
    sequence: int


class MoreReply(Record):
    """``known`` is false when no such request is in flight on this connection."""

    known: bool
