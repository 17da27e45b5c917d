"""``agent.cancel`` over the wire, whatever step the request is at: undone before it is answered."""

import os
import re
from pathlib import Path

import pytest

from guestagent.api import LayersMount, LayerSpec
from guestagent.host.client import GuestAgent
from tests.beds.agentbed import AgentProcess, Pack, World, settled_world
from vsock.client import Client
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record

PACK_LAYERS = 12
#: In order, as ``timings_ms`` names them.
STEPS = (
    "device", "version", "journal", "superblock", "linear", "verity", "prove", "target",
    "filesystem", "mount", "defer", "read back", "commit",
)  # fmt: skip
#: Far more than a step takes, and far less than the deadline of the request.
SECONDS = 20


def wait_until_at(guest: GuestAgent, step: str, threads: int) -> None:
    """Wait until so many threads have done the step before ``step``: they hang in that then."""
    before = STEPS[STEPS.index(step) - 1]
    done = re.compile(rf'step_duration_seconds_count{{step="{before}"}} (\d+)')
    with Deadline(SECONDS) as deadline:
        while (found := done.search(guest.metrics())) is None or int(found[1]) < threads:
            deadline.check(f"the request comes to {step}")


def cancelled_at(
    agent: AgentProcess, step: str, method: str, request: Record, *, threads: int = 1
) -> CallError:
    """Have ``request`` hang in ``step``, cancel it there, and return what it was answered."""
    with agent.client() as guest, Client(agent.address) as client:
        before = World.now(skip=[str(agent.directory)])
        client.call("agent.hello", {"versions": [1]})
        pending = client.start_call(method, request.to_wire(), deadline_ms=600_000)
        wait_until_at(guest, step, threads)
        assert not pending.done
        pending.cancel()
        with pytest.raises(CallError) as caught:
            pending.result(SECONDS)
        assert settled_world(before, skip=[str(agent.directory)]) == before
        assert guest.layer_list() == ()
        status = guest.status()
        assert (status.state, status.layers, status.dm_devices) == ("ready", 0, 0)
    return caught.value


def faulty(step: str, *settings: str) -> AgentProcess:
    return AgentProcess("log=error", f"fault={step}:BLOCK", *settings)


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_layer(pack: Pack, step: str) -> None:
    with faulty(step) as agent:
        error = cancelled_at(agent, step, "layer.mount", pack.spec(0))
    assert (error.code, error.step) == ("cancelled", step)


@pytest.mark.parametrize("step", ["superblock", "verity", "mount", "defer"])
def test_a_batch(pack: Pack, step: str) -> None:
    """All of its threads hang at the step, and all of them end."""
    layers: tuple[LayerSpec, ...] = tuple(pack.spec(number) for number in range(PACK_LAYERS))
    # what comes before the first step of a layer is done once, by the thread of the request
    threads = 1 if step == "superblock" else (os.cpu_count() or 1) + 1
    with faulty(step) as agent:
        request = LayersMount(layers=layers)
        error = cancelled_at(agent, step, "layers.mount", request, threads=threads)
    assert (error.code, error.step) == ("cancelled", step)


def test_an_unmount(pack: Pack, tmp_path: Path) -> None:
    """It is undone by mounting again."""
    with AgentProcess("log=error", "fault=remove:BLOCK") as agent, agent.client() as guest:
        guest.layer_mount(pack.spec(0))
        with Client(agent.address) as client:
            client.call("agent.hello", {"versions": [1]})
            pending = client.start_call(
                "layer.unmount", {"layer_id": "layer0"}, deadline_ms=600_000
            )
            with Deadline(SECONDS) as deadline:
                while Path("/run/layers/layer0/who").exists():
                    deadline.check("the layer is unmounted")
            pending.cancel()
            with pytest.raises(CallError) as caught:
                pending.result(SECONDS)
        assert (caught.value.code, caught.value.step) == ("cancelled", "remove")
        assert [layer.state for layer in guest.layer_list()] == ["mounted"]
        assert Path("/run/layers/layer0/who").exists()
        agent.kill()
        agent.settings = ("log=error",)
        agent.start()
        with agent.client() as again:
            assert [layer.layer_id for layer in again.layer_list()] == ["layer0"]
            again.layer_unmount("layer0")
