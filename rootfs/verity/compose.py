"""The hash tree of a concatenation, composed of the trees that its parts have already.

A hash block of level 0 covers consecutive data blocks. Each part of the concatenation is filled up
with zeros to a whole number of 512 KiB, which is a whole number of such hash blocks for every block
size and algorithm. So the level 0 of the concatenation is that of its parts, one after the other;
only the last hash block of a part gets the digests of the zeros behind it. The levels above are
computed: with SHA-256 and blocks of 4 KiB that is 1/128 of the hashing, and no data are read.

The tree is that of ``veritysetup format`` over the concatenation. All parts must have the same
salt, algorithm, hash type and block sizes.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

from guestagent.storage.verity import (
    PART_STEP_BYTES,
    FieldError,
    VerityParameters,
    check_spare,
)
from rootfs.imagefile.ranges import FileRange, copy_range, round_up
from rootfs.verity.hashing import BlockHash
from rootfs.verity.hashtree import Level, build_level, data_level, levels_above
from rootfs.verity.runs import Run, pieces
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("NewPart", "Part", "compose_tree", "composed_parameters")

#: What must be equal for all parts.
_SHARED_FIELDS = ("salt", "algorithm", "hash_type", "data_block_size", "hash_block_size")
_STEP = "compose the hash tree"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Data with a hash tree of their own. ``fd`` (borrowed) holds the tree, whose place in
    ``parameters`` counts from ``base_offset_bytes``. ``name`` is for errors."""

    name: str
    fd: int
    parameters: VerityParameters
    base_offset_bytes: int = 0

    @property
    def padded_bytes(self) -> int:
        """The size of the data with the zeros behind them."""
        return round_up(self.parameters.data_size_bytes, PART_STEP_BYTES)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NewPart:
    """Data without a hash tree, which are hashed: ``padded_bytes``, whole 512 KiB, of the file
    ``fd`` (borrowed) from ``offset_bytes`` on."""

    fd: int
    offset_bytes: int
    padded_bytes: int

    def __post_init__(self) -> None:
        if self.padded_bytes <= 0 or self.padded_bytes % PART_STEP_BYTES:
            raise ValueError(f"{self.padded_bytes} is not a multiple of {PART_STEP_BYTES}")


def composed_parameters(
    parts: Sequence[Part | NewPart], *, superblock: bool = True
) -> VerityParameters:
    """Return what defines the tree of a concatenation, but for its root digest, which is zeros.

    The hash area is behind the data.

    Raises:
        CallError: ``invalid``, no parts with a tree, parts whose trees cannot be composed
            (``object`` is the name of the part), or too much data.
    """
    hashed = [part for part in parts if isinstance(part, Part)]
    if not hashed:
        raise CallError("invalid", f"cannot {_STEP}: no part has a hash tree", step=_STEP)
    first = hashed[0]
    for part in hashed[1:]:
        for field in _SHARED_FIELDS:
            said, expected = getattr(part.parameters, field), getattr(first.parameters, field)
            if said != expected:
                raise CallError(
                    "invalid",
                    f"cannot {_STEP}: {part.name!r} has the {field} {_shown(said)}, "
                    f"{first.name!r} has {_shown(expected)}",
                    step=_STEP,
                    object=part.name,
                )
    data_size_bytes = sum(part.padded_bytes for part in parts)
    shared = first.parameters
    try:
        return shared.replace(
            root_digest=bytes(shared.digest_bytes),
            data_blocks=data_size_bytes // shared.data_block_size,
            hash_offset_bytes=data_size_bytes,
            superblock=superblock,
        )
    except FieldError as problem:
        raise CallError("invalid", f"cannot {_STEP}: {problem}", step=_STEP) from None


def compose_tree(
    parts: Sequence[Part | NewPart],
    parameters: VerityParameters,
    tree_fd: int,
    tree_offset_bytes: int,
    *,
    workers: int | None = None,
    accelerate: bool = True,
    deadline: Deadline | None = None,
) -> bytes:
    """Write the tree of the concatenation of ``parts`` to ``tree_fd``; return the root digest.

    ``parameters`` are those of ``composed_parameters``. What the tree does not fill in ``tree_fd``
    (borrowed) must read as zeros. The tree of each part is checked from its hash blocks of level 0
    up to its root digest; whether the data match level 0 is not.

    Raises:
        CallError: ``integrity``, a part has another tree than its root digest says (``object`` is
            its name); ``timeout``, ``cancelled``.
        OSError: reading or writing failed.
    """
    build = functools.partial(
        build_level,
        workers=workers,
        accelerate=accelerate,
        deadline=deadline or Deadline(),
    )
    composer = _Composer(parameters, tree_fd, tree_offset_bytes)
    for part in parts:
        if deadline is not None:
            deadline.check(_STEP)
        if isinstance(part, Part):
            composer.append(part)
        else:
            build(composer.append_new(part))
    for level in levels_above(parameters, composer.data, tree_offset_bytes):
        build(level)
    composer.check_parts()
    return composer.digest_of(tree_offset_bytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A part, and which hash blocks of level 0 of the tree are its own.

    ``last`` is the last of them as the part has it, where that is not as the tree has it.
    """

    part: Part
    leaves: Run
    last: bytes | None


class _Composer:
    """The tree as it grows. "Leaves" are hash blocks of level 0."""

    def __init__(self, parameters: VerityParameters, tree_fd: int, tree_offset_bytes: int) -> None:
        self.data = data_level(parameters, tree_fd, tree_fd, tree_offset_bytes)
        self._parameters = parameters
        self._tree_fd = tree_fd
        self._size_bytes = parameters.hash_block_size
        self._fan = 1 << parameters.hashes_per_block_bits
        self._hash = BlockHash.of_level(parameters, self._size_bytes)
        self._zero_slot = self.data.block_hash.slot_of(bytes(parameters.data_block_size))
        self._level_1_bytes = tree_offset_bytes - parameters.tree_offset_bytes
        if parameters.levels > 1:
            self._level_1_bytes += parameters.level_offsets_bytes[1]
        self._placed: list[_Placed] = []
        self._leaves = 0

    def append(self, part: Part) -> None:
        own = part.parameters
        covered_bytes = self._fan * own.data_block_size
        count = -(-own.data_size_bytes // covered_bytes)
        spare = count * self._fan - own.data_blocks
        last = None
        if not spare:
            self._copy_leaves(part, count)
        else:
            self._copy_leaves(part, count - 1)
            last = self._last_leaf(part)
            used_bytes = (self._fan - spare) * own.slot_size_bytes
            filled = last[:used_bytes] + self._zero_slot * spare
            self._write_leaf(count - 1, filled.ljust(self._size_bytes, b"\0"))
        zeros = (self._zero_slot * self._fan).ljust(self._size_bytes, b"\0")
        for index in range(count, part.padded_bytes // covered_bytes):
            self._write_leaf(index, zeros)
        self._placed.append(
            _Placed(part=part, leaves=Run(first=self._leaves, count=count), last=last)
        )
        self._leaves += part.padded_bytes // covered_bytes

    def append_new(self, part: NewPart) -> Level:
        """Return the level of the data, to be hashed."""
        level = dataclasses.replace(
            self.data,
            fd=part.fd,
            offset_bytes=part.offset_bytes,
            blocks=part.padded_bytes // self._parameters.data_block_size,
            slots_offset_bytes=self._leaf_offset(0),
        )
        self._leaves += level.blocks // self._fan
        return level

    def _copy_leaves(self, part: Part, count: int) -> None:
        if not count:
            return
        start = part.base_offset_bytes + part.parameters.level_offsets_bytes[0]
        extent = FileRange(offset_bytes=start, size_bytes=count * self._size_bytes)
        for _ in copy_range(part.fd, extent, self._tree_fd, self._leaf_offset(0)):
            pass

    def _last_leaf(self, part: Part) -> bytes:
        own = part.parameters
        if not own.levels:  # the digest of its one data block is the root digest
            return own.root_digest.ljust(self._size_bytes, b"\0")
        end = own.level_offsets_bytes[0] + own.level_blocks[0] * self._size_bytes
        last = os.pread(part.fd, self._size_bytes, part.base_offset_bytes + end - self._size_bytes)
        if len(last) < self._size_bytes:
            raise _changed(part, "its hash tree is cut short")
        check_spare(own, 0, last)
        return last

    def _leaf_offset(self, index: int) -> int:
        """Return where the leaf of that index of the next part goes."""
        return self.data.slots_offset_bytes + (self._leaves + index) * self._size_bytes

    def _write_leaf(self, index: int, leaf: bytes) -> None:
        os.pwrite(self._tree_fd, leaf, self._leaf_offset(index))

    def check_parts(self) -> None:
        """See that the leaves of each part lead to its root digest.

        Their digests are in the tree by now, but for the leaves that were filled up.
        """
        for placed in self._placed:
            own = placed.part.parameters
            if not own.levels:
                continue
            slots = self._slots(placed.leaves)
            if placed.last is not None:
                slots[-1] = self._hash.slot_of(placed.last)
            while len(slots) > 1:
                blocks = (
                    b"".join(slots[at : at + self._fan]).ljust(self._size_bytes, b"\0")
                    for at in range(0, len(slots), self._fan)
                )
                slots = [self._hash.slot_of(block) for block in blocks]
            found = slots[0][: own.digest_bytes]
            if found != own.root_digest:
                raise _changed(
                    placed.part,
                    f"its hash tree leads to the root digest {found.hex()}, not "
                    f"{own.root_digest.hex()}",
                )

    def _slots(self, run: Run) -> list[bytes]:
        """Return the digests of leaves, as level 1 has them."""
        slot_bytes = self._hash.slot_size_bytes
        if self._parameters.levels < 2:  # the one leaf is the top
            return [self.digest_of(self.data.slots_offset_bytes).ljust(slot_bytes, b"\0")]
        slots: list[bytes] = []
        for first, count in pieces(run, self._fan):
            block, index = divmod(first, self._fan)
            at = self._level_1_bytes + block * self._size_bytes + index * slot_bytes
            found = os.pread(self._tree_fd, count * slot_bytes, at)
            slots += (found[n : n + slot_bytes] for n in range(0, len(found), slot_bytes))
        return slots

    def digest_of(self, offset_bytes: int) -> bytes:
        """Return the digest of a hash block of the tree."""
        block = os.pread(self._tree_fd, self._size_bytes, offset_bytes)
        return self._hash.slot_of(block)[: self._parameters.digest_bytes]


def _changed(part: Part, problem: str) -> CallError:
    return CallError(
        "integrity",
        f"cannot {_STEP}: {part.name!r} has changed: {problem}",
        step=_STEP,
        object=part.name,
    )


def _shown(value: object) -> str:
    return (value.hex() or "empty") if isinstance(value, bytes) else str(value)
