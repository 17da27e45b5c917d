"""Mount and unmount one file system, at a directory that cannot be swapped meanwhile.

A target is opened component by component below an allowed root, following no link of any kind; the
mount is then attached to that very directory through its descriptor. Unmounting never detaches
lazily: a device that the host pulls away after our reply must really be unused.
"""

import errno
import os
from collections.abc import Collection, Sequence

from guestagent.storage import syscalls
from guestagent.storage.fscontext import (
    FsContext,
    FsContextError,
    attach,
    flag_bits,
    is_supported,
)
from guestagent.storage.mountinfo import whereabouts
from vsock.closeable import FdOwner
from vsock.errors import CallError

__all__ = (
    "READONLY_FLAGS",
    "TargetDirectory",
    "mount_filesystem",
    "open_detached",
    "open_mounted",
    "unmount",
)

#: What a layer is mounted with unless it is asked for otherwise.
READONLY_FLAGS = ("ro", "nodev", "nosuid")
_RESOLVE = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_BENEATH
_OPEN_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
#: How often to start over when directories vanish under us (another request undoing its own).
_RESOLVE_ATTEMPTS = 8


class TargetDirectory(FdOwner):
    """A directory below ``root`` to mount on, made if it is not there, held by a descriptor.

    ``created`` lists the directories that were made, outermost first; ``remove_created`` undoes
    just these. Use as a context manager, which closes the descriptor and removes nothing.
    """

    def __init__(self, target: str, *, root: str = "/run", create: bool = True) -> None:
        """Open ``target``, an absolute path strictly below ``root``; missing parts become 0700,
        and so does ``root`` itself in its directory.

        Raises:
            CallError: ``invalid``, outside of root or with "." or ".."; ``denied``, a symbolic or
                magic link on the way; ``conflict``, not a directory, not empty, or a mount point
                already.
            OSError: anything else the kernel refused.
        """
        self.path = target
        #: Directories that were made, outermost first.
        self.created: tuple[str, ...] = ()
        self._root = root.rstrip("/")
        self._fd = -1
        names = _names_below(target, self._root)
        try:
            self._open_or_retry(names, create)
            if target not in self.created:
                self._refuse_entries()
        except BaseException:
            self.close()
            self.remove_created()
            raise

    @property
    def fd(self) -> int:
        """The O_PATH descriptor; the caller must not close it."""
        return self._fd

    def remove_created(self) -> tuple[str, ...]:
        """Remove the directories that were made here and are empty; return those removed.

        A directory that another request has come to use since is left.
        """
        removed = []
        for path in reversed(self.created):
            try:
                _remove_directory(path)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY):
                    raise
                if error.errno != errno.ENOENT:
                    break
            else:
                removed.append(path)
        self.created = ()
        return tuple(removed)

    def _refuse_entries(self) -> None:
        """A mount would hide what is in the directory, and may replace what others read there."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            with os.scandir(fd) as entries:
                if next(entries, None) is None:
                    return
        finally:
            os.close(fd)
        text = f"target {self.path!r} is not empty"
        raise CallError("conflict", text, step="target", object=self.path)

    def _open_or_retry(self, names: list[str], create: bool) -> None:
        for attempt in range(_RESOLVE_ATTEMPTS):
            try:
                self._open(names, create)
                return
            except FileNotFoundError:
                self.close()
                if not create or attempt + 1 == _RESOLVE_ATTEMPTS:
                    raise

    def _open(self, names: list[str], create: bool) -> None:
        """Walk down from the root; on the way ``self._fd`` is the directory reached so far."""
        try:
            self._fd = os.open(self._root or "/", _OPEN_DIRECTORY)
        except FileNotFoundError:
            if not create:
                raise
            self._make(None, self._root, self._root)
            self._fd = os.open(self._root, _OPEN_DIRECTORY)
        path = self._root
        for name in names:
            path = f"{path}/{name}"
            child = self._enter(self._fd, name, path, create)
            parent_fd, self._fd = self._fd, child
            os.close(parent_fd)

    def _enter(self, parent_fd: int, name: str, path: str, create: bool) -> int:
        if create and path == self.path:  # mostly missing, as what leads there mostly is not
            self._make(parent_fd, name, path)
            return self._open_child(parent_fd, name, path)
        try:
            return self._open_child(parent_fd, name, path)
        except FileNotFoundError:
            if not create:
                raise
        self._make(parent_fd, name, path)
        return self._open_child(parent_fd, name, path)

    def _make(self, parent_fd: int | None, name: str, path: str) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent_fd)
        except FileExistsError:  # another request made it
            return
        if path not in self.created:
            self.created += (path,)

    def _open_child(self, parent_fd: int, name: str, path: str) -> int:
        # only the target itself must not be a mount point; what leads there may be one
        is_target = path == self.path
        resolve = _RESOLVE | syscalls.RESOLVE_NO_XDEV if is_target else _RESOLVE
        try:
            return syscalls.openat2(parent_fd, name, _OPEN_DIRECTORY, resolve=resolve)
        except OSError as error:
            problem = _problem_of(error, path, is_target)
            if problem is None:
                raise
            raise problem from error


def _problem_of(error: OSError, path: str, is_target: bool) -> CallError | None:
    """Return what an error of openat2 means for a component of a target; None if nothing special.

    A single name that is no link leads to another mount (EXDEV) only by a mount on top of it.
    """
    if error.errno == errno.EXDEV and is_target:
        text = f"target {path!r} is a mount point already"
        return CallError("conflict", text, step="target", object=path)
    if error.errno in (errno.ELOOP, errno.EXDEV):
        code, text = "denied", f"target component {path!r} is a link, which is not followed"
    elif error.errno == errno.ENOTDIR:
        code, text = "conflict", f"target component {path!r} is not a directory"
    else:
        return None
    return CallError(code, text, errno=error.errno, step="target", object=path)


def _names_below(target: str, root: str) -> list[str]:
    names = target[len(root) + 1 :].split("/") if target.startswith(f"{root}/") else []
    if not names or any(name in ("", ".", "..") for name in names):
        raise CallError(
            "invalid",
            f"target {target!r} is not a normal path below {root or '/'!r}",
            step="target",
            object=target,
        )
    return names


def _open_parent(path: str) -> int:
    """Open the directory that holds ``path`` following no links; the caller owns the result."""
    parent = os.path.dirname(path) or "/"
    resolve = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    return syscalls.openat2(syscalls.AT_FDCWD, parent, _OPEN_DIRECTORY, resolve=resolve)


def _remove_directory(path: str) -> None:
    parent_fd = _open_parent(path)
    try:
        os.rmdir(os.path.basename(path), dir_fd=parent_fd)
    finally:
        os.close(parent_fd)


def open_mounted(target: str, dev: str, mount_id: int) -> int:
    """Open the root of a mount with O_PATH; the caller owns the descriptor.

    Args:
        target: where it was mounted; no link is followed.
        dev: the number (MAJOR:MINOR) of its file system.
        mount_id: as in mountinfo and statx.

    Raises:
        CallError: ``conflict``, something else is there: the mount is gone, moved or covered.
        OSError: ENOENT and the like.
    """
    resolve = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    fd = syscalls.openat2(syscalls.AT_FDCWD, target, _OPEN_DIRECTORY, resolve=resolve)
    try:
        if syscalls.mount_of("", fd=fd) != (dev, mount_id):
            what = whereabouts(target, dev, mount_id)
            raise CallError("conflict", f"what was mounted is {what}", object=target)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_detached(
    *,
    source: str,
    filesystem: str,
    flags: Collection[str] = READONLY_FLAGS,
    options: Sequence[tuple[str, str | None]] = (),
) -> int:
    """Mount ``source`` nowhere yet and return the mount's descriptor, which the caller owns.

    Raises:
        FsContextError: the kernel refused; ``log`` says why.
    """
    attributes, _ = flag_bits(flags)
    with FsContext(filesystem) as context:
        context.set("source", source)
        if "ro" in flags:
            context.set("ro")
        for key, value in options:
            context.set(key, value)
        context.create(source)
        return context.mount(attributes, source)


def mount_filesystem(
    *,
    source: str,
    target: "int | str",
    filesystem: str,
    flags: Collection[str] = READONLY_FLAGS,
    options: Sequence[tuple[str, str | None]] = (),
    method: str | None = None,
) -> str:
    """Mount ``source`` at ``target``; return the method used, ``fsconfig`` or ``mount``.

    Args:
        target: a directory as an open descriptor (as of ``TargetDirectory``), or its path.
        flags: of ro, nodev, nosuid, noexec, noatime, nodiratime.
        options: of the file system, (key, value) or (key, None).
        method: forces one; otherwise mount(2) is used where the kernel has no fsopen.

    Raises:
        FsContextError: the kernel refused; ``log`` says why where it is told.
    """
    chosen = method or ("fsconfig" if is_supported() else "mount")
    if chosen == "fsconfig":
        mount_fd = open_detached(source=source, filesystem=filesystem, flags=flags, options=options)
        try:
            attach(mount_fd, target)
        finally:
            os.close(mount_fd)
    elif chosen == "mount":
        _mount_by_mount2(source, target, filesystem, flags, options)
    else:
        raise ValueError(f"mount method must be fsconfig or mount, got {method!r}")
    return chosen


def _mount_by_mount2(
    source: str,
    target: "int | str",
    filesystem: str,
    flags: Collection[str],
    options: Sequence[tuple[str, str | None]],
) -> None:
    _, bits = flag_bits(flags)
    for key, value in options:
        if "," in key or "," in (value or ""):
            raise ValueError(f"mount(2) cannot carry a comma in option {key!r}")
    data = ",".join(key if value is None else f"{key}={value}" for key, value in options)
    # mount(2) resolves the link below /proc to the very directory that was opened
    path = f"/proc/self/fd/{target}" if isinstance(target, int) else target
    try:
        syscalls.mount(source, path, filesystem, bits, data)
    except OSError as error:
        error.filename = source
        raise FsContextError.of("mount-create", error) from error


def unmount(target: str) -> None:
    """Unmount the topmost mount at ``target``. No link is followed, nothing is left detached.

    Raises:
        OSError: EBUSY, in use; EINVAL, no mount point.
    """
    parent_fd = _open_parent(target)
    try:
        name = os.path.basename(target)
        syscalls.umount2(f"/proc/self/fd/{parent_fd}/{name}", syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        error.filename = target
        raise
    finally:
        os.close(parent_fd)
