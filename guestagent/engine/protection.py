"""The devices of layers are read-only in the kernel for as long as a layer is on them, unless the
layer's policy is another (``READONLY_POLICIES`` in guestagent.api.layers).

A device that was writable is so again when its last layer is gone, or when the mount failed. What
is mounted from it for writing keeps it from being a layer's.
"""

import errno
from functools import partial

from guestagent.api import LayerSpec
from guestagent.engine.inventory import LiveLayer
from guestagent.engine.plan import Source
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import undo_deadline
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.mountinfo import mounts_of_dev
from vsock.errors import CallError

__all__ = ("is_ignored", "protect", "release")


def is_ignored(state: EngineState, spec: LayerSpec, source: Source) -> bool:
    """Return whether a layer is to be left out because a device of it is writable."""
    if spec.readonly_policy != "ignore":
        return False
    return any(_is_writable(state, device) for device in source.devices)


def protect(state: EngineState, spec: LayerSpec, source: Source, op: Transaction) -> Source:
    """Make the devices of a layer read-only; return the source with those that were not.

    Raises:
        CallError: ``conflict``, something is mounted from a device for writing; ``busy``, it is
            used in another way; ``denied``, it is writable and the layer's policy is ``error``.
    """
    made = []
    for device in source.devices:
        key = ("device", device.dev)
        with state.locks.hold([key], op.deadline), op.step("protect", device.node):
            was_writable = not blockdev.is_readonly(device.name)
            if spec.readonly_policy == "error" and _is_writable(state, device):
                raise _denied(spec.layer_id, device)
            if was_writable and not state.inventory.is_kept_readonly(device.dev):
                _refuse_in_use(device, op)
            if spec.readonly_policy == "write":
                continue
            if was_writable:
                blockdev.set_readonly(device.node, True)
            if state.inventory.keep_readonly(device.dev, spec.layer_id, was_writable):
                made.append(device.dev)
        op.on_rollback(f"read-only {device.node}", partial(_release, state, spec.layer_id, device))
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


def _is_writable(state: EngineState, device: BlockDevice) -> bool:
    """Return whether a device is writable, or was before layers came."""
    return state.inventory.is_made_readonly(device.dev) or not blockdev.is_readonly(device.name)


def _denied(layer_id: str, device: BlockDevice) -> CallError:
    return CallError(
        "denied",
        f"{device.node} is writable, and layer {layer_id!r} wants a read-only device",
        object=device.node,
        hint="attach it read-only; readonly_policy read sets it read-only in the kernel",
    )


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
