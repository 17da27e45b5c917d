"""Changes to the volumes of a pool, each of them done whole or not at all.

A change is four steps: begin (the records say what is to be done), message to the pool, record
(the records say what there is), commit (the pool's transaction id is increased). The transaction
id tells afterwards which step a change reached.
"""

import errno
from functools import partial

from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage.devicemapper import thin
from guestagent.thin.pool import Pool, dm_name
from guestagent.thin.records import RECORDS_ID, Pending, PoolRecords, VolumeRecord
from vsock.errors import CallError

__all__ = ("add_volume", "delete_device", "delete_volume", "make_device", "resize", "settle")

#: How many ids that other programs have taken are passed over for one new volume.
_ID_ATTEMPTS = 64


def make_device(
    pool: Pool, volume: VolumeRecord, origin_id: int | None, op: Transaction, _permit: Allowed
) -> VolumeRecord:
    """Have the kernel make a thin device under a free id; return the volume with that id.

    Ids that another program has taken meanwhile are passed over. ``add_volume`` ends the change.
    """
    for _ in range(_ID_ATTEMPTS):
        device_id = _free_id(pool)
        volume = volume.replace(device_id=device_id, transaction_id=pool.records.transaction_id + 1)
        _begin(pool, "create", volume, op)
        try:
            with op.step("thin-message", volume.volume_id):
                if origin_id is None:
                    pool.message(thin.create_thin(device_id))
                else:
                    pool.message(thin.create_snap(device_id, origin_id))
        except CallError as error:
            if error.errno != errno.EEXIST:
                raise
            pool.foreign |= {device_id}
            continue
        op.on_rollback(f"thin device {device_id}", partial(delete_device, pool, device_id))
        return volume
    text = f"ids of pool {pool.pool_id!r} are taken by another program"
    raise CallError("conflict", text, object=pool.pool_id)


def add_volume(pool: Pool, volume: VolumeRecord, op: Transaction) -> None:
    """Record and commit a volume that ``make_device`` has made."""
    after = pool.records.with_volume(volume)
    _finish(pool, after.replace(next_device_id=volume.device_id + 1), op)


def delete_volume(pool: Pool, volume: VolumeRecord, op: Transaction) -> None:
    """Delete a volume that is not active. Once the kernel has deleted it there is no way back: a
    failure after that is completed by ``settle``."""
    before = pool.records
    with op.child() as beginning:
        _begin(pool, "delete", volume, beginning)
        with beginning.step("thin-message", volume.volume_id):
            delete_device(pool, volume.device_id)
        beginning.commit()
    op.on_rollback(f"deletion of volume {volume.volume_id}", partial(settle, pool))
    op.timings_ms.update(beginning.timings_ms)
    _finish(pool, before.without(volume.volume_id), op)


def delete_device(pool: Pool, device_id: int) -> None:
    """Have the kernel delete a thin device. Idempotent."""
    try:
        pool.message(thin.delete_thin(device_id))
    except CallError as error:
        if error.code != "not_found":
            raise


def resize(pool: Pool, before: VolumeRecord, after: VolumeRecord, op: Transaction) -> None:
    """Give a volume another size."""
    device_id, sizes = before.device_id, (after.size_bytes, before.size_bytes)
    _begin(pool, "change", before, op)
    if pool.active(device_id) is not None:
        with op.step("thin-resize", before.volume_id):
            pool.resize_active(device_id, *sizes)
        op.on_rollback("size", lambda: pool.resize_active(device_id, *reversed(sizes)))
    _finish(pool, pool.records.with_volume(after), op)


def _begin(pool: Pool, kind: str, volume: VolumeRecord, op: Transaction) -> None:
    """Write down what is to be done, before it is done."""
    before = pool.records.replace(pending=None)
    pending = Pending(kind=kind, transaction_id=before.transaction_id + 1, volume=volume)
    with op.step("thin-begin", volume.volume_id):
        pool.write(before.replace(pending=pending))
    op.on_rollback("the records", lambda: pool.write(before), is_record=True)


def _finish(pool: Pool, after: PoolRecords, op: Transaction) -> None:
    """Write down what there is after a change, and increase the pool's transaction id."""
    pending = pool.records.pending
    assert pending is not None
    volume_id, old = pending.volume.volume_id, pending.transaction_id - 1
    with op.step("thin-record", volume_id):
        pool.write(after.replace(pending=pending, transaction_id=pending.transaction_id))
    with op.step("thin-commit", volume_id):
        try:
            pool.message(thin.set_transaction_id(old, pending.transaction_id))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise _other_transaction(pool, old, pool.status().transaction_id) from error
        pool.drop_pending()


def _free_id(pool: Pool) -> int:
    """Return an id that no volume and no other program has, the next one first."""
    taken = {volume.device_id for volume in pool.records.volumes} | pool.foreign | {RECORDS_ID}
    if len(taken) > thin.DEVICE_ID_MAX:
        text = f"all {thin.DEVICE_ID_MAX + 1} ids of pool {pool.pool_id!r} are taken"
        raise CallError("resource", text, object=pool.pool_id)
    device_id = pool.records.next_device_id
    while device_id in taken or device_id > thin.DEVICE_ID_MAX:
        device_id = 1 if device_id >= thin.DEVICE_ID_MAX else device_id + 1
    return device_id


def settle(pool: Pool) -> None:
    """Undo, or complete, the change that an earlier agent or request began.

    What was committed stands. A volume that was being made or deleted is deleted; any other change
    is taken back.

    Raises:
        CallError: ``conflict``, the transaction id does not fit the records.
    """
    found, now = pool.records, pool.status().transaction_id
    pending = found.pending
    if pending is None or now == pending.transaction_id == found.transaction_id:
        if now != found.transaction_id:
            raise _other_transaction(pool, found.transaction_id, now)
        pool.drop_pending()
        return
    if now != pending.transaction_id - 1:
        raise _other_transaction(pool, pending.transaction_id, now)
    settled = found.replace(pending=None, transaction_id=now)
    volume = pending.volume
    if pending.kind == "change":
        pool.write(settled.with_volume(volume))
        return
    pool.remove(dm_name(pool.pool_id, volume.device_id))
    delete_device(pool, volume.device_id)
    pool.write(settled.without(volume.volume_id))


def _other_transaction(pool: Pool, recorded: int, found: int) -> CallError:
    return CallError(
        "conflict",
        f"pool {pool.pool_id!r} has transaction id {found}, its records have {recorded}",
        object=pool.pool_id,
        hint="another program has changed the pool; its metadata and data disks may be of "
        "different moments",
    )
