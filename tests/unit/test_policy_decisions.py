"""What a policy decides: vectors, and properties that hold for every action."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestagent.api import METHODS, LayerSpec, OverlaySpec
from guestagent.api.overlays import LayersMount
from guestagent.policy.decision import ALLOWED_WITHOUT_POLICY, Allowed, Denied, decide
from guestagent.policy.document import canonical_policy, read_policy
from guestagent.policy.gate import Gate
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
from tests.beds.policybed import POLICY
from vsock.errors import CallError
from vsock.record import Record

VECTORS = Path(__file__).resolve().parents[1] / "vectors/policy/decisions.json"
DATA = json.loads(VECTORS.read_text())
RULES = Rules(read_policy(canonical_policy(POLICY)))


def changed(value: Any, changes: dict[str, object]) -> Any:
    made = json.loads(json.dumps(value))
    for place, new in changes.items():
        *path, last = (int(part) if part.isdigit() else part for part in place.split("."))
        there = made
        for part in path:
            there = there[part]
        there[last] = new
    return made


def layer_action(wire: object) -> LayerAction:
    spec = LayerSpec.from_wire(wire)
    size_bytes = sum(part.size_bytes for part in spec.ranges) or None
    return LayerAction(spec=spec, verity=spec.verity, size_bytes=size_bytes)


def state_of(mounted: list[str]) -> State:
    """Return what is mounted: the layers of the batch, and ``ID as evil`` with another tree."""
    layers = {}
    for text in mounted:
        layer_id, _, other = text.partition(" as ")
        wire = next(
            each for each in DATA["actions"]["batch"]["layers"] if each["layer_id"] == layer_id
        )
        root = {"verity.root_digest": "e" * 64} if other else {}
        layers[layer_id] = layer_action(changed(wire, root))
    return State(layers=layers)


def action_of(vector: dict[str, Any]) -> Action:
    kind, changes = vector["action"], vector["change"]
    if kind == "console":
        return ConsoleAction(command=changes["command"])
    if kind == "request":
        method = changes["method"]
        return RequestAction(method=method, request=METHODS[method].from_wire(changes["params"]))
    wire = changed(DATA["actions"][kind], changes)
    if kind == "layer":
        return layer_action(wire)
    if kind == "overlay":
        spec = OverlaySpec.from_wire(wire)
        layers = state_of(vector["mounted"]).layers
        found = tuple(layers[name] for name in spec.layers if name in layers)
        return OverlayAction(spec=spec, layers=found)
    request = LayersMount.from_wire(wire)
    made = tuple(layer_action(each) for each in wire["layers"])
    return BatchAction(layers=made, overlay=request.overlay)


@pytest.mark.parametrize("vector", DATA["vectors"], ids=lambda vector: vector["title"])
def test_decision_is_that_of_the_vector(vector: dict[str, Any]) -> None:
    decision = decide([RULES], state_of(vector["mounted"]), action_of(vector))
    rule = decision.rule if isinstance(decision, Denied) else None
    assert rule == vector["rule"]


@pytest.mark.parametrize("vector", DATA["vectors"], ids=lambda vector: vector["title"])
def test_narrowed_policy_allows_a_subset(vector: dict[str, Any]) -> None:
    """A second policy takes away, and gives nothing that the first denies."""
    nothing = Rules(
        read_policy(canonical_policy({**POLICY, "layers": [], "chains": [], "expose": {}}))
    )
    wide = json.loads(json.dumps(POLICY))
    wide["layers"][0]["max_instances"] = wide["chains"][0]["max_instances"] = 9
    wide["run"] = {"force": True, "shutdown": ["poweroff", "reboot"]}
    wide["expose"] |= {"dm": "tables", "console": ["help", "sh", "layers"], "shell": True}
    wider = Rules(read_policy(canonical_policy(wide)))
    state, action = state_of(vector["mounted"]), action_of(vector)
    alone = isinstance(decide([RULES], state, action), Allowed)
    for second in (nothing, wider, RULES):
        both = isinstance(decide([RULES, second], state, action), Allowed)
        assert both == (alone and isinstance(decide([second], state, action), Allowed))


def fields_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, member in items:
        place = f"{path}.{name}" if path else str(name)
        if isinstance(member, (dict, list)):
            yield from fields_of(member, place)
        else:
            yield place, member


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 or 1
    digits = "0123456789abcdef"
    if set(value) <= set(digits) and len(value) >= 32:
        return value[:-1] + digits[digits.index(value[-1]) - 1]
    return f"{value}2"


#: Where the bytes are found the host may choose, and under which id.
FREE = {"layer_id", "device.number", "mapping.offset_bytes"}


@pytest.mark.parametrize(
    "place", [place for place, _ in fields_of(DATA["actions"]["layer"]) if place not in FREE]
)
def test_any_other_value_of_an_allowed_layer_is_denied(place: str) -> None:
    value = dict(fields_of(DATA["actions"]["layer"]))[place]
    wire = changed(DATA["actions"]["layer"], {place: other_value(value)})
    try:
        action = layer_action(wire)
    except CallError:  # no layer can have it
        return
    assert isinstance(decide([RULES], State(), action), Denied)


def test_no_policy_allows_everything_and_none_yet_denies_everything() -> None:
    action = ConsoleAction(command="sh")
    assert decide(None, State(), action) is ALLOWED_WITHOUT_POLICY
    assert isinstance(decide([], State(), action), Denied)


def test_only_a_decision_makes_an_allowed() -> None:
    with pytest.raises(TypeError):
        Allowed(object())


class Faulty(Rules):
    def find_denial(self, state: State, action: Action) -> tuple[str, str] | None:
        raise KeyError("x")


def test_fault_of_a_rule_denies_and_ends_all_else() -> None:
    gate = Gate()
    gate.put_in_force([Faulty(RULES.policy)])
    with pytest.raises(CallError) as caught:
        gate.console("help")
    assert (caught.value.code, caught.value.object) == ("denied", "internal")
    assert gate.inconsistent
    gate.put_in_force([RULES])
    with pytest.raises(CallError) as caught:
        gate.console("help")
    assert caught.value.object == "inconsistent"
    gate.request("agent.status", METHODS["agent.status"]())


def test_requests_take_no_longer_than_the_policy_says() -> None:
    gate = Gate()
    assert gate.max_deadline_seconds is None
    short = json.loads(json.dumps({**POLICY, "run": {"max_deadline_ms": 1500}}))
    gate.put_in_force([RULES, Rules(read_policy(canonical_policy(short)))])
    assert gate.max_deadline_seconds == 1.5


def test_denials_look_alike_and_are_counted() -> None:
    """What is denied cannot be found out by trying: the text is one, whatever was wrong."""
    gate = Gate()
    gate.put_in_force([RULES])
    errors = []
    for place, value in (("root_digest", "c" * 64), ("salt", "cd" * 32), ("data_blocks", 7)):
        wire = changed(DATA["actions"]["layer"], {f"verity.{place}": value})
        spec = LayerSpec.from_wire(wire)
        with pytest.raises(CallError) as caught:
            gate.layer(spec, spec.verity)
        errors.append(caught.value.to_wire())
    assert errors[0] == errors[1] == errors[2]
    assert (errors[0]["code"], errors[0]["step"]) == ("denied", "policy")
    assert errors[0]["object"] == "layers.tree"
    assert errors[0]["hint"] is errors[0]["errno"] is None
    assert gate.denials == {"layers.tree": 3}


def test_scratch_device_is_bounded_once_its_size_is_known() -> None:
    policy = json.loads(json.dumps(POLICY))
    policy["chains"][0]["scratch"] = [{"kind": "device", "max_bytes": 1 << 20}]
    rules = Rules(read_policy(canonical_policy(policy)))
    layers = state_of(["app", "base"])
    disk = {"kind": "device", "device": {"kind": "pmem", "number": 1}, "encrypted": True}
    spec = OverlaySpec.from_wire(changed(DATA["actions"]["overlay"], {"scratch": disk}))
    found = tuple(layers.layers[name] for name in spec.layers)
    small = OverlayAction(spec=spec, layers=found, scratch_bytes=1 << 20)
    assert isinstance(decide([rules], layers, small), Allowed)
    large = small.replace(scratch_bytes=(1 << 20) + 512)
    assert isinstance(decide([rules], layers, large), Denied)


def test_second_instance_of_a_chain_is_denied() -> None:
    layers = state_of(["app", "base"])
    spec = OverlaySpec.from_wire(DATA["actions"]["overlay"])
    found = tuple(layers.layers[name] for name in spec.layers)
    state = layers.replace(overlays={"first": spec.replace(overlay_id="first")})
    decision = decide([RULES], state, OverlayAction(spec=spec, layers=found))
    assert isinstance(decision, Denied)
    assert decision.rule == "chains.max_instances"


def test_every_method_without_parameters_is_decided() -> None:
    """No method raises for want of a rule, and an empty policy answers none that acts."""
    empty = Rules(
        read_policy(
            canonical_policy({**POLICY, "layers": [], "chains": [], "exact": [], "expose": {}})
        )
    )
    allowed = set()
    for method in METHODS:
        decision = decide([empty], State(), RequestAction(method=method, request=Record()))
        if isinstance(decision, Allowed):
            allowed.add(method)
    assert allowed == {
        *("agent.hello", "agent.status", "agent.cancel", "agent.more", "agent.subscribe"),
        *("agent.events", "agent.log", "agent.metrics", "agent.crashes"),
        *("fs.available", "fs.version", "policy.set", "policy.narrow", "policy.get"),
    }


def test_no_module_makes_an_allowed_but_the_decision() -> None:
    """The gate hands on what the decision returns; nothing else in the guest names either maker."""
    makers = {"Allowed": {"decision.py"}, "ALLOWED_WITHOUT_POLICY": {"decision.py", "gate.py"}}
    found: dict[str, set[str]] = {name: set() for name in makers}
    for path in (Path(__file__).resolve().parents[2] / "guestagent").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "Allowed":
                found["Allowed"].add(path.name)
            if isinstance(node, ast.Name) and node.id == "ALLOWED_WITHOUT_POLICY":
                found["ALLOWED_WITHOUT_POLICY"].add(path.name)
    assert found == makers
