"""Reading the tree of an uncompressed EROFS image: inodes, attributes, and where content lies.

An image that lists devices is read if they lie in the same file, at their places in the unified
space (see ``erofs_merge``).

An image may be hostile: every offset is compared with the image, no directory is read twice, and
what is read of the metadata, inode by inode, must not be more than the image has bytes. So time
and memory are bounded by the size of the image, and names by a limit besides.

Source: Documentation/filesystems/erofs.rst; fs/erofs/super.c, inode.c, data.c, dir.c, xattr.c
(Linux 6.1 and 6.12).
"""

import functools
import stat
import struct
from collections.abc import Iterator
from typing import NoReturn

from rootfs.image.erofs_device import DeviceContent, LayerFile
from rootfs.image.erofs_format import (
    BLOCK_BYTES,
    CHUNK_BITS_MASK,
    CHUNK_INDEXES,
    CHUNKED,
    COMPACT,
    COMPAT_CHECKSUM,
    COMPAT_PLAIN_PREFIXES,
    DEVICE_SLOT_BYTES,
    DIRENT,
    EXTENDED,
    HOLE,
    INCOMPAT_FRAGMENTS,
    INCOMPAT_KNOWN,
    INLINE,
    MAGIC,
    MAX_NAME_BYTES,
    PLAIN,
    SLOT_BYTES,
    SUPERBLOCK_BYTES,
    SUPERBLOCK_OFFSET_BYTES,
    Device,
    Superblock,
    superblock_checksum,
)
from rootfs.image.erofs_xattr import (
    XATTR_ENTRY_BYTES,
    XATTR_HEADER_BYTES,
    entry_bytes,
    long_prefix,
    unpack_entry,
    unpack_xattrs,
)
from rootfs.image.tree import EMPTY, FILE_TYPES, Node, unpack_device_number
from rootfs.imagefile.errors import shown_path
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("ErofsReader", "LayerNode")

#: Of a symbolic link; Linux follows none of more than 4095 bytes.
_MAX_TARGET_BYTES = 0xFFFF
_MAX_PREFIX_BYTES = 256
#: Metadata is read in pieces, of which some are kept.
_PIECE_BYTES = 1 << 16
_KEPT_PIECES = 64

#: The path of a directory's entry: that of the directory, and the name. So a path costs the same
#: at any depth.
_Path = tuple["_Path", bytes] | None


class LayerNode(Node):
    """A node that was read from the image ``layer``, where it has the number ``nid``. ``links`` is
    the link count that the image says."""

    __slots__ = ("layer", "links", "nid")

    def __init__(self, mode: int, layer: LayerFile, nid: int, links: int) -> None:
        super().__init__(mode)
        self.layer = layer
        self.nid = nid
        self.links = links


class ErofsReader:
    """An image; ``device`` is what an image that lists it as a device calls it.

    Raises:
        CallError: ``integrity``, the superblock is damaged, or is none; ``unsupported``, what the
            image has cannot be read; both name the image.
        OSError: as read(2).
    """

    def __init__(self, layer: LayerFile, *, cancel: Deadline | None = None) -> None:
        self.layer = layer
        self.names = 0
        self._max_names = 0
        self._cancel = cancel
        self._left_bytes = layer.size_bytes
        self._piece = functools.lru_cache(maxsize=_KEPT_PIECES)(self._read_piece)
        self._nodes: dict[int, LayerNode] = {}
        self._shared: dict[int, tuple[bytes, bytes]] = {}
        self._superblock = self._read_superblock()
        seconds = _signed(self._superblock.build_time)
        self._build_time_ns = seconds * 10**9 + self._superblock.build_time_nsec
        self.device = Device(self._superblock.uuid.hex().encode(), layer.blocks)
        self._prefixes = self._read_prefixes()

    def _read_superblock(self) -> Superblock:
        block = self.layer.read(0, BLOCK_BYTES)
        end = SUPERBLOCK_OFFSET_BYTES + SUPERBLOCK_BYTES
        found = Superblock.unpack(block[SUPERBLOCK_OFFSET_BYTES:end])
        if found.magic != MAGIC:
            self._fail("integrity", "it has no EROFS superblock")
        if 1 << found.block_bits != BLOCK_BYTES:
            self._fail("unsupported", f"its blocks have 2^{found.block_bits} bytes, not 4096")
        if found.feature_compat & COMPAT_CHECKSUM:
            checksum = superblock_checksum(found, block)
            if checksum != found.checksum:
                self._fail("integrity", "the checksum of its superblock is wrong")
        if found.feature_incompat & ~INCOMPAT_KNOWN:
            self._fail("unsupported", f"it has the features {found.feature_incompat:#x}")
        if found.directory_block_bits:
            self._fail("unsupported", "the blocks of its directories have another size")
        if found.blocks > self.layer.blocks:
            self._fail(
                "integrity", f"it is cut: {self.layer.blocks} blocks of {found.blocks} are there"
            )
        if found.build_time_nsec >= 10**9:
            self._fail("integrity", "the time in its superblock is none")
        table = self._read(
            found.device_table_slot * DEVICE_SLOT_BYTES, found.extra_devices * DEVICE_SLOT_BYTES
        )
        for at in range(0, len(table), DEVICE_SLOT_BYTES):
            device = Device.unpack(table[at : at + DEVICE_SLOT_BYTES])
            end_block = device.first_block + device.blocks
            if not (found.blocks <= device.first_block and end_block <= self.layer.blocks):
                number = at // DEVICE_SLOT_BYTES + 1
                self._fail("unsupported", f"its blocks in the device {number} are in another file")
        return found

    def _read_prefixes(self) -> list[bytes]:
        """Return the long name prefixes of attributes."""
        superblock = self._superblock
        packed: DeviceContent | None = None
        plain = superblock.feature_compat & COMPAT_PLAIN_PREFIXES
        has_packed = superblock.feature_incompat & INCOMPAT_FRAGMENTS and superblock.packed_nid
        if superblock.prefix_count and has_packed and not plain:
            node = self._inode(superblock.packed_nid, (None, b"(packed inode)"))
            if not isinstance(node.content, DeviceContent) or node.content.chunk_bytes:
                self._fail("integrity", "its packed inode is no flat file", superblock.packed_nid)
            packed = node.content

        def read(at: int, size: int) -> bytes:
            if packed is None:
                return self._read(at, size)
            return b"".join(self._content_pieces(packed, at, size))

        found = []
        at = superblock.prefix_start * 4
        for _ in range(superblock.prefix_count):
            (size,) = struct.unpack("<H", read(at, 2))
            if not 1 <= size <= _MAX_PREFIX_BYTES:
                self._fail("integrity", f"a name prefix of its attributes has {size} bytes")
            try:
                found.append(long_prefix(read(at + 2, size)))
            except ValueError as problem:
                self._fail("integrity", str(problem))
            at += -(-(2 + size) // 4) * 4
        return found

    def tree(self, max_names: int) -> LayerNode:
        """Read all directories and inodes; content stays where it is (``DeviceContent``).

        ``max_names`` limits the names of all directories together; ``names`` counts them.
        A file under several names is one node, and its names may be fewer than its ``links``.

        Raises:
            CallError: ``integrity``, it is damaged; ``unsupported``; ``resource``, too many names;
                ``cancelled``, ``timeout`` by ``cancel``. They name the image and the inode.
            OSError: as read(2).
        """
        self._max_names = max_names
        root_nid = self._superblock.root_nid
        root = self._inode(root_nid, None)
        if not root.is_directory:
            self._fail("integrity", "the root is no directory", root_nid)
        waiting: list[tuple[_Path, int, LayerNode]] = [(None, root_nid, root)]
        seen = {root_nid}
        while waiting:
            path, nid, directory = waiting.pop()
            if self._cancel is not None:
                self._cancel.check("read the layer")
            for name, below in self._entries(directory, nid, path):
                where = (path, name)
                node = self._nodes.get(below) or self._inode(below, where)
                directory.children[name] = node
                if not node.is_directory:
                    self._nodes[below] = node
                elif below in seen:
                    self._fail("integrity", "the directory has two names", below, where)
                else:
                    seen.add(below)
                    waiting.append((where, below, node))
        self._piece.cache_clear()
        return root

    def _entries(self, directory: LayerNode, nid: int, path: _Path) -> Iterator[tuple[bytes, int]]:
        """Yield names and inode numbers, without the dots; names ascend."""
        content = directory.content
        assert isinstance(content, DeviceContent)
        directory.content = EMPTY
        last = b""
        for at in range(0, content.size_bytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, content.size_bytes - at)
            block = b"".join(self._content_pieces(content, at, size))
            for name, below in self._block_entries(block, nid, path):
                if name <= last:
                    self._fail("integrity", f"its name {name!r} is out of order", nid, path)
                last = name
                if name not in (b".", b".."):
                    self.names += 1
                    if self.names > self._max_names:
                        self._fail(
                            "resource", f"there are more than {self._max_names} names", nid, path
                        )
                    yield name, below

    def _block_entries(self, block: bytes, nid: int, path: _Path) -> Iterator[tuple[bytes, int]]:
        """Yield the entries of a block of a directory: records, then the names they point to."""
        if len(block) < DIRENT.size:
            self._fail("integrity", f"a block of the directory has {len(block)} bytes", nid, path)
        _, end, _ = DIRENT.unpack_from(block)
        if not DIRENT.size <= end <= len(block) or end % DIRENT.size:
            self._fail("integrity", f"the first name of a block is at {end}", nid, path)
        records = list(DIRENT.iter_unpack(block[:end]))
        starts = [start for _, start, _ in records]
        ends = [*starts[1:], len(block)]
        for (below, _, _), start, stop in zip(records, starts, ends, strict=True):
            if not end <= start < stop <= len(block):
                self._fail("integrity", f"a name is at {start} of a block", nid, path)
            name = block[start:stop]
            if stop == len(block):
                name = name.partition(b"\0")[0]
            if not name or len(name) > MAX_NAME_BYTES or b"/" in name or b"\0" in name:
                self._fail("integrity", f"it has the name {name[:300]!r}", nid, path)
            yield name, below

    def _inode(self, nid: int, path: _Path) -> LayerNode:
        """Read an inode with its attributes, and the target of a symbolic link."""
        at = self._superblock.meta_block * BLOCK_BYTES + nid * SLOT_BYTES
        head = self._read(at, COMPACT.size, nid, path)
        (inode_format,) = struct.unpack_from("<H", head)
        if inode_format >> 4:
            self._fail("unsupported", f"it has the format {inode_format:#x}", nid, path)
        layout = inode_format >> 1
        if inode_format & 1:
            head = self._read(at, EXTENDED.size, nid, path)
            _, xattrs, mode, _, size, union, _, uid, gid, seconds, nsec, links = EXTENDED.unpack(
                head
            )
            mtime_ns = _signed(seconds) * 10**9 + nsec
            if nsec >= 10**9:
                self._fail("integrity", f"its time has {nsec} nanoseconds", nid, path)
        else:
            _, xattrs, mode, links, size, _, union, _, uid, gid, _ = COMPACT.unpack(head)
            mtime_ns = self._build_time_ns
        kind = stat.S_IFMT(mode)
        if kind not in FILE_TYPES or links == 0 or size >= 1 << 63:
            self._fail("integrity", f"it has mode {mode:o}, {links} links, {size} bytes", nid, path)
        node = LayerNode(mode, self.layer, nid, links)
        node.uid, node.gid, node.mtime_ns = uid, gid, mtime_ns
        self._spend(len(head), nid, path)
        xattr_bytes = XATTR_HEADER_BYTES + 4 * (xattrs - 1) if xattrs else 0
        if xattr_bytes:
            node.xattrs = self._xattrs(at + len(head), xattr_bytes, nid, path)
        if node.is_device:
            node.rdev = unpack_device_number(union)
        elif kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            end = at + len(head) + xattr_bytes
            content = self._content(layout, size, union, end, nid, path)
            if content.chunk_bytes and not node.is_regular:
                self._fail("unsupported", "it has chunks and is no regular file", nid, path)
            if node.is_symlink:
                node.target = self._target(content, nid, path)
            else:
                node.content = content
                if node.is_directory:
                    self._spend(size, nid, path)
        return node

    def _content(
        self, layout: int, size: int, union: int, end: int, nid: int, path: _Path
    ) -> DeviceContent:
        """Return where the data of an inode is; ``end`` is the byte after its attributes."""
        if layout == CHUNKED and size:
            return self._chunks(size, union, end, nid, path)
        if layout not in (PLAIN, INLINE, CHUNKED):
            what = "it is compressed" if layout in (1, 3) else f"it has the data layout {layout}"
            self._fail("unsupported", what, nid, path)
        blocks = -(-size // BLOCK_BYTES)
        if layout == INLINE and blocks:
            blocks -= 1
            tail_bytes = size - blocks * BLOCK_BYTES
            self._check_range(end, tail_bytes, nid, path)
            if end % BLOCK_BYTES + tail_bytes > BLOCK_BYTES:
                self._fail("integrity", "its tail crosses the end of a block", nid, path)
        if blocks and union + blocks > self.layer.blocks:
            self._fail(
                "integrity", f"its {blocks} blocks from {union} end after the image", nid, path
            )
        return DeviceContent(
            layer=self.layer,
            device=self.device,
            size_bytes=size,
            first_block=union if blocks else 0,
            whole_blocks=blocks,
            tail_at=end,
        )

    def _chunks(self, size: int, union: int, end: int, nid: int, path: _Path) -> DeviceContent:
        if union & ~(CHUNK_BITS_MASK | CHUNK_INDEXES):
            self._fail("unsupported", f"it has the chunk format {union:#x}", nid, path)
        chunk_blocks = 1 << (union & CHUNK_BITS_MASK)
        chunk_bytes = chunk_blocks * BLOCK_BYTES
        count = -(-size // chunk_bytes)
        entry = 8 if union & CHUNK_INDEXES else 4
        map_at = -(-end // entry) * entry
        self._check_range(map_at, count * entry, nid, path)
        self._spend(count * entry, nid, path)
        found = DeviceContent(
            layer=self.layer,
            device=self.device,
            size_bytes=size,
            chunk_bytes=chunk_bytes,
            map_at=map_at,
            entry_bytes=entry,
        )
        last_blocks = -(-(size - (count - 1) * chunk_bytes) // BLOCK_BYTES)
        if any(any(devices) for devices in found.read_devices()):
            self._fail("unsupported", "a chunk of it lies in another device", nid, path)
        for blocks in found.read_map():
            count -= len(blocks)
            ends = [block + chunk_blocks for block in blocks if block != HOLE]
            if count == 0 and blocks[-1] != HOLE:
                ends[-1] = blocks[-1] + last_blocks
            if ends and max(ends) > self.layer.blocks:
                self._fail("integrity", "a chunk of it ends after the image", nid, path)
        return found

    def _target(self, content: DeviceContent, nid: int, path: _Path) -> bytes:
        if not 0 < content.size_bytes <= _MAX_TARGET_BYTES:
            what = f"the target of the symbolic link has {content.size_bytes} bytes"
            self._fail("integrity", what, nid, path)
        self._spend(content.size_bytes, nid, path)
        target = b"".join(self._content_pieces(content, 0, content.size_bytes))
        if b"\0" in target:
            self._fail("integrity", "the target of the symbolic link has a NUL byte", nid, path)
        return target

    def _xattrs(self, at: int, size: int, nid: int, path: _Path) -> dict[bytes, bytes]:
        self._spend(size, nid, path)
        data = self._read(at, size, nid, path)

        def shared(number: int) -> tuple[bytes, bytes]:
            if number not in self._shared:
                start = self._superblock.xattr_block * BLOCK_BYTES + number * 4
                length = entry_bytes(self._read(start, XATTR_ENTRY_BYTES, nid, path))
                self._spend(length, nid, path)
                entry = self._read(start, length, nid, path)
                self._shared[number] = unpack_entry(entry, self._prefixes)
            return self._shared[number]

        try:
            return unpack_xattrs(data, shared, self._prefixes)
        except ValueError as problem:
            self._fail("integrity", str(problem), nid, path)

    def _content_pieces(self, content: DeviceContent, at: int, size: int) -> Iterator[bytes]:
        """Yield ``size`` bytes of the data of an inode from ``at`` on."""
        end = at + size
        if end > content.size_bytes:
            self._fail(
                "integrity", f"the bytes {at} to {end} are after the end of the packed inode"
            )
        for offset, length, source in content.extents:
            first, last = max(at, offset), min(end, offset + length)
            if first < last:
                yield bytes(first - at)
                start = source - self.layer.offset_bytes + first - offset
                yield self._read(start, last - first)
                at = last
        yield bytes(end - at)

    def _read(self, at: int, size: int, nid: int | None = None, path: _Path = None) -> bytes:
        """Return metadata, from what is kept if it can be."""
        self._check_range(at, size, nid, path)
        index, start = divmod(at, _PIECE_BYTES)
        found = self._piece(index)[start : start + size]
        while len(found) < size:
            index += 1
            found += self._piece(index)[: size - len(found)]
        return found

    def _read_piece(self, index: int) -> bytes:
        at = index * _PIECE_BYTES
        return self.layer.read(at, min(_PIECE_BYTES, self.layer.size_bytes - at))

    def _check_range(self, at: int, size: int, nid: int | None, path: _Path) -> None:
        if at + size > self.layer.size_bytes:
            what = f"the {size} bytes at {at} are after the end of the image"
            self._fail("integrity", what, nid, path)

    def _spend(self, size: int, nid: int, path: _Path) -> None:
        """Count what was read. In a sound image no two inodes have metadata in common."""
        self._left_bytes -= size
        if self._left_bytes < 0:
            what = "its metadata overlaps: together it is larger than the image"
            self._fail("integrity", what, nid, path)

    def _fail(self, code: str, what: str, nid: int | None = None, path: _Path = None) -> NoReturn:
        names: list[bytes] = []
        while path is not None:
            path, name = path
            names.append(name)
        inode = "" if nid is None else f" inode {nid} ({shown_path((*reversed(names),))!r}):"
        raise CallError(
            code,
            f"cannot read the EROFS image {self.layer.name!r}:{inode} {what}",
            step="read the layer",
            object=self.layer.name,
        )


def _signed(seconds: int) -> int:
    return seconds - (1 << 64) if seconds >> 63 else seconds
