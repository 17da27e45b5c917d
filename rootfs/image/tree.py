"""A tree of files in memory: what every source of an image is read into, and every image made from.

Names, link targets and extended attributes are bytes, as in the kernel. Content stays where it is
(a file, a tar) and is read when the image is written. A hard link is one ``Node`` under several
names. Nothing here opens a file.
"""

import contextlib
import fnmatch
import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from rootfs.imagefile.output import write_at
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = (
    "CHUNK_BYTES",
    "EMPTY",
    "FILE_TYPES",
    "OPAQUE_TRUSTED",
    "OPAQUE_USER",
    "Absorb",
    "Content",
    "Extent",
    "FdContent",
    "Node",
    "Progress",
    "TreeDigest",
    "copy_content",
    "digest_tree",
    "link_counts",
    "pack_device_number",
    "unpack_device_number",
    "walk",
    "whiteout_kind",
    "without_xattrs",
    "work_off",
)

#: How much is read or copied at once.
CHUNK_BYTES = 1 << 20


#: Takes the next piece of a file's content.
Absorb = Callable[[bytes], object]

#: Called with (bytes done, bytes in all) while bulk data is read.
Progress = Callable[[int, int], None]

#: What marks a directory opaque for an overlay mounted with, and without, privilege (userxattr).
OPAQUE_TRUSTED = b"trusted.overlay.opaque"
OPAQUE_USER = b"user.overlay.opaque"
_OPAQUE_KINDS = {OPAQUE_TRUSTED: "trusted", OPAQUE_USER: "user"}

#: The type of a file in a directory of EROFS and of ext4 (include/linux/fs_types.h, FT_*).
FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}

#: (offset in the file, length, offset in the source), all in bytes; what no extent covers is zero.
Extent = tuple[int, int, int]


class Content(Protocol):
    """The bytes of a regular file. Extents ascend, do not overlap and end by ``size_bytes``."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def extents(self) -> tuple[Extent, ...]: ...

    def open(self) -> contextlib.AbstractContextManager[int]:
        """Return the source's descriptor for the time of a ``with`` block."""
        ...


class FdContent:
    """Content in extents of an open file that someone else keeps open."""

    __slots__ = ("extents", "fd", "size_bytes")

    def __init__(self, fd: int, size_bytes: int, extents: tuple[Extent, ...]) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self.extents = extents

    def open(self) -> contextlib.AbstractContextManager[int]:
        return contextlib.nullcontext(self.fd)


#: A file of no bytes.
EMPTY = FdContent(-1, 0, ())


class Node:
    """An inode. ``mode`` has the file type; ``rdev`` is for devices, ``target`` for symlinks,
    ``content`` for regular files, ``children`` for directories. ``mtime_ns`` may be negative."""

    __slots__ = (
        "children",
        "content",
        "gid",
        "mode",
        "mtime_ns",
        "rdev",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(
        self,
        mode: int,
        *,
        uid: int = 0,
        gid: int = 0,
        mtime_ns: int = 0,
        rdev: int = 0,
        target: bytes = b"",
        content: Content = EMPTY,
        xattrs: dict[bytes, bytes] | None = None,
    ) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        self.rdev = rdev
        self.target = target
        self.content = content
        self.xattrs: dict[bytes, bytes] = {} if xattrs is None else xattrs
        self.children: dict[bytes, Node] = {}

    @property
    def data_bytes(self) -> int:
        """How many bytes of content there are to copy: those of a regular file, without holes."""
        return sum(length for _, length, _ in self.content.extents)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_device(self) -> bool:
        return stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode)


def walk(root: Node) -> Iterator[tuple[tuple[bytes, ...], Node]]:
    """Yield every name with its node, each directory's names together and in byte order.

    The root comes first, with the empty path. A hard link comes once for each of its names.
    """
    queue: deque[tuple[tuple[bytes, ...], Node]] = deque([((), root)])
    yield (), root
    while queue:
        path, directory = queue.popleft()
        for name in sorted(directory.children):
            node = directory.children[name]
            below = (*path, name)
            yield below, node
            if node.is_directory:
                queue.append((below, node))


def link_counts(root: Node) -> dict[int, int]:
    """Return the link count of each inode, by ``id(node)``: names, and for a directory its dots."""
    counts = {id(root): 2}
    for path, node in walk(root):
        if not path:
            continue
        if node.is_directory:
            counts[id(node)] = 2 + sum(child.is_directory for child in node.children.values())
        else:
            counts[id(node)] = counts.get(id(node), 0) + 1
    counts[id(root)] += sum(child.is_directory for child in root.children.values())
    return counts


def whiteout_kind(root: Node) -> str:
    """Return which attribute marks opaque directories in a tree: ``none``, ``trusted``, ``user`` or
    ``both``.

    Source: Documentation/filesystems/overlayfs.rst ("whiteouts and opaque directories").
    """
    found: set[bytes] = set()
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        if directory.xattrs:
            found |= directory.xattrs.keys() & _OPAQUE_KINDS.keys()
        waiting += [node for node in directory.children.values() if node.children or node.xattrs]
    kinds = [kind for name, kind in _OPAQUE_KINDS.items() if name in found]
    return kinds[0] if len(kinds) == 1 else "both" if kinds else "none"


class TreeDigest:
    """The SHA-256 of everything in a tree, whatever it was read from.

    Covers names, types, modes, owners, times, device numbers, targets, attributes, which names are
    links of one inode, and content; a hole counts as zeros. To be given every name in the order of
    ``walk``, and the content of a regular file right after the first of its names.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"tree-digest-v1\0")
        self._numbers: dict[int, int] = {}
        #: Takes the next piece of a file's content.
        self.update = self._hash.update

    def add(self, path: tuple[bytes, ...], node: Node) -> bool:
        """Take a name; say whether it is the first of its inode."""
        known = len(self._numbers)
        number = self._numbers.setdefault(id(node), known)
        self._hash.update(_record(path, node, number))
        return number == known

    def digest(self) -> bytes:
        return self._hash.digest()


def digest_tree(
    root: Node, *, progress: Progress | None = None, cancel: Deadline | None = None
) -> bytes:
    """Return the ``TreeDigest`` of a tree, reading all of its content.

    Raises:
        CallError: ``cancelled`` or ``timeout`` by ``cancel``; ``conflict``, a file changed.
    """
    total_bytes = sum(node.content.size_bytes for _, node in _inodes(root))
    digest = TreeDigest()

    def hashed() -> Iterator[int]:
        for path, node in walk(root):
            if digest.add(path, node) and node.is_regular:
                for piece in read_content(node.content, b"/".join(path)):
                    digest.update(piece)
                    yield len(piece)

    work_off(hashed(), total_bytes, "hash the source tree", progress, cancel)
    return digest.digest()


def work_off(
    work: Iterable[int],
    total_bytes: int,
    step: str,
    progress: Progress | None,
    cancel: Deadline | None,
) -> None:
    """Do ``work``, which yields each count of bytes that it has done, and report them.

    Raises:
        CallError: ``cancelled`` or ``timeout`` at ``step``; what the work raises.
    """
    done_bytes = 0
    for count in work:
        done_bytes += count
        if cancel is not None:
            cancel.check(step)
        if progress is not None and count:
            progress(done_bytes, total_bytes)


def _record(path: tuple[bytes, ...], node: Node, number: int) -> bytes:
    """Return one inode's own facts in a form in which no two different inodes are equal."""
    fields = [
        b"/".join(path),
        f"{number} {node.mode} {node.uid} {node.gid} {node.mtime_ns} {node.rdev}".encode(),
        node.target,
        str(node.content.size_bytes).encode(),
        str(len(node.xattrs)).encode(),
    ]
    for name in sorted(node.xattrs):
        fields += (name, node.xattrs[name])
    return b"".join(b"%d:%b," % (len(field), field) for field in fields)


def _inodes(root: Node) -> Iterator[tuple[tuple[bytes, ...], Node]]:
    seen: set[int] = set()
    for path, node in walk(root):
        if id(node) not in seen:
            seen.add(id(node))
            yield path, node


def read_content(content: Content, name: bytes) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces of at most ``CHUNK_BYTES``, holes as zeros.

    Raises:
        CallError: ``conflict``, the source is shorter than it was.
    """
    at = 0
    with content.open() as fd:
        for offset, length, source_offset in content.extents:
            yield from zeros(offset - at)
            at = offset
            while at < offset + length:
                want = min(CHUNK_BYTES, offset + length - at)
                piece = os.pread(fd, want, source_offset + at - offset)
                if not piece:
                    raise shrunk(name)
                yield piece
                at += len(piece)
        yield from zeros(content.size_bytes - at)


def without_xattrs(xattrs: dict[bytes, bytes], patterns: Iterable[str]) -> dict[bytes, bytes]:
    """Return the attributes whose names fit none of some shell patterns."""
    globs = [os.fsencode(pattern) for pattern in patterns] if xattrs else []
    if not globs:
        return xattrs
    return {
        name: value
        for name, value in xattrs.items()
        if not any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    }


_ZEROS = bytes(CHUNK_BYTES)


def copy_content(
    path: tuple[bytes, ...],
    source: tuple[int, int],
    target: tuple[int, int],
    size_bytes: int,
    absorb: Absorb | None = None,
) -> Iterator[int]:
    """Copy bytes of a file's content to a new image; yield each count.

    ``source`` and ``target`` are descriptors with offsets in bytes; ``absorb`` takes what is read;
    ``path`` is of the file, for errors. A piece of nothing but zeros stays a hole of the image.

    Raises:
        CallError: ``conflict``, the source is shorter than it was.
        OSError: as read(2) and write(2).
    """
    (source_fd, source_at), (target_fd, target_at) = source, target
    while size_bytes:
        piece = os.pread(source_fd, min(CHUNK_BYTES, size_bytes), source_at)
        if not piece:
            raise shrunk(b"/".join(path))
        if absorb is not None:
            absorb(piece)
        if not _ZEROS.startswith(piece):
            write_at(target_fd, piece, target_at)
        count = len(piece)
        source_at, target_at, size_bytes = source_at + count, target_at + count, size_bytes - count
        yield count


def zeros(count: int) -> Iterator[bytes]:
    """Yield ``count`` zeros in pieces; none if it is negative."""
    while count > 0:
        yield _ZEROS[: min(count, CHUNK_BYTES)]
        count -= CHUNK_BYTES


def pack_device_number(rdev: int) -> int | None:
    """Return ``rdev`` in the kernel's 32-bit form, 12 bits of major and 20 of minor; None if it is
    too large.

    Source: include/linux/kdev_t.h, new_encode_dev (Linux 6.1).
    """
    major, minor = os.major(rdev), os.minor(rdev)
    if major >= 1 << 12 or minor >= 1 << 20:
        return None
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def unpack_device_number(number: int) -> int:
    """Return the ``st_rdev`` of a number in that form."""
    return os.makedev(number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)


def shrunk(name: bytes) -> CallError:
    """Return the error for a source file that ended before its size."""
    text = os.fsdecode(name)
    return CallError(
        "conflict",
        f"cannot read {text!r}: it became shorter while it was read",
        step="read the source",
        object=text,
    )
