"""The devices of layers are read-only in the kernel for as long as a layer is on them.

A device that was writable is so again when its last layer is gone, or when the mount failed. What
is mounted from it for writing keeps it from being a layer's.
"""

import errno
from functools import partial

from guestagent.engine.inventory import LiveLayer
from guestagent.engine.plan import Source
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import undo_deadline
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.mountinfo import mounts_of_dev
from vsock.errors import CallError

__all__ = ("protect", "release")


def protect(state: EngineState, layer_id: str, source: Source, op: Transaction) -> Source:
    """Make the devices of a layer read-only; return the source with those that were not.

    Raises:
        CallError: ``conflict``, something is mounted from a device for writing; ``busy``, it is
            used in another way.
    """
    made = []
    for device in source.devices:
        key = ("device", device.dev)
        with state.locks.hold([key], op.deadline), op.step("protect", device.node):
            was_writable = not blockdev.is_readonly(device.name)
            if was_writable:
                if not state.inventory.is_kept_readonly(device.dev):
                    _refuse_in_use(device, op)
                blockdev.set_readonly(device.node, True)
            if state.inventory.keep_readonly(device.dev, layer_id, was_writable):
                made.append(device.dev)
        op.on_rollback(f"read-only {device.node}", partial(_release, state, layer_id, device))
    return source.replace(made_readonly=tuple(made))


def release(state: EngineState, live: LiveLayer) -> None:
    """Make writable again what was so before the first layer came and has no layer any more."""
    for device in live.source.devices:
        state.tidy(f"read-only {device.node}", _release, state, live.spec.layer_id, device)


def _release(state: EngineState, layer_id: str, device: BlockDevice) -> None:
    key = ("device", device.dev)
    with undo_deadline(state) as deadline, state.locks.hold([key], deadline):
        if not state.inventory.release_readonly(device.dev, layer_id):
            return
        try:
            blockdev.set_readonly(device.node, False)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):  # it is unplugged
                raise


def _refuse_in_use(device: BlockDevice, op: Transaction) -> None:
    mounts = mounts_of_dev(device.dev)
    for mount in mounts:
        if "rw" in mount.super_options:
            raise CallError(
                "conflict",
                f"{device.node} is mounted for writing at {mount.target!r}",
                object=device.node,
            )
    if mounts:
        return
    try:
        blockdev.wait_unused(device.node, op.deadline)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        holders = ", ".join(blockdev.holders(device.dev)) or "the kernel"
        raise CallError(
            "busy",
            f"{device.node} is writable and used by {holders}",
            errno=error.errno,
            object=device.node,
        ) from error
