"""The records of a pool: its volumes, kept on its own data disk for a later machine.

The thin device 0 of a pool holds two slots. The records are written whole, into each slot in turn,
with a sequence number and a checksum: whenever the machine ends, one slot is whole.
"""

import binascii
import os
import struct

import msgpack

from guestagent.api.checks import MAX_BYTES, check_choice, check_range, check_word
from guestagent.api.devices import SECTOR_BYTES, Device
from guestagent.api.overlays import SCRATCH_FILESYSTEMS
from guestagent.storage import blockdev
from guestagent.storage.devicemapper.thin import DEVICE_ID_MAX
from vsock.errors import CallError
from vsock.record import Record, wire_fields

__all__ = (
    "RECORDS_BYTES",
    "RECORDS_ID",
    "Pending",
    "PoolRecords",
    "VolumeRecord",
    "decode_slot",
    "encode_slot",
    "is_slot",
    "read_records",
    "write_records",
)

#: The thin device that the records are on, and its size.
RECORDS_ID, RECORDS_BYTES = 0, 8 * 1024 * 1024
_SLOT_BYTES = RECORDS_BYTES // 2
#: Magic, version, length of the payload, sequence number, CRC-32 of all others and the payload.
_HEAD = struct.Struct("<16sIIQI")
_MAGIC, _VERSION = b"guestagent-pool\n", 1
_ALIGNED_BYTES = 4096
#: What is written is longer than it must be by this: a deletion writes a little more at first, and
#: must not need a new block of a pool that is full.
_SLACK_BYTES = 4096
PENDING_KINDS = ("create", "delete", "change")


class VolumeRecord(Record):
    """A volume. ``transaction_id`` is that of the pool when it was made."""

    volume_id: str
    device_id: int
    size_bytes: int
    transaction_id: int
    filesystem: str | None
    origin: str | None = None
    external_origin: Device | None = None
    deleted: bool = False

    def check(self) -> None:
        check_word("volume_id", self.volume_id)
        check_range("device_id", self.device_id, 0, DEVICE_ID_MAX)
        check_range("size_bytes", self.size_bytes, SECTOR_BYTES, MAX_BYTES)
        check_choice("filesystem", self.filesystem, SCRATCH_FILESYSTEMS)
        if self.size_bytes % SECTOR_BYTES:
            raise ValueError(f"size_bytes {self.size_bytes} is not a multiple of {SECTOR_BYTES}")


class Pending(Record):
    """A change that is not committed before the pool has ``transaction_id``.

    ``kind`` is create (of ``volume``), delete (of ``volume``) or change (``volume`` is as before).
    """

    kind: str
    transaction_id: int
    volume: VolumeRecord

    def check(self) -> None:
        check_choice("kind", self.kind, PENDING_KINDS)
        check_range("transaction_id", self.transaction_id, 1, MAX_BYTES)
        check_range("device_id", self.volume.device_id, RECORDS_ID + 1, DEVICE_ID_MAX)


class PoolRecords(Record):
    """All that is recorded of a pool. ``data_bytes`` are the sizes of its data disks in order."""

    pool_id: str
    transaction_id: int
    next_device_id: int
    data_bytes: tuple[int, ...]
    volumes: tuple[VolumeRecord, ...] = ()
    pending: Pending | None = None

    def check(self) -> None:
        check_range("transaction_id", self.transaction_id, 0, MAX_BYTES)
        check_range("next_device_id", self.next_device_id, 1, DEVICE_ID_MAX + 1)
        ids = {each.device_id for each in self.volumes}
        if len(ids) < len(self.volumes) or RECORDS_ID in ids:
            raise ValueError("volumes: two have the same device id, or one that of the records")
        if len({each.volume_id for each in self.volumes}) < len(self.volumes):
            raise ValueError("volumes: two have the same volume_id")
        if not self.data_bytes:
            raise ValueError("data_bytes is empty")

    def volume(self, volume_id: str) -> VolumeRecord | None:
        return next((each for each in self.volumes if each.volume_id == volume_id), None)

    def with_volume(self, volume: VolumeRecord) -> "PoolRecords":
        """Return the records with a volume added, or replaced."""
        return self.replace(volumes=(*self.without(volume.volume_id).volumes, volume))

    def without(self, volume_id: str) -> "PoolRecords":
        left = tuple(each for each in self.volumes if each.volume_id != volume_id)
        return self.replace(volumes=left)


def encode_slot(records: PoolRecords, sequence: int) -> bytes:
    """Return what is written into a slot.

    Raises:
        CallError: ``resource``, the records are too long for it.
    """
    payload: bytes = msgpack.packb(records, default=wire_fields)
    if _HEAD.size + len(payload) + _SLACK_BYTES > _SLOT_BYTES:
        raise CallError(
            "resource",
            f"the records of {len(records.volumes)} volumes are over {_SLOT_BYTES} bytes",
            object=records.pool_id,
            hint="delete volumes, or use another pool",
        )
    bare = _HEAD.pack(_MAGIC, _VERSION, len(payload), sequence, 0)
    crc = binascii.crc32(bare + payload)
    slot = _HEAD.pack(_MAGIC, _VERSION, len(payload), sequence, crc) + payload
    size = -(-(len(slot) + _SLACK_BYTES) // _ALIGNED_BYTES) * _ALIGNED_BYTES
    return slot.ljust(size, b"\0")


def decode_slot(slot: bytes) -> tuple[int, PoolRecords] | None:
    """Return (sequence number, records); None where the slot is not whole.

    Raises:
        CallError: ``unsupported``, they are of another version; ``integrity``, they are malformed.
    """
    if len(slot) < _HEAD.size:
        return None
    magic, version, length, sequence, crc = _HEAD.unpack_from(slot)
    payload = slot[_HEAD.size : _HEAD.size + length]
    if magic != _MAGIC or len(payload) < length:
        return None
    if crc != binascii.crc32(_HEAD.pack(magic, version, length, sequence, 0) + payload):
        return None
    if version != _VERSION:
        raise CallError("unsupported", f"the records of the pool have version {version}")
    try:
        return sequence, PoolRecords.from_wire(msgpack.unpackb(payload), "records")
    except (ValueError, CallError, msgpack.UnpackException) as error:
        raise CallError("integrity", f"the records of the pool are malformed: {error}") from None


def is_slot(head: bytes) -> bool:
    """Return whether a disk begins as a slot does: most data disks of pools do."""
    return head.startswith(_MAGIC)


def read_records(node: str) -> tuple[int, PoolRecords] | None:
    """Read the newest records that are whole; None where there are none.

    Raises:
        CallError: as ``decode_slot``.
    """
    slots = [_read_slot(node, number * _SLOT_BYTES) for number in (0, 1)]
    found = [records for records in map(decode_slot, slots) if records is not None]
    return max(found, key=lambda each: each[0], default=None)


def _read_slot(node: str, offset_bytes: int) -> bytes:
    head = blockdev.read(node, offset_bytes, _ALIGNED_BYTES)
    length = _HEAD.unpack_from(head)[2] if len(head) >= _HEAD.size else 0
    if head.startswith(_MAGIC) and _HEAD.size + length <= _SLOT_BYTES:
        return blockdev.read(node, offset_bytes, _HEAD.size + length)
    return head


def write_records(node: str, records: PoolRecords, sequence: int) -> None:
    """Write records into the slot of their number, through to the disk.

    Raises:
        CallError: as ``encode_slot``.
    """
    slot = encode_slot(records, sequence)
    fd = os.open(node, os.O_WRONLY | os.O_CLOEXEC)
    try:
        done = os.pwrite(fd, slot, sequence % 2 * _SLOT_BYTES)
        if done < len(slot):
            raise OSError(5, f"wrote {done} of {len(slot)} bytes", node)
        os.fsync(fd)
    finally:
        os.close(fd)
