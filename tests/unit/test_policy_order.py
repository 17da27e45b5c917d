"""How policies differ, and what allows both: every field has a direction, and none is missed."""

import json
from pathlib import Path
from typing import Any

import pytest

from guestagent.policy import document
from guestagent.policy.document import (
    MAX_POLICY_BYTES,
    Policy,
    canonical_policy,
    read_policy,
)
from rootfs.policy.check import check_request
from rootfs.policy.files import policy_bytes
from rootfs.policy.order import _ROWS, BOTH, NARROWER, NEITHER, WIDER, differences, merge
from tests.beds.policybed import POLICY
from vsock.errors import CallError
from vsock.record import Record

VECTORS = Path(__file__).resolve().parents[1] / "vectors/policy/decisions.json"
DATA = json.loads(VECTORS.read_text())
OLD = read_policy(canonical_policy(POLICY))
THIRD = json.loads(json.dumps(POLICY["layers"][0]).replace("a" * 64, "c" * 64)) | {"id": "third"}

#: A place in the policy, a value, and what the policy with the value is to the one without.
CHANGES: list[tuple[str, object, set[str]]] = [
    ("name", "other", {NEITHER}),
    ("svn", 4, {NEITHER}),
    ("layers.0.id", "app", set()),
    ("layers.0.filesystem", "ext4", {BOTH}),
    ("layers.0.size_bytes", None, {WIDER}),
    ("layers.0.size_bytes", 4096, {BOTH}),
    ("layers.0.whiteouts", None, {NARROWER}),
    ("layers.0.whiteouts", "none", {BOTH}),
    ("layers.0.targets", ["/run/layers/{id}", "/srv/app"], {WIDER}),
    ("layers.0.targets", ["/srv/app"], {WIDER, NARROWER}),
    ("layers.0.max_instances", 2, {WIDER}),
    ("layers.0.verity.root_digest", "c" * 64, {WIDER, NARROWER}),
    ("layers.0.verity.salt", "00", {WIDER, NARROWER}),
    ("layers", [*POLICY["layers"], THIRD], {WIDER}),
    ("chains.0.name", "renamed", {NEITHER}),
    ("chains.0.layers", ["base", "app"], {WIDER, NARROWER}),
    ("chains.0.layers", ["app"], {WIDER, NARROWER}),
    ("chains.0.options.suid", False, {WIDER, NARROWER}),
    ("chains.0.targets", ["/run/overlays/{id}", "/srv/web"], {WIDER}),
    ("chains.0.scratch", [{"kind": "none"}], {WIDER, NARROWER}),
    ("chains.0.scratch", [{"kind": "device"}], {NARROWER}),
    ("chains.0.scratch.0.max_bytes", 4096, {NARROWER}),
    ("chains.0.scratch.0.max_bytes", 1 << 40, {WIDER}),
    ("chains.0.scratch.1.encrypted", False, {WIDER}),
    ("chains.0.scratch.1.shared", True, {WIDER}),
    ("chains.0.scratch.1.existing", ["fresh"], {NARROWER}),
    ("chains.0.scratch.1", {"kind": "thin", "pools": ["p"]}, {WIDER, NARROWER}),
    ("chains.0.max_instances", 3, {WIDER}),
    ("chains", [], {NARROWER}),
    ("devices.kinds", ["pmem", "virtio-blk", "path"], {WIDER}),
    ("devices.kinds", ["pmem"], {NARROWER}),
    ("devices.readonly_policies", ["error"], {NARROWER}),
    ("devices.hash_device", True, {WIDER}),
    ("devices.presets", ["strict", "fast"], {WIDER, NARROWER}),
    ("devices.signed", True, {NARROWER}),
    ("devices.options", [], {NARROWER}),
    ("exact", [], {NARROWER}),
    ("exact.0.params.read_only", False, {WIDER, NARROWER}),
    ("expose.methods", [], {NARROWER}),
    ("expose.methods", [*POLICY["expose"]["methods"], "dm.status"], {WIDER}),
    ("expose.events.kinds", ["layer_mounted", "layer_failed"], {WIDER}),
    ("expose.events.fields", [], {NARROWER}),
    ("expose.log", "codes", {WIDER}),
    ("expose.crashes", "full", {WIDER}),
    ("expose.metrics", ["guestagent_layers"], {WIDER}),
    ("expose.errors", "text", {WIDER}),
    ("expose.inspect.layers", [], {NARROWER}),
    ("expose.inspect.layers", ["base"], {WIDER, NARROWER}),
    ("expose.inspect.overlays", True, {WIDER}),
    ("expose.console", ["sh"], {WIDER, NARROWER}),
    ("expose.dm", "tables", {WIDER}),
    ("expose.dm", "none", {NARROWER}),
    ("run.shutdown", [], {NARROWER}),
    ("run.force", True, {WIDER}),
    ("run.max_deadline_ms", 1, {NARROWER}),
    ("run.max_layers", 4096, {WIDER}),
    ("run.max_overlays", 0, {NARROWER}),
]


def changed(value: Any, changes: dict[str, object]) -> Any:
    made = json.loads(json.dumps(value))
    for place, new in changes.items():
        *path, last = (int(part) if part.isdigit() else part for part in place.split("."))
        there = made
        for part in path:
            there = there[part] if isinstance(part, int) else there.setdefault(part, {})
        there[last] = new
    return made


def policy_with(place: str, value: object) -> Policy:
    return read_policy(canonical_policy(changed(POLICY, {place: value})))


def question_of(vector: dict[str, Any]) -> bytes:
    """Return the question of a vector, as ``guestctl policy check`` takes it."""
    kind, changes = vector["action"], vector["change"]
    layers = []
    for text in vector["mounted"]:
        layer_id, _, other = text.partition(" as ")
        batch = DATA["actions"]["batch"]["layers"]
        wire = next(each for each in batch if each["layer_id"] == layer_id)
        layers.append(changed(wire, {"verity.root_digest": "e" * 64} if other else {}))
    mounted = {"mounted": {"layers": layers}}
    if kind == "console":
        return json.dumps({"console": changes["command"], **mounted}).encode()
    if kind == "request":
        return json.dumps({**changes, **mounted}).encode()
    methods = {"layer": "layer.mount", "overlay": "overlay.mount", "batch": "layers.mount"}
    params = changed(DATA["actions"][kind], changes)
    return json.dumps({"method": methods[kind], "params": params, **mounted}).encode()


QUESTIONS = [question_of(vector) for vector in DATA["vectors"]]


def answers(policy: Policy) -> list[bool]:
    return [check_request(policy, question, "q") is None for question in QUESTIONS]


@pytest.mark.parametrize("vector", DATA["vectors"], ids=lambda vector: vector["title"])
def test_check_answers_as_the_vector_says(vector: dict[str, Any]) -> None:
    denied = check_request(OLD, question_of(vector), "q")
    assert (None if denied is None else denied.rule) == vector["rule"]


@pytest.mark.parametrize(("place", "value", "directions"), CHANGES)
def test_a_change_has_its_direction(place: str, value: object, directions: set[str]) -> None:
    new = policy_with(place, value)
    found = differences(OLD, new)
    assert {change.direction for change in found} == directions
    opposite = {WIDER: NARROWER, NARROWER: WIDER}
    back = {change.direction for change in differences(new, OLD)}
    assert back == {opposite.get(each, each) for each in directions}


def test_what_is_newly_allowed_is_wider() -> None:
    """Every question of the vectors, between every two of the changed policies."""
    policies = [OLD, *(policy_with(place, value) for place, value, _ in CHANGES)]
    told = [answers(policy) for policy in policies]
    assert 0 < sum(told[0]) < len(QUESTIONS)
    for old, before in zip(policies, told, strict=True):
        for new, after in zip(policies, told, strict=True):
            if any(now and not was for was, now in zip(before, after, strict=True)):
                assert any(change.is_wider for change in differences(old, new))


@pytest.mark.parametrize(("place", "value"), [each[:2] for each in CHANGES if BOTH not in each[2]])
def test_a_merged_policy_allows_what_either_does(place: str, value: object) -> None:
    new = policy_with(place, value)
    both = merge(OLD, new)
    assert read_policy(policy_bytes(both)) == both
    for one in (OLD, new):
        assert not [change for change in differences(both, one) if change.is_wider]


@pytest.mark.parametrize(("place", "value"), [each[:2] for each in CHANGES if BOTH in each[2]])
def test_what_excludes_each_other_is_not_merged(place: str, value: object) -> None:
    with pytest.raises(CallError, match=r"layer app: .* exclude each other") as caught:
        merge(OLD, policy_with(place, value))
    assert caught.value.code == "conflict"


def test_merging_a_policy_with_itself_changes_nothing() -> None:
    assert policy_bytes(merge(OLD, OLD)) == policy_bytes(OLD)


def test_layers_of_one_id_and_other_content_stay_apart() -> None:
    other = policy_with("layers.0.verity.root_digest", "c" * 64)
    both = merge(OLD, other)
    assert [layer.id for layer in both.layers] == ["app", "base", "app-2"]
    assert [chain.layers for chain in both.chains] == [("app", "base"), ("app-2", "base")]
    assert [chain.name for chain in both.chains] == ["web", "web-2"]
    assert both.expose.inspect.layers == ("app", "app-2")


def test_layers_are_the_same_by_their_trees() -> None:
    renamed = json.loads(json.dumps(POLICY).replace('"app"', '"x"').replace('"base"', '"app"'))
    assert differences(OLD, read_policy(canonical_policy(renamed))) == ()


def test_policy_that_no_agent_reads_is_not_made() -> None:
    layers = tuple(
        layer.replace(id=f"{layer.id}-{number}", verity=layer.verity.replace(data_blocks=number))
        for number in range(1000, 2500)
        for layer in OLD.layers
    )
    raw = policy_bytes(OLD.replace(layers=(*OLD.layers, *layers[:1000])))
    assert len(raw) < MAX_POLICY_BYTES
    with pytest.raises(CallError, match="an agent reads at most 1048576") as caught:
        policy_bytes(OLD.replace(layers=(*OLD.layers, *layers)))
    assert caught.value.code == "resource"


def test_every_field_is_compared() -> None:
    """A field that is added to the document must say in which direction it allows more."""
    records = {
        kind
        for kind in vars(document).values()
        if isinstance(kind, type)
        and issubclass(kind, Record)
        and kind.__module__ == document.__name__
    }
    assert {kind.__name__ for kind in records - set(_ROWS)} == {"LayerTree", "ExactRequest"}
    for kind, rows in _ROWS.items():
        assert set(rows) == set(kind._fields)
