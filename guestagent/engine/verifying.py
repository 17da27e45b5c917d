"""Reading a whole layer through its verity device: every block is hashed by the kernel."""

import errno
import os
from collections.abc import Callable

from guestagent.api.layers import VerifyReply
from guestagent.engine.inventory import LiveLayer
from guestagent.engine.readback import verity_status
from guestagent.engine.state import EngineState
from guestagent.engine.transaction import Operation
from vsock.errors import CallError

__all__ = ("Progress", "verify_layer")

_CHUNK_BYTES = 1024 * 1024
#: More corrupt blocks than this are not listed: the layer is known to be worthless by then.
_MAX_LISTED = 1000

Progress = Callable[[int, int], None]


def verify_layer(
    state: EngineState, live: LiveLayer, op: Operation, progress: Progress
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
    block_bytes = step.parameters.data_block_size_bytes
    corrupt: list[int] = []
    read_bytes = 0
    with op.step("verify", step.name, code="integrity"):
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
    return VerifyReply(
        layer_id=live.spec.layer_id,
        read_bytes=read_bytes,
        corrupt_blocks=tuple(corrupt[:_MAX_LISTED]),
        status=verity_status(state.control, step.name),
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
    """Return how much could be read: a bad block ends a read early, and fails one that begins in
    it."""
    try:
        return len(os.pread(fd, size, offset))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return 0
