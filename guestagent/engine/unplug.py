"""Letting go of a SCSI disk at the host's request, once nothing of the guest uses it."""

import errno

from guestagent.api.devices import Device, DeviceRemoveReply
from guestagent.api.layers import Holder
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import busy_error
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.holders import find_holders
from vsock.errors import CallError

__all__ = ("remove_disk",)

#: Looking for holders reads all of /proc; it must not make an answer late.
_HOLDER_SECONDS = 2.0


def remove_disk(state: EngineState, device: Device, op: Transaction) -> DeviceRemoveReply:
    """Write a disk's cached data out, have the kernel let go of it, and wait until it has.

    Raises:
        CallError: ``busy``, with the holders, nothing was done; ``unsupported``, the kernel cannot
            let go of this kind of disk; ``invalid``, it is a partition; ``timeout``, the kernel
            has not let go of it yet.
    """
    with op.step("device", blockdev.describe(device)):
        disk = blockdev.find(device)
    if disk is None:
        return _reply((), "", op, already=True)
    with state.locks.hold([("scratch", disk.dev)], op.deadline):
        with op.step("claim", disk.node):
            parts = (disk, *blockdev.partitions(disk.name))
            deleter = _deleter_of(disk)
            _refuse_used(state, parts, op)
        with op.step("remove", disk.node):
            try:
                blockdev.delete(disk, deleter, op.deadline)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise busy_error(disk.node, disk.dev, op) from error
    return _reply(tuple(part.node for part in parts), deleter, op, already=False)


def _reply(
    removed: tuple[str, ...], written: str, op: Transaction, *, already: bool
) -> DeviceRemoveReply:
    return DeviceRemoveReply(
        removed=removed, written=written, timings_ms=op.timings_ms, already=already
    )


def _deleter_of(disk: BlockDevice) -> str:
    if blockdev.is_partition(disk.name):
        text = f"{disk.node} is a partition; a disk goes as a whole"
        raise CallError("invalid", text, object=disk.node)
    deleter = blockdev.deleter_of(disk.name)
    if deleter is None:
        raise CallError(
            "unsupported",
            f"the kernel lets go of SCSI disks only, {disk.node} is {disk.kind}",
            object=disk.node,
            hint="the host detaches it; the guest is told by the device itself",
        )
    return deleter


def _refuse_used(state: EngineState, parts: tuple[BlockDevice, ...], op: Transaction) -> None:
    """Refuse a disk of which anything is in use, also what is only open: its writes would fail.

    Raises:
        CallError: ``busy``.
    """
    held: list[Holder] = []
    for part in parts:
        layers = state.inventory.layers_on(part.dev)
        overlays = state.inventory.users_of_scratch(part.dev)
        held += [Holder(kind="layer", name=name, detail=f"is on {part.node}") for name in layers]
        held += [Holder(kind="overlay", name=name, detail="its scratch") for name in overlays]
        with op.deadline.part(_HOLDER_SECONDS) as limit:
            held += find_holders(part.dev, limit)
    if held:
        raise busy_error(parts[0].node, "", op, tuple(held))
