"""Opening below a root that no path leads out of: not by ``..``, a symlink, a mount or a device.

A ``Root`` is a private copy of the mount at a directory (``open_tree`` with OPEN_TREE_CLONE): what
is mounted further below is not part of it, and it vanishes when it is closed. Without the
privilege to make one, the directory itself is the root, and mounts below it are seen.

Nothing is opened to see what it is: a path is resolved with O_PATH, which has no effect on devices,
FIFOs and sockets; only what then proves to be a regular file or a directory is opened for reading.

Source: openat2(2), open_tree in Linux 5.2.
"""

import errno
import os
import stat

from guestagent.storage import syscalls
from vsock.closeable import Closeable

__all__ = ("Root", "reopen")

_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
#: No effect on regular files; they keep a device that slipped in from blocking or from becoming a
#: controlling terminal.
_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Root(Closeable):
    """The top of a tree. A context manager. ``is_clone`` tells whether mounts below are hidden."""

    def __init__(self, directory: str, mount: tuple[str, int] | None = None) -> None:
        """Open ``directory``, whose own path is trusted.

        ``mount`` is the number (MAJOR:MINOR) and the mount id that it must have.

        Raises:
            OSError: ENOENT, ENOTDIR; ESTALE, it has another ``mount``.
        """
        # held beside the copy, so that an unmount meanwhile is busy
        self._directory_fd = os.open(
            directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
        try:
            if mount is not None and syscalls.mount_of("", fd=self._directory_fd) != mount:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), directory)
            flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH
            self.fd = syscalls.open_tree(self._directory_fd, "", flags)
            self.is_clone = True
        except PermissionError:
            self.fd = os.dup(self._directory_fd)
            self.is_clone = False
        except BaseException:
            os.close(self._directory_fd)
            raise

    def resolve(self, path: bytes, *, follow: bool = True) -> int:
        """Return an O_PATH descriptor of what is at ``path``; the last symlink is followed unless
        ``follow`` is false.

        Raises:
            OSError: ENOENT, ENOTDIR, ELOOP (also for a magic link), ENAMETOOLONG.
        """
        flags = os.O_PATH if follow else os.O_PATH | os.O_NOFOLLOW
        return syscalls.openat2(self.fd, os.fsdecode(path), flags, resolve=_RESOLVE)

    def open_file(self, path: bytes) -> int:
        """Open a regular file for reading.

        Raises:
            OSError: as ``resolve``; EISDIR for a directory, EINVAL for anything else.
        """
        return reopen(self.resolve(path), stat.S_IFREG, path)

    def open_directory(self, path: bytes) -> int:
        """Open a directory for reading.

        Raises:
            OSError: as ``resolve``; ENOTDIR for anything else.
        """
        return reopen(self.resolve(path), stat.S_IFDIR, path)

    def close(self) -> None:
        """Idempotent."""
        for fd in (self.fd, self._directory_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._directory_fd = -1


def reopen(path_fd: int, kind: int, path: bytes) -> int:
    """Open what an O_PATH descriptor stands for, if it is of ``kind`` (S_IFREG or S_IFDIR).

    Takes ``path_fd`` over. ``path`` names it in errors.

    Raises:
        OSError: EISDIR, ENOTDIR or EINVAL, it is something else; nothing was opened.
    """
    try:
        found = stat.S_IFMT(os.fstat(path_fd).st_mode)
        if found != kind:
            if kind == stat.S_IFDIR:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            if found == stat.S_IFDIR:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            raise OSError(errno.EINVAL, "not a regular file", path)
        return os.open(f"/proc/self/fd/{path_fd}", _READ_FLAGS)
    finally:
        os.close(path_fd)
