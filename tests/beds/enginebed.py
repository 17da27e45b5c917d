"""A loop device and a live layer on it, as values that no kernel has to hold."""

from guestagent.api import ByteRange, LayerSpec, PathDevice, Verity
from guestagent.engine.inventory import LiveLayer
from guestagent.engine.plan import plan_layer, source_of
from guestagent.storage.blockdev import BlockDevice

DEVICE = BlockDevice(
    node="/dev/loop0",
    dev="7:0",
    name="loop0",
    size_bytes=1 << 20,
    logical_block_size=512,
    readonly=True,
    serial=None,
    kind="loop",
)


def layer(layer_id: str = "a", **changes: object) -> LiveLayer:
    """Return a layer of 4096 bytes on ``DEVICE``, with some fields of the live layer changed."""
    whole = ByteRange(offset_bytes=0, size_bytes=4096)
    spec = LayerSpec(
        layer_id=layer_id,
        device=PathDevice(path="/dev/loop0"),
        mapping=whole,
        verity=Verity(root_digest=bytes(range(32))),
        filesystem="erofs",
    )
    live = LiveLayer(
        spec=spec,
        source=source_of((whole,), DEVICE),
        plan=plan_layer(spec, source_of((whole,), DEVICE), names=("l", "v")),
        created=("/run/layers", "/run/layers/a"),
        timings_ms={"mount": 1.5},
    )
    return live.replace(**changes)
