"""A copy of a tree on a directory, also in another mount namespace.

The copy is a slave of the tree's own mount: what is bound in the tree later, or unmounted, is so in
the copy. What a container mounts there does not come back.

Source: mount_namespaces(7); setns(2) acts on a thread, which then has left the agent's namespace
for good.
"""

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable

from guestagent.api.devtree import DevAttachment
from guestagent.storage import syscalls
from guestagent.storage.openat import reopen
from vsock.closeable import Closeable
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("Namespace", "attach_copy")

_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_NO_LINKS = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_OPEN_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

#: Threads that were left to themselves, at most.
_MAX_LEFT = 16


class Namespace(Closeable):
    """The mount namespace of an attachment, held open. ``is_own`` says that it is the agent's."""

    def __init__(self, where: DevAttachment) -> None:
        """Open it.

        Raises:
            CallError: ``not_found``, there is no such process; ``invalid``, it is in the agent's
                own namespace, or the file is none of a mount namespace.
            OSError: the file cannot be opened.
        """
        self._fd = self._root_fd = -1
        self.is_own = where.pid is None and where.namespace is None
        try:
            if where.pid is not None:
                self._open_process(where.pid)
            elif where.namespace is not None:
                self._open_file(where.namespace)
            if self._fd >= 0 and os.path.samestat(os.fstat(self._fd), os.stat("/proc/self/ns/mnt")):
                text = "it is the agent's own mount namespace: name the target alone"
                raise CallError("invalid", text, object="params.target")
        except BaseException:
            self.close()
            raise

    def _open_process(self, pid: int) -> None:
        try:
            # held, so that its number cannot come to stand for another process
            process_fd = os.open(f"/proc/{pid}", _OPEN_DIRECTORY)
            try:
                self._fd = os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process_fd)
                self._root_fd = os.open("root", _OPEN_DIRECTORY, dir_fd=process_fd)
            finally:
                os.close(process_fd)
        except (FileNotFoundError, ProcessLookupError) as error:
            text = f"there is no process {pid}"
            raise CallError("not_found", text, errno=errno.ESRCH, object="params.pid") from error

    def _open_file(self, path: str) -> None:
        path_fd = syscalls.openat2(syscalls.AT_FDCWD, path, os.O_PATH, resolve=_NO_LINKS)
        self._fd = reopen(path_fd, stat.S_IFREG, os.fsencode(path))

    def run(self, action: Callable[[int], None], deadline: Deadline, *fds: int) -> None:
        """Run ``action`` in the namespace, with a descriptor of the root that targets are in.

        What it looks up may be on a file system of the container, which need never answer: past
        ``deadline`` it is left to itself. So it owns the descriptors ``fds``, which are closed at
        its end.

        Raises:
            CallError: ``timeout`` or ``cancelled``; what ``action`` raised.
        """
        if sum(thread.name == syscalls.APART for thread in threading.enumerate()) >= _MAX_LEFT:
            text = f"{_MAX_LEFT} file systems of containers have not answered yet"
            raise CallError("busy", text, hint="end the containers, or their FUSE servers")
        own = [os.dup(fd) if fd >= 0 else -1 for fd in (self._fd, self._root_fd)]

        def inside() -> None:
            try:
                if own[0] >= 0:
                    _enter(own[0])
                if own[1] < 0:
                    own[1] = os.open("/", _OPEN_DIRECTORY)
                action(own[1])
            finally:
                _close((*own, *fds))

        syscalls.run_apart(inside, deadline)

    def close(self) -> None:
        """Idempotent."""
        _close((self._fd, self._root_fd))
        self._fd = self._root_fd = -1


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def _enter(fd: int) -> None:
    try:
        syscalls.setns(fd, syscalls.CLONE_NEWNS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        text = "the file is none of a mount namespace"
        raise CallError("invalid", text, errno=error.errno, object="params.namespace") from error


def attach_copy(
    tree_fd: int, namespace: Namespace, target: str, deadline: Deadline
) -> tuple[int, bool]:
    """Mount a copy of a tree; return its mount id, and whether it was there already.

    Raises:
        CallError: ``denied``, a link is on the way to ``target``; ``conflict``, it is no directory,
            or lies in the tree itself; ``timeout`` or ``cancelled``, nothing is mounted then.
        OSError: ENOENT and the like.
    """
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH | syscalls.AT_RECURSIVE
    copy_fd = syscalls.open_tree(tree_fd, "", flags)
    recursive = syscalls.AT_EMPTY_PATH | syscalls.AT_RECURSIVE
    syscalls.mount_setattr(copy_fd, "", recursive, propagation=syscalls.MS_SLAVE)
    tree = os.fstat(tree_fd)
    lock = threading.Lock()
    answers: list[tuple[int, bool]] = []
    is_over: list[bool] = []

    def attach(root_fd: int) -> None:
        target_fd = _open_target(root_fd, target)
        try:
            with lock:
                if not is_over:
                    answers.append(_attach(copy_fd, tree, target_fd, target))
        finally:
            os.close(target_fd)

    try:
        namespace.run(attach, deadline, copy_fd)
    except CallError:
        with lock:
            is_over.append(True)
        if not answers:
            raise
    return answers[0]


def _attach(copy_fd: int, tree: os.stat_result, target_fd: int, target: str) -> tuple[int, bool]:
    there = os.fstat(target_fd)
    if there.st_dev != tree.st_dev:
        syscalls.move_mount(copy_fd, target_fd, filename=target)
        return syscalls.mount_of("", fd=copy_fd)[1], False
    if there.st_ino == tree.st_ino:
        return syscalls.mount_of("", fd=target_fd)[1], True
    text = f"target {target!r} lies in the tree itself"
    raise CallError("conflict", text, errno=errno.ELOOP, object=target)


def _open_target(root_fd: int, target: str) -> int:
    try:
        return syscalls.openat2(root_fd, target.lstrip("/"), _OPEN_DIRECTORY, resolve=_RESOLVE)
    except OSError as error:
        if error.errno == errno.ELOOP:
            code, text = "denied", f"a link leads to target {target!r}, which is not followed"
        elif error.errno == errno.ENOTDIR:
            code, text = "conflict", f"target {target!r} is no directory"
        else:
            error.filename = target
            raise
        raise CallError(code, text, errno=error.errno, object=target) from error
