"""What defines a verity target: from a request, from a superblock, and the shape of its tree.

The superblock is that of cryptsetup 2.6 (lib/verity/verity.c), version 1: 512 bytes, little
endian. The kernel never reads it. Source of the tree: drivers/md/dm-verity-target.c (Linux 6.1).
"""

import functools
import struct
from collections.abc import Callable

from guestagent.api.checks import MAX_BYTES, FieldError
from guestagent.api.devices import (
    DIGEST_BYTES,
    HASH_TYPE_CHROMEOS,
    HASH_TYPE_NORMAL,
    MAX_SALT_BYTES,
    TREE_FIELDS,
    VerityTerms,
    WholeVerityTerms,
)
from vsock.errors import CallError

__all__ = (
    "PART_STEP_BYTES",
    "SUPERBLOCK_BYTES",
    "VerityParameters",
    "check_kernel_limits",
    "hash_area_offset",
    "level_blocks",
    "parse_superblock",
    "read_superblock",
    "superblock_uuid",
)

SUPERBLOCK_BYTES = 512
#: In a pack, zeros fill up the data of a layer to whole units of this, and the hash area follows.
#: One hash block covers so much (128 blocks of 4 KiB, with SHA-256), or a whole number of them do.
PART_STEP_BYTES = 512 * 1024
_SIGNATURE = b"verity\0\0"
_VERSION = 1
_LAYOUT = struct.Struct("<8sII16s32sIIQH6s256s168s")
#: Block sizes that a superblock may hold.
_FORMAT_BLOCK_SIZES = tuple(512 << shift for shift in range(11))
_ALGORITHM_CHARACTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_()")
#: What formatters use; a request without a superblock need not say them.
_DEFAULTS: dict[str, object] = {
    "algorithm": "sha256",
    "hash_type": HASH_TYPE_NORMAL,
    "data_block_size": 4096,
    "hash_block_size": 4096,
}


class VerityParameters(WholeVerityTerms):
    """All that defines a verity target over its devices; checked, so that it always makes sense."""

    def check(self) -> None:
        super().check()
        step = SUPERBLOCK_BYTES if self.superblock else self.hash_block_size
        if self.hash_offset_bytes % step:
            raise FieldError(
                "hash_offset_bytes", f"{self.hash_offset_bytes} is no multiple of {step}"
            )
        if self.end_bytes > MAX_BYTES:
            raise FieldError("hash_offset_bytes", f"the hash tree would end at {self.end_bytes}")

    @classmethod
    def from_request(
        cls, terms: VerityTerms, *, hash_offset_bytes: int, superblock: bytes | None = None
    ) -> "VerityParameters":
        """Bring together what a request says and what the device's superblock says.

        What both say must be equal. Without the bytes of a superblock the request must hold
        ``salt`` and ``data_blocks``; algorithm, hash type and block sizes have the defaults of
        veritysetup. An unknown root digest becomes zeros.

        Raises:
            CallError: ``integrity``, the superblock is damaged or contradicts the request;
                ``invalid``, a value is missing or impossible; ``unsupported``, the superblock
                is whole but beyond the limits of layers. ``object`` names the field.
        """
        found = terms
        if superblock is not None:
            found = parse_superblock(superblock)
            _check_agreement(terms, found)
        try:
            fields = {field: _said(found, field) for field in TREE_FIELDS}
            root_digest = terms.root_digest
            if root_digest is None:
                root_digest = bytes(DIGEST_BYTES[str(fields["algorithm"])])
            return cls(
                root_digest=root_digest,
                hash_offset_bytes=hash_offset_bytes,
                superblock=terms.superblock,
                **fields,  # type: ignore[arg-type]  # each is of the type that VerityTerms has
            )
        except FieldError as problem:
            raise CallError(
                "invalid", str(problem), step="resolve verity", object=problem.field
            ) from None

    def pack_superblock(self, uuid: bytes) -> bytes:
        """Return the 512 bytes of a superblock. ``uuid`` has 16 bytes."""
        if len(uuid) != 16:
            raise ValueError(f"a uuid has 16 bytes, not {len(uuid)}")
        return _LAYOUT.pack(
            _SIGNATURE,
            _VERSION,
            self.hash_type,
            uuid,
            self.algorithm.encode("ascii"),
            self.data_block_size,
            self.hash_block_size,
            self.data_blocks,
            len(self.salt),
            bytes(6),
            self.salt,
            bytes(168),
        )

    # --- the tree

    @property
    def digest_bytes(self) -> int:
        return DIGEST_BYTES[self.algorithm]

    @property
    def hashes_per_block_bits(self) -> int:
        """Log2 of how many digests a hash block holds, rounded down as the kernel does."""
        return (self.hash_block_size // self.digest_bytes).bit_length() - 1

    @property
    def slot_size_bytes(self) -> int:
        """The distance between two digests in a hash block."""
        if self.hash_type == HASH_TYPE_CHROMEOS:
            return self.digest_bytes
        return self.hash_block_size >> self.hashes_per_block_bits

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """Hash blocks of each level, level 0 (over the data) first; the last is always 1."""
        return level_blocks(self.data_blocks, 1 << self.hashes_per_block_bits)

    @property
    def levels(self) -> int:
        return len(self.level_blocks)

    @property
    def level_offsets_bytes(self) -> tuple[int, ...]:
        """Where each level starts on the hash device, level 0 first."""
        offsets = []
        end = self.end_bytes
        for count in self.level_blocks:
            end -= count * self.hash_block_size
            offsets.append(end)
        return tuple(offsets)

    @property
    def hash_blocks(self) -> int:
        """Blocks of the tree, without the superblock."""
        return sum(self.level_blocks)

    @property
    def hash_start_block(self) -> int:
        """Where the tree starts, in hash blocks: the argument of the table line."""
        reserved = SUPERBLOCK_BYTES if self.superblock else 0
        return -(-(self.hash_offset_bytes + reserved) // self.hash_block_size)

    @property
    def data_size_bytes(self) -> int:
        return self.data_blocks * self.data_block_size

    @property
    def tree_offset_bytes(self) -> int:
        return self.hash_start_block * self.hash_block_size

    @property
    def end_bytes(self) -> int:
        """Where the hash area ends."""
        return self.tree_offset_bytes + self.hash_blocks * self.hash_block_size


@functools.lru_cache(maxsize=64)
def level_blocks(data_blocks: int, hashes_per_block: int) -> tuple[int, ...]:
    """Return the hash blocks of each level over so many data blocks, level 0 first."""
    counts = []
    count = data_blocks
    while count > 1:
        count = -(-count // hashes_per_block)
        counts.append(count)
    return tuple(counts)


def hash_area_offset(
    terms: VerityTerms, *, separate: bool, data_size_bytes: int | None = None
) -> int | None:
    """Return where the hash area starts, in bytes; None if nothing tells.

    That is where ``terms`` say; at the start of a hash device of its own (``separate``); or behind
    the data, whose size follows from ``data_blocks`` or is at least ``data_size_bytes``.
    """
    if terms.hash_offset_bytes is not None:
        return terms.hash_offset_bytes
    if separate:
        return 0
    unit = terms.data_block_size or 4096
    if terms.data_blocks is not None:
        data_size_bytes = terms.data_blocks * unit
    if data_size_bytes is None:
        return None
    if not terms.superblock:
        unit = max(unit, terms.hash_block_size or 4096)
    return -(-data_size_bytes // unit) * unit


def read_superblock(
    terms: VerityTerms, hash_offset_bytes: int, read_at: Callable[[int, int], bytes]
) -> tuple[int, bytes | None]:
    """Return where the hash area starts, and the bytes of its superblock, if it is to have one.

    ``read_at`` reads the device. What is not at ``hash_offset_bytes``, and not said by ``terms`` to
    be there, may be where the hash area of a layer of a pack is (``PART_STEP_BYTES``).

    Raises:
        OSError: as ``read_at``.
    """
    if not terms.superblock:
        return hash_offset_bytes, None
    raw = read_at(hash_offset_bytes, SUPERBLOCK_BYTES)
    if terms.hash_offset_bytes is None and not raw.startswith(_SIGNATURE):
        in_pack_bytes = -(-hash_offset_bytes // PART_STEP_BYTES) * PART_STEP_BYTES
        found = read_at(in_pack_bytes, SUPERBLOCK_BYTES)
        if found.startswith(_SIGNATURE):
            return in_pack_bytes, found
    return hash_offset_bytes, raw


def superblock_uuid(raw: bytes) -> bytes:
    """Return the 16 bytes of the uuid in a superblock that was parsed before."""
    uuid: bytes = _LAYOUT.unpack_from(raw)[3]
    return uuid


def check_kernel_limits(parameters: VerityParameters, *, logical_block_size: int) -> None:
    """Refuse blocks that are smaller than the device's own, which no kernel maps.

    Raises:
        CallError: ``unsupported``; ``object`` is the field.

    Source: drivers/md/dm-verity-target.c, verity_ctr (Linux 6.1).
    """
    for field in ("data_block_size", "hash_block_size"):
        size = getattr(parameters, field)
        if size < logical_block_size:
            raise CallError(
                "unsupported",
                f"{field}: {size} bytes cannot be mapped on a device with logical blocks of "
                f"{logical_block_size} bytes",
                step="check verity limits",
                object=field,
            )


def parse_superblock(raw: bytes) -> VerityTerms:
    """Read a superblock: the fields of ``TREE_FIELDS``. Every byte is checked, padding included.

    Raises:
        CallError: ``integrity``, it is damaged; ``unsupported``, an algorithm or a block size that
            the format allows and layers may not have. ``object`` is the field.
    """
    if len(raw) < SUPERBLOCK_BYTES:
        raise _bad_superblock("superblock", f"only {len(raw)} of {SUPERBLOCK_BYTES} bytes")
    signature, version, hash_type, _uuid, algorithm, *numbers = _LAYOUT.unpack_from(raw)
    data_block_size, hash_block_size, data_blocks, salt_bytes, padding, salt, tail = numbers
    if signature != _SIGNATURE:
        raise _bad_superblock("signature", f"{signature!r} is not {_SIGNATURE!r}")
    if version != _VERSION:
        raise _bad_superblock("version", f"{version} is not {_VERSION}")
    if salt_bytes > MAX_SALT_BYTES:
        raise _bad_superblock("salt_size", f"{salt_bytes} is over {MAX_SALT_BYTES}")
    if (padding + salt[salt_bytes:] + tail).strip(b"\0"):
        raise _bad_superblock("padding", "not zero")
    name = algorithm.rstrip(b"\0")
    if not 0 < len(name) < 32 or not _ALGORITHM_CHARACTERS.issuperset(name):
        raise _bad_superblock("algorithm", f"{name!r} is no name of a hash")
    try:
        return VerityTerms(
            salt=salt[:salt_bytes],
            algorithm=name.decode("ascii"),
            hash_type=hash_type,
            data_blocks=data_blocks,
            data_block_size=data_block_size,
            hash_block_size=hash_block_size,
        )
    except FieldError as problem:
        field, text = problem.field, str(problem).partition(": ")[2]
        sizes = {"data_block_size": data_block_size, "hash_block_size": hash_block_size}
        is_whole = field == "algorithm" or sizes.get(field) in _FORMAT_BLOCK_SIZES
        code = "unsupported" if is_whole else "integrity"
        raise _bad_superblock(field, text, code) from None


def _bad_superblock(field: str, problem: str, code: str = "integrity") -> CallError:
    return CallError(
        code,
        f"bad verity superblock: {field}: {problem}",
        step="parse verity superblock",
        object=field,
    )


def _said(terms: VerityTerms, field: str) -> object:
    value = getattr(terms, field)
    if value is None:
        value = _DEFAULTS.get(field)
    if value is None:
        raise FieldError(field, "missing, and there is no superblock to take it from")
    return value


def _check_agreement(terms: VerityTerms, found: VerityTerms) -> None:
    for field in TREE_FIELDS:
        said, present = getattr(terms, field), getattr(found, field)
        if said is not None and said != present:
            raise CallError(
                "integrity",
                f"{field}: the request says {_show(said)}, the superblock {_show(present)}",
                step="resolve verity",
                object=field,
            )


def _show(value: object) -> str:
    return (value.hex() or "empty") if isinstance(value, bytes) else repr(value)
