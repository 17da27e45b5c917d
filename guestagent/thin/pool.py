"""One open pool: its disks, its dm devices, its records, and the mounts of its volumes.

The data disks of a pool are joined by a linear device, so that the pool can grow by another disk.
A pool is used by one request at a time, which holds the lock of the pool.
"""

import errno
from collections.abc import Iterable, Mapping

from guestagent.api.devices import SECTOR_BYTES
from guestagent.api.thin import PoolOpen
from guestagent.engine.claims import Owner
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import remove_directories, undo_deadline
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.devicemapper import devices, thin
from guestagent.storage.devicemapper.control import DeviceInfo
from guestagent.storage.devicemapper.targets import Target, linear_target
from guestagent.storage.devicemapper.thin import PoolTable, ThinTable
from guestagent.thin import metadata, records
from guestagent.thin.metadata import DeviceDetails, Superblock
from guestagent.thin.records import RECORDS_BYTES, RECORDS_ID, PoolRecords, VolumeRecord
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("PART", "Disks", "Mounted", "Pool", "PoolEntry", "Seen", "dm_name", "uuid_prefix")

#: The name of this part in the journal.
PART = "pool"
_ALIGNED_BYTES = 4096
_EXPLAINED = {
    errno.EEXIST: "conflict",
    errno.ENODATA: "not_found",
    errno.EOPNOTSUPP: "resource",  # the pool is read-only, or has no metadata left
}


class Disks(Record):
    """The disks of a pool; the data disks in the order that the pool was grown by them."""

    metadata: BlockDevice
    data: tuple[BlockDevice, ...]

    @property
    def data_bytes(self) -> tuple[int, ...]:
        """How much of each data disk is used: whole blocks of 4 KiB."""
        return tuple(disk.size_bytes // _ALIGNED_BYTES * _ALIGNED_BYTES for disk in self.data)

    def data_targets(self) -> tuple[Target, ...]:
        """Return the table that joins the data disks."""
        start_bytes, targets = 0, []
        for disk, size in zip(self.data, self.data_bytes, strict=True):
            target = linear_target(length_bytes=size, device=disk.dev, start_bytes=start_bytes)
            targets.append(target)
            start_bytes += size
        return tuple(targets)

    def read_block(self, number: int) -> bytes:
        """Read a block of the metadata disk.

        Raises:
            CallError: ``integrity``, there is no such block.
        """
        size = thin.METADATA_BLOCK_BYTES
        block = b""
        if number < 1 << 40:  # pread(2) takes offsets of 63 bits
            block = blockdev.read(self.metadata.node, number * size, size)
        if len(block) < size:
            raise CallError("integrity", f"the metadata names block {number}, which is not there")
        return block

    def superblock(self, number: int = 0) -> Superblock | None:
        """Read the superblock past the page cache, which dm-thin does not use; None: blank."""
        blockdev.flush(self.metadata.node)
        return metadata.parse_superblock(self.read_block(number))


class Mounted(Record):
    """A volume that is mounted, or about to be while ``mount_id`` is 0.

    ``dev`` is the number of its file system: that of the crypt device where it is ``encrypted``.
    """

    volume_id: str
    path: str
    holders: tuple[str, ...]
    created: tuple[str, ...]
    rootfs: bool
    flags: tuple[str, ...]
    dev: str = ""
    mount_id: int = 0
    encrypted: bool = False


class PoolEntry(Record):
    """The entry of a pool in the journal. ``is_new`` says that its metadata was blank before;
    ``is_open`` that the request which opened it was done."""

    spec: PoolOpen
    is_new: bool
    is_open: bool = False
    mounts: tuple[Mounted, ...] = ()


class Seen(Record):
    """The thin devices of a pool by id, and the last mapped block of each that was asked about."""

    devices: Mapping[int, DeviceDetails]
    highest: Mapping[int, int | None]


def uuid_prefix(state: EngineState) -> str:
    """Return the prefix of the uuids of dm devices of pools. It is not the prefix by which recovery
    knows the devices of layers."""
    return state.uuid_prefix.replace("guestagent", "guestagent.thin", 1)


def dm_name(pool_id: str, part: str | int) -> str:
    """Return the name of a dm device: ``pool``, ``data`` or the id of a thin device."""
    return f"thin-{pool_id}-{part}"


class Pool:
    """The pool of a specification. Holds no descriptor: the kernel keeps what is open."""

    def __init__(
        self,
        state: EngineState,
        spec: PoolOpen,
        disks: Disks,
        table: PoolTable,
        *,
        is_new: bool = False,
    ) -> None:
        self.state = state
        self.spec = spec
        self.disks = disks
        self.table = table
        self.is_new = is_new
        self.mounts: dict[str, Mounted] = {}
        #: The ids of thin devices that are not volumes of the agent.
        self.foreign: frozenset[int] = frozenset()
        #: The state that the last events told.
        self.last_mode = "rw"
        self.was_low = False
        self._records: PoolRecords | None = None
        self._sequence = 0
        self._has_looked = False

    @property
    def pool_id(self) -> str:
        return self.spec.pool_id

    @property
    def name(self) -> str:
        return dm_name(self.pool_id, "pool")

    @property
    def block_bytes(self) -> int:
        return self.table.block_sectors * SECTOR_BYTES

    def publish(self, kind: str, volume_id: str, op: Transaction) -> None:
        self.state.events.publish(
            kind, pool_id=self.pool_id, volume_id=volume_id, traceparent=op.traceparent
        )

    # --- dm devices

    def create(self, part: str | int, targets: tuple[Target, ...], op: Transaction) -> DeviceInfo:
        """Make a dm device of the pool, to be removed again if the request fails."""
        control, name = self.state.control, dm_name(self.pool_id, part)
        uuid = f"{uuid_prefix(self.state)}{self.pool_id}-{part}"
        try:
            info = devices.create_device(
                control, name=name, uuid=uuid, targets=targets, readonly=False
            )
        except OSError as error:
            kind = targets[0].target_type
            if error.errno == errno.EINVAL and kind not in control.list_versions():
                raise CallError(
                    "unsupported",
                    f"this kernel has no dm target {kind!r}",
                    errno=error.errno,
                    object=name,
                    hint="the module is dm_thin_pool; boot images have it as feature thin",
                ) from error
            raise
        op.on_rollback(f"dm device {name}", lambda: self.remove(name))
        return info

    def remove(self, name: str) -> None:
        """Remove a dm device of the pool. Idempotent."""
        with undo_deadline(self.state) as deadline:
            devices.remove_device(self.state.control, name, deadline)

    def activate(self, volume: VolumeRecord, op: Transaction) -> DeviceInfo:
        """Make the dm device of a volume, unless it is there."""
        found = self.active(volume.device_id)
        if found is not None:
            self.state.control.cancel_deferred_remove(found.name)
            return found
        origin = None
        if volume.external_origin is not None:
            origin = blockdev.wait_for(volume.external_origin, op.deadline).dev
        target = self._thin_target(volume.device_id, volume.size_bytes, origin)
        return self.create(volume.device_id, (target,), op)

    def active(self, device_id: int) -> DeviceInfo | None:
        """Return the dm device of a thin device, if there is one."""
        return self.state.control.find(name=dm_name(self.pool_id, device_id))

    def node_of(self, device_id: int) -> str:
        """Return the node of a thin device that is active."""
        return self.state.control.info(dm_name(self.pool_id, device_id)).node

    def _thin_target(self, device_id: int, size_bytes: int, origin: str | None) -> Target:
        return ThinTable(
            pool_device=self.state.control.info(self.name).dev,
            device_id=device_id,
            length_sectors=size_bytes // SECTOR_BYTES,
            origin_device=origin,
        ).target()

    def resize_active(self, device_id: int, size_bytes: int, former_bytes: int) -> None:
        """Give the dm device of a volume another size, or leave it as it is."""
        name = dm_name(self.pool_id, device_id)
        origin = thin.parse_thin(self.state.control.table(name)[0]).origin_device
        target, former = (
            self._thin_target(device_id, size, origin) for size in (size_bytes, former_bytes)
        )
        self.reload(name, (target,), (former,))

    def reload(self, name: str, targets: tuple[Target, ...], former: tuple[Target, ...]) -> None:
        """Replace a live table; where the kernel refuses the new one put the former back.

        A table that fails at its resume leaves the device suspended.
        """
        control = self.state.control
        control.load_table(name, targets, readonly=False)
        try:
            control.resume(name)
        except OSError:
            control.load_table(name, former, readonly=False)
            control.resume(name)
            raise

    # --- the pool in the kernel

    def status(self) -> thin.PoolStatus:
        """Ask the kernel for the status.

        Raises:
            OSError: ENXIO, the pool is gone.
        """
        text = self.state.control.status(self.name, flush=True)[0].status
        return thin.parse_pool_status(text)

    def message(self, text: str) -> None:
        """Send the pool a message.

        Raises:
            CallError: ``conflict``, the id is taken; ``not_found``, there is no thin device of
                that id; ``resource``, the pool is read-only or has no metadata left.
        """
        try:
            self.state.control.message(self.name, 0, text)
        except OSError as error:
            code = _EXPLAINED.get(error.errno or 0)
            if code is None:
                raise
            why = f"pool {self.pool_id!r} refuses {text!r}: {error.strerror}"
            raise CallError(code, why, errno=error.errno, object=self.pool_id) from error

    def see(self, wanted: Iterable[int] = ()) -> Seen | None:
        """Look at the thin devices of the live pool, in a snapshot of its metadata.

        ``wanted`` are those whose last mapped block is looked for. None where the pool cannot make
        a snapshot: it is read-only or failed, or another program has one.
        """
        control = self.state.control
        if not self._has_looked and self.status().held_root_block is not None:
            # of an agent that was killed while it looked: it would stay for ever
            control.message(self.name, 0, "release_metadata_snap")
        self._has_looked = True
        try:
            control.message(self.name, 0, "reserve_metadata_snap")
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO):
                return None
            raise
        try:
            held, read = self.status().held_root_block, self.disks.read_block
            copy = None if held is None else self.disks.superblock(held)
            if copy is None:
                return None
            return Seen(
                devices=metadata.devices_of(read, copy),
                highest={number: metadata.highest_block(read, copy, number) for number in wanted},
            )
        finally:
            control.message(self.name, 0, "release_metadata_snap")

    def note_foreign(self, ids: Iterable[int]) -> None:
        """Remember which thin devices of the pool are not volumes of the agent."""
        own = {volume.device_id for volume in self.records.volumes} | {RECORDS_ID}
        self.foreign = frozenset(ids) - own

    def find_foreign(self) -> None:
        """Look which thin devices of the pool are not volumes, as far as the pool can tell."""
        seen = self.see()
        if seen is not None:
            self.note_foreign(seen.devices)

    # --- records

    @property
    def records(self) -> PoolRecords:
        assert self._records is not None
        return self._records

    def record_of(self, volume_id: str) -> VolumeRecord:
        """Return the record of a volume.

        Raises:
            CallError: ``not_found``.
        """
        record = self.records.volume(volume_id)
        if record is None:
            text = f"there is no volume {volume_id!r} in pool {self.pool_id!r}"
            raise CallError("not_found", text, object=volume_id)
        return record

    def is_deleting(self) -> bool:
        return any(volume.deleted for volume in self.records.volumes)

    def activate_records(self, op: Transaction) -> None:
        """Make the dm device that the records are on."""
        self.create(RECORDS_ID, (self._thin_target(RECORDS_ID, RECORDS_BYTES, None),), op)

    def read(self) -> bool:
        """Read the records; return whether there are any."""
        found = records.read_records(self.node_of(RECORDS_ID))
        if found is not None:
            self._sequence, self._records = found
        return found is not None

    def write(self, after: PoolRecords) -> None:
        """Replace the records. A slot that could not be written is written again next time."""
        records.write_records(self.node_of(RECORDS_ID), after, self._sequence + 1)
        self._sequence += 1
        self._records = after

    def drop_pending(self) -> None:
        """Take the pending change, which is committed, out of the records in memory."""
        self._records = self.records.replace(pending=None)

    # --- mounts of volumes, which the journal has for the next agent

    def keep(self) -> None:
        """Write the entry of the open pool."""
        entry = PoolEntry(
            spec=self.spec, is_new=False, is_open=True, mounts=tuple(self.mounts.values())
        )
        self.state.journal.write_part(PART, self.pool_id, entry)

    def keep_mount(self, mounted: Mounted, op: Transaction) -> None:
        """Write down a mount; where that fails it is as it was."""
        before = dict(self.mounts)
        self.mounts[mounted.volume_id] = mounted
        try:
            with op.step("journal", mounted.volume_id, code="resource"):
                self.keep()
        except CallError:
            self.mounts = before
            raise

    def drop_mount(self, volume_id: str) -> None:
        self.mounts.pop(volume_id, None)
        self.keep()

    def forget_mount(self, mounted: Mounted) -> None:
        """Drop a mount that is gone, and the directories that were made for it."""
        volume_id, state = mounted.volume_id, self.state
        state.tidy(f"the journal of volume {volume_id}", self.drop_mount, volume_id)
        state.tidy(f"the directories of volume {volume_id}", remove_directories, mounted.created)
        state.inventory.release(self.mount_owner(volume_id))

    def mount_owner(self, volume_id: str) -> Owner:
        """Return the owner of the reservation of a mounted volume's target."""
        return ("volume", f"{self.pool_id}/{volume_id}")
