"""Where the changes to a writable overlay go: memory, a block device, or a directory."""

import contextlib
import errno
import os
import stat

from guestagent.api import (
    DeviceScratch,
    DirectoryScratch,
    OverlaySpec,
    ThinScratch,
    TmpfsScratch,
)
from guestagent.api.overlays import Scratch, ScratchReport
from guestagent.engine.dmview import dm_device
from guestagent.engine.inventory import LiveLayer, LiveScratch
from guestagent.engine.plan import check_target
from guestagent.engine.scratchdisk import scratch_mount_point, use_disk
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import remove_directories, undo_deadline, unmount_target
from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage import syscalls
from guestagent.storage.makefs import empty_directory
from guestagent.storage.mount import TargetDirectory, mount_filesystem, open_mounted
from guestagent.storage.mountinfo import filesystem_at, find_mount
from vsock.errors import CallError
from vsock.log import log

__all__ = ("make_scratch", "scratch_report", "settle_volatile")

#: What the kernel leaves of a volatile overlay, in Documentation/filesystems/overlayfs.rst.
_VOLATILE = "work/work/incompat/volatile"


def make_scratch(
    state: EngineState,
    spec: OverlaySpec,
    scratch: Scratch,
    top: LiveLayer,
    op: Transaction,
    permit: Allowed,
) -> LiveScratch:
    """Bring up a scratch with the directories ``upper`` and ``work`` in it.

    A new ``upper`` gets the attributes of the root of the layer ``top``, as the root of the overlay
    shows them.

    Raises:
        CallError: ``conflict``, it is another overlay's, holds a layer, or has content that the
            request does not adopt; ``resource``, it is full; ``unsupported``, it has no user
            attributes and the overlay is to have ``userxattr``.
    """
    overlay_id = spec.overlay_id
    if isinstance(scratch, DirectoryScratch):
        live = _use_directory(state, overlay_id, scratch, op, permit)
    elif isinstance(scratch, TmpfsScratch):
        live = _mount_tmpfs(state, overlay_id, scratch, op, permit)
    elif isinstance(scratch, ThinScratch):
        live = _use_pool(state, overlay_id, scratch, op, permit)
    else:
        live = _use_device(state, overlay_id, scratch, op, permit)
    is_adopted = getattr(scratch, "existing", "fresh") == "adopt"
    upper, work = f"{live.path}/upper", f"{live.path}/work"
    is_new = _make_directory(upper, op, is_adopted=is_adopted)
    _make_directory(work, op, is_adopted=is_adopted)
    with op.step("scratch", upper, code="mount"):
        if is_new:
            fd = open_mounted(top.spec.mount_point, top.dev, top.mount_id)
            try:
                _copy_attributes(fd, upper)
            finally:
                os.close(fd)
        if isinstance(scratch, DirectoryScratch):
            _check_entries(live.path)
        if spec.options.userxattr:
            _check_user_attributes(work)
        if os.path.isdir(f"{live.path}/{_VOLATILE}"):
            raise CallError(
                "conflict",
                f"the overlay that was on scratch {live.path!r} was volatile and was not unmounted",
                object=live.path,
                hint="its content may be incomplete: use a fresh scratch",
            )
    return live


def _make_directory(path: str, op: Transaction, *, is_adopted: bool) -> bool:
    """Make a directory for the overlay; return whether it is new."""
    with op.step("scratch", path, code="mount"):
        try:
            os.mkdir(path, mode=0o755)
        except FileExistsError:  # of an earlier overlay on the same scratch
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                text = f"{path!r} is no directory, and links are not followed"
                raise CallError("denied", text, object=path) from None
            if not is_adopted and os.listdir(path):
                raise CallError(
                    "conflict",
                    f"the scratch has content already: {path!r} is not empty",
                    object=path,
                    hint="existing: adopt uses it with its content",
                ) from None
            return False
        os.chmod(path, 0o755)  # whatever the umask
    op.on_rollback(f"directory {path}", lambda: _remove_unused(path))
    return True


def _copy_attributes(fd: int, path: str) -> None:
    """Give a directory the owner, mode, extended attributes and times of an open one."""
    found, source = os.fstat(fd), f"/proc/self/fd/{fd}"
    # its new owner may replace it where its directory is sticky: what is changed stays this one
    target_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    target = f"/proc/self/fd/{target_fd}"
    try:
        os.chown(target, found.st_uid, found.st_gid)
        os.chmod(target, stat.S_IMODE(found.st_mode))
        for name in os.listxattr(source):
            if name.startswith(("trusted.overlay.", "user.overlay.")):
                continue  # overlayfs's own, about the layer
            try:
                os.setxattr(target, name, os.getxattr(source, name))
            except OSError as error:
                if error.errno != errno.ENOTSUP:
                    raise
                log.warning("the scratch cannot hold an attribute", path=path, attribute=name)
        os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
    finally:
        os.close(target_fd)


def _check_user_attributes(path: str) -> None:
    try:
        os.setxattr(path, "user.guestagent", b"")
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        raise CallError(
            "unsupported",
            "this kernel keeps no user attributes on the file system of the scratch, which option "
            "userxattr needs",
            errno=error.errno,
            object="params.options.userxattr",
        ) from error
    os.removexattr(path, "user.guestagent")


def settle_volatile(scratch: LiveScratch) -> None:
    """Write out what a volatile overlay has left to the kernel, and remove the mark by which the
    kernel refuses a scratch that may be incomplete."""
    fd = os.open(f"{scratch.path}/upper", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)
    mark = f"{scratch.path}/{_VOLATILE}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{mark}/dirty")
    for path in (mark, os.path.dirname(mark)):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)


def _remove_unused(path: str) -> None:
    """Remove a directory that we made, with what overlayfs alone puts into a work directory."""
    for inner in (f"{path}/work", f"{path}/index", path):
        try:
            os.rmdir(inner)
        except FileNotFoundError:
            continue


def scratch_report(state: EngineState, overlay_id: str, scratch: LiveScratch) -> ScratchReport:
    """Report a scratch as the kernel has it now.

    Raises:
        OSError: ENXIO, its crypt device is gone.
    """
    space, disk = os.statvfs(scratch.path), scratch.disk
    mount = find_mount(disk.mount_point) if disk is not None else None
    users = state.inventory.users_of_scratch(scratch.key)
    return ScratchReport(
        kind=scratch.kind,
        path=scratch.path,
        filesystem=scratch.filesystem,
        size_bytes=space.f_frsize * space.f_blocks,
        free_bytes=space.f_frsize * space.f_bavail,
        formatted=disk is not None and disk.formatted,
        dm=(dm_device(state.control, disk.crypt),) if disk is not None and disk.crypt else (),
        options=(*mount.options, *mount.super_options) if mount is not None else (),
        shared_with=tuple(name for name in users if name != overlay_id),
    )


def _use_directory(
    state: EngineState,
    overlay_id: str,
    scratch: DirectoryScratch,
    op: Transaction,
    _permit: Allowed,
) -> LiveScratch:
    with op.step("scratch", scratch.path, code="mount"):
        root = check_target(scratch.path, state.rules.scratch_roots, "scratch")
    _claim(state, overlay_id, scratch.path, op)
    if scratch.create and not os.path.lexists(scratch.path):
        with op.step("scratch", scratch.path, code="mount"):
            made = TargetDirectory(scratch.path, root=root)
            made.close()
        op.on_rollback(f"directory {scratch.path}", lambda: remove_directories(made.created))
    with op.step("scratch", scratch.path, code="mount"):
        _check_directory(scratch.path)
        _, filesystem = filesystem_at(scratch.path)
    return LiveScratch(kind=scratch.kind, path=scratch.path, filesystem=filesystem)


def _check_directory(path: str) -> None:
    """Check that a path is a directory which root alone can replace; it may be a mount point.

    What is in it is made by its path, and so it is mounted before Linux 6.13. Nobody can change
    what a path leads to if each directory on it is root's and is written by root alone, or is
    sticky, in which the next one is root's: what was checked first keeps the rest in its place.
    """
    place = ""
    for name in path.split("/"):
        place = f"{place}/{name}" if name else place
        found = os.lstat(place or "/")
        if stat.S_ISLNK(found.st_mode):
            text = f"a link leads to scratch {path!r}, which is not followed"
            raise CallError("denied", text, errno=errno.ELOOP, object=path)
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
            raise _replaceable(path, place or "/")


def _check_entries(path: str) -> None:
    """Check that in a sticky directory the entries of the overlay are root's."""
    if not os.lstat(path).st_mode & 0o022:
        return
    for entry in (f"{path}/upper", f"{path}/work"):
        found = os.lstat(entry)
        if found.st_uid != 0 or not stat.S_ISDIR(found.st_mode):
            raise _replaceable(path, entry)


def _replaceable(path: str, place: str) -> CallError:
    return CallError(
        "denied",
        f"scratch {path!r}: a user other than root could replace {place!r} or what is in it",
        object=path,
        hint="it and the directories that lead to it must be root's, and written by root alone",
    )


def _mount_tmpfs(
    state: EngineState, overlay_id: str, scratch: TmpfsScratch, op: Transaction, _permit: Allowed
) -> LiveScratch:
    path, created = scratch_mount_point(state, overlay_id, op)
    with op.step("scratch", path, code="mount"):
        mount_filesystem(
            source="tmpfs",
            target=path,
            filesystem="tmpfs",
            flags=("nodev", "nosuid"),
            options=(("size", str(scratch.size_bytes)), ("mode", "0700")),
        )

    def undo() -> None:
        with undo_deadline(state) as deadline:
            unmount_target(path, Transaction(deadline))

    op.on_rollback(f"scratch mount {path}", undo)
    return LiveScratch(
        kind=scratch.kind,
        path=path,
        filesystem="tmpfs",
        created=created,
        mount_dev=syscalls.mount_of(path)[0],
    )


def _use_pool(
    state: EngineState, overlay_id: str, scratch: ThinScratch, op: Transaction, permit: Allowed
) -> LiveScratch:
    if state.pool_scratches is None:
        text = f"there is no open pool {scratch.pool_id!r}"
        raise CallError("not_found", text, object=scratch.pool_id, hint="pool.open opens it")
    path, created = scratch_mount_point(state, overlay_id, op)
    live = state.pool_scratches.make_scratch(overlay_id, scratch, path, op, permit)
    return live.replace(created=created)


def _use_device(
    state: EngineState, overlay_id: str, scratch: DeviceScratch, op: Transaction, permit: Allowed
) -> LiveScratch:
    disk = use_disk(state, overlay_id, scratch, op, permit)
    path = disk.mount_point
    if disk.shared:
        path = f"{path}/overlays/{overlay_id}"
        _make_directory(path, op, is_adopted=True)
        if scratch.existing == "fresh":
            with op.step("format", path, code="mount"):
                empty_directory(path, op.deadline)
    return LiveScratch(kind=scratch.kind, path=path, filesystem=disk.filesystem, disk=disk)


def _claim(state: EngineState, overlay_id: str, key: str, op: Transaction) -> None:
    # released with the overlay's reservation
    state.inventory.reserve_scratch(("overlay", overlay_id), key)
