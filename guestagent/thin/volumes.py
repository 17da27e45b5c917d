"""Volumes of a pool: made, mounted, grown, trimmed and deleted."""

import errno
import os
import struct
from functools import partial

from guestagent.api.devices import SECTOR_BYTES
from guestagent.api.overlays import ThinScratch
from guestagent.api.thin import (
    VolumeCreate,
    VolumeDelete,
    VolumeDeleteReply,
    VolumeGrow,
    VolumeMount,
    VolumeMountReply,
    VolumeReport,
    VolumeSnapshot,
    VolumeTrim,
    VolumeTrimReply,
    VolumeUnmount,
    VolumeUnmountReply,
)
from guestagent.engine.engine import Engine
from guestagent.engine.inventory import LiveScratch, ScratchDisk
from guestagent.engine.plan import check_target
from guestagent.engine.state import PoolScratches
from guestagent.engine.teardown import (
    busy_error,
    missing_directories,
    refuse_held,
    refuse_mounts_elsewhere,
    refuse_other_mounts,
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev, filesystems, syscalls
from guestagent.storage.devicemapper import devices, thin
from guestagent.storage.devicemapper.control import DeviceInfo
from guestagent.storage.makefs import make_filesystem, trim
from guestagent.storage.mount import TargetDirectory, mount_filesystem, open_mounted
from guestagent.storage.mountinfo import mounts_of_dev
from guestagent.thin.pool import Mounted, Pool, Seen, mounted_owner
from guestagent.thin.pools import Pools
from guestagent.thin.records import Pending, VolumeRecord
from vsock.errors import CallError
from vsock.log import log

__all__ = ("Volumes",)

#: fs/ext4/ext4.h and fs/xfs/libxfs/xfs_fs.h: the numbers of ioctls.
_EXT4_IOC_RESIZE_FS, _XFS_IOC_FSGROWFSDATA = 0x40086610, 0x4010586E
_XFS_IOC_FSGEOMETRY_V1, _XFS_GEOMETRY_BYTES = 0x80705864, 112
_XFS_IMAXPCT_AT = 28
_ROOTFS, _ID_FILE = "rootfs", "id"


class Volumes(PoolScratches):
    """Thread-safe: each request holds the lock of its pool."""

    def __init__(self, engine: Engine, pools: Pools) -> None:
        self._state = engine.state
        self._pools = pools

    # --- create and snapshot

    def create(self, request: VolumeCreate, op: Transaction) -> VolumeReport:
        """Make a volume, or say that just this one is there.

        Raises:
            CallError: ``conflict``, another has the id; ``resource``, the pool has too little
                room left; ``unsupported``, the origin cannot be used so; nothing is left behind.
        """
        with self._pools.use(request.pool_id, op) as pool:
            volume = VolumeRecord(
                volume_id=request.volume_id,
                device_id=0,
                size_bytes=request.size_bytes,
                transaction_id=0,
                filesystem=request.filesystem,
                external_origin=request.origin,
            )
            if self._is_there(pool, volume):
                return self._report(pool, request.volume_id, already=True)
            with op:
                self._refuse_full(pool, op)
                if request.origin is not None:
                    self._check_origin(request, op)
                volume = pool.make(volume, None, op)
                if request.filesystem is not None or request.origin is not None:
                    self._format(pool, volume, op)
                self._record(pool, volume, op)
                op.commit()
            self._publish("volume_created", pool, volume.volume_id, op)
            return self._report(pool, volume.volume_id, op=op)

    def snapshot(self, request: VolumeSnapshot, op: Transaction) -> VolumeReport:
        """Make a volume with the content of another, whose file system is made consistent for it.

        Raises:
            CallError: as ``create``; ``not_found``, there is no such origin.
        """
        with self._pools.use(request.pool_id, op) as pool:
            origin = pool.record_of(request.of)
            if origin.deleted:
                text = f"volume {request.of!r} is being deleted"
                raise CallError("not_found", text, object=request.of)
            size_bytes = request.size_bytes or origin.size_bytes
            volume = origin.replace(
                volume_id=request.volume_id, size_bytes=size_bytes, origin=origin.volume_id
            )
            if self._is_there(pool, volume):
                return self._report(pool, request.volume_id, already=True)
            if size_bytes < origin.size_bytes:
                text = (
                    f"volume {request.of!r} has {origin.size_bytes} bytes, more than the snapshot"
                )
                raise CallError("invalid", text, object="params.size_bytes")
            with op:
                self._refuse_full(pool, op)
                active = pool.active(origin.device_id)
                if active is None:
                    volume = pool.make(volume, origin.device_id, op)
                else:
                    volume = self._snapshot_active(pool, volume, origin, active, op)
                self._record(pool, volume, op)
                op.commit()
            self._publish("volume_created", pool, volume.volume_id, op)
            return self._report(pool, volume.volume_id, op=op)

    def _snapshot_active(
        self,
        pool: Pool,
        volume: VolumeRecord,
        origin: VolumeRecord,
        active: DeviceInfo,
        op: Transaction,
    ) -> VolumeRecord:
        control = self._state.control
        with op.step("thin-suspend", active.name):
            control.suspend(active.name)
        try:
            return pool.make(volume, origin.device_id, op)
        finally:
            control.resume(active.name)

    def _is_there(self, pool: Pool, wanted: VolumeRecord) -> bool:
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

    def _record(self, pool: Pool, volume: VolumeRecord, op: Transaction) -> None:
        after = pool.records.with_volume(volume)
        pool.finish(after.replace(next_device_id=volume.device_id + 1), op)

    def _refuse_full(self, pool: Pool, op: Transaction) -> None:
        """See that the pool takes changes and keeps its least free share."""
        with op.step("thin-guard", pool.name):
            status = pool.status()
            if status.mode != "rw" or status.needs_check:
                raise CallError(
                    "resource",
                    f"pool {pool.pool_id!r} is {status.mode}",
                    object=pool.pool_id,
                    hint=_what_to_do(status),
                )
            least = pool.spec.min_free_percent
            for what, used, total in (
                ("data", status.used_data_blocks, status.total_data_blocks),
                ("metadata", status.used_metadata_blocks, status.total_metadata_blocks),
            ):
                if (total - used) * 100 < total * least:
                    raise CallError(
                        "resource",
                        f"pool {pool.pool_id!r} has {total - used} of {total} blocks of {what} "
                        f"free, less than {least} percent",
                        errno=errno.ENOSPC,
                        object=pool.pool_id,
                        hint="delete volumes, trim them, or grow the pool",
                    )

    def _check_origin(self, request: VolumeCreate, op: Transaction) -> None:
        """See that a disk can be what is under a volume."""
        assert request.origin is not None
        with op.step("device", blockdev.describe(request.origin)):
            disk = blockdev.wait_for(request.origin, op.deadline)
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
            if disk.size_bytes > request.size_bytes:
                text = f"origin {disk.node} has {disk.size_bytes} bytes, more than the volume"
                raise CallError("invalid", text, object="params.size_bytes")
            found = filesystems.detect(partial(_read_at, disk.node))
            if found != request.filesystem:
                text = f"origin {disk.node} holds {found or 'no file system'}"
                raise CallError("invalid", text, object="params.filesystem")

    def _format(self, pool: Pool, volume: VolumeRecord, op: Transaction) -> None:
        """Activate a new volume once: to make its file system, or to see that its origin can be
        used."""
        with op.step("thin-activate", volume.volume_id):
            info = pool.activate(volume, op)
        if volume.filesystem is not None and volume.external_origin is None:
            with op.step("format", volume.volume_id):
                make_filesystem(volume.filesystem, info.node, op.deadline)
        with op.step("thin-deactivate", info.name):
            devices.remove_device(self._state.control, info.name, op.deadline)

    # --- delete

    def delete(self, request: VolumeDelete, op: Transaction) -> VolumeDeleteReply:
        """Delete a volume, or have it deleted once it is not in use.

        Raises:
            CallError: ``busy``, it is in use.
        """
        with self._pools.use(request.pool_id, op) as pool:
            volume = pool.records.volume(request.volume_id)
            if volume is None:
                return _deleted(op, already=True)
            held = self._why_busy(pool, volume, op)
            if held is None:
                with op:
                    pool.delete(volume, op)
                    op.commit()
                self._publish("volume_deleted", pool, volume.volume_id, op)
                return _deleted(op, deleted=True)
            if not request.deferred:
                raise held
            if not volume.deleted:
                with op.step("thin-record", volume.volume_id):
                    pool.write(pool.records.with_volume(volume.replace(deleted=True)))
                self._pools.on_change()
            return _deleted(op, deferred=True)

    def _why_busy(self, pool: Pool, volume: VolumeRecord, op: Transaction) -> CallError | None:
        """Return the error that says why a volume cannot be deleted now."""
        mounted = pool.mounts.get(volume.volume_id)
        info = pool.active(volume.device_id)
        if mounted is not None and info is not None:
            return CallError(
                "busy",
                f"volume {volume.volume_id!r} is mounted at {mounted.path!r}",
                errno=errno.EBUSY,
                object=volume.volume_id,
                hint=f"held by {', '.join(mounted.holders)}; deferred deletes it after them",
            )
        if info is not None:
            return busy_error(info.node, info.dev, op)
        return None

    # --- scratches of overlays

    def make_scratch(
        self, overlay_id: str, scratch: ThinScratch, path: str, op: Transaction
    ) -> LiveScratch:
        """Make a volume for the changes to an overlay, and mount it, encrypted if so asked for.

        The volume is marked as deleted from the start: it goes when it is let go, whoever dies.
        """
        with self._pools.use(scratch.pool_id, op) as pool, op.child() as making:
            making.timings_ms = op.timings_ms
            if pool.records.volume(overlay_id) is not None:
                text = f"pool {pool.pool_id!r} has a volume {overlay_id!r}"
                raise CallError("conflict", text, step="claim", object=overlay_id)
            self._refuse_full(pool, making)
            volume = VolumeRecord(
                volume_id=overlay_id,
                device_id=0,
                size_bytes=scratch.size_bytes,
                transaction_id=0,
                filesystem=scratch.filesystem,
                deleted=True,
            )
            volume = pool.make(volume, None, making)
            if not scratch.encrypted:
                self._format(pool, volume, making)
            self._record(pool, volume, making)
            making.commit()
            making.on_rollback("scratch volume", lambda: self._delete_now(pool))
            mounted = Mounted(
                volume_id=overlay_id,
                path=path,
                holders=(f"overlay.{overlay_id}",),
                created=(),
                rootfs=False,
                flags=("nodev", "nosuid"),
                encrypted=scratch.encrypted,
            )
            self._keep(pool, mounted, making)
            making.on_rollback("journal", lambda: self._drop_mount(pool, overlay_id))
            with making.step("thin-activate", overlay_id):
                info = pool.activate(volume, making)
            live = LiveScratch(kind=scratch.kind, path=path, filesystem=scratch.filesystem)
            if scratch.encrypted:
                live = live.replace(disk=self._mount_encrypted(volume, info, mounted, making))
            else:
                self._mount_scratch(volume, info, mounted, making)
                live = live.replace(mount_dev=info.dev)
            dev, mount_id = syscalls.mount_of(path)
            self._keep(pool, mounted.replace(dev=dev, mount_id=mount_id), making)
            making.commit()
        op.on_rollback(f"scratch mount {path}", lambda: self._undo_scratch(pool, live, overlay_id))
        self._pools.on_change()
        return live

    def _mount_scratch(
        self, volume: VolumeRecord, info: DeviceInfo, mounted: Mounted, op: Transaction
    ) -> None:
        """Mount a device that goes with the mount."""
        path = mounted.path
        with op.step("scratch", path, code="mount"):
            _mount(volume, info.node, path, mounted.flags)
        op.on_rollback(f"mount {path}", lambda: self._undo_mount(path))
        with op.step("defer", info.name):
            devices.set_deferred_remove(self._state.control, info.name)

    def _mount_encrypted(
        self, volume: VolumeRecord, info: DeviceInfo, mounted: Mounted, op: Transaction
    ) -> ScratchDisk:
        """Format and mount a crypt device over a volume; both devices go with the mount."""
        from guestagent.engine.crypt import crypt_device  # a part that many never use

        state, owner, kind = self._state, ("overlay", volume.volume_id), volume.filesystem or ""
        # until the inventory has the disk a look for orphans would take the crypt device for one
        with state.locks.hold([("scratch", info.dev)], op.deadline):
            crypt = crypt_device(
                state,
                dev=info.dev,
                name=info.name,
                size_bytes=volume.size_bytes,
                discards=True,
                op=op,
            )
            with op.step("format", crypt.node):
                make_filesystem(kind, crypt.node, op.deadline)
            self._mount_scratch(volume, crypt, mounted, op)
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

    def release_scratch(self, pool_id: str, overlay_id: str, op: Transaction) -> None:
        """Delete the volume of an overlay whose scratch was unmounted."""
        with self._pools.use(pool_id, op) as pool:
            volume = pool.records.volume(overlay_id)
            if volume is None:  # an event has told that it was let go
                return
            with op.step("remove", overlay_id):
                name = pool.device_name(volume.device_id)
                devices.remove_device(self._state.control, name, op.deadline)
            self._drop_mount(pool, overlay_id)
            self.delete_waiting(pool, op)

    def _undo_scratch(self, pool: Pool, live: LiveScratch, overlay_id: str) -> None:
        with undo_deadline(self._state) as deadline:
            op = Transaction(deadline)
            if live.disk is not None:
                from guestagent.engine.scratchdisk import leave_disk

                leave_disk(self._state, overlay_id, live.disk, op)
            else:
                unmount_target(live.path, op)
            self.release_scratch(pool.pool_id, overlay_id, op)

    def _delete_now(self, pool: Pool) -> None:
        with undo_deadline(self._state) as deadline:
            self.delete_waiting(pool, Transaction(deadline))

    def delete_waiting(self, pool: Pool, op: Transaction) -> tuple[str, ...]:
        """Delete the volumes whose deletion was deferred and that are not in use any more.

        The caller holds the lock of the pool.
        """
        gone = []
        for volume in pool.records.volumes:
            if not volume.deleted or pool.active(volume.device_id) is not None:
                continue
            mounted = pool.mounts.get(volume.volume_id)
            if mounted is not None:  # another program unmounted it
                self._forget_mount(pool, mounted)
            try:
                with op.child() as child:
                    pool.delete(volume, child)
                    child.commit()
            except (CallError, OSError) as error:
                log.warning("a volume stays", volume=volume.volume_id, error=str(error))
                text = f"volume {volume.volume_id!r} cannot be deleted: {error}"
                self._state.inventory.note_problem(f"volume {volume.volume_id}", text)
                continue
            self._state.inventory.settle_problem(f"volume {volume.volume_id}")
            self._publish("volume_deleted", pool, volume.volume_id, op)
            gone.append(volume.volume_id)
        return tuple(gone)

    # --- look

    def get(self, pool_id: str, volume_id: str, op: Transaction) -> VolumeReport:
        """Describe a volume, which is not activated for it."""
        with self._pools.use(pool_id, op) as pool:
            return self._report(pool, volume_id)

    def list(self, pool_id: str, op: Transaction) -> tuple[VolumeReport, ...]:
        """Describe the volumes of a pool, all but the last sector of each that has a block: to find
        these would take seconds for a thousand."""
        with self._pools.use(pool_id, op) as pool:
            seen = pool.see()
            return tuple(self._describe(pool, each, seen) for each in pool.records.volumes)

    def _report(
        self,
        pool: Pool,
        volume_id: str,
        *,
        op: Transaction | None = None,
        already: bool = False,
    ) -> VolumeReport:
        volume = pool.record_of(volume_id)
        seen = pool.see((volume.device_id,))
        report = self._describe(pool, volume, seen)
        return report.replace(already=already, timings_ms={} if op is None else op.timings_ms)

    def _describe(self, pool: Pool, volume: VolumeRecord, seen: Seen | None) -> VolumeReport:
        assert pool.table is not None
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
        return VolumeReport(
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

    # --- mount

    def mount(self, request: VolumeMount, op: Transaction) -> VolumeMountReply:
        """Mount a volume, or count a holder more of the mount that is there.

        Raises:
            CallError: ``conflict``, it is mounted at another path, or is being deleted.
        """
        with self._pools.use(request.pool_id, op) as pool:
            volume = pool.record_of(request.volume_id)
            if volume.deleted:
                text = f"volume {volume.volume_id!r} is being deleted"
                raise CallError("conflict", text, object=volume.volume_id)
            if volume.filesystem is None:
                text = f"volume {volume.volume_id!r} has no file system"
                raise CallError("invalid", text, object=volume.volume_id)
            mounted = pool.mounts.get(volume.volume_id)
            if mounted is not None:
                return self._mount_again(pool, volume, mounted, request, op)
            with op:
                mounted = self._bring_up(pool, volume, request, op)
                op.commit()
            self._publish("volume_mounted", pool, volume.volume_id, op)
            return self._mount_reply(pool, volume, mounted, op, already=False)

    def _mount_again(
        self,
        pool: Pool,
        volume: VolumeRecord,
        mounted: Mounted,
        request: VolumeMount,
        op: Transaction,
    ) -> VolumeMountReply:
        asked = (request.path, request.rootfs, _flags(request))
        if asked != (mounted.path, mounted.rootfs, mounted.flags):
            raise CallError(
                "conflict",
                f"volume {volume.volume_id!r} is mounted at {mounted.path!r} with "
                f"{','.join(mounted.flags) or 'no flags'}",
                object=volume.volume_id,
                hint=f"held by {', '.join(mounted.holders)}",
            )
        os.close(open_mounted(mounted.path, mounted.dev, mounted.mount_id))
        already = request.holder in mounted.holders
        if not already:
            mounted = mounted.replace(holders=(*mounted.holders, request.holder))
            self._keep(pool, mounted, op)
        return self._mount_reply(pool, volume, mounted, op, already=already)

    def _keep(self, pool: Pool, mounted: Mounted, op: Transaction) -> None:
        """Write down what a mount is; as it was where that cannot be written."""
        before = pool.mounts.get(mounted.volume_id)
        pool.mounts[mounted.volume_id] = mounted
        try:
            with op.step("journal", mounted.volume_id, code="resource"):
                self._pools.keep(pool)
        except CallError:
            if before is None:
                del pool.mounts[mounted.volume_id]
            else:
                pool.mounts[mounted.volume_id] = before
            raise

    def _bring_up(
        self, pool: Pool, volume: VolumeRecord, request: VolumeMount, op: Transaction
    ) -> Mounted:
        state, volume_id, path = self._state, volume.volume_id, request.path
        root = check_target(path, state.rules.volume_roots, "path")
        owner = mounted_owner(pool, volume_id)
        missing = missing_directories(path, op)
        created = state.inventory.reserve(owner, path, missing=missing).directories
        op.on_rollback("reservation", lambda: state.inventory.release(owner))
        mounted = Mounted(
            volume_id=volume_id,
            path=path,
            holders=(request.holder,),
            created=created,
            rootfs=request.rootfs,
            flags=_flags(request),
        )
        self._keep(pool, mounted, op)
        op.on_rollback("journal", lambda: self._drop_mount(pool, volume_id), is_record=True)
        with op.step("thin-activate", volume_id):
            info = pool.activate(volume, op)
        with op.step("target", path, code="mount"), TargetDirectory(path, root=root) as target:
            op.on_rollback("target directory", lambda: remove_directories(created))
            with op.step("mount", info.node, code="mount"):
                _mount(volume, info.node, target.fd, mounted.flags)
            op.on_rollback(f"mount {path}", lambda: self._undo_mount(path))
        with op.step("thin-grow", path, code="mount"):
            self._grow_filesystem(volume, info.node, path)
            if request.rootfs:
                _make_rootfs(path, volume_id)
        dev, mount_id = syscalls.mount_of(path)
        with op.step("defer", info.name):
            devices.set_deferred_remove(state.control, info.name)
        mounted = mounted.replace(dev=dev, mount_id=mount_id)
        self._keep(pool, mounted, op)
        return mounted

    def _undo_mount(self, path: str) -> None:
        with undo_deadline(self._state) as deadline:
            unmount_target(path, Transaction(deadline))

    def _drop_mount(self, pool: Pool, volume_id: str) -> None:
        pool.mounts.pop(volume_id, None)
        self._pools.keep(pool)

    def _mount_reply(
        self,
        pool: Pool,
        volume: VolumeRecord,
        mounted: Mounted,
        op: Transaction,
        *,
        already: bool,
    ) -> VolumeMountReply:
        return VolumeMountReply(
            path=mounted.path,
            root=f"{mounted.path}/{_ROOTFS}" if mounted.rootfs else mounted.path,
            node=self._state.control.info(pool.device_name(volume.device_id)).node,
            dev=mounted.dev,
            mount_id=mounted.mount_id,
            filesystem=volume.filesystem or "",
            holders=mounted.holders,
            already=already,
            timings_ms=op.timings_ms,
        )

    # --- unmount

    def unmount(self, request: VolumeUnmount, op: Transaction) -> VolumeUnmountReply:
        """Let a holder go. The last one unmounts the volume, and deletes it where that waits.

        Raises:
            CallError: ``busy``, it is in use; it stays mounted, and the holder stays.
        """
        with self._pools.use(request.pool_id, op) as pool:
            mounted = pool.mounts.get(request.volume_id)
            if mounted is None or request.holder not in mounted.holders:
                holders = () if mounted is None else mounted.holders
                return _unmounted(op, holders=holders, already=True)
            left = tuple(holder for holder in mounted.holders if holder != request.holder)
            if left:
                self._keep(pool, mounted.replace(holders=left), op)
                return _unmounted(op, holders=left)
            with op:
                was_mounted = self._take_down(pool, mounted, op)
                op.commit()
            self._forget_mount(pool, mounted)
            self._publish("volume_unmounted", pool, mounted.volume_id, op)
            gone = self.delete_waiting(pool, op)
            return _unmounted(
                op,
                unmounted=mounted.path if was_mounted else "",
                deleted=mounted.volume_id in gone,
            )

    def _take_down(self, pool: Pool, mounted: Mounted, op: Transaction) -> bool:
        """Unmount a volume and see its device gone; return whether it was mounted."""
        state, volume = self._state, pool.record_of(mounted.volume_id)
        name = pool.device_name(volume.device_id)
        with op.step("look", mounted.path):
            if mounted.encrypted and mounts_of_dev(mounted.dev):
                # the key would be lost, and so it could not be mounted again
                raise CallError(
                    "busy",
                    f"volume {mounted.volume_id!r} is an encrypted scratch",
                    errno=errno.EBUSY,
                    object=mounted.volume_id,
                    hint=f"held by {', '.join(mounted.holders)}; unmount the overlay",
                )
            refuse_other_mounts(state, mounted.dev, mounted.path, op)
            refuse_mounts_elsewhere(frozenset((mounted.dev,)), mounted.path, op)
        was_mounted = unmount_target(mounted.path, op, dev=mounted.dev)
        if was_mounted:
            restore = partial(self._restore, pool, volume, mounted)
            op.on_rollback(f"unmount of {mounted.path}", restore)
        kind = volume.filesystem or ""
        refuse_held(state, mounted.dev, mounted.path, op, filesystem=kind, name=name)
        with op.step("remove", name):
            devices.remove_device(state.control, name, op.deadline)
        return was_mounted

    def _restore(self, pool: Pool, volume: VolumeRecord, mounted: Mounted) -> None:
        """Mount a volume again whose unmount failed half-way."""
        with undo_deadline(self._state) as deadline, Transaction(deadline) as op:
            info = pool.activate(volume, op)
            _mount(volume, info.node, mounted.path, mounted.flags)
            op.commit()
            devices.set_deferred_remove(self._state.control, info.name)
            dev, mount_id = syscalls.mount_of(mounted.path)
            self._keep(pool, mounted.replace(dev=dev, mount_id=mount_id), op)

    def _forget_mount(self, pool: Pool, mounted: Mounted) -> None:
        """Drop a mount that is gone, and the directories that were made for it."""
        volume_id, state = mounted.volume_id, self._state
        state.tidy(f"the journal of volume {volume_id}", self._drop_mount, pool, volume_id)
        state.tidy(f"the directories of volume {volume_id}", remove_directories, mounted.created)
        state.inventory.release(mounted_owner(pool, volume_id))

    def unmount_all(self, pool: Pool, op: Transaction) -> None:
        """Unmount every volume of a pool, whatever its holders; the caller holds its lock."""
        for mounted in tuple(pool.mounts.values()):
            with op.child() as child:
                self._take_down(pool, mounted, child)
                child.commit()
            self._forget_mount(pool, mounted)

    # --- grow and trim

    def grow(self, request: VolumeGrow, op: Transaction) -> VolumeReport:
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
                    self._resize(pool, before, after, op)
                op.commit()
            if mounted is not None:
                with op.step("thin-grow", mounted.path, code="mount"):
                    node = self._state.control.info(pool.device_name(after.device_id)).node
                    self._grow_filesystem(after, node, mounted.path)
            already = after == before
            return self._report(pool, before.volume_id, op=op).replace(already=already)

    def _resize(
        self, pool: Pool, before: VolumeRecord, after: VolumeRecord, op: Transaction
    ) -> None:
        transaction_id = pool.records.transaction_id + 1
        pool.begin(Pending(kind="change", transaction_id=transaction_id, volume=before), op)
        if pool.active(before.device_id) is not None:
            with op.step("thin-resize", before.volume_id):
                pool.resize_active(before, after)
            op.on_rollback("size", lambda: pool.resize_active(after, before))
        pool.finish(pool.records.with_volume(after), op)

    def _grow_filesystem(self, volume: VolumeRecord, node: str, path: str) -> None:
        """Have a mounted file system fill its volume; nothing happens where it does."""
        kind, size_bytes = volume.filesystem or "", volume.size_bytes
        claimed = filesystems.claimed_size_bytes(kind, partial(_read_at, node))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            block_bytes = os.fstatvfs(fd).f_frsize
            blocks = size_bytes // block_bytes
            if blocks * block_bytes <= claimed:
                return
            if kind == "ext4":
                count = bytearray(struct.pack("=Q", blocks))
                syscalls.ioctl(fd, _EXT4_IOC_RESIZE_FS, count, path, "EXT4_IOC_RESIZE_FS")
                return
            geometry = bytearray(_XFS_GEOMETRY_BYTES)
            syscalls.ioctl(fd, _XFS_IOC_FSGEOMETRY_V1, geometry, path, "XFS_IOC_FSGEOMETRY")
            (imaxpct,) = struct.unpack_from("=I", geometry, _XFS_IMAXPCT_AT)
            wanted = bytearray(struct.pack("=QI4x", blocks, imaxpct))
            syscalls.ioctl(fd, _XFS_IOC_FSGROWFSDATA, wanted, path, "XFS_IOC_FSGROWFSDATA")
        finally:
            os.close(fd)

    def trim(self, request: VolumeTrim, op: Transaction) -> VolumeTrimReply:
        """Discard the free space of a mounted volume, so that its pool has it back.

        Raises:
            CallError: ``invalid``, it is not mounted.
        """
        with self._pools.use(request.pool_id, op) as pool:
            volume = pool.record_of(request.volume_id)
            mounted = pool.mounts.get(volume.volume_id)
            if mounted is None:
                text = f"volume {volume.volume_id!r} is not mounted"
                raise CallError("invalid", text, object=volume.volume_id)
            assert pool.table is not None
            used = pool.status().used_data_blocks
            mount_id = mounted.mount_id
            if mounted.encrypted:  # an unmount of its overlay that failed has mounted it again
                mount_id = syscalls.mount_of(mounted.path)[1]
            os.close(open_mounted(mounted.path, mounted.dev, mount_id))
            with op.step("trim", mounted.path, code="mount"):
                fd = os.open(mounted.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    syscalls.syncfs(fd)  # what was deleted is free only once that is written
                finally:
                    os.close(fd)
                trimmed = trim(mounted.path, op.deadline)
            freed = used - pool.status().used_data_blocks
            return VolumeTrimReply(
                trimmed_bytes=trimmed,
                freed_bytes=max(0, freed) * pool.table.block_sectors * SECTOR_BYTES,
                timings_ms=op.timings_ms,
            )

    def _publish(self, kind: str, pool: Pool, volume_id: str, op: Transaction) -> None:
        self._state.events.publish(
            kind, pool_id=pool.pool_id, volume_id=volume_id, traceparent=op.traceparent
        )


def _flags(request: VolumeMount) -> tuple[str, ...]:
    flags = {"nodev": not request.dev, "nosuid": not request.suid}
    return tuple(flag for flag, is_set in flags.items() if is_set)


def _mount(volume: VolumeRecord, node: str, target: "int | str", flags: tuple[str, ...]) -> None:
    kind = volume.filesystem or ""
    try:
        mount_filesystem(
            source=node,
            target=target,
            filesystem=kind,
            flags=flags,
            options=filesystems.mount_options(kind, readonly=False),
        )
    except OSError as error:
        refused = filesystems.refusal(kind, node, error)
        if refused is None:
            raise
        raise refused from error


def _make_rootfs(path: str, volume_id: str) -> None:
    """Make the directory ``rootfs`` and the file ``id`` in a volume, unless they are there."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            os.mkdir(_ROOTFS, 0o755, dir_fd=fd)
        except FileExistsError:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(_ROOTFS, flags, dir_fd=fd))
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(_ID_FILE, flags, 0o600, dir_fd=fd)
        except FileExistsError:
            return
        try:
            os.write(file, f"{volume_id}\n".encode())
        finally:
            os.close(file)
    finally:
        os.close(fd)


def _read_at(node: str, offset: int, size: int) -> bytes:
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, offset).ljust(size, b"\0")
    finally:
        os.close(fd)


def _what_to_do(status: thin.PoolStatus) -> str:
    if status.mode == "out_of_data_space":
        return "grow the pool, or delete volumes"
    return "close it and run thin_check on its metadata device"


def _deleted(
    op: Transaction, *, deleted: bool = False, deferred: bool = False, already: bool = False
) -> VolumeDeleteReply:
    return VolumeDeleteReply(
        deleted=deleted, deferred=deferred, already=already, timings_ms=op.timings_ms
    )


def _unmounted(
    op: Transaction,
    *,
    unmounted: str = "",
    holders: tuple[str, ...] = (),
    deleted: bool = False,
    already: bool = False,
) -> VolumeUnmountReply:
    return VolumeUnmountReply(
        unmounted=unmounted,
        holders=holders,
        deleted=deleted,
        already=already,
        timings_ms=op.timings_ms,
    )
