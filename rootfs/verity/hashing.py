"""Digests of consecutive blocks of a file, as fast as this machine allows.

A hasher reads blocks with one ``preadv`` into a scratch buffer where the salt already lies beside
each block, so that a block and its salt are hashed in one call and nothing is copied twice. A
hasher belongs to one thread. ``HashlibHasher`` runs anywhere; see ``multibuffer`` for the faster.
"""

import dataclasses
import hashlib
import os
from typing import Protocol

from guestagent.storage.verity import DIGEST_BYTES, HASH_TYPE_CHROMEOS, VerityParameters
from vsock.errors import CallError

__all__ = ("BlockHash", "Hasher", "HashlibHasher", "Scratch")

#: Read at once: large enough to hide the calls, small enough to stay in a core's cache.
_BATCH_BYTES = 512 * 1024
#: IOV_MAX of Linux (include/uapi/linux/uio.h).
_MAX_VECTORS = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockHash:
    """How one block of a level is hashed, and how its digest lies in the level above."""

    algorithm: str
    salt: bytes
    salt_first: bool
    block_size_bytes: int
    slot_size_bytes: int
    max_batch_blocks: int

    @classmethod
    def of_level(cls, parameters: VerityParameters, block_size_bytes: int) -> "BlockHash":
        """Return the hash of the data blocks or of the hash blocks of ``parameters``."""
        chromeos = parameters.hash_type == HASH_TYPE_CHROMEOS
        return cls(
            algorithm=parameters.algorithm,
            salt=parameters.salt,
            salt_first=not chromeos,
            block_size_bytes=block_size_bytes,
            slot_size_bytes=parameters.slot_size_bytes,
            # slots of type 1 go on across hash blocks; those of type 0 leave a tail in each
            max_batch_blocks=1 << parameters.hashes_per_block_bits if chromeos else _MAX_VECTORS,
        )

    @property
    def digest_bytes(self) -> int:
        return DIGEST_BYTES[self.algorithm]

    def slot_of(self, block: bytes) -> bytes:
        """Return the digest of one block, padded to its slot."""
        salted = self.salt + block if self.salt_first else block + self.salt
        digest = hashlib.new(self.algorithm, salted).digest()
        return digest.ljust(self.slot_size_bytes, b"\0")


class Hasher(Protocol):
    """Turns up to ``batch_blocks`` blocks of a file into as many slots."""

    @property
    def batch_blocks(self) -> int:
        """A power of two."""
        ...

    def set_salt(self, salt: bytes) -> None:
        """Hash with another salt of the same length from now on."""
        ...

    def slots(self, fd: int, offset_bytes: int, count: int) -> bytes:
        """Read ``count`` blocks at ``offset_bytes`` of ``fd`` and return their slots, joined.

        Raises:
            CallError: ``integrity``, the file ends too early.
            OSError: as read(2).
        """
        ...


class Scratch:
    """Room for a batch of blocks, each with its salt in place."""

    def __init__(self, block_hash: BlockHash, batch_blocks: int) -> None:
        self._block_size_bytes = block_hash.block_size_bytes
        self.message_size_bytes = len(block_hash.salt) + self._block_size_bytes
        self.buffer = bytearray(self.message_size_bytes * batch_blocks)
        view = memoryview(self.buffer)
        starts = range(0, len(self.buffer), self.message_size_bytes)
        self.messages = [view[start : start + self.message_size_bytes] for start in starts]
        head = len(block_hash.salt) if block_hash.salt_first else 0
        self._blocks = [message[head : head + self._block_size_bytes] for message in self.messages]
        tail = 0 if block_hash.salt_first else self._block_size_bytes
        self._salts = [message[tail : tail + len(block_hash.salt)] for message in self.messages]
        self.set_salt(block_hash.salt)

    def set_salt(self, salt: bytes) -> None:
        """Put another salt of the same length in place."""
        for place in self._salts:
            place[:] = salt

    def fill(self, fd: int, offset_bytes: int, count: int) -> None:
        """Read ``count`` blocks."""
        done = 0
        while done < count:
            position = offset_bytes + done * self._block_size_bytes
            size = os.preadv(fd, self._blocks[done:count], position)
            if size < self._block_size_bytes:
                raise CallError(
                    "integrity",
                    f"cannot read a block at {position}: the file ends there; was it truncated?",
                    step="read blocks",
                )
            done += size // self._block_size_bytes


class HashlibHasher:
    """One block after the other, by the interpreter's own library."""

    def __init__(self, block_hash: BlockHash) -> None:
        room = max(1, _BATCH_BYTES // block_hash.block_size_bytes)
        self.batch_blocks = min(room, block_hash.max_batch_blocks, _MAX_VECTORS)
        self._scratch = Scratch(block_hash, self.batch_blocks)
        self._new = getattr(hashlib, block_hash.algorithm)
        self._padding = bytes(block_hash.slot_size_bytes - block_hash.digest_bytes)

    def set_salt(self, salt: bytes) -> None:
        """See ``Hasher``."""
        self._scratch.set_salt(salt)

    def slots(self, fd: int, offset_bytes: int, count: int) -> bytes:
        """See ``Hasher``."""
        self._scratch.fill(fd, offset_bytes, count)
        new = self._new
        digests = [new(message).digest() for message in self._scratch.messages[:count]]
        return self._padding.join(digests) + self._padding
