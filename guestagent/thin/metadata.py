"""The metadata of a pool as dm-thin keeps it on disk, read without the kernel. Pure.

It tells what a disk holds before the kernel writes to it, which thin devices a pool has, and how
much of each is mapped; no device is activated for that. Every number is bounded: the disk may
belong to another pool, be damaged, or hold no pool at all.

Source: drivers/md/dm-thin-metadata.c, persistent-data/dm-btree-internal.h,
persistent-data/dm-space-map-common.h (Linux 6.1).
"""

import struct
from collections.abc import Callable, Iterator

from guestagent.storage.devicemapper.thin import (
    BLOCK_SECTORS_MAX,
    BLOCK_SECTORS_MIN,
    DEVICE_ID_MAX,
    METADATA_BLOCK_BYTES,
)
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("DeviceDetails", "Superblock", "devices_of", "highest_block", "parse_superblock")

#: (block number) -> its 4 KiB.
ReadBlock = Callable[[int], bytes]

_SUPERBLOCK_MAGIC, _VERSION = 27022010, 2
_SUPERBLOCK_XOR, _NODE_XOR = 160774, 121107
_NEEDS_CHECK = 1
#: struct thin_disk_superblock: csum, flags, blocknr, uuid, magic, version, time, trans_id,
#: held_root, two space map roots, data_mapping_root, device_details_root, data_block_size.
_SUPERBLOCK = struct.Struct("<IIQ16sQIIQQ128s128sQQI")
#: struct disk_sm_root begins with nr_blocks.
_SPACE_MAP = struct.Struct("<Q")
#: struct node_header: csum, flags, blocknr, nr_entries, max_entries, value_size, padding.
_NODE = struct.Struct("<IIQIIII")
_INTERNAL = 1
#: struct disk_device_details: mapped_blocks, transaction_id, creation_time, snapshotted_time.
_DETAILS = struct.Struct("<QQII")
_ROOT = struct.Struct("<Q")
#: A tree of 2^24 devices has four levels; one of 2^60 blocks has nine.
_DEPTH_MAX = 16
_CRC32C = 0x82F63B78


class Superblock(Record):
    """The head of a pool's metadata. Sizes count blocks: of 4 KiB, and of the pool's own size."""

    transaction_id: int
    needs_check: bool
    data_block_sectors: int
    data_blocks: int
    metadata_blocks: int
    mapping_root: int
    details_root: int


class DeviceDetails(Record):
    """A thin device; ``transaction_id`` is that of the pool when it was made."""

    mapped_blocks: int
    transaction_id: int


def parse_superblock(block: bytes) -> Superblock | None:
    """Read the first block of a metadata device, or its copy in a snapshot of the metadata, which
    has no sizes; None where it is blank.

    Raises:
        CallError: ``conflict``, it is no superblock of a pool; ``integrity``, it is damaged.
    """
    if not any(block):
        return None
    (csum, flags, _, _, magic, version, _, transaction_id, _, data_map, metadata_map,
     mapping_root, details_root, block_sectors) = _SUPERBLOCK.unpack_from(block)  # fmt: skip
    if magic != _SUPERBLOCK_MAGIC:
        raise CallError(
            "conflict",
            "the metadata device is not blank and holds no pool",
            hint="a new pool needs 4096 bytes of zeros at its start",
        )
    if csum != checksum(block, _SUPERBLOCK_XOR):
        raise _damaged("the superblock does not match its checksum")
    if version != _VERSION:
        text = f"the metadata has version {version}, not {_VERSION}"
        raise CallError("unsupported", text)
    if block_sectors % BLOCK_SECTORS_MIN or not 0 < block_sectors <= BLOCK_SECTORS_MAX:
        raise _damaged(f"data blocks of {block_sectors} sectors")
    return Superblock(
        transaction_id=transaction_id,
        needs_check=bool(flags & _NEEDS_CHECK),
        data_block_sectors=block_sectors,
        data_blocks=_SPACE_MAP.unpack_from(data_map)[0],
        metadata_blocks=_SPACE_MAP.unpack_from(metadata_map)[0],
        mapping_root=mapping_root,
        details_root=details_root,
    )


def devices_of(read: ReadBlock, superblock: Superblock) -> dict[int, DeviceDetails]:
    """Return the thin devices of a pool by id.

    Raises:
        CallError: ``integrity``, the tree is damaged.
    """
    found = {}
    for device_id, value in _leaves(read, superblock.details_root, _DETAILS.size, 0):
        if device_id > DEVICE_ID_MAX or device_id in found:
            raise _damaged(f"device id {device_id} is out of order")
        mapped_blocks, transaction_id, _, _ = _DETAILS.unpack(value)
        found[device_id] = DeviceDetails(mapped_blocks=mapped_blocks, transaction_id=transaction_id)
    return found


def highest_block(read: ReadBlock, superblock: Superblock, device_id: int) -> int | None:
    """Return the number of the last block of a thin device that is mapped; None if none is.

    Raises:
        CallError: ``integrity``, the tree is damaged.
    """
    found = _last(read, superblock.mapping_root, device_id)
    if found is None or found[0] != device_id:
        return None
    last = _last(read, found[1], None)
    return None if last is None else last[0]


def _leaves(read: ReadBlock, root: int, size: int, depth: int) -> Iterator[tuple[int, bytes]]:
    """Yield (key, value of ``size`` bytes) of a tree in order."""
    is_leaf, keys, values = _node(read, root, depth, size)
    if is_leaf:
        yield from zip(keys, values, strict=True)
        return
    for child in values:
        yield from _leaves(read, _ROOT.unpack(child)[0], size, depth + 1)


def _last(read: ReadBlock, root: int, key: int | None, depth: int = 0) -> tuple[int, int] | None:
    """Return the entry of a tree with the greatest key, at most ``key`` if that is given."""
    is_leaf, keys, values = _node(read, root, depth, _ROOT.size)
    fitting = [n for n, each in enumerate(keys) if key is None or each <= key]
    if not fitting:
        return None
    (value,) = _ROOT.unpack(values[fitting[-1]])
    return (keys[fitting[-1]], value) if is_leaf else _last(read, value, key, depth + 1)


def _node(
    read: ReadBlock, number: int, depth: int, leaf_value_bytes: int
) -> tuple[bool, tuple[int, ...], list[bytes]]:
    """Return whether a node is a leaf, its keys and its values."""
    if depth > _DEPTH_MAX:
        raise _damaged("a tree is too deep")
    block = read(number)
    csum, flags, blocknr, entries, most, size, _ = _NODE.unpack_from(block)
    if csum != checksum(block, _NODE_XOR) or blocknr != number:
        raise _damaged(f"block {number} does not match its checksum")
    is_leaf = not flags & _INTERNAL
    wanted_size = leaf_value_bytes if is_leaf else _ROOT.size
    if size != wanted_size or entries > most or _NODE.size + most * (8 + size) > len(block):
        raise _damaged(f"block {number} is no node of the tree")
    keys = struct.unpack_from(f"<{entries}Q", block, _NODE.size)
    begin = _NODE.size + most * 8
    return (
        is_leaf,
        keys,
        [block[at : at + size] for at in range(begin, begin + entries * size, size)],
    )


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_CRC32C if byte & 1 else 0)
    return byte


_CRC_TABLE = tuple(map(_crc_of_byte, range(256)))


def checksum(block: bytes, xor: int) -> int:
    """Return what dm_bm_checksum does: CRC32C, not inverted, of all behind the first 4 bytes."""
    crc = 0xFFFFFFFF
    for byte in memoryview(block)[4:METADATA_BLOCK_BYTES]:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ xor


def _damaged(why: str) -> CallError:
    return CallError(
        "integrity",
        f"the metadata of the pool is damaged: {why}",
        hint="close the pool and run thin_check, then thin_repair, on its metadata device",
    )
