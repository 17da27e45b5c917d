"""One open pool: its dm devices, its messages, and changes that are whole or never were.

The data disks of a pool are joined by a linear device, so that the pool can grow by another one. A
pool is used by one request at a time, which holds the lock of the pool.
"""

import errno
import os
from functools import partial

from guestagent.api.devices import SECTOR_BYTES
from guestagent.api.thin import PoolOpen
from guestagent.engine.claims import Owner
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import undo_deadline
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.devicemapper import devices, thin
from guestagent.storage.devicemapper.control import DeviceInfo
from guestagent.storage.devicemapper.targets import Target, linear_target
from guestagent.storage.devicemapper.thin import PoolTable, ThinTable
from guestagent.thin import metadata, records
from guestagent.thin.metadata import DeviceDetails, Superblock
from guestagent.thin.records import RECORDS_BYTES, RECORDS_ID, Pending, PoolRecords, VolumeRecord
from vsock.errors import CallError
from vsock.record import Record

__all__ = (
    "Mounted",
    "Pool",
    "PoolEntry",
    "Seen",
    "linear_targets",
    "mounted_owner",
    "uuid_prefix",
)

#: How many ids that are taken by others are passed over for one new volume.
_ID_ATTEMPTS = 64
_EXPLAINED = {
    errno.EEXIST: "conflict",
    errno.ENODATA: "not_found",
    errno.EOPNOTSUPP: "resource",  # the pool is read-only, or has no metadata left
}


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
    """What the journal has of a pool. ``is_new`` says that its metadata was blank before;
    ``is_open`` that the request which opened it was done."""

    spec: PoolOpen
    is_new: bool
    is_open: bool = False
    mounts: tuple[Mounted, ...] = ()


class Seen(Record):
    """The thin devices of a pool by id, and the last mapped block of each that was asked about."""

    devices: dict[int, DeviceDetails]
    highest: dict[int, int | None]


def uuid_prefix(state: EngineState) -> str:
    """Return what the uuids of the agent's dm devices for pools begin with. They are none of those
    by which recovery knows a layer's."""
    return state.uuid_prefix.replace("guestagent", "guestagent.thin", 1)


def mounted_owner(pool: "Pool", volume_id: str) -> Owner:
    """Return what the target of a mounted volume is reserved for."""
    return ("volume", f"{pool.pool_id}/{volume_id}")


def linear_targets(disks: tuple[BlockDevice, ...], sizes: tuple[int, ...]) -> tuple[Target, ...]:
    """Return the table that joins so much of each disk."""
    start_bytes, targets = 0, []
    for disk, size in zip(disks, sizes, strict=True):
        target = linear_target(length_bytes=size, device=disk.dev, start_bytes=start_bytes)
        targets.append(target)
        start_bytes += size
    return tuple(targets)


class Pool:
    """The pool of a specification. Holds no descriptor: the kernel keeps what is open."""

    def __init__(self, state: EngineState, spec: PoolOpen) -> None:
        self.state = state
        self.spec = spec
        self.name = f"thin-{spec.pool_id}-pool"
        self.data_name = f"thin-{spec.pool_id}-data"
        self._uuid = f"{uuid_prefix(state)}{spec.pool_id}-"
        self.metadata_disk: BlockDevice | None = None
        self.data_disks: tuple[BlockDevice, ...] = ()
        self.table: PoolTable | None = None
        self.is_new = False
        self.mounts: dict[str, Mounted] = {}
        self.foreign: frozenset[int] = frozenset()
        #: What the kernel last said of it, as an event told.
        self.last_mode = "rw"
        self.was_low = False
        self._records: PoolRecords | None = None
        self._sequence = 0
        self._has_looked = False

    # --- names

    @property
    def pool_id(self) -> str:
        return self.spec.pool_id

    @property
    def records(self) -> PoolRecords:
        assert self._records is not None
        return self._records

    def device_name(self, device_id: int) -> str:
        """Return the name of the dm device of a thin device."""
        return f"thin-{self.pool_id}-{device_id}"

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

    # --- dm devices

    def create(self, name: str, targets: tuple[Target, ...], op: Transaction) -> DeviceInfo:
        """Make a dm device of the pool, to be removed again if the request fails."""
        control = self.state.control
        suffix = name.removeprefix(f"thin-{self.pool_id}-")
        uuid = self._uuid + suffix
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
        """Remove a dm device of the pool; gone already is fine."""
        with undo_deadline(self.state) as deadline:
            devices.remove_device(self.state.control, name, deadline)

    def activate(self, volume: VolumeRecord, op: Transaction) -> DeviceInfo:
        """Make the dm device of a volume, unless it is there."""
        name = self.device_name(volume.device_id)
        found = self.state.control.find(name=name)
        if found is not None:
            self.state.control.cancel_deferred_remove(name)
            return found
        origin = None
        if volume.external_origin is not None:
            origin = blockdev.wait_for(volume.external_origin, op.deadline).dev
        return self.create(name, (self._thin_target(volume, origin),), op)

    def _thin_target(self, volume: VolumeRecord, origin: str | None) -> Target:
        info = self.state.control.info(self.name)
        return ThinTable(
            pool_device=info.dev,
            device_id=volume.device_id,
            length_sectors=volume.size_bytes // SECTOR_BYTES,
            origin_device=origin,
        ).target()

    def active(self, device_id: int) -> DeviceInfo | None:
        """Return the dm device of a thin device, if there is one."""
        return self.state.control.find(name=self.device_name(device_id))

    def resize_active(self, before: VolumeRecord, after: VolumeRecord) -> None:
        """Give the dm device of a volume another size, or leave it as it is."""
        name = self.device_name(after.device_id)
        origin = thin.parse_thin(self.state.control.table(name)[0]).origin_device
        self.reload(name, (self._thin_target(after, origin),), (self._thin_target(before, origin),))

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

    def is_deleting(self) -> bool:
        """Return whether the deletion of a volume waits."""
        return any(volume.deleted for volume in self.records.volumes)

    def is_live(self) -> bool:
        """Return whether the kernel has the pool."""
        return self.state.control.exists(name=self.name)

    def status(self) -> thin.PoolStatus:
        """Ask the kernel how the pool is.

        Raises:
            OSError: ENXIO, it is gone.
        """
        text = self.state.control.status(self.name, flush=True)[0].status
        return thin.parse_pool_status(text)

    def message(self, text: str) -> None:
        """Send the pool a message.

        Raises:
            CallError: ``conflict``, the id is taken; ``not_found``, there is no thin device of
                that id; ``busy``; ``resource``, the pool is read-only or has no metadata left.
        """
        try:
            self.state.control.message(self.name, 0, text)
        except OSError as error:
            code = _EXPLAINED.get(error.errno or 0)
            if code is None:
                raise
            why = f"pool {self.pool_id!r} refuses {text!r}: {error.strerror}"
            raise CallError(code, why, errno=error.errno, object=self.pool_id) from error

    # --- what is on the metadata device

    def read_block(self, number: int) -> bytes:
        """Read a block of the metadata device, past the page cache, which the kernel does not use
        for it.

        Raises:
            CallError: ``integrity``, there is no such block.
        """
        assert self.metadata_disk is not None
        node, size = self.metadata_disk.node, thin.METADATA_BLOCK_BYTES
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            block = os.pread(fd, size, number * size) if number < 1 << 40 else b""
        finally:
            os.close(fd)
        if len(block) < size:
            raise CallError("integrity", f"the metadata names block {number}, which is not there")
        return block

    def superblock(self) -> Superblock | None:
        """Read the superblock while the pool is not live; None where the device is blank."""
        assert self.metadata_disk is not None
        blockdev.flush(self.metadata_disk.node)
        return metadata.parse_superblock(self.read_block(0))

    def see(self, wanted: tuple[int, ...] = ()) -> Seen | None:
        """Look at the thin devices of the live pool, in a snapshot of its metadata.

        ``wanted`` are those whose last mapped block is looked for. None where the pool cannot make
        a snapshot: it is read-only or failed, or another program has one.
        """
        assert self.metadata_disk is not None
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
            held = self.status().held_root_block
            blockdev.flush(self.metadata_disk.node)
            copy = None if held is None else metadata.parse_superblock(self.read_block(held))
            if copy is None:
                return None
            found = metadata.devices_of(self.read_block, copy)
            highest = {
                device_id: metadata.highest_block(self.read_block, copy, device_id)
                for device_id in wanted
            }
        finally:
            control.message(self.name, 0, "release_metadata_snap")
        return Seen(devices=found, highest=highest)

    def note_foreign(self, ids: "frozenset[int] | set[int]") -> None:
        """Remember the thin devices that are none of ours."""
        own = {volume.device_id for volume in self.records.volumes} | {RECORDS_ID}
        self.foreign = frozenset(ids) - own

    # --- records

    @property
    def _records_node(self) -> str:
        return self.state.control.info(self.device_name(RECORDS_ID)).node

    def activate_records(self, op: Transaction) -> None:
        """Make the dm device that the records are on."""
        self.create(
            self.device_name(RECORDS_ID),
            (
                ThinTable(
                    pool_device=self.state.control.info(self.name).dev,
                    device_id=RECORDS_ID,
                    length_sectors=RECORDS_BYTES // SECTOR_BYTES,
                ).target(),
            ),
            op,
        )

    def read(self) -> bool:
        """Read the records; return whether there are any."""
        found = records.read_records(self._records_node)
        if found is not None:
            self._sequence, self._records = found
        return found is not None

    def write(self, after: PoolRecords) -> None:
        """Replace the records. A slot that could not be written is written again next time."""
        records.write_records(self._records_node, after, self._sequence + 1)
        self._sequence += 1
        self._records = after

    # --- changes: begin, message, record, commit

    def begin(self, pending: Pending, op: Transaction) -> None:
        """Write down what is to be done, before it is."""
        before = self.records.replace(pending=None)
        with op.step("thin-begin", pending.volume.volume_id):
            self.write(before.replace(pending=pending))
        op.on_rollback("the records", lambda: self.write(before), is_record=True)

    def finish(self, after: PoolRecords, op: Transaction) -> None:
        """Write down what there is after a change, and move the pool's transaction id on."""
        pending = self.records.pending
        assert pending is not None
        volume_id = pending.volume.volume_id
        with op.step("thin-record", volume_id):
            self.write(after.replace(pending=pending, transaction_id=pending.transaction_id))
        with op.step("thin-commit", volume_id):
            old = pending.transaction_id - 1
            try:
                self.message(thin.set_transaction_id(old, pending.transaction_id))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise self._other_transaction(old, self.status().transaction_id) from error
            self._records = self.records.replace(pending=None)

    def make(self, volume: VolumeRecord, origin_id: int | None, op: Transaction) -> VolumeRecord:
        """Have the kernel make a thin device under a free id; return the volume with it.

        Ids that another program has taken meanwhile are passed over.
        """
        for _ in range(_ID_ATTEMPTS):
            transaction_id = self.records.transaction_id + 1
            device_id = self._free_id()
            volume = volume.replace(device_id=device_id, transaction_id=transaction_id)
            self.begin(Pending(kind="create", transaction_id=transaction_id, volume=volume), op)
            try:
                with op.step("thin-message", volume.volume_id):
                    if origin_id is None:
                        self.message(thin.create_thin(device_id))
                    else:
                        self.message(thin.create_snap(device_id, origin_id))
            except CallError as error:
                if error.errno != errno.EEXIST:
                    raise
                self.foreign |= {device_id}
                continue
            op.on_rollback(f"thin device {device_id}", partial(self.delete_id, device_id))
            return volume
        text = f"ids of pool {self.pool_id!r} are taken by another program"
        raise CallError("conflict", text, object=self.pool_id)

    def delete(self, volume: VolumeRecord, op: Transaction) -> None:
        """Delete a volume that is not active. Once the kernel has deleted it there is no way back:
        a failure after that is made good by ``settle``."""
        before = self.records
        transaction_id = before.transaction_id + 1
        pending = Pending(kind="delete", transaction_id=transaction_id, volume=volume)
        with op.child() as beginning:
            self.begin(pending, beginning)
            with beginning.step("thin-message", volume.volume_id):
                self.delete_id(volume.device_id)
            beginning.commit()
        op.on_rollback(f"deletion of volume {volume.volume_id}", self.settle)
        op.timings_ms.update(beginning.timings_ms)
        self.finish(before.without(volume.volume_id), op)

    def delete_id(self, device_id: int) -> None:
        """Have the kernel delete a thin device; gone already is fine."""
        try:
            self.message(thin.delete_thin(device_id))
        except CallError as error:
            if error.code != "not_found":
                raise

    def _free_id(self) -> int:
        """Return an id that no volume and no other program has, the next one first."""
        taken = {volume.device_id for volume in self.records.volumes} | self.foreign
        taken.add(RECORDS_ID)
        if len(taken) > thin.DEVICE_ID_MAX:
            text = f"all {thin.DEVICE_ID_MAX + 1} ids of pool {self.pool_id!r} are taken"
            raise CallError("resource", text, object=self.pool_id)
        device_id = self.records.next_device_id
        while device_id in taken or device_id > thin.DEVICE_ID_MAX:
            device_id = 1 if device_id >= thin.DEVICE_ID_MAX else device_id + 1
        return device_id

    def settle(self) -> None:
        """Undo, or finish, the change that an earlier agent or request was in.

        What was committed stands. A volume that was being made is deleted, one that was being
        deleted is deleted to the end, any other change is taken back.

        Raises:
            CallError: ``conflict``, the transaction id is not that of the records.
        """
        found, now = self.records, self.status().transaction_id
        pending = found.pending
        if pending is None or now == pending.transaction_id == found.transaction_id:
            if now != found.transaction_id:
                raise self._other_transaction(found.transaction_id, now)
            self._records = found.replace(pending=None)
            return
        if now != pending.transaction_id - 1:
            raise self._other_transaction(pending.transaction_id, now)
        settled = found.replace(pending=None, transaction_id=now)
        volume = pending.volume
        if pending.kind == "change":
            self.write(settled.with_volume(volume))
            return
        self.remove(self.device_name(volume.device_id))
        self.delete_id(volume.device_id)
        self.write(settled.without(volume.volume_id))

    def _other_transaction(self, recorded: int, found: int) -> CallError:
        return CallError(
            "conflict",
            f"pool {self.pool_id!r} has transaction id {found}, its records have {recorded}",
            object=self.pool_id,
            hint="another program has changed the pool; its metadata and data disks may be of "
            "different moments",
        )
