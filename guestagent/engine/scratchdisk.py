"""Scratch devices: encrypted if so asked for, formatted, mounted once for the overlays on them.

The first overlay makes a disk ready, the last takes it down. Both happen under the lock of the
device, which is taken while the locks of overlays and layers are held, and never before them.
"""

import errno
import os

from guestagent.api import DeviceScratch
from guestagent.engine.arrivals import find_device
from guestagent.engine.inventory import ScratchDisk
from guestagent.engine.plan import dm_uuid
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import (
    refuse_held,
    remove_devices,
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage import blockdev, syscalls
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.devicemapper import devices
from guestagent.storage.filesystems import detect, mount_options, refusal
from guestagent.storage.makefs import make_filesystem, trim
from guestagent.storage.mount import mount_filesystem
from guestagent.storage.mountinfo import find_mount
from vsock.errors import CallError

__all__ = ("leave_disk", "remove_unused_disk", "scratch_mount_point", "trim_disk", "use_disk")

_HEAD_BYTES = 128 * 1024


def use_disk(
    state: EngineState, overlay_id: str, scratch: DeviceScratch, op: Transaction, permit: Allowed
) -> ScratchDisk:
    """Mount a scratch device for an overlay, or have the overlay join those that are on it.

    Raises:
        CallError: ``conflict``, it is another overlay's, holds a layer, is in use in another way
            than is asked for, or has content that the request does not adopt.
    """
    device = find_device(scratch.device, op)
    _refuse_unfit(state, device)
    with state.locks.hold([("scratch", device.dev)], op.deadline):
        _reserve(state, overlay_id, scratch, device)
        disk = state.inventory.disk(device.dev)
        if disk is not None:
            _refuse_other_use(disk, scratch, device)
        else:
            # what fails is undone before another overlay has its turn
            with op.child() as making:
                making.timings_ms = op.timings_ms
                disk = _make_ready(state, scratch, device, making, permit)
                making.commit()
            state.inventory.add_disk(disk)
    op.on_rollback(f"scratch {disk.mount_point}", lambda: _leave_unused(state, overlay_id, disk))
    return disk


def _reserve(
    state: EngineState, overlay_id: str, scratch: DeviceScratch, device: BlockDevice
) -> None:
    """Reserve a device for an overlay; it is released with the overlay's reservation.

    Raises:
        CallError: ``conflict``, another overlay has it, and one of both does not share it.
    """
    owner = ("overlay", overlay_id)
    try:
        state.inventory.reserve_scratch(owner, device.dev, is_shared=scratch.shared)
    except CallError as error:
        other = state.inventory.scratch_owner(device.dev)
        error.message = f"{device.node} is the scratch of overlay {other!r}"
        error.object = device.node
        error.hint = "overlays that all say shared can have a device at the same time"
        raise


def _refuse_unfit(state: EngineState, device: BlockDevice) -> None:
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


def _refuse_other_use(disk: ScratchDisk, scratch: DeviceScratch, device: BlockDevice) -> None:
    asked = {
        "filesystem": scratch.filesystem,
        "encrypted": scratch.encrypted,
        "discard": scratch.discard,
    }
    there = {
        "filesystem": disk.filesystem,
        "encrypted": bool(disk.crypt),
        "discard": disk.discard,
    }
    differing = [name for name in asked if asked[name] != there[name]]
    if differing:
        raise CallError(
            "conflict",
            f"scratch device {device.node} is in use with another {', '.join(differing)}",
            step="claim",
            object=device.node,
        )


def scratch_mount_point(
    state: EngineState, name: str, op: Transaction
) -> tuple[str, tuple[str, ...]]:
    """Make the directory where a scratch is mounted; ``name`` is an overlay's id or a device.

    Return its path, and the directories that were made.
    """
    path = f"{state.directory}/scratch/{name}"
    with op.step("scratch", path, code="mount"):
        made = not os.path.isdir(path)
        os.makedirs(path, mode=0o700, exist_ok=True)
        if find_mount(path) is not None:
            raise CallError("conflict", f"something is mounted at {path!r} already", object=path)
    created = (path,) if made else ()
    op.on_rollback("scratch directory", lambda: remove_directories(created))
    return path, created


# --- making ready


def _make_ready(
    state: EngineState,
    scratch: DeviceScratch,
    device: BlockDevice,
    op: Transaction,
    permit: Allowed,
) -> ScratchDisk:
    # an id has no colon, so that the directories of tmpfs scratches lie beside it
    path, created = scratch_mount_point(state, device.dev, op)
    is_blank = _see_content(scratch, device.node, op)
    node, crypt = device.node, ""
    if scratch.encrypted:
        from guestagent.engine.crypt import crypt_device

        info = crypt_device(
            state,
            dev=device.dev,
            name=device.name,
            size_bytes=device.size_bytes,
            discards=scratch.discard,
            op=op,
            permit=permit,
        )
        node, crypt = info.node, info.name
    if is_blank:
        with op.step("format", node):
            make_filesystem(scratch.filesystem, node, op.deadline)
    disk = ScratchDisk(
        dev=device.dev,
        filesystem=scratch.filesystem,
        formatted=is_blank,
        shared=scratch.shared,
        discard=scratch.discard,
        mount_point=path,
        created=created,
        crypt=crypt,
    )
    with op.step("scratch", node, code="mount"):
        _mount(disk, node, op)
    op.on_rollback(f"scratch mount {path}", lambda: _undo_mount(state, path))
    if scratch.shared:
        with op.step("scratch", path, code="mount"):
            os.makedirs(f"{path}/overlays", mode=0o700, exist_ok=True)
    if crypt:
        with op.step("defer", crypt):
            devices.set_deferred_remove(state.control, crypt)
    return disk.replace(mount_dev=syscalls.mount_of(path)[0])


def _see_content(scratch: DeviceScratch, node: str, op: Transaction) -> bool:
    """Return whether the device is to be formatted.

    Raises:
        CallError: ``conflict``, something is on it that the request neither adopts nor replaces;
            ``invalid``, nothing is on it.
    """
    with op.step("format", node):
        blockdev.wait_unused(node, op.deadline)
        head = blockdev.read(node, 0, _HEAD_BYTES)
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
        elif not (scratch.ensure_filesystem or scratch.encrypted):
            raise CallError(
                "invalid",
                f"scratch device {node} has no file system",
                object=node,
                hint="ensure_filesystem formats it",
            )
    return True


def _clear(node: str, size_bytes: int) -> None:
    """Overwrite the start of a device that nothing uses: mkfs keeps off what it knows."""
    fd = os.open(node, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        os.pwrite(fd, bytes(size_bytes), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _mount(disk: ScratchDisk, node: str, op: Transaction) -> None:
    discard = (("discard", None),) if disk.discard else ()
    try:
        mount_filesystem(
            source=node,
            target=disk.mount_point,
            filesystem=disk.filesystem,
            flags=("nodev", "nosuid"),
            options=(*mount_options(disk.filesystem, readonly=False), *discard),
        )
    except OSError as error:
        refused = refusal(disk.filesystem, node, error)
        if refused is None:
            raise
        refused.kernel_log = op.kernel_lines()
        raise refused from error


def _node_of(disk: ScratchDisk) -> str:
    """Return the node of what was mounted, the disk itself or the crypt device over it."""
    return blockdev.inspect(disk.mount_dev).node


def _undo_mount(state: EngineState, path: str) -> None:
    with undo_deadline(state) as deadline:
        unmount_target(path, Transaction(deadline))


# --- taking down


def leave_disk(state: EngineState, overlay_id: str, disk: ScratchDisk, op: Transaction) -> None:
    """Unmount a disk with the last overlay on it, and give the overlay's reservation back.

    What was on an encrypted disk is lost here, so nothing may fail after this.

    Raises:
        CallError: ``busy``, with the holders; it is as it was.
    """
    with state.locks.hold([("scratch", disk.dev)], op.deadline):
        if state.inventory.users_of_scratch(disk.dev) == (overlay_id,):
            with op.child() as leaving:
                leaving.timings_ms = op.timings_ms
                _take_down(state, disk, leaving)
                leaving.commit()
            what = f"the directory of scratch {disk.mount_point}"
            state.tidy(what, remove_directories, disk.created)
        state.inventory.leave_scratch(("overlay", overlay_id))


def _leave_unused(state: EngineState, overlay_id: str, disk: ScratchDisk) -> None:
    with undo_deadline(state) as deadline:
        leave_disk(state, overlay_id, disk, Transaction(deadline))


def _take_down(state: EngineState, disk: ScratchDisk, op: Transaction) -> None:
    path = disk.mount_point
    if disk.crypt and state.control.exists(name=disk.crypt):
        # the key goes with the device, so that it stays until nothing can fail any more
        with op.step("defer", disk.crypt):
            state.control.cancel_deferred_remove(disk.crypt)

        def defer_again() -> None:
            devices.set_deferred_remove(state.control, disk.crypt)

        op.on_rollback(f"deferred removal of {disk.crypt}", defer_again)
    if unmount_target(path, op, dev=disk.mount_dev):
        op.on_rollback(f"unmount of {path}", lambda: _mount(disk, _node_of(disk), op))
        refuse_held(state, disk.mount_dev, path, op, filesystem=disk.filesystem)
    if disk.crypt:
        remove_devices(state, (disk.crypt,), op)


def remove_unused_disk(state: EngineState, dev: str, op: Transaction) -> None:
    """Take away the mount and the crypt device of a scratch device (MAJOR:MINOR) that no overlay is
    on: what is left of a request of an agent that was killed.

    Raises:
        CallError: ``busy``, it is in use.
    """
    path = f"{state.directory}/scratch/{dev}"
    with state.locks.hold([("scratch", dev)], op.deadline):
        if state.inventory.disk(dev) is not None:
            return
        unmount_target(path, op)
        crypt = state.control.find(uuid=dm_uuid("crypt", dev, state.uuid_prefix))
        if crypt is not None:
            remove_devices(state, (crypt.name,), op)
        remove_directories((path,))


def trim_disk(disk: ScratchDisk, op: Transaction) -> int:
    """Tell a scratch device which blocks are unused; return how many bytes that was.

    Raises:
        CallError: ``unsupported``, the device does not take discards.
    """
    with op.step("trim", disk.mount_point):
        try:
            return trim(disk.mount_point, op.deadline)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            is_withheld = disk.crypt and not disk.discard
            raise CallError(
                "unsupported",
                f"the device of scratch {disk.mount_point!r} takes no discards",
                errno=error.errno,
                hint="an encrypted scratch passes them on with discard" if is_withheld else None,
            ) from error
