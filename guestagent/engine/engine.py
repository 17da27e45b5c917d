"""The engine as a whole: its parts, its start and end, its features and counts."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from guestagent.api import LayersUnmount
from guestagent.api.agent import FEATURES
from guestagent.engine.arrivals import Arrivals
from guestagent.engine.batch import Batches
from guestagent.engine.dmview import DmView
from guestagent.engine.events import EventLog
from guestagent.engine.faults import Faults
from guestagent.engine.features import find_missing
from guestagent.engine.layers import Layers
from guestagent.engine.monitor import Monitor
from guestagent.engine.overlays import Overlays
from guestagent.engine.recovery import Recovered, recover
from guestagent.engine.state import EngineState, Rules
from guestagent.engine.statedirectory import StateDirectory
from guestagent.engine.transaction import StepListener, Transaction
from guestagent.policy.gate import Gate
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log

__all__ = ("Engine", "TakeDowns")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestagent.policy import rules as policy_rules

TakeDowns = Callable[[], Iterable[Callable[[Transaction], object]]]


class Engine:
    """Open once; ``close`` leaves everything mounted, for the next agent to adopt."""

    def __init__(
        self,
        *,
        state_directory: str | StateDirectory,
        rules: Rules | None = None,
        faults: Faults | None = None,
        gate: Gate | None = None,
    ) -> None:
        """Open the engine upon a state directory, which no other agent may have.

        Raises:
            CallError: ``conflict``, another agent has it.
        """
        self.state = EngineState(
            state_directory=state_directory,
            rules=rules or Rules(),
            faults=faults or Faults(),
            gate=gate,
        )
        self.layers = Layers(self.state)
        self.overlays = Overlays(self.state)
        self.batches = Batches(self.state, self.layers, self.overlays)
        self.dm = DmView(self.state.control)
        #: Waits for devices, for requests that may be left.
        self.arrivals = Arrivals()
        self._monitor = Monitor(self.state)
        #: Told of every step of every operation that begins from now on.
        self.on_step: StepListener | None = None
        #: Of parts that stand on the engine: what takes down each thing that the part has made.
        self.parts: list[TakeDowns] = []
        #: The same, of parts that overlays stand on: these come after the overlays.
        self.lower_parts: list[TakeDowns] = []
        #: Ends the threads of parts, and leaves what they have made.
        self.closers: list[Callable[[], None]] = []

    @property
    def events(self) -> EventLog:
        return self.state.events

    def start(self) -> Recovered:
        """Adopt what an earlier agent left, then watch the kernel's events."""
        recovered = recover(self.state)
        self.judge_mounted()
        self._monitor.note_lost_devices()
        self._monitor.start()
        detail = f"adopted {len(recovered.layers)} layers, {len(recovered.overlays)} overlays"
        self.state.events.publish("agent_started", detail=detail)
        log.info("engine ready", adopted=len(recovered.layers), undone=len(recovered.undone))
        return recovered

    def judge_mounted(self) -> str | None:
        """Have the policy judge what was adopted; return the rule that denies some of it.

        After that nothing is allowed but the end of the agent."""
        gate = self.state.gate
        rule = None if gate.is_open else self._denied_of(gate)
        if rule is not None:
            gate.note_inconsistent(f"adopted: {rule}")
        return rule

    def find_denied(self, rules: "policy_rules.Rules") -> str | None:
        """Return the rule of a policy that denies something of what is mounted, or None. What is
        not a layer or an overlay it cannot judge, and denies."""
        parts = (*self.parts, *self.lower_parts)
        if any(True for take_downs in parts for _ in take_downs()):
            return "exact"
        return self.find_denied_layer(rules)

    def find_denied_layer(self, rules: "policy_rules.Rules") -> str | None:
        """Return the rule of a policy that denies a mounted layer or overlay, or None."""
        trial = Gate()
        trial.look = self.state.gate.look
        trial.put_in_force([rules])
        return self._denied_of(trial)

    def _denied_of(self, gate: Gate) -> str | None:
        inventory = self.state.inventory
        try:
            for layer in inventory.layers():
                verity = layer.plan.verity
                parameters = None if verity is None else verity.parameters
                gate.layer(layer.spec, parameters, layer.source.size_bytes)
            for overlay in inventory.overlays():
                gate.overlay(overlay.spec)
        except CallError as error:
            return error.object
        return None

    def close(self) -> None:
        """Idempotent."""
        self.arrivals.close()
        for close in self.closers:
            close()
        self._monitor.close()
        self.state.close()

    def operation(
        self,
        deadline: Deadline,
        *,
        traceparent: str | None = None,
        may_be_left: bool = False,
    ) -> Transaction:
        """Begin a request.

        ``may_be_left``: it ends with a DeviceAbsentError where a device is not there, and is begun
        again when ``arrivals`` has it.
        """
        return Transaction(
            deadline,
            faults=self.state.faults,
            kernel_log=self.state.kernel_log,
            traceparent=traceparent,
            on_left=self._note_left,
            on_step=self.on_step,
            may_be_left=may_be_left,
        )

    def _note_left(self, failure: str) -> None:
        self.state.gate.note_inconsistent("a failed request has left something behind")
        self.state.inventory.note_problem(failure, f"left behind by a failed request: {failure}")

    def features(self) -> tuple[str, ...]:
        """Return what this kernel and this agent can do, as names that a client may test for."""
        missing = self.missing_features()
        return tuple(name for name in FEATURES if name not in missing)

    def missing_features(self) -> dict[str, str]:
        """Return the other features, each with the reason why it is not there."""
        return find_missing(self.state.control)

    def problems(self) -> tuple[str, ...]:
        return self.state.inventory.problems()

    def counts(self) -> dict[str, int]:
        """Return how many layers, overlays and dm devices there are; the last is the kernel's."""
        return {
            "layers": len(self.state.inventory.layers()),
            "overlays": len(self.state.inventory.overlays()),
            "dm_devices": len(self.state.control.list_devices()),
        }

    def layer_states(self) -> dict[str, int]:
        """Return how many layers are in each state that any layer is in."""
        states: dict[str, int] = {}
        for live in self.state.inventory.layers():
            states[live.state] = states.get(live.state, 0) + 1
        return states

    def live(self) -> dict[str, tuple[str, ...]]:
        """Return what is live as texts, without asking the kernel: for a report of a crash."""
        inventory = self.state.inventory
        return {
            "layers": tuple(
                f"{live.spec.layer_id} at {live.spec.mount_point}: {live.state}"
                for live in inventory.layers()
            ),
            "overlays": tuple(
                f"{live.spec.overlay_id} at {live.spec.mount_point}"
                for live in inventory.overlays()
            ),
            "problems": inventory.problems(),
        }

    def unmount_everything(self, op: Transaction, *, force: bool) -> None:
        """Take down what other parts have made, then every overlay, then every layer.

        Raises:
            CallError: ``busy``, the first that could not go; with ``force`` the rest goes anyway.
        """
        self._take_down(self.parts, op, force)
        for overlay in reversed(self.state.inventory.overlays()):
            self._go_on(partial(self.overlays.unmount, overlay.spec.overlay_id, op), force)
        self._take_down(self.lower_parts, op, force)
        ids = tuple(live.spec.layer_id for live in self.state.inventory.layers())
        if not ids:
            return
        if force:
            for layer_id in ids:
                self._go_on(partial(self.layers.unmount, layer_id, op, force=True), force)
        else:
            self.batches.unmount(LayersUnmount(layers=ids), op)

    def _take_down(self, parts: Sequence[TakeDowns], op: Transaction, force: bool) -> None:
        for take_downs in parts:
            for take_down in take_downs():
                self._go_on(partial(take_down, op), force)

    def _go_on(self, action: Callable[[], object], force: bool) -> None:
        try:
            action()
        except CallError as error:
            if not force:
                raise
            log.warning("left behind", error=str(error))
