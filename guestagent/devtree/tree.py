"""The files of one tree: made, looked at and removed, each whole or not at all.

A container may change its /dev at any time. So every file is reached from the root of the tree
through directories alone, never through a link or another mount, and what is changed is the very
file that was opened.

What is bound hides the file it is bound on. That file has owner, mode, access control lists and
label before the bind: after it they would change the guest's own.
"""

import errno
import os
import stat

from guestagent.devtree.closure import Node
from guestagent.devtree.source import NO_ATTRIBUTE, kind_of, open_source, rdev_of
from guestagent.storage import syscalls
from guestagent.storage.mount import open_mounted
from vsock.closeable import FdOwner
from vsock.errors import CallError

__all__ = ("Tree",)

_RESOLVE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_PATH = os.O_PATH | os.O_NOFOLLOW
_ACCESS_LIST = "system.posix_acl_access"
_DEVICE_TYPES = {"block": stat.S_IFBLK, "character": stat.S_IFCHR}


class Tree(FdOwner):
    """The mount of a tree, held open. A context manager."""

    def __init__(self, root: str, dev: str, mount_id: int) -> None:
        """Open it.

        Raises:
            CallError: ``conflict``, something else is mounted there.
            OSError: ENOENT and the like.
        """
        self._root = root
        self._fd = open_mounted(root, dev, mount_id)

    @property
    def fd(self) -> int:
        return self._fd

    # --- make

    def make(self, node: Node) -> bool:
        """Make a node; return False if just this file is there already, whatever made it.

        Raises:
            CallError: ``conflict``, another file is in its place; as ``open_source``.
            OSError: anything else that the kernel refused; nothing is left of the node.
        """
        parent_fd, name = self._open_parent(node)
        try:
            try:
                self._place(node, parent_fd, name)
            except FileExistsError:
                state = self.state(node)
                if state == "there" and node.way != "bind":
                    return False
                text = f"{node.path!r} is another file in the tree already"
                raise CallError("conflict", text, errno=errno.EEXIST, object=node.path) from None
            try:
                self._finish(node, parent_fd, name)
            except BaseException:
                _unlink(node, parent_fd, name)
                raise
        finally:
            os.close(parent_fd)
        return True

    def _place(self, node: Node, parent_fd: int, name: str) -> None:
        """Make a file that nobody may use yet."""
        seen = node.seen
        if node.way == "symlink":
            os.symlink(seen.target or "", name, dir_fd=parent_fd)
        elif node.way == "mknod":
            major, _, minor = (seen.rdev or "").partition(":")
            number = os.makedev(int(major), int(minor))
            os.mknod(name, _DEVICE_TYPES[seen.kind], number, dir_fd=parent_fd)
        elif seen.kind == "directory":
            os.mkdir(name, 0, dir_fd=parent_fd)
        else:
            os.mknod(name, stat.S_IFREG, dir_fd=parent_fd)

    def _finish(self, node: Node, parent_fd: int, name: str) -> None:
        fd = syscalls.openat2(parent_fd, name, _PATH, resolve=_RESOLVE | syscalls.RESOLVE_NO_XDEV)
        try:
            if not _is_fresh(node, os.fstat(fd)):
                text = f"{node.path!r} was replaced in the tree while it was made"
                raise CallError("conflict", text, object=node.path)
            _set_metadata(node, fd)
            if node.way == "bind":
                _bind(node, fd)
        finally:
            os.close(fd)

    # --- look

    def state(self, node: Node) -> str:
        """Return whether a node is there, missing, or another file is in its place (other)."""
        try:
            fd = self._open(node.path)
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EXDEV):
                raise
            return "other"
        try:
            found = os.fstat(fd)
            is_bound = syscalls.mount_of("", fd=fd)[1] != syscalls.mount_of("", fd=self._fd)[1]
            is_same = (kind_of(found), rdev_of(found)) == (node.seen.kind, node.seen.rdev)
            if is_same and node.way == "symlink":
                is_same = os.readlink("", dir_fd=fd) == node.seen.target
            return "there" if is_same and is_bound == (node.way == "bind") else "other"
        finally:
            os.close(fd)

    # --- remove

    def unbind(self, node: Node) -> None:
        """Unmount what is bound on a node's file, which stays. Idempotent.

        Raises:
            OSError: EBUSY, a process uses it.
        """
        parent_fd, name = self._open_parent(node)
        try:
            syscalls.umount2(f"/proc/self/fd/{parent_fd}/{name}", syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            error.filename = node.path
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
        finally:
            os.close(parent_fd)

    def rebind(self, node: Node) -> None:
        """Undo ``unbind``."""
        fd = self._open(node.path)
        try:
            _bind(node, fd)
        finally:
            os.close(fd)

    def remove(self, node: Node) -> bool:
        """Remove a node; return whether it was there. What a container has put in its place, or
        into it, stays. Idempotent.

        Raises:
            OSError: EBUSY, a process uses what is bound.
        """
        try:
            if node.way == "bind":
                self.unbind(node)
            elif self.state(node) != "there":
                return False
            parent_fd, name = self._open_parent(node)
        except FileNotFoundError:
            return False
        try:
            if node.way == "bind" and not _is_placeholder(node, parent_fd, name):
                return False
            _unlink(node, parent_fd, name)
        finally:
            os.close(parent_fd)
        return True

    # --- the way there

    def _open(self, path: str) -> int:
        return syscalls.openat2(self._fd, _below_dev(path), _PATH, resolve=_RESOLVE)

    def _open_parent(self, node: Node) -> tuple[int, str]:
        parent, _, name = _below_dev(node.path).rpartition("/")
        flags = os.O_PATH | os.O_DIRECTORY
        try:
            resolve = _RESOLVE | syscalls.RESOLVE_NO_XDEV
            return syscalls.openat2(self._fd, parent or ".", flags, resolve=resolve), name
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EXDEV):
                raise
            text = f"what leads to {node.path!r} in the tree is no directory of its own"
            raise CallError("conflict", text, errno=error.errno, object=node.path) from error


def _below_dev(path: str) -> str:
    return path.removeprefix("/dev/")


def _is_fresh(node: Node, found: os.stat_result) -> bool:
    """Return whether a file is just what was made for a node: a container may be faster."""
    kind = "file" if node.way == "bind" and node.seen.kind != "directory" else node.seen.kind
    is_empty = kind != "file" or (found.st_size == 0 and found.st_nlink == 1)
    rdev = node.seen.rdev if node.way == "mknod" else None
    return is_empty and (kind_of(found), rdev_of(found)) == (kind, rdev)


def _is_placeholder(node: Node, parent_fd: int, name: str) -> bool:
    """Return whether what a bind has left may go; no directory goes that is not empty."""
    try:
        return _is_fresh(node, os.stat(name, dir_fd=parent_fd, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _set_metadata(node: Node, fd: int) -> None:
    """Set all that decides who may use a file. The link below /proc leads to the very file."""
    seen, path = node.seen, f"/proc/self/fd/{fd}"
    os.chown(path, seen.uid, seen.gid)
    if node.way != "symlink":
        os.chmod(path, seen.mode)
        _drop_access_list(path)
    for name, value in seen.attributes.items():
        try:
            os.setxattr(path, name, value)
        except OSError as error:
            if error.errno not in NO_ATTRIBUTE:
                raise
            if name.startswith("security."):  # no label where the kernel has no such module
                continue
            # the mode alone could give its group more than the list does
            text = f"no tree can have the access control list of {node.path!r}: tmpfs keeps none"
            raise CallError("unsupported", text, errno=error.errno, object=node.path) from error


def _drop_access_list(path: str) -> None:
    """Remove what a file has from the default list of its directory."""
    try:
        os.removexattr(path, _ACCESS_LIST)
    except OSError as error:
        if error.errno not in NO_ATTRIBUTE:
            raise


def _bind(node: Node, fd: int) -> None:
    source_fd = open_source(node)
    try:
        flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH
        mount_fd = syscalls.open_tree(source_fd, "", flags)
    finally:
        os.close(source_fd)
    try:
        syscalls.mount_setattr(
            mount_fd,
            "",
            syscalls.AT_EMPTY_PATH,
            attr_set=syscalls.MOUNT_ATTR_NOSUID,
            propagation=syscalls.MS_PRIVATE,  # of what is mounted in the guest later, nothing
        )
        syscalls.move_mount(mount_fd, fd, filename=node.path)
    finally:
        os.close(mount_fd)


def _unlink(node: Node, parent_fd: int, name: str) -> None:
    try:
        if node.seen.kind == "directory":
            os.rmdir(name, dir_fd=parent_fd)
        else:
            os.unlink(name, dir_fd=parent_fd)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise
