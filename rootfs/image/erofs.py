"""Writing EROFS images from a tree: no root, no staging directory, no external program.

Uncompressed, 4096-byte blocks, deterministic: the image is a function of the tree and the UUID.

    block 0         superblock at 1024, from 1152 the table of devices, if any, then inodes
    blocks 1..      inodes with their attributes, tails of files, and directories
    then            the blocks of file data, in the order of the inodes

Inode numbers (nid) count 32-byte slots from the start of the image, as the metadata starts at
block 0. Files with holes use chunks (Linux 5.15); all else any Linux since 5.4 reads.

Source: fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst (Linux 6.1).
"""

import os
import uuid as uuid_module
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from rootfs.image.erofs_device import DeviceContent, MappedInode
from rootfs.image.erofs_format import (
    BLOCK_BYTES,
    DEVICE_SLOT_BYTES,
    HOLE,
    INCOMPAT_CHUNKED_FILE,
    INCOMPAT_DEVICE_TABLE,
    SLOT_BYTES,
    SUPERBLOCK_BYTES,
    SUPERBLOCK_OFFSET_BYTES,
    Device,
    Superblock,
    superblock_checksum,
)
from rootfs.image.erofs_inode import Inode
from rootfs.image.erofs_xattr import unsupported
from rootfs.image.tree import Node, Progress, TreeDigest, link_counts, walk, work_off
from rootfs.imagefile.output import write_at
from rootfs.imagefile.ranges import round_up
from vsock.deadline import Deadline

__all__ = ("MAX_DEVICES", "PART_BYTES", "ErofsImage")

#: What follows the superblock: the device table, if any, then inodes.
_FIRST_FREE_BYTE = SUPERBLOCK_OFFSET_BYTES + SUPERBLOCK_BYTES
#: In an image with devices, it and each device start at a multiple of this: one hash block of a
#: dm-verity tree (SHA-256, blocks of 4096 bytes) covers so much.
PART_BYTES = 128 * BLOCK_BYTES
#: The root inode comes after the device table, and its number has 16 bits.
MAX_DEVICES = 16_000
#: Partly filled metadata blocks that the next inode may still go into: enough to fill blocks well
#: (the tails of files are of every size), few enough that a directory's inodes stay together.
_OPEN_BLOCKS = 32


class ErofsImage:
    """The layout of an image, computed; ``write`` puts it into a file.

    ``inline_tails`` keeps the last partial block of a file beside its inode; without it every file
    starts at a block and can be mapped directly (DAX).

    ``devices`` are those that the content of files may lie in (``DeviceContent``), in the order of
    the device table. The unified space of blocks is then the image and after it each device, every
    one at a multiple of ``PART_BYTES``. ``links`` are the link counts by ``id(node)``; without it
    they are those of the tree.

    Raises:
        CallError: ``unsupported``, the tree holds what the format cannot.
    """

    def __init__(
        self,
        root: Node,
        *,
        inline_tails: bool = True,
        devices: Sequence[Device] = (),
        links: Mapping[int, int] | None = None,
    ) -> None:
        if len(devices) > MAX_DEVICES:
            raise unsupported((), f"{len(devices)} devices, more than {MAX_DEVICES}")
        self._root = root
        self._devices = devices
        self._inodes, self._common_mtime_ns = _plan(root)
        links = link_counts(root) if links is None else links
        for inode in self._inodes:
            inode.settle(
                links=links[id(inode.node)],
                common_mtime_ns=self._common_mtime_ns,
                inline_tails=inline_tails,
            )
        self.inode_count = len(self._inodes)
        self._blocks = self._place_metadata()
        self._place_data()
        end_block = self._place_devices()
        if end_block >= HOLE:
            raise unsupported((), f"{end_block} blocks, more than 2^32 - 2")

    @property
    def size_bytes(self) -> int:
        """With devices it is a multiple of ``PART_BYTES``."""
        return self._blocks * BLOCK_BYTES

    def _place_metadata(self) -> int:
        """Give every inode its slot; return the first block after the metadata."""
        start = _FIRST_FREE_BYTE + len(self._devices) * DEVICE_SLOT_BYTES
        open_blocks: list[tuple[int, int]] = [divmod(start, BLOCK_BYTES)]
        end_block = start // BLOCK_BYTES + 1
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

    def _place_devices(self) -> int:
        """Give every device its place after the image; return the first block after all."""
        if not self._devices:
            return self._blocks
        part_blocks = PART_BYTES // BLOCK_BYTES
        self._blocks = end_block = round_up(self._blocks, part_blocks)
        for device in self._devices:
            device.first_block = end_block
            end_block += round_up(device.blocks, part_blocks)
        return end_block

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
        absorb = None if digest is None else digest.update
        written = (count for inode in self._in_order(digest) for count in inode.write(fd, absorb))
        total_bytes = sum(inode.copied_bytes for inode in self._inodes)
        work_off(written, total_bytes, "write the image", progress, cancel)
        table = b"".join(device.pack() for device in self._devices)
        write_at(fd, table, _FIRST_FREE_BYTE)
        self._write_superblock(fd, make_uuid())

    def _in_order(self, digest: TreeDigest | None) -> Iterator[Inode]:
        """Yield the inodes in the order of their first names, which ``digest`` takes with all."""
        inodes = iter(self._inodes)
        if digest is None:
            yield from inodes
            return
        for path, node in walk(self._root):
            if digest.add(path, node):
                yield next(inodes)

    def _write_superblock(self, fd: int, uuid: uuid_module.UUID) -> None:
        seconds, nanoseconds = divmod(self._common_mtime_ns, 10**9)
        features = INCOMPAT_DEVICE_TABLE if self._devices else 0
        if any(inode.is_chunked for inode in self._inodes):
            features |= INCOMPAT_CHUNKED_FILE
        superblock = Superblock(
            root_nid=self._inodes[0].slot,
            inodes=len(self._inodes),
            build_time=seconds & (1 << 64) - 1,
            build_time_nsec=nanoseconds,
            blocks=self._blocks,
            uuid=uuid.bytes,
            feature_incompat=features,
            extra_devices=len(self._devices),
            device_table_slot=_FIRST_FREE_BYTE // DEVICE_SLOT_BYTES if self._devices else 0,
        )
        checksum = superblock_checksum(superblock, os.pread(fd, BLOCK_BYTES, 0))
        write_at(fd, superblock._replace(checksum=checksum).pack(), SUPERBLOCK_OFFSET_BYTES)


def _plan(root: Node) -> tuple[list[Inode], int]:
    """Return the inodes in the order of the image, a directory's names together, and the time that
    most names have, the earliest of equals: inodes of that time are compact."""
    inodes = {id(root): Inode(root, 1, None)}
    times = Counter((root.mtime_ns,))
    waiting = deque(inodes.values())
    while waiting:
        directory = waiting.popleft()
        for name, node in sorted(directory.node.children.items()):
            inode = inodes.get(id(node))
            if inode is None:
                kind = MappedInode if isinstance(node.content, DeviceContent) else Inode
                inode = inodes[id(node)] = kind(node, len(inodes) + 1, (directory, name))
            times[node.mtime_ns] += 1
            directory.entries.append((name, inode))
            if node.is_directory:
                waiting.append(inode)
    return list(inodes.values()), min(times, key=lambda time_ns: (-times[time_ns], time_ns))


def _round_slot(size_bytes: int) -> int:
    return -(-size_bytes // SLOT_BYTES) * SLOT_BYTES
