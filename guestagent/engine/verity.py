"""The verity half of a layer: where its parameters come from, and the proofs before and after.

dm-verity alone accepts a wrong root digest at load and tells only when something is read. So the
top of the hash tree is checked against the digest before any device exists, one block is read
through the verity device before it is mounted, and the status is read back after.
"""

import os

from guestagent.api import LayerSpec, Verity
from guestagent.engine.inventory import LayerClaim
from guestagent.engine.plan import (
    VerityOptions,
    Version,
    signature_description,
    verity_options,
)
from guestagent.engine.transaction import Operation
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.filesystems import claimed_size_bytes, detect
from guestagent.storage.openonce import OpenOnce
from guestagent.storage.verity import (
    SUPERBLOCK_BYTES,
    Superblock,
    VerityParameters,
    check_kernel_limits,
    check_tree_spines,
    resolve,
)
from vsock.closeable import FdOwner
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("Reader", "VerifiedParameters", "open_proved", "read_parameters")

_PROOF_BYTES = 4096


class VerifiedParameters(Record):
    """Parameters whose root has been checked; ``source`` is request, superblock or both."""

    parameters: VerityParameters
    source: str
    options: VerityOptions


class Reader(FdOwner):
    """Reads a range of a block device, never past its end. A context manager."""

    def __init__(
        self, node: str, *, size_bytes: int, offset_bytes: int = 0, held: OpenOnce | None = None
    ) -> None:
        """Open ``node``, or take what ``held`` has of it."""
        self.node = node
        self.size_bytes = size_bytes
        self._offset_bytes = offset_bytes
        self._is_held = held is not None
        self._fd = held.open(node) if held else os.open(node, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Idempotent."""
        if not self._is_held:
            super().close()

    def fileno(self) -> int:
        """Return the descriptor; it stays ours."""
        return self._fd

    def read_at(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Return what is there, fewer bytes than asked at the end of the range."""
        size_bytes = min(size_bytes, self.size_bytes - offset_bytes)
        if offset_bytes < 0 or size_bytes <= 0:
            return b""
        return os.pread(self._fd, size_bytes, self._offset_bytes + offset_bytes)

    def read_padded(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Return exactly ``size_bytes``, with zeros for what is past the end."""
        return self.read_at(offset_bytes, size_bytes).ljust(size_bytes, b"\0")


def read_parameters(
    claim: LayerClaim,
    verity: Verity,
    target_version: Version,
    op: Operation,
    held: OpenOnce | None = None,
) -> VerifiedParameters:
    """Bring request and superblock together and check the tree's root, before anything is made.

    ``held`` is for whoever does this for many layers of one device.

    Raises:
        CallError: ``integrity``, the tree or the superblock is not what the request says;
            ``invalid`` or ``unsupported``, it could never be mapped.
    """
    spec, device, hash_device = claim.spec, claim.device, claim.hash_device
    area = claim.range
    with (
        op.step("superblock", device.node),
        Reader(
            device.node, size_bytes=area.size_bytes, offset_bytes=area.offset_bytes, held=held
        ) as data,
    ):
        if hash_device is None:
            return _read_with(spec, verity, device, data, data, target_version)
        with Reader(hash_device.node, size_bytes=hash_device.size_bytes, held=held) as hashes:
            return _read_with(spec, verity, device, data, hashes, target_version)


def _read_with(
    spec: LayerSpec,
    verity: Verity,
    device: BlockDevice,
    data: Reader,
    hashes: Reader,
    target_version: Version,
) -> VerifiedParameters:
    hash_offset_bytes = _hash_offset(spec, verity, data, hashes)
    superblock = _superblock(verity, hashes, hash_offset_bytes)
    parameters = resolve(
        root_digest=verity.root_digest,
        salt=verity.salt,
        algorithm=verity.algorithm,
        hash_type=verity.hash_type,
        data_blocks=verity.data_blocks,
        data_block_size=verity.data_block_size,
        hash_block_size=verity.hash_block_size,
        hash_offset_bytes=hash_offset_bytes,
        superblock=superblock,
    )
    if parameters.algorithm == "sha1" and not verity.allow_sha1:
        raise CallError(
            "denied",
            f"layer {spec.layer_id!r} is hashed with sha1, which is no proof any more",
            step="superblock",
            object="params.verity.algorithm",
            hint="hash the layer again with sha256, or say allow_sha1",
        )
    check_kernel_limits(
        parameters,
        page_size_bytes=os.sysconf("SC_PAGE_SIZE"),
        logical_block_size_bytes=device.logical_block_size,
    )
    separate = None if hashes is data else hashes.read_at
    # the first block proves that tree and data belong together, the last how many blocks there are
    ends = sorted({0, parameters.data_blocks - 1})
    check_tree_spines(parameters, data.read_at, read_hash_at=separate, data_blocks=ends)
    signature_key = signature_description(spec.layer_id) if verity.signature else None
    given = verity.salt is not None and verity.data_blocks is not None
    source = "request" if superblock is None else "both" if given else "superblock"
    return VerifiedParameters(
        parameters=parameters,
        source=source,
        options=verity_options(verity.preset, target_version, signature_key),
    )


def _hash_offset(spec: LayerSpec, verity: Verity, data: Reader, hashes: Reader) -> int:
    """Find the hash area where the request does not say: behind the file system, as hcsshim lays it
    out, or at the start of a device of its own. What is found there must still prove itself."""
    if verity.hash_offset_bytes is not None:
        return verity.hash_offset_bytes
    if hashes is not data:
        return 0
    block = verity.data_block_size or 4096
    if verity.data_blocks is not None:
        return verity.data_blocks * block
    size_bytes = _filesystem_size(spec, data)
    return -(-size_bytes // block) * block


def _filesystem_size(spec: LayerSpec, data: Reader) -> int:
    filesystem = spec.filesystem
    if filesystem == "auto":
        filesystem = detect(data.read_padded) or ""
    try:
        return claimed_size_bytes(filesystem, data.read_padded)
    except CallError as error:
        raise CallError(
            "integrity",
            f"cannot find the hash area of {data.node} behind its file system: {error.message}",
            step="superblock",
            object=data.node,
            hint="say hash_offset_bytes or data_blocks",
        ) from None


def _superblock(verity: Verity, hashes: Reader, offset_bytes: int) -> Superblock | None:
    if not verity.superblock:
        return None
    raw = hashes.read_at(offset_bytes, SUPERBLOCK_BYTES)
    try:
        return Superblock.parse(raw)
    except ValueError as problem:
        raise CallError(
            "integrity",
            f"no valid verity superblock at byte {offset_bytes} of {hashes.node}: {problem}",
            step="superblock",
            object=hashes.node,
        ) from None


def open_proved(node: str, size_bytes: int) -> Reader:
    """Open a verity device and read the start of it; the caller closes it.

    Raises:
        OSError: EIO, the block did not verify.
    """
    reader = Reader(node, size_bytes=size_bytes)
    try:
        # every block is hashed by the kernel: none is to be read but those asked for
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        reader.read_at(0, _PROOF_BYTES)
    except BaseException:
        reader.close()
        raise
    return reader
