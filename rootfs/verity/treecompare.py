"""Comparing a hash tree with what it is over: every block is hashed, on all cores."""

import array
import dataclasses
import os
import struct
from collections.abc import Callable, Iterator

from guestagent.storage.verity import VerityParameters
from rootfs.verity.hashtree import Level, Progress, levels_of, run_level, spans
from rootfs.verity.runs import Run, pairs
from vsock.deadline import Deadline

__all__ = ("compare_tree",)

_RUN = struct.Struct("<QQ")


def compare_tree(
    parameters: VerityParameters,
    fd: int,
    hash_fd: int,
    *,
    base_offset_bytes: int = 0,
    first_block: int = 0,
    end_block: int | None = None,
    workers: int | None = None,
    accelerate: bool = True,
    deadline: Deadline,
    progress: Progress | None = None,
) -> list["array.array[int]"]:
    """Return for each level of hashing, data first, pairs (first block, count) that differ.

    Data and tree are at ``base_offset_bytes`` of the descriptors (borrowed). Of the data, blocks
    ``first_block`` to ``end_block - 1`` are compared, of the tree what is above them.

    Raises:
        CallError: ``timeout``, ``cancelled``.
        OSError: as read(2).
    """
    if not parameters.levels:
        return []
    end_block = parameters.data_blocks if end_block is None else end_block
    found: list[array.array[int]] = []
    for number, level in enumerate(_levels(parameters, fd, hash_fd, base_offset_bytes)):
        bits = number * parameters.hashes_per_block_bits
        differing: array.array[int] = array.array("Q")
        run_level(
            level,
            spans(level, first_block >> bits, ((end_block - 1) >> bits) + 1),
            _comparer(level, accelerate),
            differing.frombytes,
            workers=workers,
            deadline=deadline,
            step="compare blocks",
            progress=None if number else progress,
        )
        found.append(differing)
    return found


def _levels(
    parameters: VerityParameters, fd: int, hash_fd: int, base_offset_bytes: int
) -> Iterator[Level]:
    tree_offset_bytes = base_offset_bytes + parameters.tree_offset_bytes
    for number, level in enumerate(levels_of(parameters, fd, hash_fd, tree_offset_bytes)):
        if number:
            # what a hole must lead to is known, but not that it is what is there
            yield dataclasses.replace(level, uniform=())
        elif base_offset_bytes:
            # the holes that were found are those at the start of the file
            yield dataclasses.replace(level, offset_bytes=base_offset_bytes, uniform=())
        else:
            yield level


def _comparer(level: Level, accelerate: bool) -> Callable[[], Callable[[Run], bytes]]:
    """Return what makes a worker; a worker returns the pairs of a run that differ."""
    slot_size_bytes = level.block_hash.slot_size_bytes
    digest_bytes = level.block_hash.digest_bytes

    def make_worker() -> Callable[[Run], bytes]:
        batches = level.batches(accelerate)

        def work(run: Run) -> bytes:
            differing: list[int] = []
            for first, slots in batches(run):
                stored = os.pread(level.slots_fd, len(slots), level.slot_offset(first))
                if stored == slots:
                    continue
                # the kernel does not look at what pads a slot; the hash above does
                starts = range(0, len(slots), slot_size_bytes)
                differing += [
                    first + start // slot_size_bytes
                    for start in starts
                    if stored[start : start + digest_bytes] != slots[start : start + digest_bytes]
                ]
            return b"".join(_RUN.pack(*pair) for pair in pairs(differing))

        return work

    return make_worker
