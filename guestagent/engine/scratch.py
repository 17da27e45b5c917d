"""Where the changes to a writable overlay go: memory, a block device, or a directory."""

import os
import stat

from guestagent.api import DeviceScratch, DirectoryScratch, TmpfsScratch
from guestagent.api.overlays import Scratch, ScratchReport
from guestagent.engine.inventory import LiveScratch
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import remove_directories, undo_deadline, unmount_target
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev
from guestagent.storage.filesystems import detect, mount_options
from guestagent.storage.makefs import make_filesystem
from guestagent.storage.mount import TargetDirectory, mount_filesystem
from guestagent.storage.mountinfo import find_mount
from guestagent.storage.space import filesystem_at
from vsock.errors import CallError

__all__ = ("device_of", "make_scratch", "scratch_report")

_HEAD_BYTES = 128 * 1024


def make_scratch(
    state: EngineState, overlay_id: str, scratch: Scratch, op: Transaction
) -> LiveScratch:
    """Bring up a scratch with the directories ``upper`` and ``work`` in it.

    Raises:
        CallError: ``conflict``, it is another overlay's or holds a layer; ``resource``, it is full.
    """
    if isinstance(scratch, DirectoryScratch):
        live = _use_directory(state, overlay_id, scratch, op)
    elif isinstance(scratch, TmpfsScratch):
        live = _mount_tmpfs(state, overlay_id, scratch, op)
    else:
        live = _mount_device(state, overlay_id, scratch, op)
    for name in ("upper", "work"):
        _make_directory(f"{live.path}/{name}", op)
    return live


def _make_directory(path: str, op: Transaction) -> None:
    with op.step("scratch", path, code="mount"):
        try:
            os.mkdir(path, mode=0o755)
        except FileExistsError:  # of an earlier overlay on the same scratch
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                text = f"{path!r} is no directory, and links are not followed"
                raise CallError("denied", text, object=path) from None
            return
    op.on_rollback(f"directory {path}", lambda: _remove_unused(path))


def _remove_unused(path: str) -> None:
    """Remove a directory that we made, with what overlayfs alone puts into a work directory."""
    for inner in (f"{path}/work", f"{path}/index", path):
        try:
            os.rmdir(inner)
        except FileNotFoundError:
            continue


def device_of(path: str) -> str:
    """Return the number (MAJOR:MINOR) of the file system that is mounted at ``path``."""
    number = os.stat(path).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


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
        with TargetDirectory(scratch.path, root=state.rules.target_root, create=False):
            pass  # it is there, below the root, and no link leads to it
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
        mount_dev=device_of(path),
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
        mount_filesystem(
            source=device.node,
            target=path,
            filesystem=scratch.filesystem,
            flags=("nodev", "nosuid"),
            options=mount_options(scratch.filesystem, readonly=False),
        )
    _undo_mount(state, path, op)
    return LiveScratch(
        kind=scratch.kind,
        path=path,
        is_mount=True,
        dev=device.dev,
        filesystem=scratch.filesystem,
        formatted=formatted,
        created=created,
        mount_dev=device_of(path),
    )


def _ensure_filesystem(scratch: DeviceScratch, node: str, op: Transaction) -> bool:
    """Format the device if it is asked for and nothing is on it; return whether it was.

    Raises:
        CallError: ``conflict``, something else is on it: nobody's data is formatted away.
    """
    with op.step("format", node, code="device"):
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = os.pread(fd, _HEAD_BYTES, 0)
        finally:
            os.close(fd)
        found = detect(lambda offset, size: head[offset : offset + size].ljust(size, b"\0"))
        if found == scratch.filesystem or not scratch.ensure_filesystem:
            return False
        if any(head):
            what = found or "unknown data"
            raise CallError(
                "conflict",
                f"scratch device {node} is not empty: it starts with {what}",
                object=node,
                hint="clear its first 128 KiB to have it formatted",
            )
        make_filesystem(scratch.filesystem, node, op.deadline)
    return True


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
