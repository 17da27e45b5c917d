"""Mounted volumes: each is mounted once, and stays until its last holder unmounts it."""

import errno
import os
from functools import partial

from guestagent.api import thin as api
from guestagent.api.request import handles
from guestagent.engine.parts import claim_target, undo_mount, undoing
from guestagent.engine.teardown import (
    refuse_held,
    refuse_mounts_elsewhere,
    refuse_other_mounts,
    remove_directories,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage import syscalls
from guestagent.storage.devicemapper import devices
from guestagent.storage.makefs import trim
from guestagent.storage.mount import TargetDirectory, open_mounted
from guestagent.storage.mountinfo import mounts_of_dev
from guestagent.thin.pool import Mounted, Pool, dm_name
from guestagent.thin.pools import Pools
from guestagent.thin.records import VolumeRecord
from guestagent.thin.volumefs import ROOTFS, grow_filesystem, make_rootfs, mount_volume
from guestagent.thin.volumes import Volumes
from vsock.errors import CallError

__all__ = ("Mounts",)


class Mounts:
    """Thread-safe: each request holds the lock of its pool."""

    def __init__(self, pools: Pools, volumes: Volumes) -> None:
        self._pools = pools
        self._volumes = volumes

    # --- mount

    @handles(api.VolumeMount)
    def mount(self, request: api.VolumeMount, op: Transaction) -> api.VolumeMountReply:
        """Mount a volume, or add a holder to the mount that is there.

        Raises:
            CallError: ``conflict``, it is mounted at another path, or is being deleted.
        """
        with self._pools.use(request.pool_id, op) as pool:
            permit = pool.state.gate.request(request.method, request)
            volume = pool.record_of(request.volume_id)
            if volume.deleted:
                text = f"volume {volume.volume_id!r} is being deleted"
                raise CallError("conflict", text, object=volume.volume_id)
            if volume.filesystem is None:
                text = f"volume {volume.volume_id!r} has no file system"
                raise CallError("invalid", text, object=volume.volume_id)
            mounted, already = pool.mounts.get(volume.volume_id), False
            if mounted is not None:
                already = request.holder in mounted.holders
                mounted = _add_holder(pool, mounted, request, op)
            else:
                with op:
                    mounted = _bring_up(pool, volume, request, op, permit)
                    op.commit()
                pool.publish("volume_mounted", volume.volume_id, op)
            return api.VolumeMountReply(
                path=mounted.path,
                root=f"{mounted.path}/{ROOTFS}" if mounted.rootfs else mounted.path,
                node=pool.node_of(volume.device_id),
                dev=mounted.dev,
                mount_id=mounted.mount_id,
                filesystem=volume.filesystem,
                holders=mounted.holders,
                already=already,
                timings_ms=op.timings_ms,
            )

    # --- unmount

    @handles(api.VolumeUnmount)
    def unmount(self, request: api.VolumeUnmount, op: Transaction) -> api.VolumeUnmountReply:
        """Remove a holder. The last one unmounts the volume, and deletes it where that waits.

        Raises:
            CallError: ``busy``, it is in use; it stays mounted, and the holder stays.
        """
        reply = api.VolumeUnmountReply(
            unmounted="", holders=(), deleted=False, already=False, timings_ms=op.timings_ms
        )
        with self._pools.use(request.pool_id, op) as pool:
            mounted = pool.mounts.get(request.volume_id)
            if mounted is None:
                return reply.replace(already=True)
            if request.holder not in mounted.holders:
                return reply.replace(holders=mounted.holders, already=True)
            left = tuple(holder for holder in mounted.holders if holder != request.holder)
            if left:
                pool.keep_mount(mounted.replace(holders=left), op)
                return reply.replace(holders=left)
            with op:
                was_mounted = _take_down(pool, mounted, op)
                op.commit()
            pool.forget_mount(mounted)
            pool.publish("volume_unmounted", mounted.volume_id, op)
            gone = self._volumes.delete_waiting(pool, op)
            return reply.replace(
                unmounted=mounted.path if was_mounted else "", deleted=mounted.volume_id in gone
            )

    def unmount_all(self, pool: Pool, op: Transaction) -> None:
        """Unmount every volume of a pool, whatever its holders; the caller holds its lock."""
        for mounted in tuple(pool.mounts.values()):
            with op.child() as child:
                _take_down(pool, mounted, child)
                child.commit()
            pool.forget_mount(mounted)

    # --- trim

    @handles(api.VolumeTrim)
    def trim(self, request: api.VolumeTrim, op: Transaction) -> api.VolumeTrimReply:
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
            return api.VolumeTrimReply(
                trimmed_bytes=trimmed,
                freed_bytes=max(0, freed) * pool.block_bytes,
                timings_ms=op.timings_ms,
            )


def _flags(request: api.VolumeMount) -> tuple[str, ...]:
    flags = {"nodev": not request.dev, "nosuid": not request.suid}
    return tuple(flag for flag, is_set in flags.items() if is_set)


def _add_holder(pool: Pool, mounted: Mounted, request: api.VolumeMount, op: Transaction) -> Mounted:
    asked = (request.path, request.rootfs, _flags(request))
    if asked != (mounted.path, mounted.rootfs, mounted.flags):
        raise CallError(
            "conflict",
            f"volume {mounted.volume_id!r} is mounted at {mounted.path!r} with "
            f"{','.join(mounted.flags) or 'no flags'}",
            object=mounted.volume_id,
            hint=f"held by {', '.join(mounted.holders)}",
        )
    os.close(open_mounted(mounted.path, mounted.dev, mounted.mount_id))
    if request.holder not in mounted.holders:
        mounted = mounted.replace(holders=(*mounted.holders, request.holder))
        pool.keep_mount(mounted, op)
    return mounted


def _bring_up(
    pool: Pool, volume: VolumeRecord, request: api.VolumeMount, op: Transaction, _permit: Allowed
) -> Mounted:
    state, volume_id, path = pool.state, volume.volume_id, request.path
    owner, roots = pool.mount_owner(volume_id), state.rules.volume_roots
    root, created = claim_target(state, owner, path, roots, op, "path")
    mounted = Mounted(
        volume_id=volume_id,
        path=path,
        holders=(request.holder,),
        created=created,
        rootfs=request.rootfs,
        flags=_flags(request),
    )
    pool.keep_mount(mounted, op)
    op.on_rollback("journal", lambda: pool.drop_mount(volume_id), is_record=True)
    with op.step("thin-activate", volume_id):
        info = pool.activate(volume, op)
    with op.step("target", path, code="mount"), TargetDirectory(path, root=root) as target:
        op.on_rollback("target directory", lambda: remove_directories(created))
        with op.step("mount", info.node, code="mount"):
            mount_volume(volume, info.node, target.fd, mounted.flags)
        op.on_rollback(f"mount {path}", partial(undo_mount, state, path))
    with op.step("thin-grow", path, code="mount"):
        grow_filesystem(volume, info.node, path)
        if request.rootfs:
            make_rootfs(path, volume_id)
    dev, mount_id = syscalls.mount_of(path)
    with op.step("defer", info.name):
        devices.set_deferred_remove(state.control, info.name)
    mounted = mounted.replace(dev=dev, mount_id=mount_id)
    pool.keep_mount(mounted, op)
    return mounted


def _take_down(pool: Pool, mounted: Mounted, op: Transaction) -> bool:
    """Unmount a volume and see its device gone; return whether it was mounted."""
    state, volume = pool.state, pool.record_of(mounted.volume_id)
    name = dm_name(pool.pool_id, volume.device_id)
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
        restore = partial(_restore, pool, volume, mounted)
        op.on_rollback(f"unmount of {mounted.path}", restore)
    kind = volume.filesystem or ""
    refuse_held(state, mounted.dev, mounted.path, op, filesystem=kind, name=name)
    with op.step("remove", name):
        devices.remove_device(state.control, name, op.deadline)
    return was_mounted


def _restore(pool: Pool, volume: VolumeRecord, mounted: Mounted) -> None:
    """Mount a volume again whose unmount failed half-way."""
    with undoing(pool.state) as op:
        info = pool.activate(volume, op)
        mount_volume(volume, info.node, mounted.path, mounted.flags)
        op.commit()
        devices.set_deferred_remove(pool.state.control, info.name)
        dev, mount_id = syscalls.mount_of(mounted.path)
        pool.keep_mount(mounted.replace(dev=dev, mount_id=mount_id), op)
