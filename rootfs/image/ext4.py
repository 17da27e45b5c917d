"""Writing ext4 images from a tree: no root, no staging directory, no external program.

Read-only, 4096-byte blocks, without journal and spare room; deterministic: the image is a function
of the tree and the UUID.

    block 0         superblock at 1024
    then            group descriptors, bitmaps of blocks, bitmaps of inodes, inode tables
    then            directories, long symbolic links, attributes, extent trees
    then            the blocks of file data, in the order of the inodes

Linux mounts it since 4.0, always read-only (``readonly``). All metadata has checksums
(``metadata_csum``). A directory of more than one block has an index (``dir_index``), without which
a look-up reads the whole directory. The inode tables of all groups are together (``flex_bg``) and
there are no copies of the superblock (``sparse_super2``), so that file data is contiguous. The root
is inode 2, the others follow from 11. ``lost+found`` is a name like any other.

Source: fs/ext4/ext4.h, super.c and Documentation/filesystems/ext4 (Linux 6.1).
"""

import functools
import os
import struct
import uuid as uuid_module
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice

from rootfs.image.crc32c import crc32c, crc32c_of_rows
from rootfs.image.ext4_directory import HASH_VERSION, LEAF_BYTES
from rootfs.image.ext4_inode import BLOCK_BYTES, EXTRA_BYTES, INODE_BYTES, Inode
from rootfs.image.tree import Node, Progress, link_counts, walk, work_off
from rootfs.imagefile.errors import cannot_hold
from rootfs.imagefile.output import write_at
from vsock.deadline import Deadline

__all__ = ("Ext4Image",)

_SUPERBLOCK_OFFSET_BYTES = 1024
_SUPERBLOCK_BYTES = 1024
_DESCRIPTOR = struct.Struct("<IIIHHHHIHHHH")
_ROOT_NUMBER = 2
_FIRST_NUMBER = 11
_INODES_PER_BLOCK = BLOCK_BYTES // INODE_BYTES
#: As many bits as a block of a bitmap has.
_MAX_PER_GROUP = 8 * BLOCK_BYTES
_MAX_TABLE_BLOCKS = _MAX_PER_GROUP // _INODES_PER_BLOCK
_INODE_TABLE_IS_ZEROED = 4

_COMPAT = 0x8 | 0x20 | 0x200  # ext_attr, dir_index, sparse_super2
_INCOMPAT = 0x2 | 0x40 | 0x200  # filetype, extents, flex_bg
#: large_file, huge_file, dir_nlink, extra_isize, metadata_csum, readonly
_RO_COMPAT = 0x2 | 0x8 | 0x20 | 0x40 | 0x400 | 0x1000
_UNSIGNED_HASH = 2
#: Half MD4 starts from these where there is no seed.
_NO_SEED = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)

#: How many rows of metadata get their checksums together.
_BATCH = 1024
#: Where in an inode the bytes of its checksum are.
_INODE_CHECKSUM_AT = (0x7C, 0x7D, 0x82, 0x83)

#: Metadata: where it is in the image, the eight bytes before it in its checksum, its bytes.
_Row = tuple[int, bytes, bytes]


class Ext4Image:
    """The layout of an image, computed; ``write`` puts it into a file.

    Raises:
        CallError: ``unsupported``, the tree holds what the format cannot.
    """

    def __init__(self, root: Node, uuid: uuid_module.UUID) -> None:
        self._uuid = uuid
        self._seed = crc32c(uuid.bytes)
        self._inodes = self._plan(root)
        self.inode_count = len(self._inodes)
        self._place()
        if self._blocks >= 1 << 32:
            raise cannot_hold("an ext4 image", (), f"{self._blocks} blocks, more than 2^32 - 1")

    @property
    def size_bytes(self) -> int:
        return self._blocks * BLOCK_BYTES

    @property
    def data_size_bytes(self) -> int:
        """Bytes of content that ``write`` copies; what its progress counts to."""
        return sum(inode.node.data_bytes for inode in self._inodes)

    def _plan(self, root: Node) -> list[Inode]:
        """Return the inodes in the order of their numbers: a directory's names stay together."""
        numbers = chain((_ROOT_NUMBER,), count(_FIRST_NUMBER))
        inodes: dict[int, Inode] = {}
        for path, node in walk(root):
            if id(node) not in inodes:
                inodes[id(node)] = Inode(node, path, next(numbers))
        links = link_counts(root)
        for inode in inodes.values():
            for child in inode.node.children.values():
                if child.is_directory:
                    inodes[id(child)].parent = inode
        words = struct.unpack("<4I", self._uuid.bytes)
        for key, inode in inodes.items():
            inode.settle(links[key], inodes, words if any(words) else _NO_SEED)
        return list(inodes.values())

    def _place(self) -> None:
        """Choose the groups, and give every inode its blocks: first what is no file data."""
        data_blocks = sum(inode.data_blocks for inode in self._inodes if inode.node.is_regular)
        blocks = sum(inode.metadata_blocks + inode.data_blocks for inode in self._inodes)
        self._choose_groups(blocks)
        at = self._tables_start + self._groups * self._table_blocks
        data_at = at + blocks - data_blocks
        for inode in self._inodes:
            metadata_at = at
            at += inode.metadata_blocks
            if inode.node.is_regular:
                inode.place(metadata_at, data_at)
                data_at += inode.data_blocks
            else:
                inode.place(metadata_at, at)
                at += inode.data_blocks

    def _choose_groups(self, blocks: int) -> None:
        """Choose the groups for ``blocks``, their own tables and the inodes.

        A group has at most 32768 inodes. Where there are more inodes than blocks of the largest
        groups allow, groups have fewer blocks.
        """
        self._last_number = max(self._inodes[-1].number, _FIRST_NUMBER - 1)
        self._group_blocks = _MAX_PER_GROUP
        self._fit(blocks)
        while self._table_blocks > _MAX_TABLE_BLOCKS:
            self._group_blocks //= 2
            self._fit(blocks)
        # groups have tables of equal size, so that one more group can take fewer blocks in all:
        # the last group then has one block, and what is not used is free
        self._blocks = max(self._used_blocks, (self._groups - 1) * self._group_blocks + 1)
        self._directories = Counter(
            (inode.number - 1) // self._group_inodes
            for inode in self._inodes
            if inode.node.is_directory
        )

    def _fit(self, blocks: int) -> None:
        """Choose as many groups as hold ``blocks`` and their own tables."""
        needed = 1
        self._groups = 0
        while needed > self._groups:
            self._groups = needed
            self._table_blocks = -(-self._last_number // (needed * _INODES_PER_BLOCK))
            descriptor_blocks = -(-needed * _DESCRIPTOR.size // BLOCK_BYTES)
            self._bitmaps_start = 1 + descriptor_blocks
            self._tables_start = self._bitmaps_start + 2 * needed
            self._used_blocks = self._tables_start + needed * self._table_blocks + blocks
            needed = -(-self._used_blocks // self._group_blocks)

    @property
    def _group_inodes(self) -> int:
        return self._table_blocks * _INODES_PER_BLOCK

    def write(
        self, fd: int, *, progress: Progress | None = None, cancel: Deadline | None = None
    ) -> None:
        """Write the image to the empty file ``fd`` (borrowed). Holes are left where zeros are due.

        Raises:
            CallError: ``conflict``, a source changed; ``cancelled``, ``timeout`` by ``cancel``.
            OSError: as write(2): ENOSPC, EIO.
        """
        os.ftruncate(fd, self.size_bytes)
        parts = self._write_parts(fd)
        work_off(parts, self.data_size_bytes, "write the image", progress, cancel)
        write_at(fd, self._superblock(), _SUPERBLOCK_OFFSET_BYTES)

    def _write_parts(self, fd: int) -> Iterator[int]:
        """Write all but the superblock; yield how many bytes of file data each step copied."""
        for inode in self._inodes:
            if inode.node.is_regular:
                yield from inode.write_content(fd)
            elif inode.node.is_symlink and inode.data_blocks:
                write_at(fd, inode.node.target, inode.data_start * BLOCK_BYTES)
            elif inode.directory is not None:
                seed = crc32c(_owner(inode), self._seed)
                for at, block in enumerate(inode.directory.index_blocks(seed), inode.data_start):
                    write_at(fd, block, at * BLOCK_BYTES)
        at = BLOCK_BYTES - 4
        yield from self._write_sealed(fd, self._leaf_blocks(), LEAF_BYTES, range(at, at + 4))
        yield from self._write_sealed(fd, self._tree_blocks(), at, range(at, at + 4))
        yield from self._write_sealed(fd, self._xattr_blocks(), BLOCK_BYTES, range(16, 20))
        yield from self._write_sealed(fd, self._inode_rows(), INODE_BYTES, _INODE_CHECKSUM_AT)
        descriptors = [self._write_group(fd, group) for group in range(self._groups)]
        write_at(fd, b"".join(descriptors), BLOCK_BYTES)

    def _leaf_blocks(self) -> Iterator[_Row]:
        for inode in self._inodes:
            if inode.directory is not None:
                start = inode.data_start + inode.data_blocks - inode.directory.leaf_count
                for at, block in enumerate(inode.directory.leaf_blocks(), start):
                    yield at * BLOCK_BYTES, _owner(inode), block

    def _tree_blocks(self) -> Iterator[_Row]:
        for inode in self._inodes:
            for at, block in inode.tree_blocks():
                yield at * BLOCK_BYTES, _owner(inode), block

    def _xattr_blocks(self) -> Iterator[_Row]:
        for inode in self._inodes:
            for at, block in inode.xattr_blocks():
                yield at * BLOCK_BYTES, struct.pack("<Q", at), block

    def _inode_rows(self) -> Iterator[_Row]:
        """The tables of all groups follow each other."""
        start = self._tables_start * BLOCK_BYTES
        for inode in self._inodes:
            yield start + (inode.number - 1) * INODE_BYTES, _owner(inode), inode.pack()

    def _write_sealed(
        self, fd: int, rows: Iterator[_Row], covered_bytes: int, places: Sequence[int]
    ) -> Iterator[int]:
        """Write rows of equal length with the checksums of their first ``covered_bytes``.

        ``places`` say where in a row the bytes of the checksum go, the lowest first. They are zero
        before. Yields 0 after each batch.
        """
        while batch := list(islice(rows, _BATCH)):
            owners = b"".join(owner for _, owner, _ in batch)
            data = b"".join(row for _, _, row in batch)
            size = len(data) // len(batch)
            columns = chain(
                (owners[at::8] for at in range(8)), (data[at::size] for at in range(covered_bytes))
            )
            sealed = bytearray(data)
            checksums = crc32c_of_rows(columns, len(batch), self._seed)
            for place, column in zip(places, checksums, strict=True):
                sealed[place::size] = column
            for number, (offset_bytes, _, _) in enumerate(batch):
                write_at(fd, bytes(sealed[number * size : (number + 1) * size]), offset_bytes)
            yield 0

    def _write_group(self, fd: int, group: int) -> bytes:
        """Write the bitmaps of a group and return its descriptor."""
        first_block, first_inode = group * self._group_blocks, group * self._group_inodes
        blocks = min(self._group_blocks, self._blocks - first_block)
        used_blocks = max(0, min(self._used_blocks - first_block, blocks))
        used_inodes = max(0, min(self._last_number - first_inode, self._group_inodes))
        block_bitmap = _bitmap(used_blocks, blocks)
        inode_bitmap = _bitmap(used_inodes, self._group_inodes)
        block_bitmap_at = self._bitmaps_start + group
        inode_bitmap_at = block_bitmap_at + self._groups
        write_at(fd, block_bitmap, block_bitmap_at * BLOCK_BYTES)
        write_at(fd, inode_bitmap, inode_bitmap_at * BLOCK_BYTES)
        facts = (
            block_bitmap_at,
            inode_bitmap_at,
            self._tables_start + group * self._table_blocks,
            blocks - used_blocks,
            self._group_inodes - used_inodes,
            self._directories[group],
            _INODE_TABLE_IS_ZEROED,
            0,
            _bitmap_checksum(block_bitmap[: self._group_blocks // 8], self._seed) & 0xFFFF,
            _bitmap_checksum(inode_bitmap[: self._group_inodes // 8], self._seed) & 0xFFFF,
            self._group_inodes - used_inodes,
        )
        covered = group.to_bytes(4, "little") + _DESCRIPTOR.pack(*facts, 0)
        return _DESCRIPTOR.pack(*facts, crc32c(covered, self._seed) & 0xFFFF)

    def _superblock(self) -> bytes:
        inodes = self._groups * self._group_inodes
        fields = (
            (0x00, "I", inodes),
            (0x04, "I", self._blocks),
            (0x0C, "I", self._blocks - self._used_blocks),  # free
            (0x10, "I", inodes - self._last_number),  # free
            (0x18, "I", BLOCK_BYTES.bit_length() - 11),
            (0x1C, "I", BLOCK_BYTES.bit_length() - 11),  # of a cluster, the same
            (0x20, "I", self._group_blocks),
            (0x24, "I", self._group_blocks),  # in clusters
            (0x28, "I", self._group_inodes),
            (0x36, "H", 0xFFFF),  # is never checked for being mounted often
            (0x38, "H", 0xEF53),  # magic
            (0x3A, "H", 1),  # cleanly unmounted
            (0x3C, "H", 1),  # errors: continue
            (0x4C, "I", 1),  # revision
            (0x54, "I", _FIRST_NUMBER),
            (0x58, "H", INODE_BYTES),
            (0x5C, "I", _COMPAT),
            (0x60, "I", _INCOMPAT),
            (0x64, "I", _RO_COMPAT),
            (0x68, "16s", self._uuid.bytes),
            (0xEC, "16s", self._uuid.bytes),  # seed of the hashes of names
            (0xFC, "B", HASH_VERSION),
            (0x15C, "H", EXTRA_BYTES),
            (0x15E, "H", EXTRA_BYTES),
            (0x160, "I", _UNSIGNED_HASH),
            (0x175, "B", 1),  # checksums are CRC-32C
        )
        packed = bytearray(_SUPERBLOCK_BYTES)
        for at, form, value in fields:
            struct.pack_into("<" + form, packed, at, value)
        packed[-4:] = crc32c(bytes(packed[:-4])).to_bytes(4, "little")
        return bytes(packed)


def _owner(inode: Inode) -> bytes:
    """Return what goes before an inode's metadata in its checksums: number and generation."""
    return struct.pack("<II", inode.number, 0)


def _bitmap(used: int, count: int) -> bytes:
    """Return a block of bits: set for ``used``, unset up to ``count``, and set for what is not."""
    return ((1 << _MAX_PER_GROUP) - 1 ^ (1 << count) - (1 << used)).to_bytes(BLOCK_BYTES, "little")


#: Most bitmaps are all ones.
_bitmap_checksum = functools.lru_cache(maxsize=8)(crc32c)
