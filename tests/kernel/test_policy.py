"""A policy in a real agent: what is denied leaves no trace, and nothing gets round it."""

import contextlib
import errno
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestagent.api import LayersMount, LayerSpec, LayersUnmount, OverlaySpec, TmpfsScratch, Verity
from guestagent.api.layers import LayerReport
from guestagent.api.overlays import DeviceScratch, DirectoryScratch, OverlayOptions
from guestagent.boot.mounting import mount_plan
from guestagent.boot.plan import BootPlan
from guestagent.config import read_settings
from guestagent.host.client import GuestAgent
from guestagent.policy.document import canonical_policy, read_policy
from guestagent.policy.gate import Gate
from guestagent.policy.rules import Rules
from tests.beds.agentbed import AgentProcess, EngineBed, Pack, World, attached_pack, settled_world
from tests.beds.dmbed import loop_device
from tests.beds.supervised import SupervisedAgent
from vsock.errors import CallError

METHODS = [
    *("layer.mount", "layers.mount", "overlay.mount", "layer.unmount", "layers.unmount"),
    *("overlay.unmount", "layer.list", "overlay.list"),
]
SCRATCH = TmpfsScratch(size_bytes=1 << 20)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    with attached_pack(tmp_path_factory.mktemp("pack"), 3) as pack:
        yield pack


@pytest.fixture(scope="module")
def specs(pack: Pack) -> tuple[LayerSpec, ...]:
    """Return requests for the layers of the pack, with the whole tuple of their trees."""
    with AgentProcess() as agent, agent.client() as guest:
        requests = [pack.spec(number) for number in range(3)]
        reports = [guest.layer_mount(request) for request in requests]
        found = [
            request.replace(verity=whole(report))
            for request, report in zip(requests, reports, strict=True)
        ]
        guest.layers_unmount(LayersUnmount(layers=tuple(each.layer_id for each in requests)))
    return tuple(found)


def whole(report: LayerReport) -> Verity:
    assert report.verity is not None
    names = ("root_digest", "salt", "algorithm", "hash_type", "data_blocks", "data_block_size")
    more = ("hash_block_size", "hash_offset_bytes", "superblock")
    return Verity.from_wire({name: getattr(report.verity, name) for name in (*names, *more)})


def policy_of(specs: tuple[LayerSpec, ...], **changes: Any) -> bytes:
    """Return a policy for the first two layers, and one chain of them."""
    layers = []
    for spec in specs[:2]:
        assert spec.verity is not None
        tree = {
            name: value.hex() if isinstance(value, bytes) else value
            for name, value in spec.verity.as_dict().items()
            if name not in ("hash_device", "preset", "signature", "allow_sha1")
        }
        layers.append({"id": spec.layer_id, "verity": tree, "filesystem": "erofs"})
    document = {
        "type": "guestagent.policy",
        "version": 1,
        "name": "test",
        "svn": 1,
        "layers": layers,
        "chains": [
            {
                "name": "chain",
                "layers": ["layer0", "layer1"],
                "scratch": [{"kind": "tmpfs", "max_bytes": 1 << 20}],
            }
        ],
        "devices": {"kinds": ["path"]},
        "expose": {"methods": METHODS},
    }
    return canonical_policy({**document, **changes})


@pytest.fixture
def agent(specs: tuple[LayerSpec, ...]) -> Iterator[SupervisedAgent]:
    """An agent whose policy was set; everything that it has mounted is gone with it."""
    with SupervisedAgent() as agent:
        with agent.client() as guest:
            assert guest.policy_set(policy_of(specs)).state == "set"
        yield agent
        with agent.client() as guest:
            guest.layers_unmount(
                LayersUnmount(layers=tuple(spec.layer_id for spec in specs), overlay="o")
            )
        agent.end()
        agent.wait()


@pytest.fixture
def guest(agent: SupervisedAgent) -> Iterator[GuestAgent]:
    with agent.client() as guest:
        yield guest


def denied(request: Callable[[], object], rule: str) -> CallError:
    """See a request denied by a rule, with nothing made and nothing told."""
    before = World.now()
    with pytest.raises(CallError) as caught:
        request()
    error = caught.value
    assert (error.code, error.step, error.object) == ("denied", "policy", rule)
    assert error.message == "the policy of this guest does not allow it"
    assert (error.hint, error.kernel_log, error.errno) == (None, (), None)
    assert settled_world(before, seconds=0.5) == before
    return error


def test_what_the_policy_has_is_mounted(guest: GuestAgent, specs: tuple[LayerSpec, ...]) -> None:
    spec = OverlaySpec(overlay_id="o", layers=("layer0", "layer1"), scratch=SCRATCH)
    reply = guest.layers_mount(LayersMount(layers=specs[:2], overlay=spec))
    assert [layer.state for layer in reply.layers] == ["mounted", "mounted"]
    assert reply.overlay is not None
    assert reply.overlay.state == "mounted"
    # how full the scratch is, and the lines of tables, are not exposed
    assert reply.overlay.scratch is not None
    assert reply.overlay.scratch.free_bytes == 0
    assert {device.table for layer in reply.layers for device in layer.dm} == {""}
    again = guest.layers_mount(LayersMount(layers=specs[:2], overlay=spec))
    assert all(layer.already for layer in again.layers)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"verity": None}, "layers.verity"),
        ({"filesystem": "auto"}, "layers.filesystem"),
        ({"target": "/run/layers/elsewhere"}, "layers.targets"),
        ({"readonly_policy": "ignore"}, "devices.readonly_policies"),
        ({"readonly_policy": "write"}, "devices.readonly_policies"),
    ],
)
def test_another_layer_is_denied_before_a_device_is_made(
    guest: GuestAgent, specs: tuple[LayerSpec, ...], change: dict[str, Any], rule: str
) -> None:
    denied(lambda: guest.layer_mount(specs[0].replace(**change)), rule)


@pytest.mark.parametrize(
    "change",
    [
        {"root_digest": bytes(32)},
        {"salt": b"other"},
        {"salt": None},
        {"data_blocks": 1},
        {"data_blocks": None},
        {"hash_offset_bytes": None},
        {"superblock": False},
    ],
)
def test_another_tree_is_denied_before_the_device_is_opened(
    guest: GuestAgent, specs: tuple[LayerSpec, ...], change: dict[str, Any]
) -> None:
    assert specs[0].verity is not None
    spec = specs[0].replace(verity=specs[0].verity.replace(**change))
    denied(lambda: guest.layer_mount(spec), "layers.tree")


def test_layer_that_is_not_listed_is_denied(
    guest: GuestAgent, specs: tuple[LayerSpec, ...]
) -> None:
    denied(lambda: guest.layer_mount(specs[2]), "layers.tree")
    # the id of a layer that is listed does not help
    denied(lambda: guest.layer_mount(specs[2].replace(layer_id="layer0")), "layers.tree")


def test_batch_is_judged_whole(guest: GuestAgent, specs: tuple[LayerSpec, ...]) -> None:
    denied(lambda: guest.layers_mount(LayersMount(layers=specs)), "layers.tree")
    backwards = OverlaySpec(overlay_id="o", layers=("layer1", "layer0"), scratch=SCRATCH)
    request = LayersMount(layers=specs[:2], overlay=backwards)
    denied(lambda: guest.layers_mount(request), "chains.layers")


def test_overlays_are_those_of_a_chain(
    guest: GuestAgent, specs: tuple[LayerSpec, ...], tmp_path: Path
) -> None:
    guest.layers_mount(LayersMount(layers=specs[:2]))
    good = OverlaySpec(overlay_id="o", layers=("layer0", "layer1"), scratch=SCRATCH)
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with loop_device(image, readonly=False) as node:
        disk = {"kind": "path", "path": node}
        device = DeviceScratch.from_wire({"device": disk, "existing": "fresh"})
        for change, rule in (
            ({"layers": ("layer1", "layer0")}, "chains.layers"),
            ({"layers": ("layer0",)}, "chains.layers"),
            ({"options": OverlayOptions(userxattr=True)}, "chains.options"),
            ({"options": OverlayOptions(redirect_dir="off")}, "chains.options"),
            ({"options": OverlayOptions(suid=True)}, "chains.options"),
            ({"scratch": None}, "chains.scratch"),
            ({"scratch": TmpfsScratch(size_bytes=1 << 21)}, "chains.scratch"),
            ({"scratch": DirectoryScratch(path="/run/x", create=True)}, "chains.scratch"),
            ({"scratch": device}, "chains.scratch"),
            ({"target": "/run/overlays/elsewhere"}, "chains.targets"),
        ):
            spec = good.replace(**change)
            denied(lambda spec=spec: guest.overlay_mount(spec), rule)  # type: ignore[misc]
    assert guest.overlay_mount(good).state == "mounted"
    denied(lambda: guest.overlay_mount(good.replace(overlay_id="p")), "chains.max_instances")


def test_layer_of_another_content_does_not_take_the_place_of_a_lower_one(
    guest: GuestAgent, specs: tuple[LayerSpec, ...]
) -> None:
    guest.layers_mount(LayersMount(layers=specs[:2]))
    guest.layer_unmount("layer1")
    denied(lambda: guest.layer_mount(specs[2].replace(layer_id="layer1")), "layers.tree")
    spec = OverlaySpec(overlay_id="o", layers=("layer0", "layer1"), scratch=SCRATCH)
    denied(lambda: guest.overlay_mount(spec), "chains.layers")


def test_policy_outlives_the_agent(
    agent: SupervisedAgent, guest: GuestAgent, specs: tuple[LayerSpec, ...]
) -> None:
    guest.layer_mount(specs[0])
    before = guest.policy_get()
    pid = guest.status().pid
    agent.kill_child()
    with agent.client() as again:
        assert again.status().pid != pid
        after = again.policy_get()
        assert (after.state, after.digest) == ("set", before.digest)
        denied(lambda: again.layer_mount(specs[2]), "layers.tree")
        assert [layer.layer_id for layer in again.layer_list()] == ["layer0"]


def test_policy_is_set_once(guest: GuestAgent, specs: tuple[LayerSpec, ...]) -> None:
    assert guest.policy_set(policy_of(specs)).already
    with pytest.raises(CallError) as caught:
        guest.policy_set(policy_of(specs, name="other"))
    assert (caught.value.code, caught.value.object) == ("denied", "policy.set")
    assert guest.policy_get().name == "test"


def test_narrowing_ends_what_it_does_not_list(
    guest: GuestAgent, specs: tuple[LayerSpec, ...]
) -> None:
    guest.layer_mount(specs[0])
    with pytest.raises(CallError) as caught:
        guest.policy_narrow(policy_of(specs, layers=[], chains=[]))
    assert caught.value.code == "conflict"  # it would not allow what is mounted
    methods = [method for method in METHODS if not method.endswith(".mount")]
    sealed = policy_of(specs, expose={"methods": methods})
    assert guest.policy_narrow(sealed).narrowed == 1
    denied(lambda: guest.layer_mount(specs[1]), "expose.methods")
    assert [layer.layer_id for layer in guest.layer_list()] == ["layer0"]


def test_what_is_not_exposed_is_not_told(guest: GuestAgent, specs: tuple[LayerSpec, ...]) -> None:
    guest.layer_mount(specs[0])
    assert guest.log(since=0).lines == ()
    assert guest.metrics() == ""
    assert guest.crashes().crashes == ()
    assert guest.events().events == ()
    with pytest.raises(CallError) as caught:
        guest.layer_mount(specs[0].replace(device=specs[0].device.replace(path="/dev/loop250")))
    assert (caught.value.code, caught.value.hint) == ("conflict", None)
    assert "loop" not in caught.value.message
    for request, rule in (
        (guest.dm_list, "expose.methods"),
        (guest.features, "expose.methods"),
        (lambda: guest.layer_unmount("layer0", force=True), "run.force"),
        (lambda: guest.shutdown("exit"), "run.shutdown"),
    ):
        denied(request, rule)
    assert guest.policy_get().denials["expose.methods"] == 2


def test_policy_that_does_not_allow_what_is_mounted_is_refused(
    specs: tuple[LayerSpec, ...],
) -> None:
    with SupervisedAgent() as agent, agent.client() as guest:
        guest.layer_mount(specs[2])
        with pytest.raises(CallError) as caught:
            guest.policy_set(policy_of(specs))
        assert (caught.value.code, caught.value.object) == ("conflict", "layers.tree")
        assert guest.policy_get().state == "none"
        guest.layer_unmount("layer2")
        assert guest.policy_set(policy_of(specs)).state == "set"


def test_nothing_is_done_before_a_policy_that_is_required(
    specs: tuple[LayerSpec, ...],
) -> None:
    with SupervisedAgent("policy=required") as agent, agent.client() as guest:
        assert guest.policy_get().state == "required"
        denied(lambda: guest.layer_mount(specs[0]), "expose.methods")
        denied(guest.layer_list, "expose.methods")
        agent.kill_child()
        with agent.client() as again:
            denied(lambda: again.layer_mount(specs[0]), "expose.methods")
            again.policy_set(policy_of(specs))
            assert again.layer_mount(specs[0]).state == "mounted"
            again.layer_unmount("layer0")


def test_races_of_connections_do_not_get_past_a_count(
    agent: SupervisedAgent, specs: tuple[LayerSpec, ...]
) -> None:
    """The same layer under eight ids at the same time: one is mounted."""
    spec = specs[0]
    names = [f"again{number}" for number in range(8)]
    with agent.client() as guest:
        calls = [guest.start(spec.replace(layer_id=name)) for name in names]
        outcomes = []
        for call in calls:
            try:
                outcomes.append(call.result().state)
            except CallError as error:
                outcomes.append(error.object)
        assert sorted(map(str, outcomes)) == ["layers.max_instances"] * 7 + ["mounted"]
        guest.layers_unmount(LayersUnmount(layers=tuple(names)))


def test_boot_layers_are_judged(specs: tuple[LayerSpec, ...], tmp_path: Path) -> None:
    gate = Gate()
    gate.put_in_force([Rules(read_policy(policy_of(specs)))])
    settings = (("state", f"/run/boot-{tmp_path.name}"),)
    config, problems = read_settings(settings)
    assert problems == ()
    before = World.now()
    with pytest.raises(CallError) as caught:
        mount_plan(BootPlan(layers=(specs[0], specs[2]), overlay=None), config, gate)
    assert (caught.value.code, caught.value.object) == ("denied", "layers.tree")
    after = settled_world(before, skip=(config.state_directory,), seconds=0.5)
    assert (after.dm, after.mounts) == (before.dm, before.mounts)


def test_adopted_layer_that_is_not_allowed_ends_everything_else(
    specs: tuple[LayerSpec, ...], tmp_path: Path
) -> None:
    """A layer of a time without a policy is there when an agent with one begins."""
    raw = policy_of(specs)
    document = tmp_path / "policy.json"
    document.write_bytes(raw)
    with AgentProcess() as agent:
        with agent.client() as guest:
            guest.layer_mount(specs[2])
        agent.kill()
        digest = hashlib.sha256(raw).hexdigest()
        agent.start(f"policy={document},sha256={digest}")
        with agent.client() as guest:
            reply = guest.policy_get()
            assert (reply.state, reply.digest) == ("inconsistent", digest)
            assert reply.bound_by == ("sha256",)
            denied(lambda: guest.layer_mount(specs[0]), "inconsistent")
            denied(guest.layer_list, "inconsistent")
            status = guest.status()
            assert (status.layers, status.policy) == (1, "inconsistent")
            assert status.policy_digest == digest
            guest.shutdown("poweroff")
        assert agent.wait() == 80
        agent.start(f"policy={document},sha256={'0' * 64}")
        assert agent.wait() == 1  # it does not begin without its policy


def test_request_that_cannot_be_undone_ends_everything_else(
    specs: tuple[LayerSpec, ...], tmp_path: Path
) -> None:
    """What is left behind is not what the policy has judged."""

    def fail() -> None:
        raise OSError(errno.EBUSY, "it stays")

    with EngineBed(Path(f"/run/policy-{tmp_path.name}")) as bed:
        gate = bed.engine.state.gate
        gate.put_in_force([Rules(read_policy(policy_of(specs)))])
        with bed.operation() as op, contextlib.suppress(CallError), op:
            op.on_rollback("a device", fail)
            raise CallError("device", "a step failed")
        assert gate.inconsistent
        with bed.operation() as op, pytest.raises(CallError) as caught:
            bed.engine.layers.mount(specs[0], op)
        assert (caught.value.code, caught.value.object) == ("denied", "inconsistent")
