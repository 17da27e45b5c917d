"""Mount what a boot plan names, with the engine that serves requests: all of it or nothing."""

import os

from guestagent.api import LayersMount, LayerSpec
from guestagent.boot.plan import BootPlan
from guestagent.config import Config
from guestagent.engine.engine import Engine
from guestagent.engine.faults import Faults
from guestagent.engine.plan import source_of
from guestagent.engine.reader import Reader
from guestagent.engine.state import Rules
from guestagent.policy.gate import Gate
from guestagent.storage import blockdev
from guestagent.storage.filesystems import claimed_size_bytes, layer_type
from guestagent.storage.verity import (
    BLOCK_SIZES,
    PART_STEP_BYTES,
    SUPERBLOCK_BYTES,
    parse_superblock,
)
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log

__all__ = ("mount_plan",)


def mount_plan(plan: BootPlan, config: Config, gate: Gate | None = None) -> None:
    """Mount the plan and leave it mounted, journal and all, for an agent to adopt.

    ``gate`` judges it, as it judges requests.

    Raises:
        CallError: anything that is missing, unverified or contradictory; nothing stays mounted.
    """
    deadline = Deadline(config.deadline_seconds)
    engine = Engine(
        state_directory=config.state_directory,
        rules=Rules(
            target_roots=config.target_roots,
            require_verity=config.require_verity,
        ),
        faults=Faults.parse(config.fault),
        gate=gate,
    )
    try:
        engine.start()
        request = LayersMount(layers=plan.layers, overlay=plan.overlay)
        engine.state.gate.batch(request)  # before a device is read
        for spec in plan.layers:
            if spec.verity is None:
                refuse_hidden_verity(spec, deadline)
        reply = engine.batches.mount(request, engine.operation(deadline))
        for layer in reply.layers:
            verified = layer.verity.root_digest if layer.verity else "not verified"
            log.info("boot layer", layer=layer.layer_id, root=verified, target=layer.target)
    finally:
        engine.close()
        deadline.close()


def refuse_hidden_verity(spec: LayerSpec, deadline: Deadline) -> None:
    """Refuse to mount without verity a device with a hash area: its digest was dropped.

    Raises:
        CallError: ``integrity``.
    """
    device = blockdev.wait_for(spec.device, deadline)
    size_bytes = source_of(spec.ranges, device).size_bytes
    with Reader(device.node, size_bytes=size_bytes, ranges=spec.ranges) as reader:
        filesystem = layer_type(spec.filesystem, reader.read_padded)
        end_bytes = claimed_size_bytes(filesystem, reader.read_padded)
        # a hash area begins at the next block, of any size there is, or where it is in a pack
        offsets = {-(-end_bytes // block) * block for block in (*BLOCK_SIZES, PART_STEP_BYTES)}
        hashed = [offset for offset in sorted(offsets) if _begins_hash_area(reader, offset)]
    if hashed:
        raise CallError(
            "integrity",
            f"layer {spec.layer_id!r} has root=none, but a hash area at byte {hashed[0]} of "
            f"{os.path.basename(device.node)}",
            step="plan boot",
            object=spec.layer_id,
            hint="say its root digest",
        )


def _begins_hash_area(reader: Reader, offset_bytes: int) -> bool:
    """Say whether a superblock is there, even a damaged one."""
    try:
        parse_superblock(reader.read_at(offset_bytes, SUPERBLOCK_BYTES))
    except CallError as problem:
        return problem.object not in ("superblock", "signature")  # too short, or something else
    return True
