"""Where the hash area of an image is, when nobody says.

A file that ``veritysetup`` or this package has made ends with its tree, so the size of the file
gives away how much of it is data: few offsets fit for each pair of block sizes, and a signature is
at one of them or nowhere.
"""

import itertools
import os

from guestagent.storage.verity import SUPERBLOCK_BYTES, Superblock
from vsock.errors import CallError

__all__ = ("find_hash_area", "read_superblock")

#: With the version that follows it.
_SIGNATURE = b"verity\0\0\1\0\0\0"
#: What formatters use and a kernel with pages of 4 KiB can map, the usual first.
_BLOCK_SIZES_BYTES = (4096, 512, 1024)
#: Of sha1 and sha256, and of sha512.
_SLOT_SIZES_BYTES = (32, 64)


def find_hash_area(fd: int, size_bytes: int) -> int | None:
    """Return the offset of the superblock in a file of ``size_bytes``, or None."""
    seen = set()
    for hash_block, slot, data_block in itertools.product(
        _BLOCK_SIZES_BYTES, _SLOT_SIZES_BYTES, _BLOCK_SIZES_BYTES
    ):
        if size_bytes % hash_block:
            continue
        for tree_offset in _tree_offsets(size_bytes, data_block, hash_block, hash_block // slot):
            place = (tree_offset, hash_block)
            if place in seen:
                continue
            seen.add(place)
            # the superblock ends in the block before the tree, wherever the data ended
            start = max(0, tree_offset - hash_block - SUPERBLOCK_BYTES)
            at = os.pread(fd, tree_offset - start, start).find(_SIGNATURE)
            if at >= 0 and (start + at) % SUPERBLOCK_BYTES == 0:
                return start + at
    return None


def read_superblock(fd: int, offset_bytes: int, path: str) -> Superblock:
    """Read and check the superblock at an offset.

    Raises:
        CallError: ``integrity``; ``object`` is the field that is wrong.
        OSError: as read(2).
    """
    try:
        return Superblock.parse(os.pread(fd, SUPERBLOCK_BYTES, offset_bytes))
    except CallError as problem:
        raise CallError(
            problem.code,
            f"{problem.message} (at {offset_bytes} in {path!r})",
            step=problem.step,
            object=problem.object,
        ) from None


def _tree_offsets(size_bytes: int, data_block: int, hash_block: int, per_block: int) -> set[int]:
    """Return from where trees may reach to the end of the file, each over the data before it."""
    offsets: set[int] = set()
    data_blocks = size_bytes // data_block
    while True:  # each round corrects by a smaller part; three are usual
        hash_blocks, count = 0, data_blocks
        while count > 1:
            count = -(-count // per_block)
            hash_blocks += count
        offset_bytes = size_bytes - hash_blocks * hash_block
        if offset_bytes in offsets or offset_bytes < SUPERBLOCK_BYTES:
            return offsets
        offsets.add(offset_bytes)
        data_blocks = (offset_bytes - SUPERBLOCK_BYTES) // data_block
