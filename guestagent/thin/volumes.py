"""Volumes of a pool: made, made as snapshots, described, grown and deleted."""

import errno
from functools import partial

from guestagent.api import thin as api
from guestagent.api.devices import SECTOR_BYTES, Device
from guestagent.api.request import handles
from guestagent.engine.teardown import busy_error
from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage import blockdev, filesystems
from guestagent.storage.devicemapper import devices
from guestagent.storage.makefs import make_filesystem
from guestagent.storage.mountinfo import mounts_of_dev
from guestagent.thin.changes import add_volume, delete_volume, make_device, resize
from guestagent.thin.pool import Pool, Seen
from guestagent.thin.pools import Pools
from guestagent.thin.records import VolumeRecord
from guestagent.thin.volumefs import grow_filesystem, read_at
from vsock.errors import CallError
from vsock.log import log

__all__ = ("Volumes", "format_volume", "refuse_full")


class Volumes:
    """Thread-safe: each request holds the lock of its pool."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    # --- create and snapshot

    @handles(api.VolumeCreate)
    def create(self, request: api.VolumeCreate, op: Transaction) -> api.VolumeReport:
        """Make a volume, or say that exactly this volume is there.

        Raises:
            CallError: ``conflict``, another has the id; ``resource``, the pool has too little
                room left; ``unsupported``, the origin cannot be used so; nothing is left behind.
        """
        with self._pools.use(request.pool_id, op) as pool:
            permit = pool.state.gate.request(request.method, request)
            volume = VolumeRecord(
                volume_id=request.volume_id,
                device_id=0,
                size_bytes=request.size_bytes,
                transaction_id=0,
                filesystem=request.filesystem,
                external_origin=request.origin,
            )
            if _is_there(pool, volume):
                return _report(pool, request.volume_id).replace(already=True)
            with op:
                refuse_full(pool, op)
                if request.origin is not None:
                    _check_origin(request.origin, volume, op)
                volume = make_device(pool, volume, None, op, permit)
                if request.filesystem is not None or request.origin is not None:
                    format_volume(pool, volume, op)
                add_volume(pool, volume, op)
                op.commit()
            pool.publish("volume_created", volume.volume_id, op)
            return _report(pool, volume.volume_id).replace(timings_ms=op.timings_ms)

    @handles(api.VolumeSnapshot)
    def snapshot(self, request: api.VolumeSnapshot, op: Transaction) -> api.VolumeReport:
        """Make a volume with the content of another, whose file system is made consistent for it.

        Raises:
            CallError: as ``create``; ``not_found``, there is no such origin.
        """
        with self._pools.use(request.pool_id, op) as pool:
            permit = pool.state.gate.request(request.method, request)
            origin = pool.record_of(request.of)
            if origin.deleted:
                text = f"volume {request.of!r} is being deleted"
                raise CallError("not_found", text, object=request.of)
            size_bytes = request.size_bytes or origin.size_bytes
            volume = origin.replace(
                volume_id=request.volume_id, size_bytes=size_bytes, origin=origin.volume_id
            )
            if _is_there(pool, volume):
                return _report(pool, request.volume_id).replace(already=True)
            if size_bytes < origin.size_bytes:
                text = (
                    f"volume {request.of!r} has {origin.size_bytes} bytes, more than the snapshot"
                )
                raise CallError("invalid", text, object="params.size_bytes")
            with op:
                refuse_full(pool, op)
                volume = _make_snapshot(pool, volume, origin, op, permit)
                add_volume(pool, volume, op)
                op.commit()
            pool.publish("volume_created", volume.volume_id, op)
            return _report(pool, volume.volume_id).replace(timings_ms=op.timings_ms)

    # --- grow

    @handles(api.VolumeGrow)
    def grow(self, request: api.VolumeGrow, op: Transaction) -> api.VolumeReport:
        """Make a volume larger; its file system as well, now or when it is mounted.

        Raises:
            CallError: ``invalid``, it is larger already; ``unsupported``, it is an encrypted
                scratch.
        """
        with self._pools.use(request.pool_id, op) as pool:
            before = pool.record_of(request.volume_id)
            if request.size_bytes < before.size_bytes:
                text = f"volume {before.volume_id!r} has {before.size_bytes} bytes; none shrinks"
                raise CallError("invalid", text, object="params.size_bytes")
            mounted = pool.mounts.get(before.volume_id)
            if mounted is not None and mounted.encrypted:
                text = f"volume {before.volume_id!r} is an encrypted scratch, which does not grow"
                raise CallError("unsupported", text, object=before.volume_id)
            after = before.replace(size_bytes=request.size_bytes)
            with op:
                if after != before:
                    resize(pool, before, after, op)
                op.commit()
            if mounted is not None:
                with op.step("thin-grow", mounted.path, code="mount"):
                    grow_filesystem(after, pool.node_of(after.device_id), mounted.path)
            report = _report(pool, before.volume_id)
            return report.replace(already=after == before, timings_ms=op.timings_ms)

    # --- delete

    @handles(api.VolumeDelete)
    def delete(self, request: api.VolumeDelete, op: Transaction) -> api.VolumeDeleteReply:
        """Delete a volume, or have it deleted once it is not in use.

        Raises:
            CallError: ``busy``, it is in use.
        """
        reply = api.VolumeDeleteReply(
            deleted=False, deferred=False, already=False, timings_ms=op.timings_ms
        )
        with self._pools.use(request.pool_id, op) as pool:
            volume = pool.records.volume(request.volume_id)
            if volume is None:
                return reply.replace(already=True)
            held = _why_busy(pool, volume, op)
            if held is None:
                with op:
                    delete_volume(pool, volume, op)
                    op.commit()
                pool.publish("volume_deleted", volume.volume_id, op)
                return reply.replace(deleted=True)
            if not request.deferred:
                raise held
            if not volume.deleted:
                with op.step("thin-record", volume.volume_id):
                    pool.write(pool.records.with_volume(volume.replace(deleted=True)))
                self._pools.on_change()
            return reply.replace(deferred=True)

    def delete_waiting(self, pool: Pool, op: Transaction) -> tuple[str, ...]:
        """Delete the volumes whose deletion was deferred and that are not in use any more.

        The caller holds the lock of the pool.
        """
        gone, inventory = [], pool.state.inventory
        for volume in pool.records.volumes:
            if not volume.deleted or pool.active(volume.device_id) is not None:
                continue
            mounted = pool.mounts.get(volume.volume_id)
            if mounted is not None:  # another program unmounted it
                pool.forget_mount(mounted)
            problem = f"volume {volume.volume_id}"
            try:
                with op.child() as child:
                    delete_volume(pool, volume, child)
                    child.commit()
            except (CallError, OSError) as error:
                log.warning("a volume stays", volume=volume.volume_id, error=str(error))
                text = f"volume {volume.volume_id!r} cannot be deleted: {error}"
                inventory.note_problem(problem, text)
                continue
            inventory.settle_problem(problem)
            pool.publish("volume_deleted", volume.volume_id, op)
            gone.append(volume.volume_id)
        return tuple(gone)

    # --- describe

    @handles(api.VolumeGet)
    def get(self, request: api.VolumeGet, op: Transaction) -> api.VolumeReport:
        """Describe a volume, which is not activated for it."""
        with self._pools.use(request.pool_id, op) as pool:
            return _report(pool, request.volume_id)

    @handles(api.VolumeList)
    def list(self, request: api.VolumeList, op: Transaction) -> api.VolumeListReply:
        """Describe the volumes of a pool without the last mapped sector of each: to find these
        would take seconds for a thousand volumes."""
        with self._pools.use(request.pool_id, op) as pool:
            seen = pool.see()
            volumes = tuple(_describe(pool, each, seen) for each in pool.records.volumes)
            return api.VolumeListReply(volumes=volumes)


def _make_snapshot(
    pool: Pool, volume: VolumeRecord, origin: VolumeRecord, op: Transaction, permit: Allowed
) -> VolumeRecord:
    control, active = pool.state.control, pool.active(origin.device_id)
    if active is None:
        return make_device(pool, volume, origin.device_id, op, permit)
    with op.step("thin-suspend", active.name):
        control.suspend(active.name)
    try:
        return make_device(pool, volume, origin.device_id, op, permit)
    finally:
        control.resume(active.name)


def _is_there(pool: Pool, wanted: VolumeRecord) -> bool:
    """Return whether exactly this volume is there.

    Raises:
        CallError: ``conflict``, another volume has the id, perhaps one that is being deleted.
    """
    there = pool.records.volume(wanted.volume_id)
    if there is None:
        return False
    asked = wanted.replace(device_id=there.device_id, transaction_id=there.transaction_id)
    if there == asked:
        return True
    what = "is being deleted" if there.deleted else "is there, and is another"
    raise CallError(
        "conflict",
        f"volume {wanted.volume_id!r} of pool {pool.pool_id!r} {what}",
        object=wanted.volume_id,
        hint="wait for the event volume_deleted" if there.deleted else "delete it first",
    )


def refuse_full(pool: Pool, op: Transaction) -> None:
    """See that the pool takes changes, and that its least free share is free.

    Raises:
        CallError: ``resource``.
    """
    with op.step("thin-guard", pool.name):
        status = pool.status()
        if status.mode != "rw" or status.needs_check:
            hint = "close it and run thin_check on its metadata device"
            if status.mode == "out_of_data_space":
                hint = "grow the pool, or delete volumes"
            text = f"pool {pool.pool_id!r} is {status.mode}"
            raise CallError("resource", text, object=pool.pool_id, hint=hint)
        least = pool.spec.min_free_percent
        for what, used, total in (
            ("data", status.used_data_blocks, status.total_data_blocks),
            ("metadata", status.used_metadata_blocks, status.total_metadata_blocks),
        ):
            if (total - used) * 100 < total * least:
                raise CallError(
                    "resource",
                    f"pool {pool.pool_id!r} has {total - used} of {total} blocks of {what} free, "
                    f"less than {least} percent",
                    errno=errno.ENOSPC,
                    object=pool.pool_id,
                    hint="delete volumes, trim them, or grow the pool",
                )


def _check_origin(origin: Device, volume: VolumeRecord, op: Transaction) -> None:
    """See that a disk can be the external origin of a volume."""
    with op.step("device", blockdev.describe(origin)):
        disk = blockdev.wait_for(origin, op.deadline)
        if disk.logical_block_size > SECTOR_BYTES:
            raise CallError(
                "unsupported",
                f"{disk.node} has blocks of {disk.logical_block_size} bytes, and a volume "
                f"on it would promise {SECTOR_BYTES}: it could not be mounted",
                object=disk.node,
                hint="put an overlay over the layer, which makes changes to it possible",
            )
        if not disk.readonly:
            text = f"origin {disk.node} is not read-only"
            raise CallError("invalid", text, object=disk.node)
        if disk.size_bytes > volume.size_bytes:
            text = f"origin {disk.node} has {disk.size_bytes} bytes, more than the volume"
            raise CallError("invalid", text, object="params.size_bytes")
        found = filesystems.detect(partial(read_at, disk.node))
        if found != volume.filesystem:
            text = f"origin {disk.node} holds {found or 'no file system'}"
            raise CallError("invalid", text, object="params.filesystem")


def format_volume(pool: Pool, volume: VolumeRecord, op: Transaction) -> None:
    """Activate a new volume once: to make its file system, or to see that its origin can be
    used."""
    with op.step("thin-activate", volume.volume_id):
        info = pool.activate(volume, op)
    if volume.filesystem is not None and volume.external_origin is None:
        with op.step("format", volume.volume_id):
            make_filesystem(volume.filesystem, info.node, op.deadline)
    with op.step("thin-deactivate", info.name):
        devices.remove_device(pool.state.control, info.name, op.deadline)


def _why_busy(pool: Pool, volume: VolumeRecord, op: Transaction) -> CallError | None:
    """Return the error that says why a volume cannot be deleted now."""
    info = pool.active(volume.device_id)
    if info is None:
        return None
    mounted = pool.mounts.get(volume.volume_id)
    if mounted is None:
        return busy_error(info.node, info.dev, op)
    return CallError(
        "busy",
        f"volume {volume.volume_id!r} is mounted at {mounted.path!r}",
        errno=errno.EBUSY,
        object=volume.volume_id,
        hint=f"held by {', '.join(mounted.holders)}; deferred deletes it after them",
    )


def _report(pool: Pool, volume_id: str) -> api.VolumeReport:
    volume = pool.record_of(volume_id)
    return _describe(pool, volume, pool.see((volume.device_id,)))


def _describe(pool: Pool, volume: VolumeRecord, seen: Seen | None) -> api.VolumeReport:
    mapped, highest = None, None
    block_sectors = pool.table.block_sectors
    if seen is not None and volume.device_id in seen.devices:
        mapped = seen.devices[volume.device_id].mapped_blocks * block_sectors
        last = seen.highest.get(volume.device_id)
        highest = None if last is None else (last + 1) * block_sectors - 1
    info = pool.active(volume.device_id)
    mounted = pool.mounts.get(volume.volume_id)
    dev = "" if info is None else info.dev
    if info is not None and mounted is not None and mounted.encrypted:
        dev = mounted.dev
    origin = volume.external_origin
    return api.VolumeReport(
        pool_id=pool.pool_id,
        volume_id=volume.volume_id,
        device_id=volume.device_id,
        size_bytes=volume.size_bytes,
        sectors=volume.size_bytes // SECTOR_BYTES,
        transaction_id=volume.transaction_id,
        mapped_sectors=mapped,
        highest_mapped_sector=highest,
        filesystem=volume.filesystem,
        origin=volume.origin,
        external_origin=None if origin is None else blockdev.describe(origin),
        active=info is not None,
        node="" if info is None else info.node,
        open_count=0 if info is None else info.open_count,
        mounts=tuple(m.target for m in mounts_of_dev(dev)) if dev else (),
        holders=() if mounted is None else mounted.holders,
        deleting=volume.deleted,
    )
