"""The on-disk structures of EROFS that its writer and its reader share.

All numbers are little-endian. Only what an uncompressed image of 4096-byte blocks needs is here.

Source: fs/erofs/erofs_fs.h (Linux 6.1 and 6.12).
"""

import struct
from typing import NamedTuple

from rootfs.image.crc32c import crc32c

__all__ = (
    "BLOCK_BYTES",
    "CHUNKED",
    "CHUNK_BITS_MASK",
    "CHUNK_INDEXES",
    "COMPACT",
    "COMPAT_CHECKSUM",
    "COMPAT_MTIME",
    "COMPAT_PLAIN_PREFIXES",
    "DEVICE_SLOT_BYTES",
    "DIRENT",
    "EXTENDED",
    "HOLE",
    "INCOMPAT_CHUNKED_FILE",
    "INCOMPAT_DEVICE_TABLE",
    "INCOMPAT_FRAGMENTS",
    "INCOMPAT_KNOWN",
    "INLINE",
    "MAGIC",
    "MAX_NAME_BYTES",
    "PLAIN",
    "SLOT_BYTES",
    "SUPERBLOCK_BYTES",
    "SUPERBLOCK_OFFSET_BYTES",
    "Device",
    "Superblock",
    "superblock_checksum",
)

BLOCK_BYTES = 4096
#: Inode numbers (nid) count slots of so many bytes.
SLOT_BYTES = 32
SUPERBLOCK_OFFSET_BYTES = 1024
MAGIC = 0xE0F5E1E2

COMPAT_CHECKSUM = 0x1
COMPAT_MTIME = 0x2
#: The table of long name prefixes lies in the image, whether or not there is a packed inode.
COMPAT_PLAIN_PREFIXES = 0x10
INCOMPAT_CHUNKED_FILE = 0x4
INCOMPAT_DEVICE_TABLE = 0x8
INCOMPAT_FRAGMENTS = 0x20
#: The bits up to the long name prefixes of attributes. Those of compression change nothing for an
#: inode that is not compressed; beyond are 48-bit addresses and metadata in an inode.
INCOMPAT_KNOWN = 0x7F

#: Layouts of an inode's data; the others are compressed.
PLAIN, INLINE, CHUNKED = 0, 2, 4
#: The block address of a chunk that is a hole.
HOLE = 0xFFFFFFFF
#: In the format of a chunk-based inode: log2 of the blocks of a chunk; entries have 8 bytes, not 4.
CHUNK_BITS_MASK = 0x1F
CHUNK_INDEXES = 0x20

#: struct erofs_inode_compact: format, xattr_icount, mode, nlink, size, -, union, ino, uid, gid, -
COMPACT = struct.Struct("<HHHHIIIIHHI")
#: struct erofs_inode_extended: format, xattr_icount, mode, -, size, union, ino, uid, gid, mtime,
#: mtime_nsec, nlink
EXTENDED = struct.Struct("<HHHHQIIIIQII16x")
#: struct erofs_dirent: nid, nameoff, file_type
DIRENT = struct.Struct("<QHBx")
MAX_NAME_BYTES = 255

_DEVICE_SLOT = struct.Struct("<64sII56x")
DEVICE_SLOT_BYTES = _DEVICE_SLOT.size
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24s")
SUPERBLOCK_BYTES = _SUPERBLOCK.size


class Superblock(NamedTuple):
    """struct erofs_super_block, 128 bytes at ``SUPERBLOCK_OFFSET_BYTES``. Times are in seconds and
    nanoseconds, addresses in blocks; ``device_table_slot`` counts ``DEVICE_SLOT_BYTES`` from the
    start of the image, ``prefix_start`` 4 bytes."""

    magic: int = MAGIC
    checksum: int = 0
    feature_compat: int = COMPAT_CHECKSUM | COMPAT_MTIME
    block_bits: int = BLOCK_BYTES.bit_length() - 1
    extension_slots: int = 0
    root_nid: int = 0
    inodes: int = 0
    build_time: int = 0
    build_time_nsec: int = 0
    blocks: int = 0
    meta_block: int = 0
    xattr_block: int = 0
    uuid: bytes = bytes(16)
    volume_name: bytes = bytes(16)
    feature_incompat: int = 0
    compression: int = 0
    extra_devices: int = 0
    device_table_slot: int = 0
    directory_block_bits: int = 0
    prefix_count: int = 0
    prefix_start: int = 0
    packed_nid: int = 0
    reserved: bytes = bytes(24)

    def pack(self) -> bytes:
        return _SUPERBLOCK.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> "Superblock":
        return cls._make(_SUPERBLOCK.unpack(data))


def superblock_checksum(superblock: Superblock, block: bytes) -> int:
    """Return the checksum; ``block`` is the image's first block, of which it covers the rest."""
    head = superblock._replace(checksum=0).pack()
    return crc32c(head + block[SUPERBLOCK_OFFSET_BYTES + len(head) : BLOCK_BYTES])


class Device:
    """A device that an image lists: ``blocks`` of it lie from ``first_block`` in the unified space
    of blocks. ``first_block`` is set when the image is laid out. ``tag`` has up to 64 bytes."""

    __slots__ = ("blocks", "first_block", "tag")

    def __init__(self, tag: bytes, blocks: int) -> None:
        self.tag = tag
        self.blocks = blocks
        self.first_block = 0

    def pack(self) -> bytes:
        """Return its slot of the device table."""
        return _DEVICE_SLOT.pack(self.tag, self.blocks, self.first_block)

    @classmethod
    def unpack(cls, slot: bytes) -> "Device":
        tag, blocks, first_block = _DEVICE_SLOT.unpack(slot)
        found = cls(tag, blocks)
        found.first_block = first_block
        return found
