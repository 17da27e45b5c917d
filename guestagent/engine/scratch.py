"""Where the changes to a writable overlay go: memory, a block device, or a directory."""

import contextlib
import errno
import os
import stat

from guestagent.api import DeviceScratch, DirectoryScratch, OverlaySpec, TmpfsScratch
from guestagent.api.overlays import Scratch, ScratchReport
from guestagent.engine.inventory import LiveLayer, LiveScratch
from guestagent.engine.plan import check_target
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import remove_directories, undo_deadline, unmount_target
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev, syscalls
from guestagent.storage.filesystems import detect, mount_options
from guestagent.storage.makefs import make_filesystem
from guestagent.storage.mount import mount_filesystem, open_mounted
from guestagent.storage.mountinfo import filesystem_at, find_mount
from guestagent.storage.overlayfs import open_plain
from vsock.errors import CallError
from vsock.log import log

__all__ = ("make_scratch", "remount_scratch", "scratch_report", "settle_volatile")

_HEAD_BYTES = 128 * 1024
#: What the kernel leaves of a volatile overlay, in Documentation/filesystems/overlayfs.rst.
_VOLATILE = "work/work/incompat/volatile"


def make_scratch(
    state: EngineState, spec: OverlaySpec, scratch: Scratch, top: LiveLayer, op: Transaction
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
        live = _use_directory(state, overlay_id, scratch, op)
    elif isinstance(scratch, TmpfsScratch):
        live = _mount_tmpfs(state, overlay_id, scratch, op)
    else:
        live = _mount_device(state, overlay_id, scratch, op)
    is_adopted = not isinstance(scratch, TmpfsScratch) and scratch.existing == "adopt"
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
    os.chown(path, found.st_uid, found.st_gid)
    os.chmod(path, stat.S_IMODE(found.st_mode))
    for name in os.listxattr(source):
        if name.startswith(("trusted.overlay.", "user.overlay.")):
            continue  # overlayfs's own, about the layer
        try:
            os.setxattr(path, name, os.getxattr(source, name))
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            log.warning("the scratch cannot hold an attribute", path=path, attribute=name)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


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


def remount_scratch(scratch: LiveScratch) -> None:
    """Mount the device of a scratch again that was just unmounted."""
    _mount_scratch_device(blockdev.inspect(scratch.dev).node, scratch.path, scratch.filesystem)


def _mount_scratch_device(node: str, path: str, filesystem: str) -> None:
    mount_filesystem(
        source=node,
        target=path,
        filesystem=filesystem,
        flags=("nodev", "nosuid"),
        options=mount_options(filesystem, readonly=False),
    )


def _remove_unused(path: str) -> None:
    """Remove a directory that we made, with what overlayfs alone puts into a work directory."""
    for inner in (f"{path}/work", f"{path}/index", path):
        try:
            os.rmdir(inner)
        except FileNotFoundError:
            continue


def scratch_report(scratch: LiveScratch) -> ScratchReport:
    """Say how large and how full a scratch is now."""
    space = os.statvfs(scratch.path)
    return ScratchReport(
        kind=scratch.kind,
        path=scratch.path,
        filesystem=scratch.filesystem,
        size_bytes=space.f_frsize * space.f_blocks,
        free_bytes=space.f_frsize * space.f_bavail,
        formatted=scratch.formatted,
    )


def _use_directory(
    state: EngineState, overlay_id: str, scratch: DirectoryScratch, op: Transaction
) -> LiveScratch:
    with op.step("scratch", scratch.path, code="mount"):
        check_target(scratch.path, state.rules.scratch_roots, "scratch")
        _check_directory(scratch.path)
        _, filesystem = filesystem_at(scratch.path)
    _claim(state, overlay_id, scratch.path, op)
    return LiveScratch(
        kind=scratch.kind,
        path=scratch.path,
        is_mount=False,
        dev="",
        filesystem=filesystem,
        formatted=False,
        created=(),
    )


def _check_directory(path: str) -> None:
    """Check that a path is a directory that no link leads to; it may be a mount point."""
    try:
        os.close(open_plain(path))
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        text = f"a link leads to scratch {path!r}, which is not followed"
        raise CallError("denied", text, errno=error.errno, object=path) from error


def _mount_tmpfs(
    state: EngineState, overlay_id: str, scratch: TmpfsScratch, op: Transaction
) -> LiveScratch:
    path, created = _mount_point(state, overlay_id, op)
    with op.step("scratch", path, code="mount"):
        mount_filesystem(
            source="tmpfs",
            target=path,
            filesystem="tmpfs",
            flags=("nodev", "nosuid"),
            options=(("size", str(scratch.size_bytes)), ("mode", "0700")),
        )
    _undo_mount(state, path, op)
    return LiveScratch(
        kind=scratch.kind,
        path=path,
        is_mount=True,
        dev="",
        filesystem="tmpfs",
        formatted=False,
        created=created,
        mount_dev=syscalls.mount_of(path)[0],
    )


def _mount_device(
    state: EngineState, overlay_id: str, scratch: DeviceScratch, op: Transaction
) -> LiveScratch:
    with op.step("device", blockdev.describe(scratch.device)):
        device = blockdev.wait_for(scratch.device, op.deadline)
    layers = state.inventory.layers_on(device.dev)
    if layers:
        raise CallError(
            "conflict",
            f"scratch device {device.node} holds layer {layers[0]!r}",
            step="claim",
            object=device.node,
        )
    if device.readonly:
        text = f"scratch device {device.node} is read-only"
        raise CallError("invalid", text, step="device", object=device.node)
    _claim(state, overlay_id, device.dev, op)
    formatted = _ensure_filesystem(scratch, device.node, op)
    path, created = _mount_point(state, overlay_id, op)
    with op.step("scratch", device.node, code="mount"):
        _mount_scratch_device(device.node, path, scratch.filesystem)
    _undo_mount(state, path, op)
    return LiveScratch(
        kind=scratch.kind,
        path=path,
        is_mount=True,
        dev=device.dev,
        filesystem=scratch.filesystem,
        formatted=formatted,
        created=created,
        mount_dev=syscalls.mount_of(path)[0],
    )


def _ensure_filesystem(scratch: DeviceScratch, node: str, op: Transaction) -> bool:
    """Format the device if the request says so; return whether it was.

    Raises:
        CallError: ``conflict``, something is on it that the request neither adopts nor replaces;
            ``invalid``, nothing is on it.
    """
    with op.step("format", node, code="device"):
        blockdev.wait_unused(node, op.deadline)
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = os.pread(fd, _HEAD_BYTES, 0)
        finally:
            os.close(fd)
        if scratch.existing == "fresh":
            _clear(node, len(head))
        elif any(head):
            found = detect(lambda offset, size: head[offset : offset + size].ljust(size, b"\0"))
            if found == scratch.filesystem and scratch.existing == "adopt":
                return False
            raise CallError(
                "conflict",
                f"scratch device {node} is not empty: it starts with {found or 'unknown data'}",
                object=node,
                hint="existing: adopt uses a file system with its content, fresh replaces it",
            )
        elif not scratch.ensure_filesystem:
            raise CallError(
                "invalid",
                f"scratch device {node} has no file system",
                object=node,
                hint="ensure_filesystem formats it",
            )
        make_filesystem(scratch.filesystem, node, op.deadline)
    return True


def _clear(node: str, size_bytes: int) -> None:
    """Overwrite the start of a device that nothing uses: mkfs keeps off what it knows."""
    fd = os.open(node, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        os.pwrite(fd, bytes(size_bytes), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _mount_point(
    state: EngineState, overlay_id: str, op: Transaction
) -> tuple[str, tuple[str, ...]]:
    path = f"{state.directory}/scratch/{overlay_id}"
    with op.step("scratch", path, code="mount"):
        made = not os.path.isdir(path)
        os.makedirs(path, mode=0o700, exist_ok=True)
        if find_mount(path) is not None:
            raise CallError("conflict", f"something is mounted at {path!r} already", object=path)
    created = (path,) if made else ()
    op.on_rollback("scratch directory", lambda: remove_directories(created))
    return path, created


def _claim(state: EngineState, overlay_id: str, key: str, op: Transaction) -> None:
    # released with the overlay's reservation
    state.inventory.reserve_scratch(("overlay", overlay_id), key)


def _undo_mount(state: EngineState, path: str, op: Transaction) -> None:
    def undo() -> None:
        with undo_deadline(state) as deadline:
            unmount_target(path, Transaction(deadline))

    op.on_rollback(f"scratch mount {path}", undo)
