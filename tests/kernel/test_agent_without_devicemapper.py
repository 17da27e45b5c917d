"""An agent on a kernel without device-mapper: it serves what needs none, and refuses the rest.

Where this kernel has device-mapper, the agent is in a mount namespace that hides it.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guestagent.api import ByteRange, LayerSpec, PathDevice, TmpfsScratch, Verity
from guestagent.host.client import GuestAgent
from tests.beds.agentbed import AgentProcess, overlay
from tests.beds.calls import call_error
from tests.beds.dmbed import erofs_image, loop_device

_HIDE = """
set -e
if grep -qs device-mapper /proc/misc; then
    mkdir -p /dev/mapper
    mount -t tmpfs tmpfs /dev/mapper
    mount --bind /dev/null /proc/misc
fi
exec "$@"
"""


class AgentWithout(AgentProcess):
    def command(self, *settings: str) -> list[str]:
        return ["unshare", "--mount", "sh", "-c", _HIDE, "sh", *super().command(*settings)]

    def read(self, path: str) -> bytes:
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/root", path.lstrip("/")).read_bytes()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    directory = tmp_path_factory.mktemp("layers")
    with ExitStack() as stack:
        images = {
            name: erofs_image(directory, name, {"who": name.encode(), name: b""})
            for name in ("top", "base")
        }
        yield {name: stack.enter_context(loop_device(path)) for name, path in images.items()}


@pytest.fixture
def agent() -> Iterator[AgentWithout]:
    with AgentWithout() as agent:
        yield agent


@pytest.fixture
def guest(agent: AgentWithout) -> Iterator[GuestAgent]:
    with agent.client() as guest:
        yield guest


def spec(nodes: dict[str, str], name: str, **fields: object) -> LayerSpec:
    device = PathDevice(path=nodes[name])
    return LayerSpec(layer_id=name, device=device, filesystem="erofs").replace(**fields)


def test_plain_layers_and_overlays_are_served(
    agent: AgentWithout, guest: GuestAgent, nodes: dict[str, str]
) -> None:
    features = guest.hello.features
    assert "fs-erofs" in features
    assert not [name for name in features if name.startswith("dm-")]
    for name in nodes:
        assert guest.layer_mount(spec(nodes, name)).dm == ()
    guest.overlay_mount(overlay("o", "top", "base", scratch=TmpfsScratch(size_bytes=1 << 20)))
    assert agent.read("/run/overlays/o/who") == b"top"
    assert agent.read("/run/overlays/o/base") == b""
    assert guest.status().state == "ready"
    assert guest.dm_list().devices == ()
    assert "guestagent_dm_devices 0" in guest.metrics()
    guest.overlay_unmount("o")
    for name in nodes:
        guest.layer_unmount(name)
    guest.shutdown("exit")
    assert agent.wait() == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"mapping": ByteRange(offset_bytes=0, size_bytes=4096)},
        {"verity": Verity(root_digest=bytes(32))},
    ],
    ids=["linear", "verity"],
)
def test_mount_that_needs_device_mapper_is_unsupported(
    guest: GuestAgent, nodes: dict[str, str], fields: dict[str, object]
) -> None:
    with call_error("unsupported", match="device-mapper", step="claim"):
        guest.layer_mount(spec(nodes, "top", **fields))
    assert guest.status().layers == 0
    assert guest.status().state == "ready"
