"""An error of a batch says which of its layers it is about."""

from pathlib import Path

from guestagent.api import LayersMount, Verity
from tests.beds.agentbed import AgentProcess, attached_pack
from tests.beds.calls import call_error


def test_the_layer_is_named(tmp_path: Path) -> None:
    with attached_pack(tmp_path, 3) as pack, AgentProcess() as agent, agent.client() as guest:
        specs = [pack.spec(number) for number in range(3)]
        specs[1] = specs[1].replace(verity=Verity(root_digest=bytes(32)))
        with call_error("integrity", match="layer 'layer1'"):
            guest.layers_mount(LayersMount(layers=tuple(specs)))
        assert guest.layer_list() == ()
