"""dm-verity on disk: the superblock, the geometry of the hash tree, and the check of its root.

Pure over bytes: nothing here opens a device. A caller hands in ``read_at`` and gets values or a
``CallError``. The kernel reads neither the superblock nor the root before the first data block is
touched, and loads a table with a wrong root digest without complaint; so what is refused here is
the only thing that is refused before a mount.

The tree: each hash block holds the digests of consecutive blocks of the level below; level 0 is the
one over the data. On the device the top level comes first. One data block has no tree at all: its
own digest is the root.

Source: Documentation/admin-guide/device-mapper/verity.rst and drivers/md/dm-verity-target.c (Linux
6.1); the superblock is that of cryptsetup 2.6 (lib/verity/verity.c), version 1.
"""

import struct
from collections.abc import Callable

from vsock.errors import CallError
from vsock.record import Record

TYPE_CHECKING = False  # as typing's, without its import
if TYPE_CHECKING:
    from typing import Any, TypeVar

    Value = TypeVar("Value", bytes, int)

__all__ = (
    "DIGEST_SIZES",
    "HASH_TYPE_CHROMEOS",
    "HASH_TYPE_NORMAL",
    "MAX_BLOCK_SIZE_BYTES",
    "MAX_SALT_BYTES",
    "MIN_BLOCK_SIZE_BYTES",
    "SUPERBLOCK_BYTES",
    "FieldError",
    "ReadAt",
    "Superblock",
    "VerityParameters",
    "block_digest",
    "check_kernel_limits",
    "check_root",
    "check_spare",
    "check_tree_spine",
    "resolve",
    "sha256",
    "superblock_offset",
)

SUPERBLOCK_BYTES = 512
MIN_BLOCK_SIZE_BYTES = 512
MAX_BLOCK_SIZE_BYTES = 512 * 1024
MAX_SALT_BYTES = 256
#: The salt follows the block in the hash, digests lie end to end.
HASH_TYPE_CHROMEOS = 0
#: The salt precedes the block, each digest starts at a power of two.
HASH_TYPE_NORMAL = 1
#: Bytes of a digest, for each algorithm that is accepted.
DIGEST_SIZES = {"sha1": 20, "sha256": 32, "sha512": 64}

_SIGNATURE = b"verity\0\0"
_VERSION = 1
_LAYOUT = struct.Struct("<8sII16s32sIIQH6s256s168s")
_ALGORITHM_CHARACTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_()")
_LIMIT_BYTES = 1 << 63
_DEFAULT_BLOCK_SIZE_BYTES = 4096

#: Read ``size`` bytes at ``offset_bytes``; fewer only at the end of the device.
ReadAt = Callable[[int, int], bytes]


class FieldError(ValueError):
    """A value is refused; ``field`` says which."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class Superblock(Record):
    """The 512 bytes before a hash tree. ``data_blocks`` counts blocks of ``data_block_size_bytes``.

    ``algorithm`` may be one that ``VerityParameters`` does not accept: this is what is on disk.
    """

    uuid: bytes
    hash_type: int
    algorithm: str
    data_block_size_bytes: int
    hash_block_size_bytes: int
    data_blocks: int
    salt: bytes

    def check(self) -> None:
        """Raise FieldError for a value that the format cannot hold."""
        if len(self.uuid) != 16:
            raise FieldError("uuid", f"{len(self.uuid)} bytes, not 16")
        name = self.algorithm.encode("ascii", "replace")
        if not 0 < len(name) < 32 or not _ALGORITHM_CHARACTERS.issuperset(name):
            raise FieldError("algorithm", f"{self.algorithm!r} is no name of a hash")
        _check_geometry(self)

    @classmethod
    def parse(cls, raw: bytes) -> "Superblock":
        """Read a superblock; every byte is checked, padding included.

        Raises:
            CallError: ``integrity``; ``object`` is the field that is wrong.
        """
        if len(raw) < SUPERBLOCK_BYTES:
            raise _bad_superblock("superblock", f"only {len(raw)} of {SUPERBLOCK_BYTES} bytes")
        signature, version, hash_type, uuid, algorithm, *numbers = _LAYOUT.unpack_from(raw)
        data_block_size, hash_block_size, data_blocks, salt_size, padding, salt, tail = numbers
        if signature != _SIGNATURE:
            raise _bad_superblock("signature", f"{signature!r} is not {_SIGNATURE!r}")
        if version != _VERSION:
            raise _bad_superblock("version", f"{version} is not {_VERSION}")
        if salt_size > MAX_SALT_BYTES:
            raise _bad_superblock("salt_size", f"{salt_size} is over {MAX_SALT_BYTES}")
        if any(padding) or any(salt[salt_size:]) or any(tail):
            raise _bad_superblock("padding", "not zero")
        name = algorithm.rstrip(b"\0")
        if not _ALGORITHM_CHARACTERS.issuperset(name):
            raise _bad_superblock("algorithm", f"{name!r} is no name of a hash")
        try:
            return cls(
                uuid=uuid,
                hash_type=hash_type,
                algorithm=name.decode("ascii"),
                data_block_size_bytes=data_block_size,
                hash_block_size_bytes=hash_block_size,
                data_blocks=data_blocks,
                salt=salt[:salt_size],
            )
        except FieldError as problem:
            raise _bad_superblock(problem.field, str(problem), prefix="") from None

    def pack(self) -> bytes:
        """Return the 512 bytes."""
        return _LAYOUT.pack(
            _SIGNATURE,
            _VERSION,
            self.hash_type,
            self.uuid,
            self.algorithm.encode("ascii"),
            self.data_block_size_bytes,
            self.hash_block_size_bytes,
            self.data_blocks,
            len(self.salt),
            bytes(6),
            self.salt,
            bytes(168),
        )


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
        _check_geometry(self)
        if not 0 <= self.hash_offset_bytes < _LIMIT_BYTES:
            raise FieldError("hash_offset_bytes", f"{self.hash_offset_bytes} is out of range")
        step = MIN_BLOCK_SIZE_BYTES if self.has_superblock else self.hash_block_size_bytes
        if self.hash_offset_bytes % step:
            raise FieldError(
                "hash_offset_bytes", f"{self.hash_offset_bytes} is no multiple of {step}"
            )
        if self.end_bytes >= _LIMIT_BYTES:
            raise FieldError("hash_offset_bytes", f"the hash tree would end at {self.end_bytes}")

    @property
    def digest_size_bytes(self) -> int:
        return DIGEST_SIZES[self.algorithm]

    @property
    def hashes_per_block_bits(self) -> int:
        """Log2 of how many digests a hash block holds, rounded down as the kernel does."""
        return (self.hash_block_size_bytes // self.digest_size_bytes).bit_length() - 1

    @property
    def slot_size_bytes(self) -> int:
        """The distance between two digests in a hash block."""
        if self.hash_type == HASH_TYPE_CHROMEOS:
            return self.digest_size_bytes
        return self.hash_block_size_bytes >> self.hashes_per_block_bits

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """Hash blocks of each level, level 0 (over the data) first; the last is always 1."""
        per_block = 1 << self.hashes_per_block_bits
        counts = []
        count = self.data_blocks
        while count > 1:
            count = -(-count // per_block)
            counts.append(count)
        return tuple(counts)

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
    if not 0 <= offset_bytes < _LIMIT_BYTES or offset_bytes % SUPERBLOCK_BYTES:
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
    asked: dict[str, object] = {
        "salt": salt,
        "algorithm": algorithm,
        "hash_type": hash_type,
        "data_blocks": data_blocks,
        "data_block_size": data_block_size,
        "hash_block_size": hash_block_size,
    }
    try:
        if superblock is not None:
            terms = superblock
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


def block_digest(parameters: VerityParameters, block: bytes) -> bytes:
    """Return the salted digest of one data or hash block."""
    salted = (block, parameters.salt)
    if parameters.hash_type == HASH_TYPE_NORMAL:
        salted = (parameters.salt, block)
    digest: bytes = _hash_function(parameters.algorithm)(b"".join(salted)).digest()
    return digest


def sha256(data: bytes) -> bytes:
    """Return a SHA-256 digest without the weight of hashlib."""
    digest: bytes = _hash_function("sha256")(data).digest()
    return digest


def _hash_function(algorithm: str) -> "Callable[[bytes], Any]":
    """Return the interpreter's own implementation of a hash, by the names it has had.

    hashlib alone would bring libcrypto: 5 MiB of memory, and of every boot image, to hash a few
    blocks.
    """
    for name in (f"_{algorithm}", "_sha2", "hashlib"):  # _sha2 since Python 3.12
        try:
            found: Callable[[bytes], Any] = getattr(__import__(name), algorithm)
        except (ImportError, AttributeError):
            continue
        return found
    raise CallError("unsupported", f"this interpreter has no {algorithm}", object=algorithm)


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


def check_tree_spine(
    parameters: VerityParameters,
    read_at: ReadAt,
    *,
    read_hash_at: ReadAt | None = None,
    data_block: int = 0,
) -> None:
    """Verify one path of the tree, from the root digest down to a data block.

    Reads one block of each level and the data block: a cheap proof that this tree belongs to this
    data, which the root alone is not. The path to the last data block proves ``data_blocks`` too.

    Raises:
        CallError: as ``check_root``; ``object`` is the part that does not match.
        OSError: as raised by the readers.
    """
    if not 0 <= data_block < parameters.data_blocks:
        raise ValueError(f"data block {data_block} of {parameters.data_blocks}")
    block = _top_block(parameters, read_at, read_hash_at)
    bits = parameters.hashes_per_block_bits
    for level in reversed(range(parameters.levels)):
        slot = (data_block >> (bits * level)) & ((1 << bits) - 1)
        start = slot * parameters.slot_size_bytes
        expected = block[start : start + parameters.digest_size_bytes]
        if level:
            index = data_block >> (bits * level)
            size = parameters.hash_block_size_bytes
            offset_bytes = parameters.level_offsets_bytes[level - 1] + index * size
            what = f"hash block {index} of level {level - 1}"
            block = _read(read_hash_at or read_at, offset_bytes, size, what)
        else:
            size = parameters.data_block_size_bytes
            what = f"data block {data_block}"
            block = _read(read_at, data_block * size, size, what)
        _expect(parameters, block, expected, what)
        if level and index == parameters.level_blocks[level - 1] - 1:
            check_spare(parameters, level - 1, block)


def check_spare(parameters: VerityParameters, level: int, last_block: bytes) -> None:
    """See that the last hash block of a level holds no more digests than ``data_blocks`` needs.

    The root digest does not vouch for the number of data blocks, and the kernel takes any: a tree
    over more blocks passes for one over fewer. It differs only in what should be zero here.

    Raises:
        CallError: ``integrity``.
    """
    below = parameters.level_blocks[level - 1] if level else parameters.data_blocks
    used = ((below - 1) & ((1 << parameters.hashes_per_block_bits) - 1)) + 1
    if last_block[used * parameters.slot_size_bytes :].strip(b"\0"):
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
        block = _read(read_at, 0, parameters.data_block_size_bytes, "data block 0")
        _expect(parameters, block, parameters.root_digest, "data block 0, which is the root")
        return block
    read_hash_at = read_hash_at or read_at
    size = parameters.hash_block_size_bytes
    block = _read(read_hash_at, parameters.tree_offset_bytes, size, "the top hash block")
    if parameters.hash_blocks > 1:
        _read(read_hash_at, parameters.end_bytes - size, size, "the last hash block")
    _expect(parameters, block, parameters.root_digest, "the top hash block")
    check_spare(parameters, parameters.levels - 1, block)
    return block


def _check_one_device(parameters: VerityParameters) -> None:
    occupied = parameters.has_superblock or parameters.levels
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


def _check_geometry(value: Superblock | VerityParameters) -> None:
    if value.hash_type not in (HASH_TYPE_CHROMEOS, HASH_TYPE_NORMAL):
        raise FieldError("hash_type", f"{value.hash_type} is neither 0 nor 1")
    for field in ("data_block_size", "hash_block_size"):
        size = getattr(value, f"{field}_bytes")
        if not MIN_BLOCK_SIZE_BYTES <= size <= MAX_BLOCK_SIZE_BYTES or size & (size - 1):
            raise FieldError(
                field,
                f"{size} is no power of two from {MIN_BLOCK_SIZE_BYTES} to {MAX_BLOCK_SIZE_BYTES}",
            )
    if value.data_blocks <= 0:
        raise FieldError("data_blocks", f"{value.data_blocks} is not positive")
    if value.data_blocks * value.data_block_size_bytes >= _LIMIT_BYTES:
        raise FieldError("data_blocks", f"{value.data_blocks} blocks exceed {_LIMIT_BYTES} bytes")
    if len(value.salt) > MAX_SALT_BYTES:
        raise FieldError("salt", f"{len(value.salt)} bytes, at most {MAX_SALT_BYTES}")


def _bad_superblock(field: str, problem: str, *, prefix: str | None = None) -> CallError:
    where = f"{field}: " if prefix is None else prefix
    return CallError(
        "integrity",
        f"bad verity superblock: {where}{problem}",
        step="parse verity superblock",
        object=field,
    )


def _needed(field: str, value: "Value | None") -> "Value":
    if value is None:
        raise FieldError(field, "missing, and there is no superblock to take it from")
    return value


def _or_default(block_size_bytes: int | None) -> int:
    return _DEFAULT_BLOCK_SIZE_BYTES if block_size_bytes is None else block_size_bytes


def _check_agreement(asked: dict[str, object], superblock: Superblock) -> None:
    found = superblock.as_dict()
    for field, value in asked.items():
        present = found[f"{field}_bytes" if field.endswith("_size") else field]
        if value is not None and value != present:
            raise CallError(
                "integrity",
                f"{field}: the request says {_show(value)}, the superblock {_show(present)}",
                step="resolve verity",
                object=field,
            )


def _show(value: object) -> str:
    return (value.hex() or "empty") if isinstance(value, bytes) else repr(value)
