"""SHA-256 of many blocks at once, by Intel's multi-buffer library (libIPSec_MB), if it is here.

A core has several independent hash lanes, which one stream of blocks after the other leaves idle.
The library is optional, found at run time, and never trusted: its version must be one whose
structures were checked, and it must hash like ``hashlib`` before it is used.

Source: intel-ipsec-mb.h of version 1.3. Its offsets are written down here because the library
offers its jobs through structures and function pointers only; the header promises that pointers
keep their place. Versions that were not checked are not used.
"""

import ctypes
import dataclasses
import functools
import hashlib
import struct
import threading
from collections.abc import Callable

from rootfs.verity.hashing import BlockHash, Hasher, HashlibHasher, Scratch

__all__ = ("MultiBufferHasher", "is_usable", "library_version", "open_hasher")

_LIBRARY = "libIPSec_MB.so.1"
_CHECKED_VERSIONS = ("1.3.",)

# struct IMB_MGR: offsets of function pointers
_GET_NEXT_BURST = 952
_SUBMIT_BURST = 960
_FLUSH_BURST = 976
# struct IMB_JOB: src at 24, hash_start_src_offset_in_bytes and msg_len_to_hash_in_bytes at 56,
# auth_tag_output and its length at 88, cipher_mode, cipher_direction, hash_alg, chain_order at 132
_JOB_LAYOUT = "24xQ24xQQ16xQQ28x4I52x"
_JOB_BYTES = 200
_NULL_CIPHER, _ENCRYPT, _SHA_256, _HASH_THEN_CIPHER = 3, 1, 15, 2

_BURST_JOBS = 128  # IMB_MAX_BURST_SIZE
_DIGEST_BYTES = 32
#: A burst takes as long as one of so many jobs, however few there are: 16 lanes, 3 times as fast.
_MIN_BURST_JOBS = 6
_TRIAL_COUNTS = (_BURST_JOBS, 1, 37, _BURST_JOBS, 100, _BURST_JOBS)
#: The lanes count in 16 bits, lane number included; far below that they are tested here.
_MAX_MESSAGE_BYTES = 8192

#: What setting up the library costs is won back over this many blocks.
_ACCELERATION_BLOCKS = 128

_BurstFunction = ctypes.CFUNCTYPE(
    ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p
)


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
        library.imb_get_version_str.restype = ctypes.c_char_p
        library.alloc_mb_mgr.restype = ctypes.c_void_p
        library.alloc_mb_mgr.argtypes = (ctypes.c_uint64,)
        library.free_mb_mgr.argtypes = (ctypes.c_void_p,)
        library.free_mb_mgr.restype = None
        library.init_mb_mgr_auto.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        library.init_mb_mgr_auto.restype = None
    except (OSError, AttributeError):  # not installed, or not that library
        return None
    return library


def library_version() -> str | None:
    """Return the version of the library that is installed and known, or None."""
    library = _library()
    if library is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    version = str((library.imb_get_version_str() or b"").decode("ascii", "replace"))
    return version if version.startswith(_CHECKED_VERSIONS) else None


def is_usable(block_hash: BlockHash) -> bool:
    """Say whether the library is here, and right, for blocks of this kind."""
    message_size_bytes = len(block_hash.salt) + block_hash.block_size_bytes
    return (
        block_hash.algorithm == "sha256"
        and message_size_bytes <= _MAX_MESSAGE_BYTES
        and library_version() is not None
        and _agrees_with_hashlib(message_size_bytes)
    )


@functools.cache
def _agrees_with_hashlib(message_size_bytes: int) -> bool:
    whole = bytes(range(251)) * (1 + message_size_bytes // 251)
    messages = [bytes([index]) + whole[: message_size_bytes - 1] for index in range(_BURST_JOBS)]
    expected = b"".join(hashlib.sha256(message).digest() for message in messages)
    buffer = bytearray(b"".join(messages))
    try:
        burst = _Burst(buffer, message_size_bytes, _BURST_JOBS)
        # odd counts as well, so that a burst wraps around the end of the library's ring of jobs
        return all(burst.run(count) == expected[: count * _DIGEST_BYTES] for count in _TRIAL_COUNTS)
    except OSError:
        return False


class _Manager:
    """The library's state. Dear to make, so each thread keeps one; it is idle between bursts."""

    def __init__(self) -> None:
        library = _library()
        assert library is not None
        self._free = library.free_mb_mgr
        self.address = library.alloc_mb_mgr(0)
        if not self.address:
            raise OSError(f"{_LIBRARY}: cannot allocate a manager")
        library.init_mb_mgr_auto(self.address, None)
        self.get_next = self._function(_GET_NEXT_BURST)
        self.submit = self._function(_SUBMIT_BURST)
        self.flush = self._function(_FLUSH_BURST)

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._free(self.address)

    def _function(self, offset_bytes: int) -> Callable[[int, int, object], int]:
        address = ctypes.c_void_p.from_address(self.address + offset_bytes).value
        function: Callable[[int, int, object], int] = _BurstFunction(address or 0)
        return function


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.manager = _Manager()


@functools.cache
def _per_thread() -> _PerThread:
    return _PerThread()


class _Burst:
    """The messages of one buffer, side by side, as jobs that are submitted again and again."""

    def __init__(self, buffer: bytearray, message_size_bytes: int, jobs: int) -> None:
        self._manager = _per_thread().manager
        self._pinned = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        self._digests = ctypes.create_string_buffer(jobs * _DIGEST_BYTES)
        template = self._jobs(ctypes.addressof(self._pinned), message_size_bytes, jobs)
        self._template = ctypes.create_string_buffer(template, len(template))
        self._template_address = ctypes.addressof(self._template)
        self._pointers = (ctypes.c_void_p * _BURST_JOBS)()

    def run(self, count: int) -> bytes:
        """Hash the first ``count`` messages; return their digests, joined."""
        manager = self._manager
        if manager.get_next(manager.address, count, self._pointers) != count:
            raise OSError(f"{_LIBRARY}: no room for {count} jobs")
        self._place_jobs(count)
        done = manager.submit(manager.address, count, self._pointers)
        while done < count:
            flushed = manager.flush(manager.address, count - done, self._pointers)
            if not flushed:
                raise OSError(f"{_LIBRARY}: finished {done} of {count} jobs")
            done += flushed
        return self._digests.raw[: count * _DIGEST_BYTES]

    def _place_jobs(self, count: int) -> None:
        # the jobs are a ring: a burst is one run of them, or a run at its end and one at its start
        first, last = self._pointers[0] or 0, self._pointers[count - 1] or 0
        if last - first == (count - 1) * _JOB_BYTES:
            ctypes.memmove(first, self._template_address, count * _JOB_BYTES)
            return
        pointers = [pointer or 0 for pointer in self._pointers[:count]]
        start = 0
        for end in range(1, count + 1):
            if end < count and pointers[end] > pointers[end - 1]:
                continue
            size_bytes = (end - start) * _JOB_BYTES
            if pointers[end - 1] - pointers[start] != size_bytes - _JOB_BYTES:
                raise OSError(f"{_LIBRARY}: its jobs do not have {_JOB_BYTES} bytes")
            ctypes.memmove(pointers[start], self._template_address + start * _JOB_BYTES, size_bytes)
            start = end

    def _jobs(self, messages: int, message_size_bytes: int, count: int) -> bytes:
        digests = ctypes.addressof(self._digests)
        modes = (_NULL_CIPHER, _ENCRYPT, _SHA_256, _HASH_THEN_CIPHER)
        fields: list[int] = []
        for index in range(count):
            source = messages + index * message_size_bytes
            digest = digests + index * _DIGEST_BYTES
            fields += (source, 0, message_size_bytes, digest, _DIGEST_BYTES, *modes)
        return struct.pack("=" + _JOB_LAYOUT * count, *fields)


class MultiBufferHasher:
    """A burst of blocks at once. See ``rootfs.verity.hashing.Hasher``."""

    def __init__(self, block_hash: BlockHash) -> None:
        self.batch_blocks = min(_BURST_JOBS, block_hash.max_batch_blocks)
        self._scratch = Scratch(block_hash, self.batch_blocks)
        self._burst = _Burst(
            self._scratch.buffer, self._scratch.message_size_bytes, self.batch_blocks
        )

    def set_salt(self, salt: bytes) -> None:
        """See ``rootfs.verity.hashing.Hasher``."""
        self._scratch.set_salt(salt)

    def slots(self, fd: int, offset_bytes: int, count: int) -> bytes:
        """See ``rootfs.verity.hashing.Hasher``."""
        self._scratch.fill(fd, offset_bytes, count)
        if count < _MIN_BURST_JOBS:
            messages = self._scratch.messages[:count]
            return b"".join([hashlib.sha256(message).digest() for message in messages])
        return self._burst.run(count)


class _Kept(threading.local):
    """The hashers that a thread had last: their buffers serve all levels, and the next image."""

    def __init__(self) -> None:
        self.hashers: dict[object, Hasher] = {}


_kept = _Kept()
#: One for the data, one for the tree.
_MAX_KEPT = 2


def open_hasher(block_hash: BlockHash, blocks: int, *, accelerate: bool = True) -> Hasher:
    """Return the fastest hasher for so many of these blocks on this machine.

    It is this thread's, with this salt until the next call.
    """
    slow, fast = (
        (kind, len(block_hash.salt), dataclasses.replace(block_hash, salt=b""))
        for kind in (HashlibHasher, MultiBufferHasher)
    )
    worthwhile = blocks >= _ACCELERATION_BLOCKS or fast in _kept.hashers
    key = fast if accelerate and worthwhile and is_usable(block_hash) else slow
    hasher = _kept.hashers.get(key)
    if hasher is None:
        if len(_kept.hashers) >= _MAX_KEPT:
            _kept.hashers.clear()
        hasher = _kept.hashers[key] = key[0](block_hash)
    hasher.set_salt(block_hash.salt)
    return hasher
