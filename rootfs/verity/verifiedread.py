"""Reading data that have a hash tree: what a read returns is what the tree says, or nothing is."""

import functools
import os

from guestagent.storage.verity import VerityParameters
from rootfs.verity.hashing import BlockHash
from vsock.errors import CallError

__all__ = ("VerifiedReader",)

#: Blocks kept, so that small reads one after the other hash a block once.
_KEPT_BLOCKS = 256


class VerifiedReader:
    """Reads the data in ``fd`` (borrowed) from ``base_offset_bytes`` on and compares each block
    with its digest in level 0 of the tree, which ``parameters`` place behind it.

    Level 0 itself is trusted here: see that it leads to the root digest (``compose_tree``, or
    ``rootfs.verity.treecompare``). ``name`` is for errors.
    """

    def __init__(
        self, fd: int, parameters: VerityParameters, *, base_offset_bytes: int, name: str
    ) -> None:
        self._fd = fd
        self._parameters = parameters
        self._base = base_offset_bytes
        self._name = name
        self._hash = BlockHash.of_level(parameters, parameters.data_block_size)
        self._bits = parameters.hashes_per_block_bits
        self._level_0 = parameters.level_offsets_bytes[0] if parameters.levels else None
        self._block = functools.lru_cache(maxsize=_KEPT_BLOCKS)(self._read_block)
        self._slots = functools.lru_cache(maxsize=_KEPT_BLOCKS)(self._read_slots)

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Return bytes of the data.

        Raises:
            CallError: ``integrity``, they are not what was hashed; ``object`` is the name.
            OSError: as read(2).
        """
        if not size_bytes:
            return b""
        unit = self._parameters.data_block_size
        end_bytes = offset_bytes + size_bytes
        first, end = offset_bytes // unit, -(-end_bytes // unit)
        data = b"".join(self._block(number) for number in range(first, end))
        return data[offset_bytes - first * unit : end_bytes - first * unit]

    def _read_block(self, number: int) -> bytes:
        own = self._parameters
        if not 0 <= number < own.data_blocks:
            raise self._wrong(f"data block {number} is not one of its {own.data_blocks}")
        unit = own.data_block_size
        block = os.pread(self._fd, unit, self._base + number * unit)
        expected = own.root_digest
        if self._level_0 is not None:
            at = (number & ((1 << self._bits) - 1)) * own.slot_size_bytes
            expected = self._slots(number >> self._bits)[at : at + own.digest_bytes]
        if self._hash.slot_of(block)[: own.digest_bytes] != expected:
            raise self._wrong(f"data block {number} does not match its hash tree")
        return block

    def _read_slots(self, index: int) -> bytes:
        assert self._level_0 is not None
        size_bytes = self._parameters.hash_block_size
        return os.pread(self._fd, size_bytes, self._base + self._level_0 + index * size_bytes)

    def _wrong(self, problem: str) -> CallError:
        return CallError(
            "integrity",
            f"cannot read {self._name!r}: {problem}",
            step="read verified data",
            object=self._name,
        )
