"""Requests whose devices are not there yet: they hold no thread, and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import (
    DeviceScratch,
    LayersMount,
    LayerSpec,
    OverlaySpec,
    PathDevice,
    PmemDevice,
)
from guestagent.host.client import GuestAgent
from tests.beds import dmbed
from tests.beds.agentbed import AgentProcess, Pack, World, settled_world, who
from vsock.client import Client, PendingCall
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record

PACK_LAYERS = 2
SECONDS = 20.0
LONG_MS = 600_000
#: More than the agent has threads, and than a connection may have.
MANY = 64


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as agent:
        yield agent


@pytest.fixture
def guest(agent: AgentProcess) -> Iterator[GuestAgent]:
    with agent.client() as guest:
        yield guest


@pytest.fixture
def raw(agent: AgentProcess, guest: GuestAgent) -> Iterator[Client]:
    """A second connection, after the agent has answered on the first."""
    with Client(agent.address) as client:
        client.call("agent.hello", {"versions": [1]})
        yield client


def never(number: int) -> LayerSpec:
    """A layer of a device that does not come."""
    device = PmemDevice(number=100 + number)
    return LayerSpec(layer_id=f"never{number}", device=device, filesystem="erofs")


def start(client: Client, request: Record, deadline_ms: int = LONG_MS) -> PendingCall:
    method = type(request).method  # type: ignore[attr-defined]
    return client.start_call(method, request.to_wire(), deadline_ms=deadline_ms)


def wait_until_waiting(guest: GuestAgent, count: int) -> None:
    with Deadline(SECONDS) as deadline:
        while guest.status().requests_in_flight != count + 1:  # and the one for the status
            deadline.check(f"{count} requests wait")


def error_of(pending: PendingCall) -> CallError:
    with pytest.raises(CallError) as caught:
        pending.result(SECONDS)
    return caught.value


def test_requests_that_wait_hold_no_thread(guest: GuestAgent, raw: Client, pack: Pack) -> None:
    """Those of one connection must not keep it, or another, from mounting."""
    waiting = [start(raw, never(number)) for number in range(MANY)]
    wait_until_waiting(guest, MANY)
    for name in ("same", "other"):
        spec = pack.spec(0, layer_id=name)
        if name == "same":
            start(raw, spec, deadline_ms=10_000).result(SECONDS)
        else:
            guest.layer_mount(spec)
        assert who(f"/run/layers/{name}") == pack.layers[0].marker
        guest.layer_unmount(name)
    assert not any(pending.done for pending in waiting)
    for pending in waiting:
        pending.cancel()
    for number, pending in enumerate(waiting):
        error = error_of(pending)
        assert (error.code, error.step) == ("cancelled", "device")
        assert error.object == f"pmem {100 + number}"
    wait_until_waiting(guest, 0)


def test_a_device_that_comes_ends_the_wait(guest: GuestAgent, raw: Client, tmp_path: Path) -> None:
    image = dmbed.erofs_image(tmp_path, "image", {"a": b"content"})
    node = dmbed.run("losetup", "-f").strip()
    spec = LayerSpec(layer_id="late", device=PathDevice(path=node), filesystem="erofs")
    waiting = [start(raw, spec), start(raw, spec), start(raw, never(0))]
    wait_until_waiting(guest, len(waiting))
    dmbed.run("losetup", "-r", node, image)
    try:
        replies = [pending.result(SECONDS) for pending in waiting[:2]]
        assert all(isinstance(reply, dict) for reply in replies)
        assert sorted(reply["already"] for reply in replies) == [False, True]  # type: ignore[index]
        first = next(reply for reply in replies if not reply["already"])  # type: ignore[index]
        assert first["timings_ms"]["device"] > 1  # type: ignore[index]
        assert not waiting[2].done
        guest.layer_unmount("late")
    finally:
        dmbed.run("losetup", "-d", node)


@pytest.mark.parametrize("what", ["layer", "batch", "scratch", "scratch of a batch"])
def test_the_deadline_says_what_is_missing(
    agent: AgentProcess, guest: GuestAgent, raw: Client, pack: Pack, tmp_path: Path, what: str
) -> None:
    guest.layer_mount(pack.spec(0))
    copy = tmp_path / "copy"
    copy.write_bytes(pack.image.read_bytes())
    scratch = DeviceScratch(device=PmemDevice(number=100))
    overlay = OverlaySpec(overlay_id="o", layers=("layer0",), scratch=scratch)
    with dmbed.loop_device(copy, readonly=False) as node:
        there = pack.spec(1, device=PathDevice(path=node))
        request = {
            "layer": never(0),
            "batch": LayersMount(layers=(there, never(0))),
            "scratch": overlay,
            "scratch of a batch": LayersMount(
                layers=(there,), overlay=overlay.replace(layers=("layer0", "layer1"))
            ),
        }[what]
        before = World.now(skip=[str(agent.directory)])
        pending = start(raw, request, deadline_ms=1500)
        wait_until_waiting(guest, 1)
        # nothing is done to a device while another is awaited
        ro = Path(f"/sys/class/block/{Path(node).name}/ro")
        assert ro.read_text().strip() == "0"
        error = error_of(pending)
        assert (error.code, error.step, error.object) == ("timeout", "device", "pmem 100")
        assert f"{Path(node).name} (loop, {copy.stat().st_size} bytes)" in error.message
        assert settled_world(before, skip=[str(agent.directory)]) == before
    method = type(request).method
    counted = f'guestagent_requests_total{{method="{method}",code="timeout"}} 1'
    assert counted in guest.metrics()
    guest.layer_unmount("layer0")


def test_an_agent_that_ends_leaves_no_request_waiting(
    agent: AgentProcess, guest: GuestAgent, raw: Client
) -> None:
    waiting = [start(raw, never(number)) for number in range(3)]
    wait_until_waiting(guest, len(waiting))
    guest.shutdown("exit")
    assert {error_of(pending).code for pending in waiting} == {"cancelled"}
    assert agent.wait() == 0
