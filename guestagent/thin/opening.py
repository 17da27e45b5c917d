"""How a pool is opened and grown: its disks claimed and judged, its dm devices made."""

import errno
import os

from guestagent.api.devices import SECTOR_BYTES, Device
from guestagent.api.thin import BLOCK_BYTES_MIN, MAX_DATA_DEVICES, PoolGrow, PoolOpen
from guestagent.engine.parts import begin_entry
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import busy_error
from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.devicemapper import thin
from guestagent.storage.devicemapper.thin import PoolTable
from guestagent.storage.filesystems import detect
from guestagent.thin.changes import delete_device, settle
from guestagent.thin.metadata import Superblock
from guestagent.thin.pool import PART, Disks, Pool, PoolEntry, dm_name
from guestagent.thin.records import RECORDS_ID, PoolRecords, is_slot
from vsock.errors import CallError

__all__ = ("grow_pool", "open_pool", "unmake")

#: dm-thin takes no less, Documentation/admin-guide/device-mapper/thin-provisioning.rst.
_METADATA_BYTES_MIN = 2 * 1024 * 1024
#: THIN_METADATA_MAX_SECTORS of drivers/md/dm-thin-metadata.h: 255 bitmaps of 16,320 blocks.
_METADATA_BYTES_MAX = 255 * ((1 << 14) - 64) * 4096
#: Records and a volume or two.
_DATA_BLOCKS_MIN = 16
_LOW_WATER_PART = 10
#: A data disk that is blank has this much of zeros at its start.
_HEAD_BYTES = 128 * 1024


def open_pool(state: EngineState, spec: PoolOpen, op: Transaction, _permit: Allowed) -> Pool:
    """Make the dm devices of a pool, and read its records or write the first ones.

    Raises:
        CallError: ``conflict``, a disk is in use or holds something else; ``integrity``, the
            metadata is damaged.
    """
    disks = _claim(state, spec, op)
    with op.step("thin-metadata", disks.metadata.node):
        found = disks.superblock()
        if found is None:
            _refuse_content(disks.data[0])
        else:
            _refuse_metadata(spec, disks, found)
    pool = Pool(state, spec, disks, _plan(spec, disks, found), is_new=found is None)
    begin_entry(state, (PART, spec.pool_id), PoolEntry(spec=spec, is_new=pool.is_new), op)
    if pool.is_new:
        op.on_rollback("metadata", lambda: unmake(disks.metadata, disks.data[0]))
    with op.step("thin-data", dm_name(spec.pool_id, "data")):
        data = pool.create("data", disks.data_targets(), op)
    with op.step("thin-pool", pool.name):
        pool.table = pool.table.replace(data_device=data.dev)
        pool.create("pool", (pool.table.target(),), op)
    with op.step("thin-records", pool.name):
        _bring_records_up(pool, found, op)
    return pool


# --- the disks


def _claim(state: EngineState, spec: PoolOpen, op: Transaction) -> Disks:
    metadata = _claim_disk(state, spec.metadata_device, ("pool-metadata", spec.pool_id), op)
    data = tuple(
        _claim_disk(state, device, (f"pool-{number}", spec.pool_id), op)
        for number, device in enumerate(spec.data_devices)
    )
    if metadata.size_bytes < _METADATA_BYTES_MIN:
        raise _too_small(metadata, _METADATA_BYTES_MIN)
    return Disks(metadata=metadata, data=data)


def _claim_disk(
    state: EngineState, device: Device, owner: tuple[str, str], op: Transaction
) -> BlockDevice:
    """Find a disk and reserve it.

    Raises:
        CallError: ``invalid``, it is read-only; ``conflict`` or ``busy``, it is in use.
    """
    with op.step("device", blockdev.describe(device)):
        disk = blockdev.wait_for(device, op.deadline)
    with op.step("claim", disk.node):
        if disk.readonly:
            raise CallError("invalid", f"{disk.node} is read-only", object=disk.node)
        layers = state.inventory.layers_on(disk.dev)
        if layers:
            text = f"{disk.node} holds layer {layers[0]!r}"
            raise CallError("conflict", text, object=disk.node)
        state.inventory.reserve_scratch(owner, disk.dev)
        op.on_rollback(f"claim of {disk.node}", lambda: state.inventory.release(owner))
        try:
            blockdev.wait_unused(disk.node, op.deadline)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise busy_error(disk.node, disk.dev, op) from error
    return disk


def _refuse_metadata(spec: PoolOpen, disks: Disks, found: Superblock) -> None:
    """Judge the superblock that was found, before the kernel writes to the metadata disk."""
    disk = disks.metadata
    if found.needs_check:
        raise CallError(
            "integrity",
            f"the metadata of pool {spec.pool_id!r} on {disk.node} needs a check",
            object=disk.node,
            hint="run thin_check --clear-needs-check-flag, or thin_repair, on the device",
        )
    block_bytes = found.data_block_sectors * SECTOR_BYTES
    if spec.adopt == "never":
        raise CallError(
            "conflict",
            f"{disk.node} holds the metadata of a pool (transaction id "
            f"{found.transaction_id}, blocks of {block_bytes} bytes)",
            object=disk.node,
            hint="adopt: matching goes on with it; a new pool needs zeros at the start",
        )
    if spec.block_size_bytes not in (None, block_bytes):
        text = f"the pool on {disk.node} has blocks of {block_bytes} bytes"
        raise CallError("conflict", text, object=disk.node)
    if disk.size_bytes < found.metadata_blocks * thin.METADATA_BLOCK_BYTES:
        raise _too_small(disk, found.metadata_blocks * thin.METADATA_BLOCK_BYTES)
    wanted, there = found.data_blocks * block_bytes, sum(disks.data_bytes)
    if there < wanted:
        raise CallError(
            "conflict",
            f"the data devices of pool {spec.pool_id!r} have {there} bytes, it has {wanted}",
            object=disks.data[-1].node,
            hint="name all data devices of the pool, in the order that it was grown by them",
        )


def _too_small(disk: BlockDevice, least: int) -> CallError:
    text = f"{disk.node} has {disk.size_bytes} bytes, at least {least} are needed"
    return CallError("invalid", text, object=disk.node)


def _refuse_content(disk: BlockDevice) -> None:
    """Refuse a data disk that is not blank at its start.

    Raises:
        CallError: ``conflict``, naming what is there.
    """
    head = _head_of(disk)
    if not any(head):
        return
    found = detect(lambda offset, size: head[offset : offset + size].ljust(size, b"\0"))
    what = found or "unknown data"
    if is_slot(head):
        what = "the records of a pool whose metadata is elsewhere"
    raise CallError(
        "conflict",
        f"data device {disk.node} is not empty: it starts with {what}",
        object=disk.node,
        hint=f"clear its first {_HEAD_BYTES} bytes to lose what is on it",
    )


def _head_of(disk: BlockDevice) -> bytes:
    blockdev.flush(disk.node)
    return blockdev.read(disk.node, 0, _HEAD_BYTES)


def unmake(metadata: BlockDevice, data: BlockDevice) -> None:
    """Clear two disks that were blank before they were made a pool."""
    sizes = {metadata: thin.METADATA_BLOCK_BYTES}
    if is_slot(_head_of(data)):
        sizes[data] = _HEAD_BYTES
    for disk, size_bytes in sizes.items():
        fd = os.open(disk.node, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, bytes(size_bytes), 0)
            os.fsync(fd)
        finally:
            os.close(fd)


# --- the pool


def _plan(spec: PoolOpen, disks: Disks, found: Superblock | None) -> PoolTable:
    """Decide the table: an adopted pool keeps its blocks and its length."""
    if found is None:
        block_bytes = spec.block_size_bytes or BLOCK_BYTES_MIN
        blocks = sum(disks.data_bytes) // block_bytes
        if blocks < _DATA_BLOCKS_MIN:
            raise _too_small(disks.data[0], _DATA_BLOCKS_MIN * block_bytes)
    else:
        block_bytes, blocks = found.data_block_sectors * SECTOR_BYTES, found.data_blocks
        if not blocks:
            text = f"the metadata of pool {spec.pool_id!r} has no data blocks"
            raise CallError("integrity", text, object=spec.pool_id)
    low_water = blocks // _LOW_WATER_PART
    if spec.low_water_bytes is not None:
        low_water = -(-spec.low_water_bytes // block_bytes)
    return PoolTable(
        metadata_device=disks.metadata.dev,
        data_device="0:0",  # not made yet
        length_sectors=blocks * block_bytes // SECTOR_BYTES,
        block_sectors=block_bytes // SECTOR_BYTES,
        low_water_blocks=low_water,
        options=("error_if_no_space",) if spec.on_full == "error" else (),
    )


def _bring_records_up(pool: Pool, found: Superblock | None, op: Transaction) -> None:
    """Adopt the records of the pool, or write the first ones."""
    pool_id, seen = pool.pool_id, pool.see()
    if seen is None:
        text = f"pool {pool_id!r} does not show its thin devices"
        raise CallError("device", text, object=pool_id)
    has_records_device = RECORDS_ID in seen.devices
    if has_records_device:
        pool.activate_records(op)
        if pool.read():
            _adopt(pool)
            return
    foreign = seen.devices.keys() - {RECORDS_ID}
    if found is not None and (found.transaction_id or foreign):
        raise CallError(
            "conflict",
            f"the pool on {pool.disks.metadata.node} is not empty and holds no records: "
            f"{len(foreign)} thin devices, transaction id {found.transaction_id}",
            object=pool_id,
            hint="another program made it; a new pool needs blank metadata",
        )
    if not has_records_device:
        pool.message(thin.create_thin(RECORDS_ID))
        if not pool.is_new:
            op.on_rollback("records", lambda: delete_device(pool, RECORDS_ID))
        pool.activate_records(op)
    data_bytes = pool.disks.data_bytes
    pool.write(
        PoolRecords(pool_id=pool_id, transaction_id=0, next_device_id=1, data_bytes=data_bytes)
    )
    pool.note_foreign(seen.devices)


def _adopt(pool: Pool) -> None:
    """Go on with the volumes of the records."""
    spec, there = pool.spec, pool.records
    if there.pool_id != spec.pool_id:
        raise CallError(
            "conflict",
            f"the metadata is that of pool {there.pool_id!r}, not of {spec.pool_id!r}",
            object=there.pool_id,
        )
    if spec.adopt == "empty" and there.volumes:
        raise CallError(
            "conflict",
            f"pool {spec.pool_id!r} has {len(there.volumes)} volumes",
            object=spec.pool_id,
            hint="adopt: matching goes on with them",
        )
    sizes, known = pool.disks.data_bytes, there.data_bytes
    last = len(known) - 1
    if len(sizes) < len(known) or sizes[:last] != known[:last] or sizes[last] < known[last]:
        raise CallError(
            "conflict",
            f"the data devices of pool {spec.pool_id!r} have {list(sizes)} bytes, "
            f"recorded are {list(known)}",
            object=spec.pool_id,
            hint="name them in the order that the pool was grown by them",
        )
    settle(pool)
    pool.find_foreign()  # after settle: a volume that was half made is gone


# --- grow


def grow_pool(pool: Pool, request: PoolGrow, op: Transaction, permit: Allowed) -> bool:
    """Grow a pool; return False if it is so large already.

    Everything that can be refused is refused before the live pool is touched: a pool whose resume
    fails stays suspended, and with it all that is written to it.

    Raises:
        CallError: ``conflict``, a disk has shrunk, or the new one is in use or has content.
    """
    with op.step("device", pool.name):
        disks = _look_again(pool)
    spec, device = pool.spec, request.data_device
    if device is not None and device not in spec.data_devices:  # else of a request cut short
        disks = _append(pool, disks, request, op)
        spec = spec.replace(more_data_devices=(*spec.more_data_devices, device))
    blocks = sum(disks.data_bytes) // pool.block_bytes
    table = pool.table.replace(length_sectors=blocks * pool.table.block_sectors)
    if disks.data == pool.disks.data and table == pool.table and _fills_metadata(pool):
        return False
    _extend(pool, spec, disks, table, op, permit)
    return True


def _look_again(pool: Pool) -> Disks:
    """Return the disks with the sizes that they have now."""
    metadata = blockdev.inspect(pool.disks.metadata.dev)
    needed = pool.status().total_metadata_blocks * thin.METADATA_BLOCK_BYTES
    if metadata.size_bytes < needed:
        raise _shrunk(metadata, needed)
    now = tuple(blockdev.inspect(disk.dev) for disk in pool.disks.data)
    for disk, was in zip(now, pool.disks.data, strict=True):
        if disk.size_bytes < was.size_bytes:
            raise _shrunk(disk, was.size_bytes)
    # only the last data disk can grow: the next one begins where an earlier one ended
    return pool.disks.replace(data=(*pool.disks.data[:-1], now[-1]))


def _shrunk(disk: BlockDevice, had: int) -> CallError:
    text = f"{disk.node} has shrunk from {had} to {disk.size_bytes} bytes"
    return CallError("conflict", text, object=disk.node, hint="nothing was changed")


def _append(pool: Pool, disks: Disks, request: PoolGrow, op: Transaction) -> Disks:
    assert request.data_device is not None
    number = len(disks.data)
    if number == MAX_DATA_DEVICES:
        text = f"pool {pool.pool_id!r} has {MAX_DATA_DEVICES} data devices"
        raise CallError("resource", text, object=pool.pool_id)
    owner = (f"pool-{number}", pool.pool_id)
    disk = _claim_disk(pool.state, request.data_device, owner, op)
    with op.step("claim", disk.node):
        _refuse_content(disk)
    return disks.replace(data=(*disks.data, disk))


def _fills_metadata(pool: Pool) -> bool:
    """Return whether the pool uses all of its metadata disk, as far as dm-thin can."""
    disk = blockdev.inspect(pool.disks.metadata.dev)
    most = min(disk.size_bytes, _METADATA_BYTES_MAX) // thin.METADATA_BLOCK_BYTES
    return pool.status().total_metadata_blocks >= most


def _extend(
    pool: Pool,
    spec: PoolOpen,
    disks: Disks,
    table: PoolTable,
    op: Transaction,
    _permit: Allowed,
) -> None:
    before, records = (pool.spec, pool.disks, pool.table), pool.records
    data_name = dm_name(pool.pool_id, "data")
    data_before = pool.state.control.table(data_name)

    def restore() -> None:
        pool.spec, pool.disks, pool.table = before
        pool.keep()

    op.on_rollback("the disks of the pool", restore, is_record=True)
    pool.spec, pool.disks = spec, disks
    with op.step("journal", pool.pool_id, code="resource"):
        pool.keep()
    with op.step("thin-record", pool.pool_id):
        pool.write(records.replace(data_bytes=disks.data_bytes))
    op.on_rollback("records", lambda: pool.write(records), is_record=True)
    with op.step("thin-data", data_name):
        pool.reload(data_name, disks.data_targets(), data_before)
    op.on_rollback("data device", lambda: pool.reload(data_name, data_before, data_before))
    with op.step("thin-pool", pool.name):
        pool.reload(pool.name, (table.target(),), (pool.table.target(),))
    pool.table = table
