"""The verity half of a layer: where its parameters come from, and what proves them.

dm-verity alone accepts a wrong root digest at load and tells only when something is read. So the
top of the hash tree is checked against the digest before any device exists, one block is read
through the verity device before it is mounted, and the status is read back after.
"""

import errno
import os
from collections.abc import Callable

from guestagent.api import LayerSpec, Verity
from guestagent.api.layers import VerifyReply
from guestagent.engine.inventory import LayerClaim, LiveLayer
from guestagent.engine.readback import verity_status
from guestagent.engine.reader import Reader
from guestagent.engine.state import EngineState
from guestagent.engine.transaction import Transaction
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.filesystems import claimed_size_bytes, layer_type
from guestagent.storage.verity import (
    VerityParameters,
    check_kernel_limits,
    check_tree_spines,
    hash_area_offset,
    read_superblock,
)
from vsock.errors import CallError

__all__ = ("Progress", "open_proved", "read_parameters", "verify_layer")

_PROOF_BYTES = 4096
_CHUNK_BYTES = 1024 * 1024
#: More corrupt blocks than this are not listed: the layer is known to be worthless by then.
_MAX_LISTED = 1000

#: Gets bytes done and bytes in all.
Progress = Callable[[int, int], None]


def read_parameters(
    claim: LayerClaim, verity: Verity, op: Transaction
) -> tuple[VerityParameters, str]:
    """Bring request and superblock together and check the tree's root, before anything is made.

    Returns the parameters and where they came from: request, superblock or both.

    Raises:
        CallError: ``integrity``, the tree or the superblock is not what the request says;
            ``invalid`` or ``unsupported``, it could never be mapped.
    """
    source, ranges = claim.source, claim.spec.ranges
    device, hash_device = source.device, source.hash_device
    with (
        op.step("superblock", device.node),
        Reader(device.node, size_bytes=source.size_bytes, ranges=ranges) as data,
    ):
        if hash_device is None:
            return _read_with(claim.spec, verity, device, data, data)
        with Reader(hash_device.node, size_bytes=hash_device.size_bytes) as hashes:
            return _read_with(claim.spec, verity, device, data, hashes)


def _read_with(
    spec: LayerSpec, verity: Verity, device: BlockDevice, data: Reader, hashes: Reader
) -> tuple[VerityParameters, str]:
    is_separate = hashes is not data
    hash_offset_bytes = hash_area_offset(verity, separate=is_separate)
    if hash_offset_bytes is None:
        # behind the file system, as hcsshim lays it out; what is found there must prove itself
        size_bytes = _filesystem_size(spec, data)
        hash_offset_bytes = hash_area_offset(verity, separate=False, data_size_bytes=size_bytes)
    assert hash_offset_bytes is not None
    hash_offset_bytes, raw = read_superblock(verity, hash_offset_bytes, hashes.read_at)
    try:
        parameters = VerityParameters.from_request(
            verity, hash_offset_bytes=hash_offset_bytes, superblock=raw
        )
    except CallError as problem:
        where = f" (read at byte {hash_offset_bytes} of {hashes.node})" if verity.superblock else ""
        raise CallError(
            problem.code, problem.message + where, step=problem.step, object=problem.object
        ) from None
    if parameters.algorithm == "sha1" and not verity.allow_sha1:
        raise CallError(
            "denied",
            f"layer {spec.layer_id!r} is hashed with sha1, which is no proof any more",
            step="superblock",
            object="params.verity.algorithm",
            hint="hash the layer again with sha256, or say allow_sha1",
        )
    check_kernel_limits(parameters, logical_block_size=device.logical_block_size)
    # the first block proves that tree and data belong together, the last how many blocks there are
    ends = sorted({0, parameters.data_blocks - 1})
    separate = hashes.read_at if is_separate else None
    check_tree_spines(parameters, data.read_at, read_hash_at=separate, data_blocks=ends)
    given = verity.salt is not None and verity.data_blocks is not None
    source = "both" if given else "superblock"
    return parameters, source if verity.superblock else "request"


def _filesystem_size(spec: LayerSpec, data: Reader) -> int:
    try:
        filesystem = layer_type(spec.filesystem, data.read_padded)
        return claimed_size_bytes(filesystem, data.read_padded)
    except CallError as error:
        raise CallError(
            "integrity",
            f"cannot find the hash area of {data.node} behind its file system: {error.message}",
            step="superblock",
            object=data.node,
            hint="say hash_offset_bytes or data_blocks",
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


def verify_layer(
    state: EngineState, live: LiveLayer, op: Transaction, progress: Progress
) -> VerifyReply:
    """Read every data block, not from the page cache; list those that do not verify.

    Raises:
        CallError: ``unsupported``, the layer is not verified; ``timeout`` or ``cancelled``.
        OSError: the device failed in another way than by a corrupt block.
    """
    step = live.plan.verity
    if step is None:
        raise CallError(
            "unsupported",
            f"layer {live.spec.layer_id!r} was mounted without verity",
            step="verify",
            object=live.spec.layer_id,
        )
    total_bytes = step.parameters.data_size_bytes
    block_bytes = step.parameters.data_block_size
    corrupt: list[int] = []
    read_bytes = 0
    with op.step("verify", step.name):
        fd = os.open(state.control.info(step.name).node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for start in range(0, total_bytes, _CHUNK_BYTES):
                op.deadline.check("verify")
                size = min(_CHUNK_BYTES, total_bytes - start)
                read_bytes += _read_chunk(fd, start, size, block_bytes, corrupt)
                # what was read is not needed again, and must not push other layers' pages out
                os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)
                progress(start + size, total_bytes)
        finally:
            os.close(fd)
    status = verity_status(state.control, step.name)
    if corrupt and status == "V":
        raise CallError(
            "device",
            f"data block {corrupt[0]} of layer {live.spec.layer_id!r} cannot be read, and not for "
            "its content: the disk fails",
            errno=errno.EIO,
            step="verify",
            object=step.name,
            kernel_log=op.kernel_lines(),
        )
    return VerifyReply(
        layer_id=live.spec.layer_id,
        read_bytes=read_bytes,
        corrupt_blocks=tuple(corrupt[:_MAX_LISTED]),
        status=status,
        timings_ms=op.timings_ms,
    )


def _read_chunk(fd: int, start: int, size: int, block_bytes: int, corrupt: list[int]) -> int:
    """Read a chunk, by blocks where it cannot be read whole; return the bytes that verified."""
    good_bytes = _read(fd, start, size)
    if good_bytes == size:
        return good_bytes
    good_bytes -= good_bytes % block_bytes
    for offset in range(start + good_bytes, start + size, block_bytes):
        read_bytes = _read(fd, offset, block_bytes)
        good_bytes += read_bytes
        if read_bytes < block_bytes and len(corrupt) < _MAX_LISTED:
            corrupt.append(offset // block_bytes)
    return good_bytes


def _read(fd: int, offset: int, size: int) -> int:
    """Return how many bytes could be read. A bad block ends a read early; a read that begins in a
    bad block returns 0."""
    try:
        return len(os.pread(fd, size, offset))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return 0
