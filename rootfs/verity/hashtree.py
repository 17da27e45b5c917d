"""The hash tree of an image, level by level: built into a file, or compared with one.

Every level is made by the same step: digests of consecutive blocks of one file become slots in
another, first from the image to level 0, then from each level to the one above. The tree is never
in memory. Blocks that are known to be alike (holes of the image, and the hash blocks that holes
lead to) are hashed once.
"""

import dataclasses
import os
import stat
from collections.abc import Callable, Iterator

from guestagent.storage.verity import VerityParameters, block_digest
from rootfs.imagefile.ranges import data_extents, free_ranges
from rootfs.verity import workers as parallel
from rootfs.verity.hashing import BlockHash
from rootfs.verity.multibuffer import open_hasher
from rootfs.verity.runs import Run, pieces
from vsock.deadline import Deadline

__all__ = (
    "Level",
    "Progress",
    "build_level",
    "build_tree",
    "data_level",
    "holes",
    "levels_above",
    "levels_of",
    "run_level",
    "spans",
)

#: A task: long enough to hide its start, short enough to spread evenly and to cancel.
_SPAN_BYTES = 8 * 1024 * 1024
_MAX_SPANS = 16384
#: Below this, starting workers costs more than they save.
_PARALLEL_BYTES = 48 * 1024 * 1024
#: A shorter hole is read like data: it is not worth a task of its own.
_MIN_HOLE_BLOCKS = 64
#: A task over alike blocks only writes their slots.
_ALIKE_SPANS = 128

#: Called with bytes done and bytes in all, of data blocks.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Blocks to hash, where they are, and where their slots belong.

    ``uniform`` are the runs of blocks equal to ``uniform_block``, ascending, apart.
    """

    fd: int
    offset_bytes: int
    blocks: int
    block_hash: BlockHash
    slots_fd: int
    slots_offset_bytes: int
    hash_block_size: int
    hashes_per_block_bits: int
    uniform: tuple[Run, ...]
    uniform_block: bytes

    def slot_offset(self, block: int) -> int:
        """Return where in ``slots_fd`` the slot of a block is."""
        bits = self.hashes_per_block_bits
        within = block & ((1 << bits) - 1)
        return (
            self.slots_offset_bytes
            + (block >> bits) * self.hash_block_size
            + within * self.block_hash.slot_size_bytes
        )

    def batches(self, accelerate: bool = True) -> Callable[[Run], Iterator[tuple[int, bytes]]]:
        """Return a function from a run to its slots, in pieces ``(first block, slots)``."""
        hasher = open_hasher(self.block_hash, self.blocks, accelerate=accelerate)

        def hashed(run: Run) -> Iterator[tuple[int, bytes]]:
            size_bytes = self.block_hash.block_size_bytes
            for first, count in pieces(run, hasher.batch_blocks):
                yield first, hasher.slots(self.fd, self.offset_bytes + first * size_bytes, count)

        def repeated(run: Run) -> Iterator[tuple[int, bytes]]:
            slot = self.block_hash.slot_of(self.uniform_block)
            batch = self.block_hash.max_batch_blocks
            slots = slot * batch
            for first, count in pieces(run, batch):
                yield first, slots if count == batch else slot * count

        return lambda run: repeated(run) if run.alike else hashed(run)


def holes(fd: int, blocks: int, block_size_bytes: int) -> tuple[Run, ...]:
    """Return the runs of blocks that a file does not store and that therefore read as zeros."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return ()
    found = []
    end_bytes = blocks * block_size_bytes
    for hole in free_ranges(data_extents(fd, end_bytes), end_bytes):
        first = -(-hole.offset_bytes // block_size_bytes)
        count = hole.end_bytes // block_size_bytes - first
        if count >= _MIN_HOLE_BLOCKS:
            found.append(Run(first=first, count=count, alike=True))
    return tuple(found)


def spans(level: Level, first: int = 0, end: int | None = None) -> list[Run]:
    """Cut the blocks of a level (or a part of them) into tasks."""
    end = level.blocks if end is None else end
    size_bytes = level.block_hash.block_size_bytes
    length = max(_SPAN_BYTES // size_bytes, (end - first) // _MAX_SPANS, 1)
    length = 1 << (length - 1).bit_length()  # so that batches are not cut
    tasks = []
    position = first
    for run in (*level.uniform, Run(first=end, count=0)):
        hole_first, hole_end = max(run.first, first), min(run.end, end)
        if hole_end < hole_first:
            continue
        tasks += [
            Run(first=at, count=count)
            for at, count in pieces(Run(first=position, count=hole_first - position), length)
        ]
        if hole_end > hole_first:
            hole = Run(first=hole_first, count=hole_end - hole_first)
            tasks += [
                Run(first=at, count=count, alike=True)
                for at, count in pieces(hole, length * _ALIKE_SPANS)
            ]
        position = hole_end
    return tasks


def data_level(
    parameters: VerityParameters,
    fd: int,
    tree_fd: int,
    tree_offset_bytes: int,
    *,
    uniform: tuple[Run, ...] = (),
) -> Level:
    """Return the level of the data blocks; its slots are level 0 of the tree."""
    size_bytes = parameters.data_block_size
    base = tree_offset_bytes - parameters.tree_offset_bytes
    return Level(
        fd=fd,
        offset_bytes=0,
        blocks=parameters.data_blocks,
        block_hash=BlockHash.of_level(parameters, size_bytes),
        slots_fd=tree_fd,
        slots_offset_bytes=base + parameters.level_offsets_bytes[0],
        hash_block_size=parameters.hash_block_size,
        hashes_per_block_bits=parameters.hashes_per_block_bits,
        uniform=uniform,
        uniform_block=bytes(size_bytes),
    )


def levels_of(
    parameters: VerityParameters, fd: int, tree_fd: int, tree_offset_bytes: int
) -> Iterator[Level]:
    """Yield the levels to hash, the data first; the digest of the last one is the root.

    The tree is in ``tree_fd`` at ``tree_offset_bytes``. Not for a tree without levels.
    """
    runs = holes(fd, parameters.data_blocks, parameters.data_block_size)
    data = data_level(parameters, fd, tree_fd, tree_offset_bytes, uniform=runs)
    yield data
    yield from levels_above(parameters, data, tree_offset_bytes)


def levels_above(
    parameters: VerityParameters, data: Level, tree_offset_bytes: int
) -> Iterator[Level]:
    """Yield the levels to hash above that of the data; their blocks and slots are in the tree."""
    level = data
    for above in range(1, parameters.levels):
        level = dataclasses.replace(
            level,
            fd=level.slots_fd,
            offset_bytes=level.slots_offset_bytes,
            blocks=parameters.level_blocks[above - 1],
            block_hash=BlockHash.of_level(parameters, parameters.hash_block_size),
            slots_offset_bytes=tree_offset_bytes
            + parameters.level_offsets_bytes[above]
            - parameters.tree_offset_bytes,
            uniform=_uniform_above(level),
            uniform_block=_uniform_block_above(level),
        )
        yield level


def _uniform_above(level: Level) -> tuple[Run, ...]:
    bits = level.hashes_per_block_bits
    runs = []
    for run in level.uniform:
        first, end = -(-run.first >> bits), run.end >> bits
        if end > first:
            runs.append(Run(first=first, count=end - first, alike=True))
    return tuple(runs)


def _uniform_block_above(level: Level) -> bytes:
    slot = level.block_hash.slot_of(level.uniform_block)
    return (slot * (1 << level.hashes_per_block_bits)).ljust(level.hash_block_size, b"\0")


def build_tree(
    parameters: VerityParameters,
    fd: int,
    tree_fd: int,
    tree_offset_bytes: int,
    *,
    workers: int | None = None,
    accelerate: bool,
    deadline: Deadline,
    progress: Progress | None,
) -> bytes:
    """Write the tree of the image ``fd`` to ``tree_fd`` and return the root digest.

    ``parameters`` say all but the root digest. Both descriptors are borrowed; what the tree does
    not fill in ``tree_fd`` must read as zeros.

    Raises:
        CallError: ``timeout``, ``cancelled``, ``integrity`` (the image shrank while it was read).
        OSError: reading or writing failed.
    """
    if not parameters.levels:
        return block_digest(parameters, os.pread(fd, parameters.data_block_size, 0))
    for number, level in enumerate(levels_of(parameters, fd, tree_fd, tree_offset_bytes)):
        build_level(
            level,
            workers=workers,
            accelerate=accelerate,
            deadline=deadline,
            progress=progress if number == 0 else None,
        )
    size_bytes = parameters.hash_block_size
    return block_digest(parameters, os.pread(tree_fd, size_bytes, tree_offset_bytes))


def run_level(
    level: Level,
    tasks: list[Run],
    make_worker: Callable[[], Callable[[Run], bytes]],
    on_result: Callable[[bytes], None],
    *,
    workers: int | None = None,
    deadline: Deadline,
    step: str,
    progress: Progress | None = None,
) -> None:
    """Run tasks of a level on as many workers as are worth their start.

    Raises:
        CallError, OSError: as ``parallel.run``.
    """
    size_bytes = level.block_hash.block_size_bytes
    total_bytes = sum(run.count for run in tasks) * size_bytes
    dense_bytes = sum(run.count for run in tasks if not run.alike) * size_bytes
    done_bytes = 0

    def on_done(index: int, result: bytes) -> None:
        nonlocal done_bytes
        on_result(result)
        done_bytes += tasks[index].count * size_bytes
        if progress is not None:
            progress(done_bytes, total_bytes)

    parallel.run(
        tasks,
        make_worker,
        on_done,
        workers=workers if dense_bytes >= _PARALLEL_BYTES else 1,
        deadline=deadline,
        step=step,
    )


def build_level(
    level: Level,
    *,
    workers: int | None = None,
    accelerate: bool,
    deadline: Deadline,
    progress: Progress | None = None,
) -> None:
    """Hash the blocks of a level and write their slots.

    Raises:
        CallError, OSError: as ``build_tree``.
    """

    def make_worker() -> Callable[[Run], bytes]:
        batches = level.batches(accelerate)

        def work(run: Run) -> bytes:
            for first, slots in batches(run):
                _write(level.slots_fd, slots, level.slot_offset(first))
            return b""

        return work

    run_level(
        level,
        spans(level),
        make_worker,
        lambda _: None,
        workers=workers,
        deadline=deadline,
        step="hash blocks",
        progress=progress,
    )


def _write(fd: int, data: bytes, offset_bytes: int) -> None:
    written = os.pwrite(fd, data, offset_bytes)
    while written < len(data):  # a nearly full disk takes a part, and then says why
        written += os.pwrite(fd, data[written:], offset_bytes + written)
