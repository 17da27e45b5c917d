"""The superblock, and the bounds of every value in it.

Source: cryptsetup 2.6, lib/verity/verity.c, version 1 of the format.
"""

import functools
import struct

from vsock.errors import CallError
from vsock.record import Record

TYPE_CHECKING = False  # as typing's, without its import
if TYPE_CHECKING:
    from guestagent.storage.verity.parameters import VerityParameters

__all__ = (
    "DIGEST_SIZES",
    "HASH_TYPE_CHROMEOS",
    "HASH_TYPE_NORMAL",
    "LIMIT_BYTES",
    "MAX_BLOCK_SIZE_BYTES",
    "MAX_SALT_BYTES",
    "MIN_BLOCK_SIZE_BYTES",
    "SUPERBLOCK_BYTES",
    "FieldError",
    "Superblock",
    "check_geometry",
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
LIMIT_BYTES = 1 << 63


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
        check_geometry(self)

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
        if (padding + salt[salt_size:] + tail).strip(b"\0"):
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


def check_geometry(value: "Superblock | VerityParameters") -> None:
    """Raise FieldError for hash type, block sizes, count or salt that the format cannot hold."""
    _check_terms(
        value.hash_type,
        value.data_block_size_bytes,
        value.hash_block_size_bytes,
        value.data_blocks,
        len(value.salt),
    )


@functools.lru_cache(maxsize=64)
def _check_terms(
    hash_type: int, data_block_size: int, hash_block_size: int, data_blocks: int, salt_size: int
) -> None:
    if hash_type not in (HASH_TYPE_CHROMEOS, HASH_TYPE_NORMAL):
        raise FieldError("hash_type", f"{hash_type} is neither 0 nor 1")
    for field, size in (("data_block_size", data_block_size), ("hash_block_size", hash_block_size)):
        if not MIN_BLOCK_SIZE_BYTES <= size <= MAX_BLOCK_SIZE_BYTES or size & (size - 1):
            raise FieldError(
                field,
                f"{size} is no power of two from {MIN_BLOCK_SIZE_BYTES} to {MAX_BLOCK_SIZE_BYTES}",
            )
    if data_blocks <= 0:
        raise FieldError("data_blocks", f"{data_blocks} is not positive")
    if data_blocks * data_block_size >= LIMIT_BYTES:
        raise FieldError("data_blocks", f"{data_blocks} blocks exceed {LIMIT_BYTES} bytes")
    if salt_size > MAX_SALT_BYTES:
        raise FieldError("salt", f"{salt_size} bytes, at most {MAX_SALT_BYTES}")


def _bad_superblock(field: str, problem: str, *, prefix: str | None = None) -> CallError:
    where = f"{field}: " if prefix is None else prefix
    return CallError(
        "integrity",
        f"bad verity superblock: {where}{problem}",
        step="parse verity superblock",
        object=field,
    )
