"""Bringing a layer up and taking it down: the one path that every mount request goes.

device -> superblock and root digest -> linear -> verity -> first block -> mount -> deferred
removal -> read back. Each step registers its undo; what is made is kept only when all of it is.
"""

from guestagent.api import LayerReport, LayerSpec
from guestagent.engine.inventory import LiveLayer
from guestagent.engine.operation import Operation
from guestagent.engine.plan import (
    check_range,
)
from guestagent.engine.state import EngineState
from guestagent.engine.verified import read_parameters
from guestagent.storage import blockdev
from vsock.errors import CallError

__all__ = ("Layers",)


class Layers:
    """Mounts and unmounts single layers. Thread-safe: requests for other layers run beside."""

    def __init__(self, state: EngineState) -> None:
        self._state = state

    def mount(self, spec: LayerSpec, op: Operation) -> LayerReport:
        """Mount a layer, or say that it is mounted already.

        Raises:
            CallError: any code of the contract; nothing is left behind.
        """
        with self._state.locks.hold([("layer", spec.layer_id)], op.deadline):
            if self.is_mounted(spec):
                return self.get(spec.layer_id, already=True)
            with op:
                live = self.bring_up(spec, op)
                self.keep(live)
                op.commit()
            return self._announce(live, op)

    def is_mounted(self, spec: LayerSpec) -> bool:
        """Return whether exactly this layer is there.

        Raises:
            CallError: ``conflict``, the id is taken by a layer of another specification.
        """
        live = self._state.inventory.layer(spec.layer_id)
        if live is None:
            return False
        differing = [
            name for name, value in spec.as_dict().items() if value != getattr(live.spec, name)
        ]
        if differing:
            raise CallError(
                "conflict",
                f"layer {spec.layer_id!r} is mounted with another {', '.join(differing)}",
                step="claim",
                object=spec.layer_id,
                hint="unmount it first, or use another layer_id",
            )
        return True

    def bring_up(self, spec: LayerSpec, op: Operation) -> LiveLayer:
        """Do every step of a mount but the last, ``keep``; the caller holds the layer's lock."""
        self._check_rules(spec)
        self._claim(spec, op)
        with op.step("device", _name(spec)):
            device = blockdev.wait_for(spec.device, op.deadline)
            area = check_range(spec.mapping, device)
        hash_device = self._hash_device(spec, op)
        verified = None
        if spec.verity is not None:
            version = self._verity_version()
            verified = read_parameters(spec, spec.verity, device, area, hash_device, version, op)
        live = self._prepare(spec, device, area_filesystem(spec, device, op), verified, hash_device)
        live = live.replace(range=area)
        self._write_intent(live, op)
        node = self._make_devices(live.plan, device, op)
        created = self._mount(live, node, op)
        self._defer_removal(live.plan, op)
        return live.replace(created=created, timings_ms=dict(op.timings_ms))

    def keep(self, live: LiveLayer) -> None:
        """Make a mounted layer official: in the journal, then in the inventory."""
        self._state.journal.write("layer", live.spec.layer_id, journal_entry(live, "whole"))
        self._state.inventory.add_layer(live)
