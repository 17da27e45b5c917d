"""Files of a new EROFS image whose content stays where it is, in another image.

That image is a device which the new one lists. An address of a block counts through the image and
all of its devices (the unified space), so that an inode needs nothing but new addresses. The last
partial block of a file, which lies beside its inode, is copied.
"""

import contextlib
import os
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from rootfs.image.erofs_format import (
    BLOCK_BYTES,
    CHUNKED,
    HOLE,
    INLINE,
    PLAIN,
    SLOT_BYTES,
    Device,
)
from rootfs.image.erofs_inode import Inode
from rootfs.image.tree import Absorb, Extent, shrunk
from rootfs.imagefile.output import write_at
from vsock.errors import CallError

__all__ = ("DeviceContent", "LayerFile", "MappedInode")

#: How many entries of a block map are read at once.
_MAP_ENTRIES = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFile:
    """An image to read: ``size_bytes`` of the file ``fd`` (borrowed) from ``offset_bytes`` on,
    without a hash area. ``name`` is what errors call it.

    Raises:
        CallError: ``invalid``, the range is none of whole blocks.
    """

    name: str
    fd: int
    size_bytes: int
    offset_bytes: int = 0

    def __post_init__(self) -> None:
        if self.offset_bytes < 0 or self.size_bytes <= 0 or self.size_bytes % BLOCK_BYTES:
            raise CallError(
                "invalid",
                f"cannot read {self.name!r}: the range of {self.size_bytes} bytes from "
                f"{self.offset_bytes} is not one of whole blocks of {BLOCK_BYTES} bytes",
                step="read the layer",
                object=self.name,
            )

    @property
    def blocks(self) -> int:
        return self.size_bytes // BLOCK_BYTES

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Return bytes of the image, which lie within it.

        Raises:
            CallError: ``conflict``, the file ends before them.
            OSError: as read(2).
        """
        data = os.pread(self.fd, size_bytes, self.offset_bytes + offset_bytes)
        while len(data) < size_bytes:
            at = self.offset_bytes + offset_bytes + len(data)
            more = os.pread(self.fd, size_bytes - len(data), at)
            if not more:
                raise shrunk(os.fsencode(self.name))
            data += more
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceContent:
    """The content of a regular file in a layer, in one of two forms.

    Flat: ``whole_blocks`` blocks from ``first_block`` of the layer, and the rest, the tail, at the
    byte ``tail_at``. Chunk-based, if ``chunk_bytes`` is not 0: a block number for each chunk, in
    entries of ``entry_bytes`` (4 or 8) from the byte ``map_at`` on. All of it lies in the layer.
    """

    layer: LayerFile
    device: Device
    size_bytes: int
    first_block: int = 0
    whole_blocks: int = 0
    tail_at: int = 0
    chunk_bytes: int = 0
    map_at: int = 0
    entry_bytes: int = 4

    @property
    def tail_bytes(self) -> int:
        if self.chunk_bytes:
            return 0
        return max(0, self.size_bytes - self.whole_blocks * BLOCK_BYTES)

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Where the content is in the file of the layer (``Content``)."""
        if self.chunk_bytes:
            return tuple(self._chunk_extents())
        start = self.layer.offset_bytes
        whole = min(self.whole_blocks * BLOCK_BYTES, self.size_bytes)
        found = [(0, whole, start + self.first_block * BLOCK_BYTES)] if whole else []
        if self.tail_bytes:
            found.append((whole, self.tail_bytes, start + self.tail_at))
        return tuple(found)

    def _chunk_extents(self) -> Iterator[Extent]:
        offset = length = place = 0
        at = 0
        for blocks in self.read_map():
            for block in blocks:
                here = self.layer.offset_bytes + block * BLOCK_BYTES
                size = min(self.chunk_bytes, self.size_bytes - at)
                if block != HOLE and length and here == place + length and at == offset + length:
                    length += size
                elif block != HOLE:
                    if length:
                        yield offset, length, place
                    offset, length, place = at, size, here
                at += size
        if length:
            yield offset, length, place

    def open(self) -> contextlib.AbstractContextManager[int]:
        return contextlib.nullcontext(self.layer.fd)

    def read_map(self) -> "Iterator[array[int]]":
        """Yield the block numbers of the chunks in pieces, ``HOLE`` where nothing is stored.

        Raises:
            CallError: as ``LayerFile.read``.
        """
        for found in self._read_entries():
            # struct erofs_inode_chunk_index: 16 bits reserved, 16 of a device, 32 of a block
            yield found[1::2] if self.entry_bytes == 8 else found

    def read_devices(self) -> "Iterator[array[int]]":
        """Yield the numbers of the devices that chunks are in; 0 is the layer."""
        for found in self._read_entries():
            yield array("I", [low >> 16 for low in found[::2]] if self.entry_bytes == 8 else ())

    def _read_entries(self) -> "Iterator[array[int]]":
        count = -(-self.size_bytes // self.chunk_bytes)
        for first in range(0, count, _MAP_ENTRIES):
            entries = min(_MAP_ENTRIES, count - first)
            at = self.map_at + first * self.entry_bytes
            yield _numbers(self.layer.read(at, entries * self.entry_bytes))

    def mapped(self) -> Iterator[bytes]:
        """Yield the block map (4 bytes an entry) in the unified space, but for a tail.

        Raises:
            CallError: as ``LayerFile.read``; ``conflict``, the map is another than it was.
        """
        base = self.device.first_block
        if not self.chunk_bytes:
            first = base + self.first_block
            for at in range(0, self.whole_blocks, _MAP_ENTRIES):
                end = min(at + _MAP_ENTRIES, self.whole_blocks)
                yield _packed(array("I", range(first + at, first + end)))
            return
        for blocks in self.read_map():
            if any(self.layer.blocks <= block < HOLE for block in blocks):
                raise CallError(
                    "conflict",
                    f"cannot read {self.layer.name!r}: it changed while it was read",
                    step="read the layer",
                    object=self.layer.name,
                )
            yield _packed(array("I", [b if b == HOLE else b + base for b in blocks]))


def _numbers(data: bytes) -> "array[int]":
    found = array("I", data)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def _packed(numbers: "array[int]") -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


class MappedInode(Inode):
    """The inode of a regular file in a layer: its blocks stay there, its tail is copied.

    A tail that has no room beside the inode gets a block of the image, and the file chunks of one
    block if it has more, since the blocks of a flat file follow each other. All that is copied is
    read by ``LayerFile.read``.
    """

    __slots__ = ()

    @property
    def _content(self) -> DeviceContent:
        content = self.node.content
        assert isinstance(content, DeviceContent)
        return content

    def _settle_layout(self, inline_tails: bool) -> None:
        content = self._content
        if content.chunk_bytes:
            self._layout = CHUNKED
            self._chunk_bytes = content.chunk_bytes
        elif not content.tail_bytes:
            self._layout = PLAIN
        elif inline_tails and self._header_bytes + content.tail_bytes <= BLOCK_BYTES:
            self._layout = INLINE
        else:
            self.data_blocks = 1
            self._layout = CHUNKED if content.whole_blocks else PLAIN
            self._chunk_bytes = BLOCK_BYTES

    @property
    def _union(self) -> int:
        if self._layout == CHUNKED or self.data_blocks:
            return super()._union
        content = self._content
        return content.device.first_block + content.first_block if content.whole_blocks else 0

    @property
    def copied_bytes(self) -> int:
        return self._content.tail_bytes

    def write(self, fd: int, absorb: Absorb | None) -> Iterator[int]:
        assert absorb is None
        content = self._content
        tail = content.layer.read(content.tail_at, content.tail_bytes) if self.copied_bytes else b""
        head = self._pack_head()
        place = self.slot * SLOT_BYTES
        if self.data_blocks:
            write_at(fd, tail, self.first_block * BLOCK_BYTES)
            write_at(fd, head, place)
        else:
            write_at(fd, head + tail, place)
        if self._layout == CHUNKED:
            place += len(head)
            for piece in content.mapped():
                write_at(fd, piece, place)
                place += len(piece)
            if self.data_blocks:
                write_at(fd, self.first_block.to_bytes(4, "little"), place)
        yield len(tail)
