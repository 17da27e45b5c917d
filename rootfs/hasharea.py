"""Where the hash area of an image is, when nobody says.

A file that ``veritysetup`` or this package has made ends with its tree, so the size of the file
gives away how much of it is data: few offsets fit for each pair of block sizes, and a signature is
at one of them or nowhere.
"""

import os
from collections.abc import Iterator

from guestagent.storage.verity import SUPERBLOCK_BYTES, Superblock
from vsock.errors import CallError

__all__ = ("find_hash_area", "read_superblock")

_SIGNATURE = b"verity\0\0"
#: The sizes that a kernel with pages of 4 KiB can map, the usual first.
_BLOCK_SIZES_BYTES = (4096, 512, 1024, 2048)
#: 4096-byte hash blocks hold 128 digests of sha1 and sha256, 64 of sha512.
_SMALLEST_SLOTS_BYTES = (32, 64)


def find_hash_area(fd: int, size_bytes: int) -> int | None:
    """Return the offset of the superblock in a file of ``size_bytes``, or None."""
    seen = set()
    for hash_block_size_bytes in _BLOCK_SIZES_BYTES:
        for slot_bytes in _SMALLEST_SLOTS_BYTES:
            per_block = hash_block_size_bytes // slot_bytes
            for data_block_size_bytes in _BLOCK_SIZES_BYTES:
                for offset_bytes in _candidates(
                    size_bytes, data_block_size_bytes, hash_block_size_bytes, per_block
                ):
                    if offset_bytes in seen:
                        continue
                    seen.add(offset_bytes)
                    if os.pread(fd, len(_SIGNATURE), offset_bytes) == _SIGNATURE:
                        return offset_bytes
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


def _candidates(size_bytes: int, data_block: int, hash_block: int, per_block: int) -> Iterator[int]:
    """Yield the ends of data from which superblock and tree would end at ``size_bytes``."""
    if size_bytes % hash_block:
        return
    blocks = size_bytes // data_block
    for _ in range(8):  # each round corrects by a smaller part; three are usual
        better = (size_bytes - _area_size(blocks, data_block, hash_block, per_block)) // data_block
        if better == blocks:
            break
        blocks = better
    # with data blocks smaller than hash blocks, several counts end alike
    slack = max(1, hash_block // data_block) + 1
    for count in range(max(1, blocks - slack), blocks + slack + 1):
        data_size_bytes = count * data_block
        area_bytes = _area_size(count, data_block, hash_block, per_block)
        if data_size_bytes + area_bytes == size_bytes:
            yield data_size_bytes


def _area_size(blocks: int, data_block: int, hash_block: int, per_block: int) -> int:
    """Return the bytes from the end of the data to the end of the tree."""
    data_size_bytes = blocks * data_block
    tree_start = -(-(data_size_bytes + SUPERBLOCK_BYTES) // hash_block)
    hash_blocks = 0
    while blocks > 1:
        blocks = -(-blocks // per_block)
        hash_blocks += blocks
    return (tree_start + hash_blocks) * hash_block - data_size_bytes
