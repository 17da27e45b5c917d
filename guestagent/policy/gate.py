"""The gate of an agent: which policies are in force, and the one way to ask whether they allow.

Without a policy a question costs one comparison. A denial has a constant text with the rule, and
nothing of what the policy expects: what is denied cannot be found out by trying. The reason goes
to the log as a field that no policy exposes but one that exposes all of the log.
"""

import threading
import time

from guestagent.policy.decision import ALLOWED_WITHOUT_POLICY, Allowed, Denied, decide
from vsock.errors import CallError
from vsock.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guestagent.api import Event, LayersMount, LayerSpec, OverlaySpec
    from guestagent.api.devices import VerityTerms
    from guestagent.policy.disclosure import Disclosure
    from guestagent.policy.rules import Action, LayerAction, Rules, State
    from vsock.record import Record

__all__ = ("Gate",)

#: Reasons that are written to the log in one second.
_REASONS_PER_SECOND = 10


class Gate:
    """Thread-safe. A policy that is in force stays so: there is ``put_in_force`` and no other way.

    ``look`` returns what is mounted; it is set by what the gate stands before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._policies: Sequence[Rules] | None = None
        self.look: Callable[[], State] | None = None
        #: Why nothing but the end of the agent is allowed any more.
        self.inconsistent = ""
        self._disclosure: Disclosure | None = None
        #: Denials by rule.
        self.denials: dict[str, int] = {}
        self._second = 0.0
        self._reasons = 0

    @property
    def is_open(self) -> bool:
        """Whether everything is allowed."""
        return self._policies is None

    @property
    def lock_keys(self) -> tuple[tuple[str, str], ...]:
        """What a request holds that mounts or unmounts: under a policy one does so at a time, so
        that what is counted stays as it was when it was judged."""
        return () if self._policies is None else (("policy", ""),)

    def put_in_force(self, policies: "Sequence[Rules]") -> None:
        """Judge by these policies from now on, each of which must allow."""
        from guestagent.policy.disclosure import Disclosure

        disclosure = Disclosure([rules.policy for rules in policies])
        with self._lock:
            self._policies, self._disclosure = policies, disclosure

    def note_inconsistent(self, why: str) -> None:
        """Allow nothing but the end from now on, because what is mounted is not what was judged."""
        if self._policies is not None and not self.inconsistent:
            self.inconsistent = why
            log.error("the policy does not hold for what is mounted", reason=why)

    # --- what is told

    @property
    def disclosure(self) -> "Disclosure | None":
        """What the host may learn; None: everything."""
        return self._disclosure

    def shown_error(self, error: CallError) -> CallError:
        """Return an error as it may leave the guest."""
        return error if self._disclosure is None else self._disclosure.error(error)

    def shown_reply(self, reply: "Record") -> "Record":
        """Return a reply as it may leave the guest."""
        return reply if self._disclosure is None else self._disclosure.reply(reply)

    def shown_event(self, event: "Event") -> "Event | None":
        """Return an event as it may leave the guest; None: it may not."""
        return event if self._disclosure is None else self._disclosure.event(event)

    @property
    def max_deadline_seconds(self) -> float | None:
        """How long a request may take; None: as long as it says."""
        if self._policies is None:
            return None
        return min(rules.policy.run.max_deadline_ms for rules in self._policies) / 1000

    # --- what is asked

    def layer(
        self, spec: "LayerSpec", verity: "VerityTerms | None", size_bytes: int | None = None
    ) -> Allowed:
        """Ask for a layer, with as much of it as is resolved.

        Raises:
            CallError: ``denied``.
        """
        if self._policies is None:
            return ALLOWED_WITHOUT_POLICY
        from guestagent.policy.rules import LayerAction

        return self._judge(LayerAction(spec=spec, verity=verity, size_bytes=size_bytes))

    def overlay(
        self,
        spec: "OverlaySpec",
        layers: "Callable[[], tuple[LayerAction, ...]] | None" = None,
        scratch_bytes: int | None = None,
    ) -> Allowed:
        """Ask for an overlay of layers that are mounted; without ``layers`` they are looked up.

        Raises:
            CallError: ``denied``.
        """
        if self._policies is None:
            return ALLOWED_WITHOUT_POLICY
        from guestagent.policy.rules import OverlayAction

        if layers is None:
            there = self._state().layers
            found = tuple(there[layer_id] for layer_id in spec.layers if layer_id in there)
        else:
            found = layers()
        return self._judge(OverlayAction(spec=spec, layers=found, scratch_bytes=scratch_bytes))

    def batch(self, request: "LayersMount") -> Allowed:
        """Ask for a whole batch, before anything of it is made.

        Raises:
            CallError: ``denied``.
        """
        if self._policies is None:
            return ALLOWED_WITHOUT_POLICY
        from guestagent.policy.rules import BatchAction, LayerAction

        layers = tuple(LayerAction(spec=spec, verity=spec.verity) for spec in request.layers)
        return self._judge(BatchAction(layers=layers, overlay=request.overlay))

    def request(self, method: str, request: "Record") -> Allowed:
        """Ask for a request, by its method and its parameters.

        Raises:
            CallError: ``denied``.
        """
        if self._policies is None:
            return ALLOWED_WITHOUT_POLICY
        from guestagent.policy.rules import RequestAction, State
        from guestagent.policy.table import METHOD_RULES

        # what is mounted decides about places alone, and takes a look at all of it
        state = None if METHOD_RULES.get(method) == "place" else State()
        return self._judge(RequestAction(method=method, request=request), state)

    def console(self, command: str) -> Allowed:
        """Ask for a command of the console.

        Raises:
            CallError: ``denied``.
        """
        if self._policies is None:
            return ALLOWED_WITHOUT_POLICY
        from guestagent.policy.rules import ConsoleAction, State

        return self._judge(ConsoleAction(command=command), State())

    def _state(self) -> "State":
        from guestagent.policy.rules import State

        return State() if self.look is None else self.look()

    def _judge(self, action: "Action", state: "State | None" = None) -> Allowed:
        if self.inconsistent and not _is_always_answered(action):
            raise self._denied(Denied(rule="inconsistent", reason=self.inconsistent))
        decision = decide(self._policies, state or self._state(), action)
        if isinstance(decision, Denied):
            raise self._denied(decision)
        return decision

    def _denied(self, denied: Denied) -> CallError:
        with self._lock:
            self.denials[denied.rule] = self.denials.get(denied.rule, 0) + 1
            now = time.monotonic()
            if now - self._second >= 1.0:
                self._second, self._reasons = now, 0
            self._reasons += 1
            is_told = self._reasons <= _REASONS_PER_SECOND
        if is_told:
            log.warning("denied by the policy", rule=denied.rule, reason=denied.reason)
        if denied.rule == "internal":
            self.note_inconsistent(denied.reason)
        text = "the policy of this guest does not allow it"
        error = CallError("denied", text, step="policy", object=denied.rule)
        error.has_step = True
        return error


def _is_always_answered(action: "Action") -> bool:
    from guestagent.policy.rules import RequestAction
    from guestagent.policy.table import ALWAYS_RULES, METHOD_RULES

    return isinstance(action, RequestAction) and METHOD_RULES.get(action.method) in ALWAYS_RULES
