"""Pools: opened, closed, grown and told of, and what becomes of them when an agent starts anew."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guestagent.api.devices import SECTOR_BYTES, Device
from guestagent.api.thin import (
    BLOCK_BYTES_MIN,
    MAX_DATA_DEVICES,
    PoolClose,
    PoolCloseReply,
    PoolGrow,
    PoolOpen,
    PoolReport,
    SpaceUsed,
)
from guestagent.engine.engine import Engine
from guestagent.engine.inventory import Reservation
from guestagent.engine.parts import recover_part
from guestagent.engine.plan import dm_uuid
from guestagent.engine.teardown import (
    busy_error,
    remove_devices,
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.devicemapper import thin
from guestagent.storage.devicemapper.targets import Target
from guestagent.storage.devicemapper.thin import PoolTable
from guestagent.storage.filesystems import detect
from guestagent.storage.mountinfo import find_mount
from guestagent.thin.metadata import Superblock
from guestagent.thin.pool import (
    Mounted,
    Pool,
    PoolEntry,
    linear_targets,
    mounted_owner,
    uuid_prefix,
)
from guestagent.thin.records import RECORDS_ID, PoolRecords, is_slot
from vsock.errors import CallError
from vsock.log import log

__all__ = ("PART", "Pools")

#: The name of this part in the journal.
PART = "pool"
#: dm-thin takes no less, Documentation/admin-guide/device-mapper/thin-provisioning.rst.
_METADATA_BYTES_MIN = 2 * 1024 * 1024
#: THIN_METADATA_MAX_SECTORS of drivers/md/dm-thin-metadata.h: 255 bitmaps of 16,320 blocks.
_METADATA_BYTES_MAX = 255 * ((1 << 14) - 64) * 4096
#: Records and a volume or two.
_DATA_BLOCKS_MIN = 16
_LOW_WATER_PART = 10
_ALIGNED_BYTES = 4096
#: A data disk that is blank has this much of zeros at its start.
_HEAD_BYTES = 128 * 1024
_LISTED_IDS = 64


class Pools:
    """The open pools. Thread-safe: each request holds the lock of its pool."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._state = engine.state
        self._pools: dict[str, Pool] = {}
        #: Told of a pool more, and of a deletion that waits.
        self.on_change: Callable[[], None] = lambda: None

    def all(self) -> tuple[Pool, ...]:
        return tuple(self._pools.values())

    @contextmanager
    def use(self, pool_id: str, op: Transaction) -> Iterator[Pool]:
        """Hold a pool for the length of the block.

        Raises:
            CallError: ``not_found``, it is not open; ``timeout`` or ``cancelled``.
        """
        with self._state.locks.hold([("pool", pool_id)], op.deadline):
            pool = self._pools.get(pool_id)
            if pool is None:
                text = f"there is no open pool {pool_id!r}"
                raise CallError("not_found", text, object=pool_id, hint="pool.open opens it")
            if pool.records.pending is not None:  # of a request that could not undo it
                pool.settle()
            try:
                yield pool
            except OSError:  # a look at the pool; what changes it is in steps of its own
                with op.step("look", pool_id, is_checked=False):
                    raise

    def keep(self, pool: Pool) -> None:
        """Write down what the next agent must know of an open pool."""
        entry = PoolEntry(
            spec=pool.spec, is_new=False, is_open=True, mounts=tuple(pool.mounts.values())
        )
        self._state.journal.write_part(PART, pool.pool_id, entry)

    # --- open

    def open(self, spec: PoolOpen, op: Transaction) -> PoolReport:
        """Open a pool, or say that just this one is open already.

        Raises:
            CallError: ``conflict``, a disk is in use or holds something else; ``integrity``, the
                metadata is damaged; nothing is left behind.
        """
        with self._state.locks.hold([("pool", spec.pool_id)], op.deadline):
            there = self._pools.get(spec.pool_id)
            if there is not None:
                _refuse_other(spec.replace(adopt=there.spec.adopt), there.spec)
                return self.report(there, already=True)
            pool = Pool(self._state, spec)
            with op:
                self._open(pool, op)
                with op.step("read back", pool.name):
                    report = self.report(pool, op)
                with op.step("commit", pool.name, code="resource"):
                    self.keep(pool)
                op.commit()
            self._pools[spec.pool_id] = pool
        self.on_change()
        self._state.events.publish("pool_opened", pool_id=spec.pool_id, traceparent=op.traceparent)
        return report

    def _open(self, pool: Pool, op: Transaction) -> None:
        spec = pool.spec
        self._claim(pool, op)
        with op.step("thin-metadata", self._metadata_disk(pool).node):
            found = pool.superblock()
            self._refuse_metadata(pool, found)
            if found is None:
                for disk in pool.data_disks[:1]:
                    _refuse_content(disk)
        pool.is_new = found is None
        pool.table = self._plan(pool, found)
        with op.step("journal", spec.pool_id, code="resource"):
            entry = PoolEntry(spec=spec, is_new=pool.is_new)
            self._state.journal.write_part(PART, spec.pool_id, entry)
        op.on_rollback(
            "what was begun",
            lambda: self._state.journal.remove_part(PART, spec.pool_id),
            is_record=True,
        )
        if pool.is_new:
            op.on_rollback(
                "metadata", lambda: _unmake(self._metadata_disk(pool), pool.data_disks[0])
            )
        with op.step("thin-data", pool.data_name):
            pool.create(
                pool.data_name, linear_targets(pool.data_disks, _sizes(pool.data_disks)), op
            )
        with op.step("thin-pool", pool.name):
            self._create_pool(pool, op)
        self._bring_records_up(pool, found, op)

    def _claim(self, pool: Pool, op: Transaction) -> None:
        """Find the disks, and have them for the pool alone."""
        spec = pool.spec
        owner = ("pool-metadata", spec.pool_id)
        pool.metadata_disk = self._claim_disk(spec.metadata_device, owner, op)
        pool.data_disks = tuple(
            self._claim_disk(device, (f"pool-{number}", spec.pool_id), op)
            for number, device in enumerate(spec.data_devices)
        )
        if pool.metadata_disk.size_bytes < _METADATA_BYTES_MIN:
            raise _too_small(pool.metadata_disk, _METADATA_BYTES_MIN)

    def _claim_disk(self, device: Device, owner: tuple[str, str], op: Transaction) -> BlockDevice:
        with op.step("device", blockdev.describe(device)):
            disk = blockdev.wait_for(device, op.deadline)
        with op.step("claim", disk.node):
            if disk.readonly:
                raise CallError("invalid", f"{disk.node} is read-only", object=disk.node)
            layers = self._state.inventory.layers_on(disk.dev)
            if layers:
                text = f"{disk.node} holds layer {layers[0]!r}"
                raise CallError("conflict", text, object=disk.node)
            self._state.inventory.reserve_scratch(owner, disk.dev)
            op.on_rollback(f"claim of {disk.node}", lambda: self._state.inventory.release(owner))
            try:
                blockdev.wait_unused(disk.node, op.deadline)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise busy_error(disk.node, disk.dev, op) from error
        return disk

    def _refuse_metadata(self, pool: Pool, found: Superblock | None) -> None:
        """Judge what is on the metadata device, before the kernel writes to it."""
        spec, disk = pool.spec, self._metadata_disk(pool)
        if found is None:
            return
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
        wanted, there = found.data_blocks * block_bytes, sum(_sizes(pool.data_disks))
        if there < wanted:
            raise CallError(
                "conflict",
                f"the data devices of pool {spec.pool_id!r} have {there} bytes, it has {wanted}",
                object=pool.data_disks[-1].node,
                hint="name all data devices of the pool, in the order that it was grown by them",
            )

    def _plan(self, pool: Pool, found: Superblock | None) -> PoolTable:
        """Decide the table: an adopted pool keeps its blocks and its length."""
        spec = pool.spec
        if found is None:
            block_bytes = spec.block_size_bytes or BLOCK_BYTES_MIN
            blocks = sum(_sizes(pool.data_disks)) // block_bytes
            if blocks < _DATA_BLOCKS_MIN:
                raise _too_small(pool.data_disks[0], _DATA_BLOCKS_MIN * block_bytes)
        else:
            block_bytes, blocks = found.data_block_sectors * SECTOR_BYTES, found.data_blocks
            if not blocks:
                text = f"the metadata of pool {spec.pool_id!r} has no data blocks"
                raise CallError("integrity", text, object=spec.pool_id)
        block_sectors = block_bytes // SECTOR_BYTES
        low_water = blocks // _LOW_WATER_PART
        if spec.low_water_bytes is not None:
            low_water = -(-spec.low_water_bytes // block_bytes)
        return PoolTable(
            metadata_device=self._metadata_disk(pool).dev,
            data_device="0:0",  # not made yet
            length_sectors=blocks * block_sectors,
            block_sectors=block_sectors,
            low_water_blocks=low_water,
            options=("error_if_no_space",) if spec.on_full == "error" else (),
        )

    def _create_pool(self, pool: Pool, op: Transaction) -> None:
        assert pool.table is not None
        data = self._state.control.info(pool.data_name).dev
        pool.table = pool.table.replace(data_device=data)
        pool.create(pool.name, (pool.table.target(),), op)

    def _bring_records_up(self, pool: Pool, found: Superblock | None, op: Transaction) -> None:
        spec = pool.spec
        with op.step("thin-records", pool.name):
            seen = pool.see()
            if seen is None:
                text = f"pool {spec.pool_id!r} does not show its thin devices"
                raise CallError("device", text, object=spec.pool_id)
            ids, is_recorded = set(seen.devices), False
            if RECORDS_ID in ids:
                pool.activate_records(op)
                is_recorded = pool.read()
            if is_recorded:
                self._adopt(pool)
                return
            if found is not None and (found.transaction_id or ids - {RECORDS_ID}):
                raise CallError(
                    "conflict",
                    f"the pool on {self._metadata_disk(pool).node} is not empty and holds no "
                    f"records: {len(ids - {RECORDS_ID})} thin devices, transaction id "
                    f"{found.transaction_id}",
                    object=spec.pool_id,
                    hint="another program made it; a new pool needs blank metadata",
                )
            if RECORDS_ID not in ids:
                pool.message(thin.create_thin(RECORDS_ID))
                if not pool.is_new:
                    op.on_rollback("records", lambda: pool.delete_id(RECORDS_ID))
                pool.activate_records(op)
            sizes = _sizes(pool.data_disks)
            pool.write(
                PoolRecords(
                    pool_id=spec.pool_id, transaction_id=0, next_device_id=1, data_bytes=sizes
                )
            )
            pool.note_foreign(ids)

    def _adopt(self, pool: Pool) -> None:
        """Go on with the volumes that the records tell of."""
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
        sizes = _sizes(pool.data_disks)
        known = there.data_bytes
        last = len(known) - 1
        if len(sizes) < len(known) or sizes[:last] != known[:last] or sizes[last] < known[last]:
            raise CallError(
                "conflict",
                f"the data devices of pool {spec.pool_id!r} have {list(sizes)} bytes, "
                f"recorded are {list(known)}",
                object=spec.pool_id,
                hint="name them in the order that the pool was grown by them",
            )
        pool.settle()
        seen = pool.see()  # anew: a volume that was half made is gone
        pool.note_foreign(set() if seen is None else set(seen.devices))

    def _metadata_disk(self, pool: Pool) -> BlockDevice:
        assert pool.metadata_disk is not None
        return pool.metadata_disk

    # --- an agent that starts

    def recover(self) -> None:
        """Go on with the pools of an earlier agent, and undo what it was in the middle of.

        What cannot be undone is told in the status.
        """

        def recover(entry: PoolEntry) -> None:
            with undo_deadline(self._state) as deadline, Transaction(deadline) as op:
                self._recover(entry, op)
                op.commit()

        recover_part(
            self._state, PART, PoolEntry, lambda entry: f"pool {entry.spec.pool_id}", recover
        )

    def _recover(self, entry: PoolEntry, op: Transaction) -> None:
        spec, control = entry.spec, self._state.control
        names = self._devices_of(spec.pool_id)
        for name in reversed(names):  # a snapshot may have been cut short
            if control.info(name).suspended:
                control.resume(name)
        pool = Pool(self._state, spec)
        if not entry.is_open or pool.name not in names:
            self._undo_open(pool, entry, names, op)
            return
        self._find_disks(pool)
        is_mounted = {mounted.volume_id: mounted for mounted in entry.mounts}
        if not pool.active(RECORDS_ID):
            pool.activate_records(op)
        if not pool.read():
            text = f"the records of pool {spec.pool_id!r} cannot be read"
            raise CallError("integrity", text, object=spec.pool_id)
        used = {
            pool.device_name(volume.device_id)
            for volume in pool.records.volumes
            if volume.volume_id in is_mounted
        }
        kept = {pool.name, pool.data_name, pool.device_name(RECORDS_ID)} | used
        for name in names:
            if name not in kept:
                pool.remove(name)
        pool.settle()
        if pool.records.data_bytes != _sizes(pool.data_disks):
            pool.write(pool.records.replace(data_bytes=_sizes(pool.data_disks)))
        seen = pool.see()
        pool.note_foreign(set() if seen is None else set(seen.devices))
        for mounted in entry.mounts:
            self._recover_mount(pool, mounted, op)
        self._pools[spec.pool_id] = pool
        self.keep(pool)

    def _undo_open(
        self, pool: Pool, entry: PoolEntry, names: tuple[str, ...], op: Transaction
    ) -> None:
        remove_devices(self._state, names, op)
        if entry.is_new and not entry.is_open:
            metadata = blockdev.find(entry.spec.metadata_device)
            data = blockdev.find(entry.spec.data_device)
            if metadata is not None and data is not None:
                _unmake(metadata, data)
        self._forget(pool.pool_id)

    def _find_disks(self, pool: Pool) -> None:
        """Learn from the live tables which disks the pool has, and reserve them."""
        control, inventory = self._state.control, self._state.inventory
        pool.table = thin.parse_pool(control.table(pool.name)[0])
        pool.metadata_disk = blockdev.inspect(pool.table.metadata_device)
        data = control.table(pool.data_name)
        pool.data_disks = tuple(blockdev.inspect(target.params.split()[0]) for target in data)
        # what was to be appended when the agent was killed is not
        more = pool.spec.more_data_devices[: len(pool.data_disks) - 1]
        pool.spec = pool.spec.replace(more_data_devices=more)
        inventory.reserve_scratch(("pool-metadata", pool.pool_id), pool.metadata_disk.dev)
        for number, disk in enumerate(pool.data_disks):
            inventory.reserve_scratch((f"pool-{number}", pool.pool_id), disk.dev)

    def _recover_mount(self, pool: Pool, mounted: Mounted, op: Transaction) -> None:
        """Adopt the mount of a volume, or take away what there is of it."""
        volume = pool.records.volume(mounted.volume_id)
        info = None if volume is None else pool.active(volume.device_id)
        own = [] if info is None else [info]
        if info is not None and mounted.encrypted:
            uuid = dm_uuid("crypt", info.dev, self._state.uuid_prefix)
            crypt = self._state.control.find(uuid=uuid)
            own = [info] if crypt is None else [crypt, info]
        mount = find_mount(mounted.path)
        if own and mount is not None and mount.dev == own[0].dev:
            if mounted.mount_id:
                if not mounted.path.startswith(self._state.directory + "/"):  # no scratch
                    reservation = Reservation(target=mounted.path, directories=mounted.created)
                    owner = mounted_owner(pool, mounted.volume_id)
                    self._state.inventory.adopt(owner, reservation)
                found = mounted.replace(dev=mount.dev, mount_id=mount.mount_id)
                pool.mounts[mounted.volume_id] = found
                return
            unmount_target(mounted.path, op, dev=mount.dev)
        for device in own:
            pool.remove(device.name)
        remove_directories(mounted.created)

    # --- close

    def close(self, request: PoolClose, op: Transaction) -> PoolCloseReply:
        """Take the devices of a pool away; its disks keep everything.

        Raises:
            CallError: ``busy``, volumes are mounted or in use.
        """
        pool_id = request.pool_id
        with self._state.locks.hold([("pool", pool_id)], op.deadline):
            pool = self._pools.get(pool_id)
            if pool is not None:
                _refuse_mounted(pool)
            names = self._devices_of(pool_id)
            remove_devices(self._state, names, op)
            with op.step("commit", pool_id):
                self._forget(pool_id)
        if pool is not None:
            self._state.events.publish("pool_closed", pool_id=pool_id, traceparent=op.traceparent)
        return PoolCloseReply(
            removed_devices=names,
            already=pool is None and not names,
            timings_ms=op.timings_ms,
        )

    def _forget(self, pool_id: str) -> None:
        self._pools.pop(pool_id, None)
        self._state.journal.remove_part(PART, pool_id)
        for kind in ("metadata", *range(MAX_DATA_DEVICES)):
            self._state.inventory.release((f"pool-{kind}", pool_id))
        self._state.inventory.settle_problem(f"pool {pool_id}")

    def _devices_of(self, pool_id: str) -> tuple[str, ...]:
        """Return the dm devices of a pool, those that stand on others first."""
        uuid = f"{uuid_prefix(self._state)}{pool_id}-"
        last = {f"thin-{pool_id}-pool": 1, f"thin-{pool_id}-data": 2}
        names = [
            name
            for name, _, found in self._state.control.list_devices()
            if found.startswith(uuid) and name.startswith(f"thin-{pool_id}-")
            if name in last or name.rpartition("-")[2].isdigit()
            if found == uuid + name.removeprefix(f"thin-{pool_id}-")
        ]
        return tuple(sorted(names, key=lambda name: (last.get(name, 0), name)))

    # --- grow

    def grow(self, request: PoolGrow, op: Transaction) -> PoolReport:
        """Take up what the disks have grown by, and append a disk.

        Everything that can be refused is refused before the live pool is touched: a pool whose
        resume fails stays suspended, and with it all that is written to it.

        Raises:
            CallError: ``conflict``, a disk has shrunk, or the new one is in use or has content.
        """
        with self.use(request.pool_id, op) as pool:
            assert pool.table is not None
            before = pool.data_disks
            with op:
                after, spec = self._disks_after(pool, request, op)
                former, table = pool.table, self._table_after(pool, after)
                already = after == before and table == former and self._metadata_fits(pool)
                if not already:
                    self._extend(pool, spec, after, table, op)
                op.commit()
            log.info("pool grown", pool=pool.pool_id, sectors=table.length_sectors)
            return self.report(pool, op, already=already)

    def _disks_after(
        self, pool: Pool, request: PoolGrow, op: Transaction
    ) -> tuple[tuple[BlockDevice, ...], PoolOpen]:
        """Look at the disks anew; return the data disks that the pool is to have."""
        with op.step("device", pool.name):
            metadata = blockdev.inspect(self._metadata_disk(pool).dev)
            needed = pool.status().total_metadata_blocks * thin.METADATA_BLOCK_BYTES
            if metadata.size_bytes < needed:
                raise _shrunk(metadata, needed)
            now = tuple(blockdev.inspect(disk.dev) for disk in pool.data_disks)
            for disk, was in zip(now, pool.data_disks, strict=True):
                if disk.size_bytes < was.size_bytes:
                    raise _shrunk(disk, was.size_bytes)
            # what lies behind a disk that is not the last is not its own
            after = (*pool.data_disks[:-1], now[-1])
        spec, device = pool.spec, request.data_device
        if device is None or device in spec.data_devices:  # appended by a request cut short
            return after, spec
        if len(after) == MAX_DATA_DEVICES:
            text = f"pool {pool.pool_id!r} has {MAX_DATA_DEVICES} data devices"
            raise CallError("resource", text, object=pool.pool_id)
        disk = self._claim_disk(device, (f"pool-{len(after)}", pool.pool_id), op)
        with op.step("claim", disk.node):
            _refuse_content(disk)
        more = (*spec.more_data_devices, device)
        return (*after, disk), spec.replace(more_data_devices=more)

    def _table_after(self, pool: Pool, disks: tuple[BlockDevice, ...]) -> PoolTable:
        assert pool.table is not None
        block_sectors = pool.table.block_sectors
        blocks = sum(_sizes(disks)) // (block_sectors * SECTOR_BYTES)
        return pool.table.replace(length_sectors=blocks * block_sectors)

    def _metadata_fits(self, pool: Pool) -> bool:
        """Return whether the pool uses all of its metadata disk, as far as dm-thin can."""
        disk = blockdev.inspect(self._metadata_disk(pool).dev)
        most = min(disk.size_bytes, _METADATA_BYTES_MAX) // thin.METADATA_BLOCK_BYTES
        return pool.status().total_metadata_blocks >= most

    def _extend(
        self,
        pool: Pool,
        spec: PoolOpen,
        disks: tuple[BlockDevice, ...],
        table: PoolTable,
        op: Transaction,
    ) -> None:
        assert pool.table is not None
        before = pool.spec, pool.data_disks, pool.table, pool.records
        former, data_before = pool.table.target(), self._data_targets(pool)

        def restore() -> None:
            pool.spec, pool.data_disks, pool.table, _ = before
            self.keep(pool)

        op.on_rollback("the disks of the pool", restore, is_record=True)
        pool.spec, pool.data_disks = spec, disks
        with op.step("journal", pool.pool_id, code="resource"):
            self.keep(pool)
        with op.step("thin-record", pool.pool_id):
            pool.write(before[3].replace(data_bytes=_sizes(disks)))
        op.on_rollback("records", lambda: pool.write(before[3]), is_record=True)
        with op.step("thin-data", pool.data_name):
            pool.reload(pool.data_name, linear_targets(disks, _sizes(disks)), data_before)
        op.on_rollback("data device", lambda: pool.reload(pool.data_name, data_before, data_before))
        with op.step("thin-pool", pool.name):
            pool.reload(pool.name, (table.target(),), (former,))
        pool.table = table

    def _data_targets(self, pool: Pool) -> tuple[Target, ...]:
        return self._state.control.table(pool.data_name)

    # --- look

    def report(
        self, pool: Pool, op: Transaction | None = None, *, already: bool = False
    ) -> PoolReport:
        """Describe a pool as the kernel has it now."""
        assert pool.table is not None
        try:
            status = pool.status()
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            status = thin.PoolStatus(mode="gone")
        block_bytes = pool.table.block_sectors * SECTOR_BYTES
        metadata_bytes = thin.METADATA_BLOCK_BYTES
        volumes = pool.records.volumes
        return PoolReport(
            pool_id=pool.pool_id,
            mode=status.mode,
            transaction_id=status.transaction_id,
            data=SpaceUsed(
                used_bytes=status.used_data_blocks * block_bytes,
                total_bytes=status.total_data_blocks * block_bytes,
            ),
            metadata=SpaceUsed(
                used_bytes=status.used_metadata_blocks * metadata_bytes,
                total_bytes=status.total_metadata_blocks * metadata_bytes,
            ),
            block_size_bytes=block_bytes,
            low_water_bytes=pool.table.low_water_blocks * block_bytes,
            on_full="error" if pool.table.error_if_full else "queue",
            needs_check=status.needs_check,
            discard_passdown=status.discard_passdown,
            devices=(self._metadata_disk(pool).node, *(disk.node for disk in pool.data_disks)),
            volumes=sum(not volume.deleted for volume in volumes),
            deleting=tuple(volume.volume_id for volume in volumes if volume.deleted),
            foreign_ids=tuple(sorted(pool.foreign)[:_LISTED_IDS]),
            created=pool.is_new and not already,
            already=already,
            timings_ms={} if op is None else op.timings_ms,
        )

    def status(self, pool_id: str, op: Transaction) -> PoolReport:
        """Describe a pool, with the thin devices in it that are foreign now."""
        with self.use(pool_id, op) as pool:
            seen = pool.see() if pool.is_live() else None
            if seen is not None:
                pool.note_foreign(set(seen.devices))
            return self.report(pool)

    def list(self) -> tuple[PoolReport, ...]:
        """Describe all pools."""
        return tuple(self.report(pool) for pool in self.all())


def _sizes(disks: tuple[BlockDevice, ...]) -> tuple[int, ...]:
    """Return how much of each data disk is used: whole blocks of 4 KiB."""
    return tuple(disk.size_bytes // _ALIGNED_BYTES * _ALIGNED_BYTES for disk in disks)


def _shrunk(disk: BlockDevice, had: int) -> CallError:
    text = f"{disk.node} has shrunk from {had} to {disk.size_bytes} bytes"
    return CallError("conflict", text, object=disk.node, hint="nothing was changed")


def _refuse_other(wanted: PoolOpen, has: PoolOpen) -> None:
    asked, there = wanted.as_dict(), has.as_dict()
    differing = [field for field in asked if asked[field] != there[field]]
    if differing:
        raise CallError(
            "conflict",
            f"pool {wanted.pool_id!r} is open with another {', '.join(differing)}",
            step="claim",
            object=wanted.pool_id,
            hint="close it first, or use another pool_id",
        )


def _refuse_mounted(pool: Pool) -> None:
    held = [f"{m.volume_id} at {m.path} by {', '.join(m.holders)}" for m in pool.mounts.values()]
    if held:
        raise CallError(
            "busy",
            f"{len(held)} volumes of pool {pool.pool_id!r} are mounted",
            errno=errno.EBUSY,
            object=pool.pool_id,
            hint=f"mounted: {'; '.join(held[:16])}",
        )


def _too_small(disk: BlockDevice, least: int) -> CallError:
    text = f"{disk.node} has {disk.size_bytes} bytes, at least {least} are needed"
    return CallError("invalid", text, object=disk.node)


def _refuse_content(disk: BlockDevice) -> None:
    """Refuse a data disk that is not blank at its start, as a scratch device is refused."""
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
    fd = os.open(disk.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, _HEAD_BYTES, 0)
    finally:
        os.close(fd)


def _unmake(metadata: BlockDevice, data: BlockDevice) -> None:
    """Clear what makes two disks a pool that were blank before."""
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
