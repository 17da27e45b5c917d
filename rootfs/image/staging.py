"""A tree on disk, for programs that only read directories. Owners and devices need privilege."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rootfs.image.tree import Node, read_content, walk
from rootfs.imagefile.errors import OsErrors
from vsock.errors import CallError

__all__ = ("staged",)


@contextlib.contextmanager
def staged(root: Node, beside: Path, purpose: str) -> Iterator[Path]:
    """Write a tree into a new directory in ``beside`` for the time of a ``with`` block.

    Raises:
        CallError: ``unsupported``, the caller is not root; by errno.
    """
    if os.geteuid() != 0:
        raise CallError(
            "unsupported",
            f"cannot make {purpose}: only root can put owners and devices into a directory",
            step="stage the tree",
            hint="build it uncompressed, or as squashfs: neither needs privilege",
        )
    with OsErrors("stage the tree in", beside):
        holder = tempfile.mkdtemp(prefix=".staging-", dir=beside)
    try:
        top = Path(holder) / "root"
        with OsErrors("stage the tree"):
            _write_tree(root, os.fsencode(top))
        yield top
    finally:
        shutil.rmtree(holder)


def _write_tree(root: Node, top: bytes) -> None:
    first_names: dict[int, bytes] = {}
    directories: list[tuple[bytes, Node]] = []
    for path, node in walk(root):
        place = b"/".join((top, *path))
        if id(node) in first_names:
            os.link(first_names[id(node)], place, follow_symlinks=False)
            continue
        _create(node, place)
        if node.is_directory:
            directories.append((place, node))
        else:
            first_names[id(node)] = place
            _describe(node, place, top)
    for place, node in reversed(directories):
        _describe(node, place, top)


def _create(node: Node, place: bytes) -> None:
    if node.is_directory:
        os.mkdir(place, 0o700)
    elif node.is_symlink:
        os.symlink(node.target, place)
    elif node.is_regular:
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_content(node, fd, place)
        finally:
            os.close(fd)
    else:
        os.mknod(place, stat.S_IFMT(node.mode) | 0o600, node.rdev)


def _write_content(node: Node, fd: int, place: bytes) -> None:
    """Write a file's bytes to the empty file ``fd``; pieces of zeros become holes."""
    for piece in read_content(node.content, place):
        if piece.count(0) == len(piece):
            os.lseek(fd, len(piece), os.SEEK_CUR)
            continue
        view = memoryview(piece)
        while view:
            view = view[os.write(fd, view) :]
    os.ftruncate(fd, node.content.size_bytes)


def _describe(node: Node, place: bytes, top: bytes) -> None:
    # the owner first: changing it clears set-id bits and capabilities
    os.chown(place, node.uid, node.gid, follow_symlinks=False)
    if not node.is_symlink:
        os.chmod(place, stat.S_IMODE(node.mode))
    for name, value in node.xattrs.items():
        os.setxattr(place, name, value, follow_symlinks=False)
    with contextlib.suppress(OverflowError):  # then the time below is another
        os.utime(place, ns=(node.mtime_ns, node.mtime_ns), follow_symlinks=False)
    found = os.lstat(place)
    # chown(2) takes 4294967295 as "no change"; a file system cuts times to what it can hold
    if (found.st_uid, found.st_gid, found.st_mtime_ns) != (node.uid, node.gid, node.mtime_ns):
        text = os.fsdecode(os.path.relpath(place, top))
        raise CallError(
            "unsupported",
            f"cannot stage {text!r}: a file here cannot have the owner {node.uid}:{node.gid} "
            f"or the time {node.mtime_ns // 10**9}",
            step="stage the tree",
            object=text,
            hint="build it uncompressed",
        )
