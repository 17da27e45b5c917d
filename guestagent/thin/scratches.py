"""Volumes as scratches of overlays, encrypted if so asked for.

Such a volume is marked as deleted from the start: it goes with the overlay, even where the agent
dies before.
"""

from functools import partial

from guestagent.api.overlays import ThinScratch
from guestagent.engine.inventory import LiveScratch, ScratchDisk
from guestagent.engine.parts import undo_mount, undoing
from guestagent.engine.state import PoolScratches
from guestagent.engine.teardown import unmount_target
from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage import syscalls
from guestagent.storage.devicemapper import devices
from guestagent.storage.devicemapper.control import DeviceInfo
from guestagent.storage.makefs import make_filesystem
from guestagent.thin.changes import add_volume, make_device
from guestagent.thin.pool import Mounted, Pool, dm_name
from guestagent.thin.pools import Pools
from guestagent.thin.records import VolumeRecord
from guestagent.thin.volumefs import mount_volume
from guestagent.thin.volumes import Volumes, format_volume, refuse_full
from vsock.errors import CallError

__all__ = ("Scratches",)


class Scratches(PoolScratches):
    """Thread-safe: each request holds the lock of its pool."""

    def __init__(self, pools: Pools, volumes: Volumes) -> None:
        self._pools = pools
        self._volumes = volumes

    def make_scratch(
        self, overlay_id: str, scratch: ThinScratch, path: str, op: Transaction, permit: Allowed
    ) -> LiveScratch:
        """Make a volume for the changes to an overlay, and mount it.

        Raises:
            CallError: ``conflict``, the pool has a volume of that id; ``resource``, it is full.
        """
        with self._pools.use(scratch.pool_id, op) as pool, op.child() as making:
            making.timings_ms = op.timings_ms
            volume = _make_volume(pool, overlay_id, scratch, making, permit)
            making.commit()
            making.on_rollback("scratch volume", partial(self._delete_now, pool))
            mounted = Mounted(
                volume_id=overlay_id,
                path=path,
                holders=(f"overlay.{overlay_id}",),
                created=(),
                rootfs=False,
                flags=("nodev", "nosuid"),
                encrypted=scratch.encrypted,
            )
            pool.keep_mount(mounted, making)
            making.on_rollback("journal", lambda: pool.drop_mount(overlay_id))
            with making.step("thin-activate", overlay_id):
                info = pool.activate(volume, making)
            live = LiveScratch(kind=scratch.kind, path=path, filesystem=scratch.filesystem)
            if scratch.encrypted:
                disk = _mount_encrypted(pool, volume, info, mounted, making, permit)
                live = live.replace(disk=disk)
            else:
                _mount(pool, volume, info, mounted, making, permit)
                live = live.replace(mount_dev=info.dev)
            dev, mount_id = syscalls.mount_of(path)
            pool.keep_mount(mounted.replace(dev=dev, mount_id=mount_id), making)
            making.commit()
        op.on_rollback(f"scratch mount {path}", lambda: self._undo(pool, live, overlay_id))
        self._pools.on_change()
        return live

    def release_scratch(self, pool_id: str, overlay_id: str, op: Transaction) -> None:
        """Delete the volume of an overlay whose scratch was unmounted."""
        with self._pools.use(pool_id, op) as pool:
            volume = pool.records.volume(overlay_id)
            if volume is None:  # an event has told that it was let go
                return
            with op.step("remove", overlay_id):
                name = dm_name(pool_id, volume.device_id)
                devices.remove_device(pool.state.control, name, op.deadline)
            pool.drop_mount(overlay_id)
            self._volumes.delete_waiting(pool, op)

    def _undo(self, pool: Pool, live: LiveScratch, overlay_id: str) -> None:
        with undoing(pool.state) as op:
            if live.disk is not None:
                from guestagent.engine.scratchdisk import leave_disk

                leave_disk(pool.state, overlay_id, live.disk, op)
            else:
                unmount_target(live.path, op)
            self.release_scratch(pool.pool_id, overlay_id, op)

    def _delete_now(self, pool: Pool) -> None:
        with undoing(pool.state) as op:
            self._volumes.delete_waiting(pool, op)


def _make_volume(
    pool: Pool, overlay_id: str, scratch: ThinScratch, op: Transaction, permit: Allowed
) -> VolumeRecord:
    if pool.records.volume(overlay_id) is not None:
        text = f"pool {pool.pool_id!r} has a volume {overlay_id!r}"
        raise CallError("conflict", text, step="claim", object=overlay_id)
    refuse_full(pool, op)
    volume = VolumeRecord(
        volume_id=overlay_id,
        device_id=0,
        size_bytes=scratch.size_bytes,
        transaction_id=0,
        filesystem=scratch.filesystem,
        deleted=True,
    )
    volume = make_device(pool, volume, None, op, permit)
    if not scratch.encrypted:
        format_volume(pool, volume, op)
    add_volume(pool, volume, op)
    return volume


def _mount(
    pool: Pool,
    volume: VolumeRecord,
    info: DeviceInfo,
    mounted: Mounted,
    op: Transaction,
    _permit: Allowed,
) -> None:
    """Mount a device, which is removed with the mount."""
    path = mounted.path
    with op.step("scratch", path, code="mount"):
        mount_volume(volume, info.node, path, mounted.flags)
    op.on_rollback(f"mount {path}", partial(undo_mount, pool.state, path))
    with op.step("defer", info.name):
        devices.set_deferred_remove(pool.state.control, info.name)


def _mount_encrypted(
    pool: Pool,
    volume: VolumeRecord,
    info: DeviceInfo,
    mounted: Mounted,
    op: Transaction,
    permit: Allowed,
) -> ScratchDisk:
    """Format and mount a crypt device over a volume; both devices go with the mount."""
    from guestagent.engine.crypt import crypt_device  # a part that many never use

    state, owner, kind = pool.state, ("overlay", volume.volume_id), volume.filesystem or ""
    # until the inventory has the disk a look for orphans would take the crypt device for one
    with state.locks.hold([("scratch", info.dev)], op.deadline):
        size_bytes = volume.size_bytes
        crypt = crypt_device(
            state,
            dev=info.dev,
            name=info.name,
            size_bytes=size_bytes,
            discards=True,
            op=op,
            permit=permit,
        )
        with op.step("format", crypt.node):
            make_filesystem(kind, crypt.node, op.deadline)
        _mount(pool, volume, crypt, mounted, op, permit)
        with op.step("defer", info.name):
            devices.set_deferred_remove(state.control, info.name)
        disk = ScratchDisk(
            dev=info.dev,
            filesystem=kind,
            formatted=True,
            shared=False,
            discard=False,
            mount_point=mounted.path,
            created=(),
            crypt=crypt.name,
            mount_dev=crypt.dev,
        )
        state.inventory.reserve_scratch(owner, disk.dev)
        op.on_rollback("scratch disk", lambda: state.inventory.leave_scratch(owner))
        state.inventory.add_disk(disk)
    return disk
