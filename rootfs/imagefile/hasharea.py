"""Where the data of an image ends and its hash area starts, when the caller does not say.

A file that ``veritysetup`` or this package has formatted ends with its hash tree, so the size of
the file tells how much of it is data: few offsets fit each pair of block sizes, and the signature
is at one of them or nowhere.

A file system may hold a formatted image as its last file, and then ends with a hash area that is
not its own. Nothing below the size that the file system's superblock states is taken for one.
"""

import itertools
import os
from collections.abc import Callable

from guestagent.storage.filesystems import claimed_size_bytes, detect
from guestagent.storage.verity import (
    SUPERBLOCK_BYTES,
    VerityParameters,
    VerityTerms,
    block_digest,
    check_tree_spines,
    level_blocks,
)
from vsock.errors import CallError

__all__ = ("data_end", "filesystem_size", "find_hash_area", "identify")

#: With the version that follows it.
_SIGNATURE = b"verity\0\0\1\0\0\0"
#: What formatters use and a kernel with pages of 4 KiB can map, the usual first.
_BLOCK_SIZES_BYTES = (4096, 512, 1024)
#: Of sha1 and sha256, and of sha512.
_SLOT_SIZES_BYTES = (32, 64)


def identify(fd: int) -> str | None:
    """Return which file system a file starts with, by its magic number, as the guest sees it.

    Raises:
        CallError: ``mount``, two magic numbers are there.
        OSError: as read(2).
    """
    return detect(_reader(fd))


def filesystem_size(fd: int) -> int | None:
    """Return the bytes of the file system at the start of ``fd``, by its superblock.

    None without a file system that layers can have, and for a superblock that contradicts itself.
    """
    try:
        found = identify(fd)
        return None if found is None else claimed_size_bytes(found, _reader(fd))
    except CallError:
        return None


def _reader(fd: int) -> Callable[[int, int], bytes]:
    """Return what reads a file; behind its end there are zeros."""

    def read_at(offset_bytes: int, length_bytes: int) -> bytes:
        return os.pread(fd, length_bytes, offset_bytes).ljust(length_bytes, b"\0")

    return read_at


def data_end(fd: int, size_bytes: int, path: str) -> int:
    """Return where the data of a file of ``size_bytes`` ends: at its hash area, or with the file.

    Raises:
        CallError: ``conflict``, a hash area is there, and neither the size of a file system nor
            the tree itself shows that it is of this file, and not of a file at its end.
        OSError: as read(2).
    """
    found = find_hash_area(fd, size_bytes)
    if found is None:
        return size_bytes
    if filesystem_size(fd) is None and not _is_tree_of(fd, found):
        raise CallError(
            "conflict",
            f"cannot tell where the data of {path!r} ends: there is a hash area at {found}, which "
            "may be the end of its data",
            step="find the hash area",
            object=path,
            hint="say data_blocks",
        )
    return found


def _is_tree_of(fd: int, offset_bytes: int) -> bool:
    """Say whether the tree of the hash area is over this file: by its first and last block."""
    read_at = _reader(fd)
    try:
        parameters = VerityParameters.from_request(
            VerityTerms(),
            hash_offset_bytes=offset_bytes,
            superblock=read_at(offset_bytes, SUPERBLOCK_BYTES),
        )
        if not parameters.levels:  # one block, whose digest is nowhere
            return parameters.data_size_bytes == offset_bytes
        top = read_at(parameters.tree_offset_bytes, parameters.hash_block_size)
        check_tree_spines(
            parameters.replace(root_digest=block_digest(parameters, top)),
            read_at,
            data_blocks=(0, parameters.data_blocks - 1),
        )
    except CallError:
        return False
    return True


def find_hash_area(fd: int, size_bytes: int) -> int | None:
    """Return the offset of the superblock in a file of ``size_bytes``, or None.

    Raises:
        OSError: as read(2).
    """
    least_bytes = filesystem_size(fd) or 0
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
            if at >= 0 and (start + at) % SUPERBLOCK_BYTES == 0 and start + at >= least_bytes:
                return start + at
    return None


def _tree_offsets(size_bytes: int, data_block: int, hash_block: int, per_block: int) -> set[int]:
    """Return from where trees may reach to the end of the file, each over the data before it."""
    offsets: set[int] = set()
    data_blocks = size_bytes // data_block
    while True:  # each round corrects by a smaller part; three are usual
        offset_bytes = size_bytes - sum(level_blocks(data_blocks, per_block)) * hash_block
        if offset_bytes in offsets or offset_bytes < SUPERBLOCK_BYTES:
            return offsets
        offsets.add(offset_bytes)
        data_blocks = (offset_bytes - SUPERBLOCK_BYTES) // data_block
