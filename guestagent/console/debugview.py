"""What the console shows of the engine beyond what the methods report."""

from guestagent.api import LayerSpec
from guestagent.api.inspect import PlaceRequest
from guestagent.engine.engine import Engine
from guestagent.engine.layermount import LayerMount
from guestagent.engine.plan import LayerPlan
from guestagent.engine.reconciliation import Reconciliation
from guestagent.engine.transaction import Transaction
from guestagent.inspect.place import Place, open_place
from vsock.errors import CallError

__all__ = ("DebugView",)


class DebugView:
    """Every method may be called from many threads at once. ``reconciliation`` holds the books
    against the kernel."""

    def __init__(self, engine: Engine) -> None:
        self._state = engine.state
        self._mounting = LayerMount(engine.state)
        self.reconciliation = Reconciliation(engine.state, engine.layers, engine.overlays)

    def layer_ids(self) -> tuple[str, ...]:
        """Return the ids of the mounted layers."""
        return tuple(live.spec.layer_id for live in self._state.inventory.layers())

    def overlay_ids(self) -> tuple[str, ...]:
        """Return the ids of the mounted overlays."""
        return tuple(live.spec.overlay_id for live in self._state.inventory.overlays())

    def dm_devices(self) -> tuple[tuple[str, str], ...]:
        """Return (name, MAJOR:MINOR) of every dm device."""
        return tuple((name, dev) for name, dev, _ in self._state.control.list_devices())

    def dev_of_layer(self, layer_id: str) -> str | None:
        """Return MAJOR:MINOR of what is mounted as a layer, None if there is no such layer."""
        live = self._state.inventory.layer(layer_id)
        return None if live is None else live.dev

    def plan_of(self, layer_id: str) -> LayerPlan | None:
        """Return the plan that a mounted layer was made by, None if there is no such layer."""
        live = self._state.inventory.layer(layer_id)
        return None if live is None else live.plan

    def plan(self, spec: LayerSpec, op: Transaction) -> LayerPlan:
        """Return the plan for a layer that is not mounted: a dry run, after which nothing is left.

        Raises:
            CallError: what the mount itself would be refused for, before anything is made.
        """
        with self._state.locks.hold([("layer", spec.layer_id)], op.deadline):
            if self._state.inventory.layer(spec.layer_id) is not None:
                raise CallError(
                    "conflict",
                    f"layer {spec.layer_id!r} is mounted; its id alone prints its plan",
                    object=spec.layer_id,
                )
            with op:  # never committed: all claims are taken back
                return self._mounting.plan(self._mounting.claim(spec, op), op).plan

    def place(self, request: PlaceRequest) -> Place:
        """Open a layer or an overlay to look into.

        Raises:
            CallError: ``not_found``.
        """
        return open_place(self._state, request)
