"""Reading a directory of this host into a tree, without following a symlink anywhere below it."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator

from rootfs.image.tree import Extent, Node, without_xattrs
from rootfs.imagefile.errors import OsErrors, from_os_error
from rootfs.imagefile.ranges import data_extents
from vsock.closeable import FdOwner
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("KEPT_ATTRIBUTES", "DirectorySource")

#: Extended attributes that an image keeps. Others belong to the file system they were read from.
KEPT_ATTRIBUTES = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_MAX_DEPTH = 1000
_MAX_PATH_BYTES = 4095


class DirectorySource(FdOwner):
    """A directory opened for reading into a tree. Use as a context manager.

    Files are opened again when their content is needed. A file whose inode, size or time has
    changed since is an error, so that an image is never a mix of two states.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open ``path``; the last component may be a symlink.

        Raises:
            CallError: by errno; step "open".
        """
        self.path = os.fspath(path)
        with OsErrors("open", path):
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def read_tree(self, *, cancel: Deadline | None = None, drop_xattrs: Iterable[str] = ()) -> Node:
        """Return the tree. Names that are one inode become one node. ``drop_xattrs`` are shell
        patterns of attributes to leave out.

        As a user without privilege, files that cannot be read are an error, and attributes in the
        ``trusted`` name space are not seen.

        Raises:
            CallError: by errno; ``cancelled``, ``timeout`` by ``cancel``.
        """
        with OsErrors("read the source tree"):
            return self._read_tree(cancel, tuple(drop_xattrs))

    def _read_tree(self, cancel: Deadline | None, drop_xattrs: tuple[str, ...]) -> Node:
        root = _node(os.fstat(self._fd), self._fd, None)
        root.xattrs = without_xattrs(root.xattrs, drop_xattrs)
        inodes: dict[tuple[int, int], Node] = {}
        with contextlib.ExitStack() as stack:
            top = os.dup(self._fd)
            stack.callback(os.close, top)
            levels = [(top, b"", self._entries(top, b"", root, inodes, drop_xattrs))]
            while levels:
                parent, _, entries = levels[-1]
                if cancel is not None:
                    cancel.check("read the source tree")
                found = next(entries, None)
                if found is None:
                    levels.pop()
                    if parent != top:
                        os.close(parent)
                    continue
                path, node = found
                if len(levels) >= _MAX_DEPTH:
                    _close_all(levels[1:])
                    raise OSError(errno.ELOOP, f"more than {_MAX_DEPTH} levels", os.fsdecode(path))
                try:
                    fd = os.open(path.rpartition(b"/")[2], _OPEN_DIRECTORY, dir_fd=parent)
                except OSError as problem:
                    _close_all(levels[1:])
                    problem.filename = os.fsdecode(path)
                    raise
                levels.append((fd, path, self._entries(fd, path, node, inodes, drop_xattrs)))
        return root

    def _entries(
        self,
        fd: int,
        path: bytes,
        directory: Node,
        inodes: dict[tuple[int, int], Node],
        drop_xattrs: tuple[str, ...],
    ) -> Iterator[tuple[bytes, Node]]:
        """Fill ``directory`` and yield the directories in it."""
        with os.scandir(fd) as listing:
            names = sorted(os.fsencode(entry.name) for entry in listing)
        for name in names:
            below = path + b"/" + name if path else name
            facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
            key = (facts.st_dev, facts.st_ino)
            node = inodes.get(key) if facts.st_nlink > 1 else None
            if node is None or node.is_directory:
                node = _node(facts, fd, name)
                node.xattrs = without_xattrs(node.xattrs, drop_xattrs)
                if node.is_regular and facts.st_size:
                    node.content = _FileContent(self._fd, below, facts)
                if facts.st_nlink > 1 and not node.is_directory:
                    inodes[key] = node
            directory.children[name] = node
            if node.is_directory:
                yield below, node


def _close_all(levels: list[tuple[int, bytes, Iterator[tuple[bytes, Node]]]]) -> None:
    for fd, _, _ in levels:
        os.close(fd)


def _node(facts: os.stat_result, fd: int, name: bytes | None) -> Node:
    node = Node(facts.st_mode, uid=facts.st_uid, gid=facts.st_gid, mtime_ns=facts.st_mtime_ns)
    node.xattrs = _attributes(fd, name)
    if node.is_device:
        node.rdev = facts.st_rdev
    elif node.is_symlink and name is not None:
        node.target = os.readlink(name, dir_fd=fd)
    return node


def _attributes(fd: int, name: bytes | None) -> dict[bytes, bytes]:
    """Return the kept attributes of ``name`` in the directory ``fd``, or of ``fd`` itself."""
    # no call takes a directory descriptor and a name; /proc spares one open for each file
    place: int | bytes = fd if name is None else b"/proc/self/fd/%d/%b" % (fd, name)
    try:
        names = os.listxattr(place, follow_symlinks=name is None)
        return {
            os.fsencode(attribute): os.getxattr(place, attribute, follow_symlinks=name is None)
            for attribute in names
            if os.fsencode(attribute).startswith(KEPT_ATTRIBUTES)
        }
    except OSError as problem:
        if problem.errno == errno.ENOTSUP:
            return {}
        raise


class _FileContent:
    """Content of a file on this host, found again by its path below ``root_fd``."""

    __slots__ = ("_facts", "_path", "_root_fd", "extents", "size_bytes")

    def __init__(self, root_fd: int, path: bytes, facts: os.stat_result) -> None:
        self._root_fd = root_fd
        self._path = path
        self._facts = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        self.size_bytes = facts.st_size
        self.extents: tuple[Extent, ...] = ((0, facts.st_size, 0),)
        if facts.st_blocks * 512 < facts.st_size:
            with self.open() as fd:
                self.extents = tuple(
                    (found.offset_bytes, found.size_bytes, found.offset_bytes)
                    for found in data_extents(fd, facts.st_size)
                )

    def open(self) -> "_OpenFile":
        return _OpenFile(self)

    def open_unchanged(self) -> int:
        """Open the file again; it must be the inode that was listed, of the same size and time."""
        try:
            fd = _open_below(self._root_fd, self._path)
        except OSError as problem:
            text = os.fsdecode(self._path)
            raise from_os_error(problem, step="open the source file", object=text) from problem
        now = os.fstat(fd)
        if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != self._facts:
            os.close(fd)
            text = os.fsdecode(self._path)
            raise CallError(
                "conflict",
                f"cannot read {text!r}: it changed while the tree was read",
                step="open the source file",
                object=text,
            )
        return fd


def _open_below(directory: int, path: bytes) -> int:
    """Open a file by a path of any length: the kernel takes 4095 bytes at once."""
    with contextlib.ExitStack() as opened:
        while len(path) > _MAX_PATH_BYTES:
            front, _, rest = path[:_MAX_PATH_BYTES].rpartition(b"/")
            directory = os.open(front, _OPEN_DIRECTORY, dir_fd=directory)
            opened.callback(os.close, directory)
            path = rest + path[_MAX_PATH_BYTES:]
        return os.open(path, _OPEN_FILE, dir_fd=directory)


class _OpenFile:
    """The file for the time of a ``with`` block; a class, as a tree may hold a million of them."""

    __slots__ = ("_content", "_fd")

    def __init__(self, content: _FileContent) -> None:
        self._content = content
        self._fd = -1

    def __enter__(self) -> int:
        self._fd = self._content.open_unchanged()
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
