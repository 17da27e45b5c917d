"""From the boot image to the real root: move the API file systems, give the memory back, exec.

Source: Documentation/filesystems/ramfs-rootfs-initramfs.rst: rootfs cannot be pivoted away, so the
new root is moved over it and what is in it is deleted.
"""

import contextlib
import os
import stat
import sys

from guestagent.engine.journal import Journal
from guestagent.storage import syscalls
from guestagent.storage.makefs import forbid_programs
from vsock.errors import CallError
from vsock.log import log

__all__ = (
    "check_root",
    "exec_init",
    "keep_modules",
    "move_out",
    "rename_root",
    "switch_root",
)

#: What goes along. /run holds the layers and the journal.
_MOVED = ("/proc", "/sys", "/dev", "/run")
_IN_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
#: A link in the new root could lead the mounts anywhere, and out of the sight of its programs.
_NO_LINKS = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS


def check_root(root: str, init: str) -> None:
    """See that ``root`` can be switched to: has the directories, and an ``init`` to execute.

    Raises:
        CallError: ``invalid``, naming what is missing.
    """
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in _MOVED:
            os.close(_open_in(root_fd, root, path, _NO_LINKS))
        init_fd = _open_in(root_fd, root, init, _IN_ROOT)
        mode = os.fstat(init_fd).st_mode
        os.close(init_fd)
    finally:
        os.close(root_fd)
    if not stat.S_ISREG(mode) or not mode & 0o111:
        raise CallError(
            "invalid",
            f"cannot switch to {root!r}: {init!r} in it is no program",
            step="switch root",
            object=init,
        )


def _open_in(root_fd: int, root: str, path: str, resolve: int) -> int:
    """Return an O_PATH descriptor of ``path`` in the root: a directory, unless links are allowed.

    Raises:
        CallError: ``invalid``, naming the path.
    """
    flags = os.O_PATH | (os.O_DIRECTORY if resolve == _NO_LINKS else 0)
    relative = path.lstrip("/") if resolve == _NO_LINKS else path
    try:
        return syscalls.openat2(root_fd, relative, flags, resolve=resolve)
    except OSError as error:
        raise CallError(
            "invalid",
            f"cannot switch to {root!r}: {path!r} in it: {error.strerror}",
            errno=error.errno,
            step="switch root",
            object=path,
        ) from error


def move_out(mounted_at: str, new_root: str) -> None:
    """Move the root-to-be out of /run, which is to be moved into it."""
    os.makedirs(new_root, mode=0o700, exist_ok=True)
    syscalls.mount(mounted_at, new_root, "", syscalls.MS_MOVE, "")


def rename_root(state_directory: str, mounted_at: str) -> None:
    """Tell the journal that what was mounted at ``mounted_at`` is about to be the root."""
    journal = Journal(state_directory)
    written = journal.read()
    for layer in written.layers:
        if layer.spec.mount_point == mounted_at:
            spec = layer.spec.replace(target="/")
            journal.write_layers((layer.replace(spec=spec),), begun="")
    for overlay in written.overlays:
        if overlay.spec.mount_point == mounted_at:
            root = overlay.spec.replace(target="/")
            journal.write_overlay(overlay.replace(spec=root), begun="")


def keep_modules(state_directory: str) -> None:
    """Copy the interpreter's modules to /run, for an agent that outlives the boot image.

    What is imported is in memory; what is imported later must come from what was measured, never
    from the new root. The same holds for the programs that make file systems: there are none then.
    """
    forbid_programs()
    kept = f"{state_directory}/python"
    copied = [path for path in sys.path if os.path.isdir(path) and path != kept]
    for path in copied:
        _copy_tree(path, kept)
    sys.path[:] = [kept]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        # a package that is imported looks for its other modules where it was found itself
        places = getattr(module, "__path__", None)
        if isinstance(places, list):
            places[:] = [_moved(place, copied, kept) for place in places]


def _moved(place: str, copied: list[str], kept: str) -> str:
    """Return where the copy of a directory is; one that was not copied stays where it is."""
    for path in sorted(copied, key=len, reverse=True):
        if place.startswith(f"{path}/"):
            return kept + place[len(path) :]
    return place


def _copy_tree(source: str, target: str) -> None:
    os.makedirs(target, mode=0o700, exist_ok=True)
    for entry in os.scandir(source):
        there = f"{target}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            _copy_tree(entry.path, there)
        elif entry.is_file():
            with open(entry.path, "rb") as original, open(there, "wb") as copy:
                copy.write(original.read())


def switch_root(new_root: str) -> None:
    """Make ``new_root`` the root of this process; what was the boot image is deleted.

    Raises:
        CallError, OSError: a mount could not be moved; the system cannot go on then.
    """
    with contextlib.suppress(OSError):  # no mount there: it would stay, out of anybody's sight
        syscalls.umount2("/tmp", syscalls.MNT_DETACH)
    old_root_fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    old_dev = os.fstat(old_root_fd).st_dev
    new_root_fd = os.open(new_root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for path in _MOVED:
        target_fd = _open_in(new_root_fd, new_root, path, _NO_LINKS)
        syscalls.move_mount(syscalls.AT_FDCWD, target_fd, from_path=path)
        os.close(target_fd)
    os.close(new_root_fd)
    os.chdir(new_root)
    syscalls.mount(".", "/", "", syscalls.MS_MOVE, "")
    os.chroot(".")
    os.chdir("/")
    try:
        _delete_below(old_root_fd, old_dev)
    except OSError as error:
        # memory that is not given back is a pity, no reason to end the boot
        log.warning("the boot image is not deleted", error=str(error))
    finally:
        os.close(old_root_fd)


def _delete_below(directory_fd: int, dev: int) -> None:
    """Delete everything below an open directory, staying on the file system ``dev``."""
    for name in os.listdir(directory_fd):
        info = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        if info.st_dev != dev:
            continue
        if not stat.S_ISDIR(info.st_mode):
            os.unlink(name, dir_fd=directory_fd)
            continue
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        child_fd = os.open(name, flags, dir_fd=directory_fd)
        try:
            _delete_below(child_fd, dev)
        finally:
            os.close(child_fd)
        try:
            os.rmdir(name, dir_fd=directory_fd)
        except OSError:  # a mount point of something that stays
            continue


def exec_init(init: str, arguments: tuple[str, ...]) -> None:
    """Become ``init``, with signals as a kernel would hand them over. Does not return."""
    import signal

    # Python ignores these two; an ignored signal would be inherited
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    environment = {"HOME": "/", "TERM": "linux", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    os.execve(init, [init, *arguments], environment)
