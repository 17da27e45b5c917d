"""What defines a verity target: the geometry of its tree, and who may say so.

Source: drivers/md/dm-verity-target.c (Linux 6.1).
"""

import functools

from guestagent.storage.verity.superblock import (
    DIGEST_SIZES,
    HASH_TYPE_CHROMEOS,
    HASH_TYPE_NORMAL,
    LIMIT_BYTES,
    MIN_BLOCK_SIZE_BYTES,
    SUPERBLOCK_BYTES,
    FieldError,
    Superblock,
    check_geometry,
)
from vsock.errors import CallError
from vsock.record import Record

TYPE_CHECKING = False  # as typing's, without its import
if TYPE_CHECKING:
    from typing import TypeVar

    Value = TypeVar("Value", bytes, int)

__all__ = (
    "VerityParameters",
    "check_kernel_limits",
    "resolve",
    "superblock_offset",
)

_DEFAULT_BLOCK_SIZE_BYTES = 4096


class VerityParameters(Record):
    """All that defines a verity target over its devices; checked, so that it always makes sense.

    ``hash_offset_bytes`` leads to the superblock, or to the tree when there is none.
    """

    root_digest: bytes
    salt: bytes
    algorithm: str
    hash_type: int
    data_blocks: int
    data_block_size_bytes: int
    hash_block_size_bytes: int
    hash_offset_bytes: int
    has_superblock: bool

    def check(self) -> None:
        """Raise FieldError for a value that no verity target can have."""
        if self.algorithm not in DIGEST_SIZES:
            known = ", ".join(DIGEST_SIZES)
            raise FieldError("algorithm", f"{self.algorithm!r} is none of {known}")
        if len(self.root_digest) != self.digest_size_bytes:
            raise FieldError(
                "root_digest",
                f"{len(self.root_digest)} bytes, but {self.algorithm} has {self.digest_size_bytes}",
            )
        check_geometry(self)
        if not 0 <= self.hash_offset_bytes < LIMIT_BYTES:
            raise FieldError("hash_offset_bytes", f"{self.hash_offset_bytes} is out of range")
        step = MIN_BLOCK_SIZE_BYTES if self.has_superblock else self.hash_block_size_bytes
        if self.hash_offset_bytes % step:
            raise FieldError(
                "hash_offset_bytes", f"{self.hash_offset_bytes} is no multiple of {step}"
            )
        if self.end_bytes >= LIMIT_BYTES:
            raise FieldError("hash_offset_bytes", f"the hash tree would end at {self.end_bytes}")

    @property
    def digest_size_bytes(self) -> int:
        return DIGEST_SIZES[self.algorithm]

    @property
    def hashes_per_block_bits(self) -> int:
        """Log2 of how many digests a hash block holds, rounded down as the kernel does."""
        return (self.hash_block_size_bytes // DIGEST_SIZES[self.algorithm]).bit_length() - 1

    @property
    def slot_size_bytes(self) -> int:
        """The distance between two digests in a hash block."""
        if self.hash_type == HASH_TYPE_CHROMEOS:
            return self.digest_size_bytes
        return self.hash_block_size_bytes >> self.hashes_per_block_bits

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """Hash blocks of each level, level 0 (over the data) first; the last is always 1."""
        return _level_blocks(self.data_blocks, self.hashes_per_block_bits)

    @property
    def levels(self) -> int:
        return len(self.level_blocks)

    @property
    def level_offsets_bytes(self) -> tuple[int, ...]:
        """Where each level starts on the hash device, level 0 first."""
        offsets = []
        end = self.end_bytes
        for count in self.level_blocks:
            end -= count * self.hash_block_size_bytes
            offsets.append(end)
        return tuple(offsets)

    @property
    def hash_blocks(self) -> int:
        """Blocks of the tree, without the superblock."""
        return sum(self.level_blocks)

    @property
    def hash_start_block(self) -> int:
        """Where the tree starts, in hash blocks: the argument of the table line."""
        reserved = SUPERBLOCK_BYTES if self.has_superblock else 0
        return -(-(self.hash_offset_bytes + reserved) // self.hash_block_size_bytes)

    @property
    def data_size_bytes(self) -> int:
        return self.data_blocks * self.data_block_size_bytes

    @property
    def tree_offset_bytes(self) -> int:
        return self.hash_start_block * self.hash_block_size_bytes

    @property
    def end_bytes(self) -> int:
        """Where the hash area ends."""
        return self.tree_offset_bytes + self.hash_blocks * self.hash_block_size_bytes


@functools.lru_cache(maxsize=64)
def _level_blocks(data_blocks: int, hashes_per_block_bits: int) -> tuple[int, ...]:
    per_block = 1 << hashes_per_block_bits
    counts = []
    count = data_blocks
    while count > 1:
        count = -(-count // per_block)
        counts.append(count)
    return tuple(counts)


def superblock_offset(
    *, hash_offset_bytes: int | None, data_blocks: int | None, data_block_size: int | None
) -> int:
    """Return where a request says the hash area is: told, or right behind the data.

    Raises:
        CallError: ``invalid``, neither was said, or it is no place for a superblock.
    """
    offset_bytes = hash_offset_bytes
    if offset_bytes is None:
        if data_blocks is None:
            raise CallError(
                "invalid",
                "cannot find the hash area: neither hash_offset_bytes nor data_blocks is given",
                step="resolve verity",
                object="hash_offset_bytes",
            )
        offset_bytes = data_blocks * _or_default(data_block_size)
    if not 0 <= offset_bytes < LIMIT_BYTES or offset_bytes % SUPERBLOCK_BYTES:
        raise CallError(
            "invalid",
            f"hash_offset_bytes: {offset_bytes} is no place for a hash area",
            step="resolve verity",
            object="hash_offset_bytes",
        )
    return offset_bytes


def resolve(
    *,
    root_digest: bytes,
    salt: bytes | None = None,
    algorithm: str | None = None,
    hash_type: int | None = None,
    data_blocks: int | None = None,
    data_block_size: int | None = None,
    hash_block_size: int | None = None,
    hash_offset_bytes: int | None = None,
    superblock: Superblock | None = None,
) -> VerityParameters:
    """Bring together what a request says and what the device's superblock says.

    What both say must be equal. Without a superblock ``salt`` and ``data_blocks`` must be in the
    request; the algorithm is then sha256, the hash type 1 and blocks have 4096 bytes unless said
    otherwise. The hash area is right behind the data unless said otherwise.

    Raises:
        CallError: ``integrity``, the two disagree; ``invalid``, a value is missing or impossible.
            ``object`` is the name of the field in the request.
    """
    try:
        if superblock is not None:
            terms = superblock
            asked: dict[str, object] = {
                "salt": salt,
                "algorithm": algorithm,
                "hash_type": hash_type,
                "data_blocks": data_blocks,
                "data_block_size": data_block_size,
                "hash_block_size": hash_block_size,
            }
            _check_agreement(asked, superblock)
        else:
            terms = Superblock(
                uuid=bytes(16),
                hash_type=HASH_TYPE_NORMAL if hash_type is None else hash_type,
                algorithm="sha256" if algorithm is None else algorithm,
                data_block_size_bytes=_or_default(data_block_size),
                hash_block_size_bytes=_or_default(hash_block_size),
                data_blocks=_needed("data_blocks", data_blocks),
                salt=_needed("salt", salt),
            )
        return VerityParameters(
            root_digest=root_digest,
            salt=terms.salt,
            algorithm=terms.algorithm,
            hash_type=terms.hash_type,
            data_blocks=terms.data_blocks,
            data_block_size_bytes=terms.data_block_size_bytes,
            hash_block_size_bytes=terms.hash_block_size_bytes,
            hash_offset_bytes=superblock_offset(
                hash_offset_bytes=hash_offset_bytes,
                data_blocks=terms.data_blocks,
                data_block_size=terms.data_block_size_bytes,
            ),
            has_superblock=superblock is not None,
        )
    except FieldError as problem:
        raise CallError(
            "invalid", str(problem), step="resolve verity", object=problem.field
        ) from None


def check_kernel_limits(
    parameters: VerityParameters, *, page_size_bytes: int, logical_block_size_bytes: int
) -> None:
    """Refuse what the format allows but this kernel and device cannot map.

    Raises:
        CallError: ``unsupported``; ``object`` is the field.

    Source: drivers/md/dm-verity-target.c, verity_ctr (Linux 6.1).
    """
    for field, size in (
        ("data_block_size", parameters.data_block_size_bytes),
        ("hash_block_size", parameters.hash_block_size_bytes),
    ):
        # only data blocks are bound by the page size; dm-bufio takes larger hash blocks
        too_large = field == "data_block_size" and size > page_size_bytes
        if size < logical_block_size_bytes or too_large:
            raise CallError(
                "unsupported",
                f"{field}: {size} bytes cannot be mapped with pages of {page_size_bytes} bytes on "
                f"a device with logical blocks of {logical_block_size_bytes} bytes",
                step="check verity limits",
                object=field,
            )


def _needed(field: str, value: "Value | None") -> "Value":
    if value is None:
        raise FieldError(field, "missing, and there is no superblock to take it from")
    return value


def _or_default(block_size_bytes: int | None) -> int:
    return _DEFAULT_BLOCK_SIZE_BYTES if block_size_bytes is None else block_size_bytes


def _check_agreement(asked: dict[str, object], superblock: Superblock) -> None:
    for field, value in asked.items():
        if value is None:
            continue
        present = getattr(superblock, f"{field}_bytes" if field.endswith("_size") else field)
        if value != present:
            raise CallError(
                "integrity",
                f"{field}: the request says {_show(value)}, the superblock {_show(present)}",
                step="resolve verity",
                object=field,
            )


def _show(value: object) -> str:
    return (value.hex() or "empty") if isinstance(value, bytes) else repr(value)
