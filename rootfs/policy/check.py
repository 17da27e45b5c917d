"""What a policy decides about a request, by the decision of the guest itself.

A guest keeps the reason to itself. Here it is told: the policy is the host's own.
"""

from collections.abc import Mapping

from guestagent.api import METHODS, LayersMount, LayerSpec, OverlaySpec
from guestagent.policy.decision import Denied, decide
from guestagent.policy.document import Policy
from guestagent.policy.rules import (
    Action,
    BatchAction,
    ConsoleAction,
    LayerAction,
    OverlayAction,
    RequestAction,
    Rules,
    State,
)
from rootfs.pack.canonical import parse_json
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("MAX_QUESTION_BYTES", "check_request")

MAX_QUESTION_BYTES = 4 << 20


class _Mounted(Record):
    """What is mounted, as in the requests that have mounted it."""

    layers: tuple[LayerSpec, ...] = ()
    overlays: tuple[OverlaySpec, ...] = ()


class _Question(Record):
    """What is asked for: a method with its parameters, or a command of the console."""

    method: str | None = None
    params: Mapping[str, object] = {}
    console: str | None = None
    mounted: _Mounted = _Mounted()

    def check(self) -> None:
        if (self.method is None) == (self.console is None):
            raise ValueError("it must have either method or console")
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"there is no method {self.method[:64]!r}")


def check_request(policy: Policy, raw: bytes, name: str) -> Denied | None:
    """Return why a policy denies what the JSON of the file ``name`` asks, or None: it is allowed.

    The JSON has the fields of ``_Question``. The sizes of devices, which a guest knows and a
    request does not say, are not judged.

    Raises:
        CallError: ``invalid``, it is no such JSON or no valid request; ``object`` is the field.
    """
    try:
        question = _Question.from_wire(parse_json(raw), "request")
        state = State(
            layers={spec.layer_id: _layer(spec) for spec in question.mounted.layers},
            overlays={overlay.overlay_id: overlay for overlay in question.mounted.overlays},
        )
        actions = _actions(question, state)
    except (ValueError, CallError) as problem:
        place = problem.object if isinstance(problem, CallError) else "request"
        text = problem.message if isinstance(problem, CallError) else str(problem)
        text = f"cannot use the request {name!r}: {text}"
        raise CallError("invalid", text, step="read the request", object=place) from None
    rules = [Rules(policy)]
    decisions = (decide(rules, state, action) for action in actions)
    return next((each for each in decisions if isinstance(each, Denied)), None)


def _actions(question: _Question, state: State) -> list[Action]:
    """Return what an agent judges of a request, in its order."""
    if question.method is None:
        return [ConsoleAction(command=str(question.console))]
    request = METHODS[question.method].from_wire(question.params, "request.params")
    actions: list[Action] = [RequestAction(method=question.method, request=request)]
    if isinstance(request, LayerSpec):
        actions.append(_layer(request))
    elif isinstance(request, OverlaySpec):
        found = tuple(state.layers[each] for each in request.layers if each in state.layers)
        actions.append(OverlayAction(spec=request, layers=found))
    elif isinstance(request, LayersMount):
        layers = tuple(map(_layer, request.layers))
        actions.append(BatchAction(layers=layers, overlay=request.overlay))
    return actions


def _layer(spec: LayerSpec) -> LayerAction:
    size_bytes = sum(part.size_bytes for part in spec.ranges) or None
    return LayerAction(spec=spec, verity=spec.verity, size_bytes=size_bytes)
