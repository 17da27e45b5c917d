"""That a tree belongs to a root digest, and to its data: checked block by block."""

from collections.abc import Callable, Iterable

from guestagent.api.devices import HASH_TYPE_NORMAL
from guestagent.storage.hashing import new_hash
from guestagent.storage.verity.parameters import VerityParameters
from vsock.errors import CallError

__all__ = (
    "ReadAt",
    "block_digest",
    "check_root",
    "check_spare",
    "check_tree_spines",
)

#: Read ``size`` bytes at ``offset_bytes``; fewer only at the end of the device.
ReadAt = Callable[[int, int], bytes]


def block_digest(parameters: VerityParameters, block: bytes) -> bytes:
    """Return the salted digest of one data or hash block."""
    salted = (block, parameters.salt)
    if parameters.hash_type == HASH_TYPE_NORMAL:
        salted = (parameters.salt, block)
    hasher = new_hash(parameters.algorithm)
    hasher.update(b"".join(salted))
    return hasher.digest()


def check_root(
    parameters: VerityParameters, read_at: ReadAt, *, read_hash_at: ReadAt | None = None
) -> None:
    """Compare the top of the tree with the root digest, and see that the whole tree is there.

    ``read_at`` reads the data device; so it does the hash area unless ``read_hash_at`` is given.
    At least one read and at most two.

    Raises:
        CallError: ``integrity``, the digest differs or the device is too short; ``invalid``, data
            and hash area overlap on the one device.
        OSError: as raised by the readers.
    """
    _top_block(parameters, read_at, read_hash_at)


def check_tree_spines(
    parameters: VerityParameters,
    read_at: ReadAt,
    *,
    read_hash_at: ReadAt | None = None,
    data_blocks: Iterable[int] = (0,),
) -> None:
    """Verify the path of the tree to each of a few data blocks, from the root digest down.

    Reads one block of each level and the data block: a cheap proof that this tree belongs to this
    data, which the root alone is not. The path to the last data block proves ``data_blocks`` too.
    What paths have in common is read and hashed once.

    Raises:
        CallError: as ``check_root``; ``object`` is the part that does not match.
        OSError: as raised by the readers.
    """
    top = _top_block(parameters, read_at, read_hash_at)
    levels = parameters.levels
    verified = {(levels - 1, 0): top}
    for data_block in data_blocks:
        if not 0 <= data_block < parameters.data_blocks:
            raise ValueError(f"data block {data_block} of {parameters.data_blocks}")
        for level in reversed(range(levels - 1)):
            _verify_hash_block(parameters, verified, level, data_block, read_hash_at or read_at)
        if levels:  # without a tree the one data block was the top
            _verify_data_block(parameters, verified, data_block, read_at)


def _verify_hash_block(
    parameters: VerityParameters,
    verified: dict[tuple[int, int], bytes],
    level: int,
    data_block: int,
    read_hash_at: ReadAt,
) -> None:
    """Verify the block of ``level`` on the way to ``data_block`` by the block above it."""
    index = data_block >> (parameters.hashes_per_block_bits * (level + 1))
    if (level, index) in verified:
        return
    size = parameters.hash_block_size
    offset_bytes = parameters.level_offsets_bytes[level] + index * size
    what = f"hash block {index} of level {level}"
    block = _read(read_hash_at, offset_bytes, size, what)
    _expect(parameters, block, _digest_above(parameters, verified, level, index), what)
    if index == parameters.level_blocks[level] - 1:
        check_spare(parameters, level, block)
    verified[level, index] = block


def _verify_data_block(
    parameters: VerityParameters,
    verified: dict[tuple[int, int], bytes],
    data_block: int,
    read_at: ReadAt,
) -> None:
    size = parameters.data_block_size
    what = f"data block {data_block}"
    block = _read(read_at, data_block * size, size, what)
    _expect(parameters, block, _digest_above(parameters, verified, -1, data_block), what)


def _digest_above(
    parameters: VerityParameters, verified: dict[tuple[int, int], bytes], level: int, index: int
) -> bytes:
    """Return the digest of a block as the verified block above it has it; level -1 is the data."""
    bits, size = parameters.hashes_per_block_bits, parameters.digest_bytes
    start = (index & ((1 << bits) - 1)) * parameters.slot_size_bytes
    return verified[level + 1, index >> bits][start : start + size]


def check_spare(parameters: VerityParameters, level: int, last_block: bytes) -> None:
    """See that the last hash block of a level holds no more digests than ``data_blocks`` needs.

    The root digest does not vouch for the number of data blocks, and the kernel takes any: a tree
    over more blocks passes for one over fewer. It differs only in what should be zero here.

    Raises:
        CallError: ``integrity``.
    """
    below = parameters.level_blocks[level - 1] if level else parameters.data_blocks
    used = ((below - 1) & ((1 << parameters.hashes_per_block_bits) - 1)) + 1
    spare = last_block[used * parameters.slot_size_bytes :]
    if spare != bytes(len(spare)):
        raise CallError(
            "integrity",
            f"data_blocks: the hash tree is not over {parameters.data_blocks} blocks, level {level}"
            " goes on behind the last digest",
            step="check verity root",
            object="data_blocks",
        )


def _top_block(parameters: VerityParameters, read_at: ReadAt, read_hash_at: ReadAt | None) -> bytes:
    if read_hash_at is None:
        _check_one_device(parameters)
    if not parameters.levels:
        block = _read(read_at, 0, parameters.data_block_size, "data block 0")
        _expect(parameters, block, parameters.root_digest, "data block 0, which is the root")
        return block
    read_hash_at = read_hash_at or read_at
    size = parameters.hash_block_size
    block = _read(read_hash_at, parameters.tree_offset_bytes, size, "the top hash block")
    if parameters.hash_blocks > 1:
        _read(read_hash_at, parameters.end_bytes - size, size, "the last hash block")
    _expect(parameters, block, parameters.root_digest, "the top hash block")
    check_spare(parameters, parameters.levels - 1, block)
    return block


def _check_one_device(parameters: VerityParameters) -> None:
    occupied = parameters.superblock or parameters.levels
    if occupied and parameters.hash_offset_bytes < parameters.data_size_bytes:
        raise CallError(
            "invalid",
            f"hash_offset_bytes: the hash area at {parameters.hash_offset_bytes} overlaps the data,"
            f" which ends at {parameters.data_size_bytes}",
            step="check verity root",
            object="hash_offset_bytes",
        )


def _read(read_at: ReadAt, offset_bytes: int, size: int, what: str) -> bytes:
    block = read_at(offset_bytes, size)
    if len(block) != size:
        raise CallError(
            "integrity",
            f"cannot read {what}: the device ends {size - len(block)} bytes too early"
            f" ({size} bytes at {offset_bytes})",
            step="check verity root",
            object=what,
        )
    return block


def _expect(parameters: VerityParameters, block: bytes, expected: bytes, what: str) -> None:
    found = block_digest(parameters, block)
    if found != expected:
        raise CallError(
            "integrity",
            f"{what} has the digest {found.hex()}, expected {expected.hex()}",
            step="check verity root",
            object=what,
        )
