"""One inode of an EROFS image: which form it takes, how much room, and its bytes.

Forms: *compact* (32 bytes) where owner, size and time allow, else *extended* (64). Layouts: *plain*
(whole blocks), *inline* (the last partial block beside the inode) and *chunk-based* (a block number
for each chunk, so that holes take no room).

Source: fs/erofs/erofs_fs.h, inode.c, data.c, dir.c (Linux 6.1).
"""

import os
import stat
import struct
from collections.abc import Iterator, Sequence

from rootfs.image.erofs_format import (
    BLOCK_BYTES,
    CHUNKED,
    COMPACT,
    DIRENT,
    EXTENDED,
    HOLE,
    INLINE,
    MAX_NAME_BYTES,
    PLAIN,
    SLOT_BYTES,
)
from rootfs.image.erofs_xattr import XATTR_HEADER_BYTES, pack_xattrs, unsupported
from rootfs.image.tree import (
    CHUNK_BYTES,
    FILE_TYPES,
    Absorb,
    Extent,
    Node,
    copy_content,
    pack_device_number,
    shrunk,
    zeros,
)
from rootfs.imagefile.output import write_at

__all__ = ("Inode",)

#: A file's chunks are made larger until it has no more than this many.
_MAX_CHUNKS = 65536


class Inode:
    """An inode being laid out. ``first_name`` is its directory and its name there, None for the
    root; ``settle`` decides its form, the image gives it ``slot`` and
    ``first_block``, then ``write`` puts it into the image."""

    __slots__ = (
        "_chunk_bytes",
        "_directory_blocks",
        "_extended",
        "_first_name",
        "_layout",
        "_links",
        "_size_bytes",
        "_stored_chunks",
        "_xattrs",
        "data_blocks",
        "entries",
        "first_block",
        "node",
        "number",
        "slot",
    )

    def __init__(self, node: Node, number: int, first_name: "tuple[Inode, bytes] | None") -> None:
        self.node = node
        self.number = number
        self._first_name = first_name
        self.entries: list[tuple[bytes, Inode]] = []
        self.slot = 0
        self.first_block = 0
        self.data_blocks = 0
        self._links = 1
        self._size_bytes = 0
        self._extended = True
        self._layout = PLAIN
        self._xattrs = b""
        self._directory_blocks: Sequence[list[tuple[bytes, Inode]]] = ()
        self._chunk_bytes = 0
        self._stored_chunks: Sequence[int] = ()

    @property
    def parent(self) -> "Inode":
        return self if self._first_name is None else self._first_name[0]

    @property
    def path(self) -> tuple[bytes, ...]:
        names = []
        inode = self
        while inode._first_name is not None:
            inode, name = inode._first_name
            names.append(name)
        return (*reversed(names),)

    def settle(self, *, links: int, common_mtime_ns: int, inline_tails: bool) -> None:
        """Decide form and layout; directories need all their entries first.

        Raises:
            CallError: ``unsupported``, the format cannot hold it; ``object`` is the path.
        """
        node = self.node
        self._links = links
        self._xattrs = pack_xattrs(lambda: self.path, node.xattrs)
        self._size_bytes = self._measure()
        self._extended = (
            node.mtime_ns != common_mtime_ns
            or max(node.uid, node.gid, links) > 0xFFFF
            or self._size_bytes > 0xFFFFFFFF
        )
        if max(node.uid, node.gid, links) > 0xFFFFFFFF or min(node.uid, node.gid) < 0:
            raise unsupported(self.path, "an owner or link count that is no 32-bit number")
        if not -(1 << 63) <= node.mtime_ns // 10**9 < 1 << 63:
            raise unsupported(self.path, "a time that is no 64-bit number of seconds")
        self._settle_layout(inline_tails)

    def _settle_layout(self, inline_tails: bool) -> None:
        if not (self.node.is_regular and self._settle_chunks()):
            self._settle_tail(inline_tails)

    def _measure(self) -> int:
        node = self.node
        if node.is_regular:
            return node.content.size_bytes
        if node.is_symlink:
            return len(node.target)
        if not node.is_directory:
            return 0
        self._directory_blocks = self._split_entries()
        return (len(self._directory_blocks) - 1) * BLOCK_BYTES + sum(
            DIRENT.size + len(name) for name, _ in self._directory_blocks[-1]
        )

    def _split_entries(self) -> list[list[tuple[bytes, "Inode"]]]:
        """Return the sorted entries by the block they go to."""
        entries = [*self.entries, (b".", self), (b"..", self.parent)]
        blocks: list[list[tuple[bytes, Inode]]] = [[]]
        used = 0
        for name, inode in sorted(entries, key=lambda entry: entry[0]):
            if len(name) > MAX_NAME_BYTES:
                raise unsupported((*self.path, name), f"a name of {len(name)} bytes, limit 255")
            size = DIRENT.size + len(name)
            if used + size > BLOCK_BYTES:
                blocks.append([])
                used = 0
            blocks[-1].append((name, inode))
            used += size
        return blocks

    def _settle_tail(self, inline_tails: bool) -> None:
        tail = self._size_bytes % BLOCK_BYTES
        fits = self._header_bytes + tail <= BLOCK_BYTES
        # A file may be mapped directly only from its own block; the others never are.
        if tail and fits and (inline_tails or not self.node.is_regular):
            self._layout = INLINE
            self.data_blocks = self._size_bytes // BLOCK_BYTES
        else:
            self._layout = PLAIN
            self.data_blocks = -(-self._size_bytes // BLOCK_BYTES)

    def _settle_chunks(self) -> bool:
        """Choose chunks if that leaves out a whole chunk of zeros; say whether it does."""
        extents = self.node.content.extents
        if self.node.data_bytes == self._size_bytes:
            return False
        chunk = BLOCK_BYTES
        while -(-self._size_bytes // chunk) > _MAX_CHUNKS:
            chunk *= 2
        stored = sorted(_covered_chunks(extents, chunk))
        if len(stored) == -(-self._size_bytes // chunk):
            return False
        self._layout = CHUNKED
        self._chunk_bytes = chunk
        self._stored_chunks = stored
        self.data_blocks = sum(self._blocks_of_chunk(index) for index in stored)
        return True

    def _blocks_of_chunk(self, index: int) -> int:
        """The last chunk of a file has only the blocks that it needs."""
        size = min(self._chunk_bytes, self._size_bytes - index * self._chunk_bytes)
        return -(-size // BLOCK_BYTES)

    @property
    def is_chunked(self) -> bool:
        return self._layout == CHUNKED

    @property
    def copied_bytes(self) -> int:
        """Bytes of content that ``write`` copies."""
        return self.node.data_bytes

    @property
    def _header_bytes(self) -> int:
        return (EXTENDED.size if self._extended else COMPACT.size) + len(self._xattrs)

    @property
    def metadata_bytes(self) -> int:
        """Bytes from the inode's slot: header, attributes, and tail or block numbers."""
        if self._layout == INLINE:
            return self._header_bytes + self._size_bytes % BLOCK_BYTES
        if self._layout == CHUNKED:
            return self._header_bytes + 4 * -(-self._size_bytes // self._chunk_bytes)
        return self._header_bytes

    def pack(self) -> bytes:
        """Return the bytes from the slot on, but the tail of a regular file, which is zero."""
        head = self._pack_head()
        if self._layout == CHUNKED:
            return head + self._pack_block_map()
        if self._layout != INLINE:
            return head
        if self.node.is_symlink:
            return head + self.node.target[self._size_bytes // BLOCK_BYTES * BLOCK_BYTES :]
        if self.node.is_directory:
            return head + _pack_directory_block(self._directory_blocks[-1])
        return head

    def _pack_head(self) -> bytes:
        return (self._pack_extended() if self._extended else self._pack_compact()) + self._xattrs

    @property
    def _xattr_count(self) -> int:
        """The header counts as one, each four bytes after it as one more."""
        return (len(self._xattrs) - XATTR_HEADER_BYTES) // 4 + 1 if self._xattrs else 0

    @property
    def _union(self) -> int:
        if self.node.is_device:
            number = pack_device_number(self.node.rdev)
            if number is None:
                shown = f"{os.major(self.node.rdev)}:{os.minor(self.node.rdev)}"
                raise unsupported(self.path, f"the device number {shown}")
            return number
        if self._layout == CHUNKED:
            return (self._chunk_bytes // BLOCK_BYTES).bit_length() - 1
        return self.first_block if self.data_blocks else 0

    def _pack_compact(self) -> bytes:
        node = self.node
        return COMPACT.pack(
            self._layout << 1,
            self._xattr_count,
            node.mode,
            self._links,
            self._size_bytes,
            0,
            self._union,
            self.number,
            node.uid,
            node.gid,
            0,
        )

    def _pack_extended(self) -> bytes:
        node = self.node
        seconds, nanoseconds = divmod(node.mtime_ns, 10**9)
        return EXTENDED.pack(
            self._layout << 1 | 1,
            self._xattr_count,
            node.mode,
            0,
            self._size_bytes,
            self._union,
            self.number,
            node.uid,
            node.gid,
            seconds & (1 << 64) - 1,
            nanoseconds,
            self._links,
        )

    def _pack_block_map(self) -> bytes:
        blocks = [HOLE] * -(-self._size_bytes // self._chunk_bytes)
        block = self.first_block
        for index in self._stored_chunks:
            blocks[index] = block
            block += self._blocks_of_chunk(index)
        return struct.pack(f"<{len(blocks)}I", *blocks)

    def write(self, fd: int, absorb: Absorb | None) -> Iterator[int]:
        """Write the inode and what belongs to it; yield the bytes of content just copied.

        ``absorb`` takes the content of a regular file, holes as zeros.

        Raises:
            CallError: ``conflict``, a source changed.
            OSError: as read(2) and write(2).
        """
        start = self.first_block * BLOCK_BYTES
        place = self.slot * SLOT_BYTES
        if self.node.is_regular and self._is_small:
            yield self._copy_small(fd, place, absorb)
            return
        write_at(fd, self.pack(), place)
        if self.node.is_directory:
            for index, entries in enumerate(self._directory_blocks[: self.data_blocks]):
                write_at(fd, _pack_directory_block(entries), start + index * BLOCK_BYTES)
        elif self.node.is_symlink and self.data_blocks:
            write_at(fd, self.node.target[: self.data_blocks * BLOCK_BYTES], start)
        elif self.node.is_regular:
            yield from self._copy_content(fd, absorb)

    @property
    def _is_small(self) -> bool:
        """One read gets it, and it has no holes."""
        extents = self.node.content.extents
        size = self._size_bytes
        return 0 < size <= CHUNK_BYTES and len(extents) == 1 and extents[0][1] == size

    def _copy_small(self, fd: int, place: int, absorb: Absorb | None) -> int:
        """Write inode and content with as few calls as there can be: most files are small."""
        size = self._size_bytes
        with self.node.content.open() as source:
            data = os.pread(source, size, self.node.content.extents[0][2])
        if len(data) != size:
            raise shrunk(b"/".join(self.path))
        if absorb is not None:
            absorb(data)
        whole = self.data_blocks * BLOCK_BYTES if self._layout == INLINE else size
        write_at(fd, self.pack() + data[whole:], place)
        if whole:
            write_at(fd, data[:whole], self.first_block * BLOCK_BYTES)
        return size

    def _copy_content(self, fd: int, absorb: Absorb | None) -> Iterator[int]:
        end = 0
        with self.node.content.open() as source:
            for offset, length, source_offset in self.node.content.extents:
                if absorb is not None:
                    _absorb_zeros(absorb, offset - end)
                end = offset + length
                for at, size, place in self._places(offset, length):
                    source_at = source_offset + at - offset
                    yield from copy_content(
                        self.path, (source, source_at), (fd, place), size, absorb
                    )
        if absorb is not None:
            _absorb_zeros(absorb, self._size_bytes - end)

    def _places(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (offset in the file, length, offset in the image) of the parts of an extent."""
        start = self.first_block * BLOCK_BYTES
        if self._layout == PLAIN:
            yield offset, length, start + offset
        elif self._layout == INLINE:
            tail_at = self._size_bytes // BLOCK_BYTES * BLOCK_BYTES
            whole = max(0, min(length, tail_at - offset))
            if whole:
                yield offset, whole, start + offset
            if whole < length:
                at = offset + whole
                tail = self.slot * SLOT_BYTES + self._header_bytes
                yield at, length - whole, tail + at - tail_at
        else:
            yield from self._chunk_places(offset, length)

    def _chunk_places(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        # all chunks but the file's last have the same number of blocks, and the last comes last
        order = {index: place for place, index in enumerate(self._stored_chunks)}
        at = offset
        while at < offset + length:
            index, within = divmod(at, self._chunk_bytes)
            size = min(self._chunk_bytes - within, offset + length - at)
            block_start = self.first_block * BLOCK_BYTES + order[index] * self._chunk_bytes
            yield at, size, block_start + within
            at += size


def _absorb_zeros(absorb: Absorb, count: int) -> None:
    for piece in zeros(count):
        absorb(piece)


def _covered_chunks(extents: tuple[Extent, ...], chunk_bytes: int) -> set[int]:
    covered: set[int] = set()
    for offset, length, _ in extents:
        if length:
            covered.update(range(offset // chunk_bytes, (offset + length - 1) // chunk_bytes + 1))
    return covered


def _pack_directory_block(entries: list[tuple[bytes, Inode]]) -> bytes:
    """Return the entries of one block and their names; the first name offset tells their count."""
    name_at = DIRENT.size * len(entries)
    head = []
    for name, inode in entries:
        head.append(DIRENT.pack(inode.slot, name_at, FILE_TYPES[stat.S_IFMT(inode.node.mode)]))
        name_at += len(name)
    return b"".join(head) + b"".join(name for name, _ in entries)
