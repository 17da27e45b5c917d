"""Writing EROFS images from a tree: no root, no staging directory, no external program.

Uncompressed, 4096-byte blocks, deterministic: the image is a function of the tree and the UUID.

    block 0         superblock at 1024, inodes from 1152
    blocks 1..      inodes with their attributes, tails of files, and directories
    then            the blocks of file data, in the order of the inodes

Inode numbers (nid) count 32-byte slots from the start of the image, as the metadata starts at
block 0. Files with holes use chunks (Linux 5.15); all else any Linux since 5.4 reads.

Source: fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst (Linux 6.1).
"""

import os
import struct
import uuid as uuid_module
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from rootfs.image.crc32c import crc32c
from rootfs.image.erofs_inode import BLOCK_BYTES, SLOT_BYTES, Inode
from rootfs.image.erofs_xattr import unsupported
from rootfs.image.tree import Node, Progress, TreeDigest, link_counts, walk
from rootfs.imagefile.output import write_at
from vsock.deadline import Deadline

__all__ = ("ErofsImage",)

_SUPERBLOCK_OFFSET_BYTES = 1024
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24s")
_MAGIC = 0xE0F5E1E2
_FIRST_SLOT = (_SUPERBLOCK_OFFSET_BYTES + _SUPERBLOCK.size) // SLOT_BYTES
_COMPAT_CHECKSUM = 1
_COMPAT_MTIME = 2
_INCOMPAT_CHUNKED_FILE = 4
#: Partly filled metadata blocks that the next inode may still go into: enough to fill blocks well
#: (the tails of files are of every size), few enough that a directory's inodes stay together.
_OPEN_BLOCKS = 32


class ErofsImage:
    """The layout of an image, computed; ``write`` puts it into a file.

    ``inline_tails`` keeps the last partial block of a file beside its inode; without it every file
    starts at a block and can be mapped directly (DAX).

    Raises:
        CallError: ``unsupported``, the tree holds what the format cannot.
    """

    def __init__(self, root: Node, *, inline_tails: bool = True) -> None:
        self._names = list(walk(root))
        self._common_mtime_ns = _most_common_mtime(self._names)
        self._inodes = self._plan(root, inline_tails)
        self._blocks = self._place_metadata()
        self._place_data()
        if self._blocks >= 1 << 32:
            raise unsupported((), f"{self._blocks} blocks, more than 2^32 - 1")

    @property
    def size_bytes(self) -> int:
        return self._blocks * BLOCK_BYTES

    @property
    def data_size_bytes(self) -> int:
        """Bytes of content that ``write`` copies; what its progress counts to."""
        return sum(
            length
            for inode in self._inodes
            if inode.node.is_regular
            for _, length, _ in inode.node.content.extents
        )

    @property
    def inode_count(self) -> int:
        return len(self._inodes)

    def _plan(self, root: Node, inline_tails: bool) -> list[Inode]:
        """Return the inodes in the order of the image: a directory's names stay together."""
        inodes: dict[int, Inode] = {}
        for path, node in self._names:
            if id(node) not in inodes:
                inodes[id(node)] = Inode(node, path, len(inodes) + 1)
        links = link_counts(root)
        for inode in inodes.values():
            for name, child in inode.node.children.items():
                below = inodes[id(child)]
                inode.entries.append((name, below))
                if child.is_directory:
                    below.parent = inode
        for key, inode in inodes.items():
            inode.settle(
                links=links[key],
                common_mtime_ns=self._common_mtime_ns,
                inline_tails=inline_tails,
            )
        return list(inodes.values())

    def _place_metadata(self) -> int:
        """Give every inode its slot; return the first block after the metadata."""
        open_blocks: list[tuple[int, int]] = [(0, _FIRST_SLOT * SLOT_BYTES)]
        end_block = 1
        for inode in self._inodes:
            size = inode.metadata_bytes
            if size > BLOCK_BYTES:
                inode.slot = end_block * (BLOCK_BYTES // SLOT_BYTES)
                used = size % BLOCK_BYTES
                end_block += -(-size // BLOCK_BYTES)
                if used:
                    open_blocks.append((end_block - 1, _round_slot(used)))
            else:
                fitting = [spot for spot in open_blocks if spot[1] + size <= BLOCK_BYTES]
                if fitting:
                    best = max(fitting, key=lambda spot: spot[1])
                    open_blocks.remove(best)
                else:
                    best = (end_block, 0)
                    end_block += 1
                block, used = best
                inode.slot = (block * BLOCK_BYTES + used) // SLOT_BYTES
                if _round_slot(used + size) < BLOCK_BYTES:
                    open_blocks.append((block, _round_slot(used + size)))
            if len(open_blocks) > _OPEN_BLOCKS:
                open_blocks.remove(max(open_blocks, key=lambda spot: spot[1]))
        return end_block

    def _place_data(self) -> None:
        for inode in self._inodes:
            inode.first_block = self._blocks
            self._blocks += inode.data_blocks

    def write(
        self,
        fd: int,
        make_uuid: Callable[[], uuid_module.UUID],
        *,
        digest: TreeDigest | None = None,
        progress: Progress | None = None,
        cancel: Deadline | None = None,
    ) -> None:
        """Write the image to the empty file ``fd`` (borrowed). Holes are left where zeros are due.

        ``make_uuid`` is called last, when ``digest`` has taken the whole tree: so every file is
        read once for both.

        Raises:
            CallError: ``conflict``, a source changed; ``cancelled``, ``timeout`` by ``cancel``.
            OSError: as write(2): ENOSPC, EIO.
        """
        os.ftruncate(fd, self.size_bytes)
        total = self.data_size_bytes
        done = 0
        for inode in self._in_order(digest):
            for count in inode.write(fd, None if digest is None else digest.update):
                done += count
                if progress is not None:
                    progress(done, total)
                if cancel is not None:
                    cancel.check("write the image")
        self._write_superblock(fd, make_uuid())

    def _in_order(self, digest: TreeDigest | None) -> Iterator[Inode]:
        """Yield the inodes in the order of their first names, which ``digest`` takes with all."""
        inodes = iter(self._inodes)
        if digest is None:
            yield from inodes
            return
        for path, node in self._names:
            if digest.add(path, node):
                yield next(inodes)

    def _write_superblock(self, fd: int, uuid: uuid_module.UUID) -> None:
        seconds, nanoseconds = divmod(self._common_mtime_ns, 10**9)
        chunked = any(inode.is_chunked for inode in self._inodes)

        def pack(checksum: int) -> bytes:
            return _SUPERBLOCK.pack(
                _MAGIC,
                checksum,
                _COMPAT_CHECKSUM | _COMPAT_MTIME,
                BLOCK_BYTES.bit_length() - 1,
                0,
                self._inodes[0].slot,
                len(self._inodes),
                seconds & (1 << 64) - 1,
                nanoseconds,
                self._blocks,
                0,
                0,
                uuid.bytes,
                bytes(16),
                _INCOMPAT_CHUNKED_FILE if chunked else 0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                bytes(24),
            )

        write_at(fd, pack(0), _SUPERBLOCK_OFFSET_BYTES)
        covered = os.pread(fd, BLOCK_BYTES - _SUPERBLOCK_OFFSET_BYTES, _SUPERBLOCK_OFFSET_BYTES)
        write_at(fd, pack(crc32c(covered)), _SUPERBLOCK_OFFSET_BYTES)


def _most_common_mtime(names: Iterable[tuple[object, Node]]) -> int:
    """Return the time that most inodes have, the earliest of equals: those inodes are compact."""
    counts = Counter(node.mtime_ns for _, node in names)
    return min(counts, key=lambda mtime_ns: (-counts[mtime_ns], mtime_ns))


def _round_slot(size_bytes: int) -> int:
    return -(-size_bytes // SLOT_BYTES) * SLOT_BYTES
