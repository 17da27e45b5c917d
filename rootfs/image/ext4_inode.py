"""One inode of an ext4 image: the blocks that belong to it, and its 256 bytes.

Source: fs/ext4/ext4.h, ext4_extents.h, inode.c and Documentation/filesystems/ext4/inodes.rst,
ifork.rst.
"""

import os
import stat
import struct
from collections.abc import Iterator

from rootfs.image.ext4_directory import Directory
from rootfs.image.ext4_xattr import Attribute, pack_block, pack_xattrs
from rootfs.image.tree import FILE_TYPES, Extent, Node, copy_content, pack_device_number
from rootfs.imagefile.errors import cannot_hold

__all__ = ("BLOCK_BYTES", "EXTRA_BYTES", "INODE_BYTES", "Inode")

BLOCK_BYTES = 4096
INODE_BYTES = 256
_SECTORS_PER_BLOCK = BLOCK_BYTES // 512
_UP_TO_UNION = struct.Struct("<HHIIIIIHHIII")
_UNION_BYTES = 60
_AFTER_UNION = struct.Struct("<IIIIHHHHHH")
_EXTRA = struct.Struct("<HHIIIIIII")
#: How many bytes of fields there are behind the first 128; attributes have the rest.
EXTRA_BYTES = _EXTRA.size
_XATTR_ROOM_BYTES = INODE_BYTES - 128 - EXTRA_BYTES

_EXTENTS_FLAG, _INDEX_FLAG = 0x80000, 0x1000
_EXTENT_MAGIC = 0xF30A
_EXTENT_HEADER = struct.Struct("<HHHHI")
_EXTENT = struct.Struct("<IHHI")
_EXTENT_REFERENCE = struct.Struct("<IIHH")
_MAX_EXTENT_BLOCKS = 1 << 15
#: In the inode, and in a block, which ends with a checksum.
_ROOT_EXTENTS, _NODE_EXTENTS = 4, 340

_MAX_LINKS = 65_000
_MAX_FILE_BYTES = (1 << 32) - 1 << 12
_MAX_FAST_SYMLINK_BYTES = 59
_MIN_SECONDS, _MAX_SECONDS = -(1 << 31), (1 << 34) - (1 << 31) - 1


class Inode:
    """An inode being laid out: ``settle`` decides how many blocks it has, ``place`` where they are.

    ``path`` is its first name. ``parent`` is for directories; the root is its own.
    """

    __slots__ = (
        "_block_xattrs",
        "_extents",
        "_inline_xattrs",
        "_links",
        "_runs",
        "_tree_start",
        "_xattr_start",
        "data_blocks",
        "data_start",
        "directory",
        "metadata_blocks",
        "node",
        "number",
        "parent",
        "path",
    )

    def __init__(self, node: Node, path: tuple[bytes, ...], number: int) -> None:
        self.node = node
        self.path = path
        self.number = number
        self.parent = self
        self.directory: Directory | None = None
        #: How many blocks of content there are: of a file, a directory or a long symbolic link.
        self.data_blocks = 0
        #: How many further blocks there are: of attributes, and of the extent tree.
        self.metadata_blocks = 0
        #: Where in the image the content starts.
        self.data_start = 0
        self._tree_start = self._xattr_start = 0
        self._links = 1
        self._inline_xattrs = b""
        self._block_xattrs: list[Attribute] = []
        #: (first block in the file, count) of what is no hole.
        self._runs: list[tuple[int, int]] = []
        #: (first block in the file, count, first block in the image).
        self._extents: list[tuple[int, int, int]] = []

    @property
    def file_type(self) -> int:
        return FILE_TYPES[stat.S_IFMT(self.node.mode)]

    def settle(self, links: int, below: dict[int, "Inode"], hash_seed: tuple[int, ...]) -> None:
        """Decide form and number of blocks. ``below`` has the inodes of children by ``id(node)``.

        Raises:
            CallError: ``unsupported``, the format cannot hold it; ``object`` is the path.
        """
        node = self.node
        self._check(links)
        # 1 is the link count of a directory with too many directories in it (dir_nlink)
        self._links = links if links <= _MAX_LINKS else 1
        self._inline_xattrs, self._block_xattrs = pack_xattrs(
            self.path, node.xattrs, _XATTR_ROOM_BYTES
        )
        if node.is_directory:
            entries = [
                (name, below[id(child)].number, below[id(child)].file_type)
                for name, child in node.children.items()
            ]
            self.directory = Directory(
                self.path, self.number, self.parent.number, entries, hash_seed
            )
            self._runs = [(0, self.directory.block_count)]
        elif node.is_regular:
            self._runs = _covered_blocks(node.content.extents)
        elif node.is_symlink and not self._is_fast_symlink:
            self._runs = [(0, 1)]
        self.data_blocks = sum(count for _, count in self._runs)
        extents = sum(-(-count // _MAX_EXTENT_BLOCKS) for _, count in self._runs)
        self.metadata_blocks = bool(self._block_xattrs) + sum(_tree_levels(extents))

    def _check(self, links: int) -> None:
        node = self.node
        if links > _MAX_LINKS and not node.is_directory:
            raise self._unsupported(f"{links} names, limit {_MAX_LINKS}")
        if not 0 <= min(node.uid, node.gid) <= max(node.uid, node.gid) < 1 << 32:
            raise self._unsupported(f"the owner {node.uid}:{node.gid}, limit 32 bits")
        if not _MIN_SECONDS <= node.mtime_ns // 10**9 <= _MAX_SECONDS:
            raise self._unsupported("a time outside the years 1901 to 2446")
        if node.content.size_bytes > _MAX_FILE_BYTES:
            raise self._unsupported(f"{node.content.size_bytes} bytes, limit {_MAX_FILE_BYTES}")
        if node.is_symlink and (not 0 < len(node.target) < BLOCK_BYTES or b"\0" in node.target):
            what = f"a target of {len(node.target)} bytes, limit {BLOCK_BYTES - 1}, and not empty"
            raise self._unsupported(what if b"\0" not in node.target else "a zero in its target")
        if node.is_device and pack_device_number(node.rdev) is None:
            number = f"{os.major(node.rdev)}:{os.minor(node.rdev)}"
            raise self._unsupported(f"the device number {number}, limits 4095:1048575")

    def _unsupported(self, what: str) -> Exception:
        return cannot_hold("an ext4 image", self.path, what)

    @property
    def _is_fast_symlink(self) -> bool:
        return self.node.is_symlink and len(self.node.target) <= _MAX_FAST_SYMLINK_BYTES

    @property
    def size_bytes(self) -> int:
        if self.node.is_symlink:
            return len(self.node.target)
        if self.node.is_directory:
            return self.data_blocks * BLOCK_BYTES
        return self.node.content.size_bytes if self.node.is_regular else 0

    def place(self, metadata_start: int, data_start: int) -> None:
        """Set where in the image the blocks start: of metadata, and of content."""
        self._xattr_start = metadata_start if self._block_xattrs else 0
        self._tree_start = metadata_start + bool(self._block_xattrs)
        self.data_start = data_start
        for first, count in self._runs:
            for done in range(0, count, _MAX_EXTENT_BLOCKS):
                length = min(_MAX_EXTENT_BLOCKS, count - done)
                self._extents.append((first + done, length, data_start + done))
            data_start += count

    def xattr_blocks(self) -> Iterator[tuple[int, bytes]]:
        """Yield the block of attributes, if there is one, with where it is in the image."""
        if self._block_xattrs:
            yield self._xattr_start, pack_block(self._block_xattrs)

    def tree_blocks(self) -> Iterator[tuple[int, bytes]]:
        """Yield the blocks of the extent tree with where they are in the image.

        The last four bytes of each are for its checksum.
        """
        yield from enumerate(_pack_tree(self._extents, self._tree_start)[1], self._tree_start)

    def write_content(self, fd: int) -> Iterator[int]:
        """Copy the content of a regular file to the image; yield each count of bytes.

        Raises:
            CallError: ``conflict``, the source changed.
            OSError: as read(2) and write(2).
        """
        at = 0
        with self.node.content.open() as source:
            for offset, length, source_offset in self.node.content.extents:
                if not length:
                    continue
                while sum(self._extents[at][:2]) * BLOCK_BYTES <= offset:
                    at += 1
                # all blocks of an extent of the source follow each other in the image, too
                first, _, start = self._extents[at]
                place = offset + (start - first) * BLOCK_BYTES
                yield from copy_content(self.path, (source, source_offset), (fd, place), length)

    def pack(self) -> bytes:
        """Return the inode; its checksum is zero, as it covers the number."""
        node = self.node
        seconds, nanoseconds = divmod(node.mtime_ns, 10**9)
        time = seconds & 0xFFFFFFFF
        # how often 2^32 seconds are to be added to the signed 32 bits
        extra = nanoseconds << 2 | seconds + (1 << 31) >> 32
        sectors = (self.data_blocks + self.metadata_blocks) * _SECTORS_PER_BLOCK
        size = self.size_bytes
        low = (node.mode, node.uid & 0xFFFF, size & 0xFFFFFFFF, time, time, time, 0)
        links = (node.gid & 0xFFFF, self._links, sectors & 0xFFFFFFFF)
        high = (size >> 32, 0, sectors >> 32, 0, node.uid >> 16, node.gid >> 16)
        packed = _UP_TO_UNION.pack(*low, *links, self._flags, 0)
        packed += self._pack_union().ljust(_UNION_BYTES, b"\0")
        packed += _AFTER_UNION.pack(0, self._xattr_start, *high, 0, 0)
        packed += _EXTRA.pack(EXTRA_BYTES, 0, extra, extra, extra, time, extra, 0, 0)
        return packed + self._inline_xattrs.ljust(_XATTR_ROOM_BYTES, b"\0")

    @property
    def _flags(self) -> int:
        if not (self.node.is_regular or self._runs):
            return 0
        is_indexed = self.directory is not None and self.directory.is_indexed
        return _EXTENTS_FLAG | (_INDEX_FLAG if is_indexed else 0)

    def _pack_union(self) -> bytes:
        """Return the 60 bytes whose meaning depends on the type of the file."""
        if self._is_fast_symlink:
            return self.node.target
        if self.node.is_device:
            major, minor = os.major(self.node.rdev), os.minor(self.node.rdev)
            if major < 256 and minor < 256:
                return struct.pack("<I", major << 8 | minor)
            return struct.pack("<II", 0, pack_device_number(self.node.rdev))
        return _pack_tree(self._extents, self._tree_start)[0] if self._flags else b""


def _covered_blocks(extents: tuple[Extent, ...]) -> list[tuple[int, int]]:
    """Return (first, count) of the blocks of a file that extents of its source touch."""
    runs: list[tuple[int, int]] = []
    start = end = 0
    for offset, length, _ in extents:
        if not length:
            continue
        if offset // BLOCK_BYTES > end:
            runs.append((start, end - start))
            start = offset // BLOCK_BYTES
        end = -(-(offset + length) // BLOCK_BYTES)
    runs.append((start, end - start))
    return [run for run in runs if run[1]]


def _tree_levels(extents: int) -> list[int]:
    """Return how many blocks each level of an extent tree has, the lowest first."""
    levels = []
    while extents > _ROOT_EXTENTS:
        extents = -(-extents // _NODE_EXTENTS)
        levels.append(extents)
    return levels


def _pack_tree(extents: list[tuple[int, int, int]], first_block: int) -> tuple[bytes, list[bytes]]:
    """Return the root of the extent tree, for the inode, and its blocks from ``first_block`` on."""
    entries = [(first, _EXTENT.pack(first, count, 0, start)) for first, count, start in extents]
    blocks: list[bytes] = []
    depth = 0
    while len(entries) > _ROOT_EXTENTS:
        level = [entries[at : at + _NODE_EXTENTS] for at in range(0, len(entries), _NODE_EXTENTS)]
        entries = []
        for node in level:
            number = first_block + len(blocks)
            entries.append((node[0][0], _EXTENT_REFERENCE.pack(node[0][0], number, 0, 0)))
            blocks.append(_pack_node(node, _NODE_EXTENTS, depth).ljust(BLOCK_BYTES, b"\0"))
        depth += 1
    return _pack_node(entries, _ROOT_EXTENTS, depth), blocks


def _pack_node(entries: list[tuple[int, bytes]], limit: int, depth: int) -> bytes:
    header = _EXTENT_HEADER.pack(_EXTENT_MAGIC, len(entries), limit, depth, 0)
    return header + b"".join(packed for _, packed in entries)
