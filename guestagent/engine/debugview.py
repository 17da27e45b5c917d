"""What the debug console shows of the engine and no method offers."""

from collections.abc import Callable, Iterator

from guestagent.api.agent import Event
from guestagent.api.layers import Holder, LayerSpec
from guestagent.engine.engine import Engine
from guestagent.engine.layermount import LayerMount
from guestagent.engine.reconciliation import Reconciliation
from guestagent.storage.holders import find_holders
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("DebugView",)


class DebugView:
    """Every method may be called from many threads at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._state = engine.state
        self._mounting = LayerMount(engine.state)
        self._reconciliation = Reconciliation(engine.state, engine.layers, engine.overlays)

    def plan_of(self, layer_id: str) -> tuple[str, ...] | None:
        """Return the steps that a mounted layer was made by, None if there is no such layer."""
        live = self._state.inventory.layer(layer_id)
        return None if live is None else live.plan.describe(live.spec.ranges)

    def plan(self, spec: LayerSpec, deadline: Deadline) -> tuple[str, ...]:
        """Return the steps that a mount would take: a dry run, after which nothing is left.

        Raises:
            CallError: the error with which the mount itself would be refused, before anything is
                made; ``conflict``, the layer is mounted.
        """
        with self._state.locks.hold([("layer", spec.layer_id)], deadline):
            if self._state.inventory.layer(spec.layer_id) is not None:
                raise CallError(
                    "conflict",
                    f"layer {spec.layer_id!r} is mounted; its id alone prints its plan",
                    object=spec.layer_id,
                )
            with self._engine.operation(
                deadline
            ) as op:  # never committed: all claims are taken back
                claim = self._mounting.claim(spec, self._mounting.reserve(spec, op), op)
                return self._mounting.plan(claim, op).plan.describe(spec.ranges)

    def reconcile(self, deadline: Deadline, *, dry_run: bool) -> Iterator[tuple[str, str, bool]]:
        """Yield each disagreement of journal, inventory and kernel, what was done about it (with
        ``dry_run``: what would be), and whether that failed.

        Raises:
            CallError: ``cancelled``; ``mount`` or ``device``, the kernel could not be asked.
        """
        op = self._engine.operation(deadline)
        for finding in self._reconciliation.look(op):
            problem = f"{finding.kind} {finding.name} {finding.problem}"
            if dry_run:
                yield problem, f"would {finding.action or 'leave it: nothing can be done'}", False
                continue
            outcome = self._reconciliation.settle(finding, op)
            detail = f": {outcome.detail}" if outcome.detail else ""
            done = f"{finding.action or 'no action'}: {outcome.result}{detail}"
            yield problem, done, outcome.result == "failed"

    def holders(self, dev: str, deadline: Deadline) -> tuple[Holder, ...]:
        """Return what uses the device MAJOR:MINOR, as far as it is found in time."""
        return find_holders(dev, deadline)

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``listener`` at every event, which must not wait; return what ends that."""
        return self._engine.events.listen(listener)
