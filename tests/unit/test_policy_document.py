"""The document of a policy: one form of bytes, every field checked, nothing unknown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guestagent.api import METHODS
from guestagent.console.commands import COMMANDS
from guestagent.policy.document import (
    MAX_POLICY_BYTES,
    Policy,
    canonical_policy,
    is_target,
    read_policy,
)
from guestagent.policy.table import CONSOLE_COMMANDS, METHOD_RULES
from rootfs.pack.canonical import canonical_bytes
from tests.beds.policybed import POLICY
from vsock.errors import CallError

SCHEMA = Path(__file__).resolve().parents[2] / "docs/policy.schema.json"
#: A place in the document and a value that no policy has there.
WRONG: list[tuple[str, object]] = [
    ("version", True),
    ("name", "two words"),
    ("name", None),
    ("svn", -1),
    ("svn", 1 << 63),
    ("svn", "1"),
    ("requires", ["time-travel"]),
    ("unknown", 1),
    ("layers.0.unknown", 1),
    ("layers.0.id", ".hidden"),
    ("layers.0.filesystem", "auto"),
    ("layers.0.size_bytes", 0),
    ("layers.0.whiteouts", "blue"),
    ("layers.0.targets", []),
    ("layers.0.targets", ["run/layers/{id}"]),
    ("layers.0.targets", ["/run/{id}/x"]),
    ("layers.0.targets", ["/"]),
    ("layers.0.max_instances", 0),
    ("layers.0.verity.root_digest", "00"),
    ("layers.0.verity.salt", None),
    ("layers.0.verity.algorithm", "sha1"),
    ("layers.0.verity.hash_type", 2),
    ("layers.0.verity.data_blocks", 0),
    ("layers.0.verity.data_block_size", 4095),
    ("layers.0.verity.hash_block_size", 8192),
    ("layers.0.verity.hash_offset_bytes", -1),
    ("layers.0.verity.superblock", 1),
    ("chains.0.layers", []),
    ("chains.0.layers", ["app", "app"]),
    ("chains.0.options.metacopy", "maybe"),
    ("chains.0.options.index", "on"),
    ("chains.0.scratch", []),
    ("chains.0.scratch.0", {"kind": "directory", "path": "/run/x"}),
    ("chains.0.scratch.0", {"kind": "tmpfs"}),
    ("chains.0.scratch.0", {"kind": "device", "existing": ["perhaps"]}),
    ("devices.kinds", ["tape"]),
    ("devices.readonly_policies", ["ignore"]),
    ("devices.presets", ["loose"]),
    ("exact", [{"method": "layer.mount", "params": {}}]),
    ("expose.methods", ["agent.hello"]),
    ("expose.methods", ["share.mount"]),
    ("expose.methods", ["layer.mount", "layer.mount"]),
    ("expose.events.kinds", ["party"]),
    ("expose.events.fields", ["sequence"]),
    ("expose.log", "some"),
    ("expose.console", ["rm"]),
    ("run.shutdown", ["exit"]),
    ("run.max_deadline_ms", 0),
]
#: The same, where only the records see it.
BEYOND: list[tuple[str, object]] = [
    ("chains.0.layers", ["absent"]),
    ("chains.0.options.userxattr", True),
    ("layers.1.id", "app"),
    ("exact", [{"method": "share.mount", "params": {"share_id": "x"}}]),
    ("expose.inspect.layers", ["absent"]),
    ("expose.shell", True),
    ("layers.0.targets", ["/run/../x"]),
]


def changed(place: str, value: object) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(POLICY))
    there: Any = document
    *path, last = (int(part) if part.isdigit() else part for part in place.split("."))
    for part in path:
        there = there[part] if isinstance(part, int) else there.setdefault(part, {})
    there[last] = value
    return document


def refused(raw: bytes) -> CallError:
    with pytest.raises(CallError) as caught:
        read_policy(raw)
    assert caught.value.code in ("invalid", "unsupported")
    return caught.value


def test_policy_is_read() -> None:
    policy = read_policy(canonical_policy(POLICY))
    assert (policy.name, policy.svn) == ("web", 3)
    assert policy.chains[0].layers == ("app", "base")
    assert policy.layers[0].verity.root_digest.hex() == POLICY["layers"][0]["verity"]["root_digest"]


def test_canonical_form_is_that_of_packs() -> None:
    assert canonical_policy(POLICY) == canonical_bytes(POLICY)


@pytest.mark.parametrize(("place", "value"), WRONG + BEYOND)
def test_wrong_value_is_refused(place: str, value: object) -> None:
    assert refused(canonical_policy(changed(place, value)))


def test_schema_judges_alike() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(POLICY)
    for place, value in WRONG:
        assert not validator.is_valid(changed(place, value)), (place, value)


def test_schema_has_every_method_and_command() -> None:
    expose = json.loads(SCHEMA.read_text())["$defs"]["expose"]["properties"]
    exact = json.loads(SCHEMA.read_text())["properties"]["exact"]["items"]["properties"]["method"]
    listed = {*expose["methods"]["items"]["enum"], *exact["enum"]}
    rest = {m for m, rule in METHOD_RULES.items() if rule in ("always", "shutdown", "observed")}
    assert listed | rest == set(METHOD_RULES)
    assert set(expose["console"]["items"]["enum"]) == CONSOLE_COMMANDS


def test_every_method_has_a_rule() -> None:
    assert set(METHOD_RULES) == set(METHODS)


def test_every_console_command_has_a_row() -> None:
    assert set(COMMANDS) == CONSOLE_COMMANDS


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda raw: raw[:-1], "cut"),
        (lambda raw: raw + b"\n", "white space"),
        (lambda raw: raw.replace(b'"svn":3', b'"svn":3.0'), "a float"),
        (lambda raw: raw.replace(b'"svn":3', b'"svn":NaN'), "no number"),
        (lambda raw: raw.replace(b'"svn":3', b'"svn":2,"svn":3'), "a name twice"),
        (lambda raw: raw.replace(b'"svn":3', b'"svn":03'), "a number of another form"),
        (lambda raw: raw.replace(b'"svn":3', b'"svn":' + b"9" * 5000), "a very long number"),
        (lambda raw: raw.replace(b'"web"', b'"w\\u0065b"'), "an escape that need not be"),
        (lambda raw: raw.replace(b'"web"', b'"w\xff"'), "no UTF-8"),
        (lambda raw: raw.replace(b'"web"', b'"\\ud800"'), "a lone surrogate"),
        (lambda raw: raw.replace(b"guestagent.policy", b"guestagent.manifest"), "another type"),
        (lambda raw: b'{"name":"web","svn":3,"version":1}', "no type"),
        (lambda raw: b"[" * 100_000, "depth"),
        (lambda raw: b'{"exact":' + b"[" * 40 + b"]" * 40 + b"}", "depth that Python reads"),
        (lambda raw: b"[]", "no object"),
        (lambda raw: b"", "nothing"),
    ],
)
def test_other_bytes_are_refused(change: Callable[[bytes], bytes], what: str) -> None:
    raw = canonical_policy(POLICY)
    assert change(raw) != raw
    assert refused(change(raw)), what


def test_size_is_bounded() -> None:
    error = refused(b" " * (MAX_POLICY_BYTES + 1))
    assert str(MAX_POLICY_BYTES) in error.message


def test_two_layers_of_one_tree_are_refused() -> None:
    document = changed("layers.1.verity", POLICY["layers"][0]["verity"])
    assert "twice" in refused(canonical_policy(document)).message


def test_smallest_policy_allows_nothing() -> None:
    policy = Policy(name="nothing", svn=0)
    assert policy.layers == policy.chains == policy.exact == policy.expose.methods == ()
    assert (policy.expose.log, policy.expose.errors, policy.expose.dm) == ("none", "codes", "none")
    assert not policy.run.force


def test_target_stands_for_its_id_alone() -> None:
    rules = ("/run/layers/{id}", "/srv/app")
    assert is_target(rules, "/run/layers/a", "a")
    assert is_target(rules, "/srv/app", "a")
    assert not is_target(rules, "/run/layers/b", "a")
    assert not is_target(rules, "/run/layers/x/a", "a")
    assert not is_target(rules, "/srv/app/a", "a")
