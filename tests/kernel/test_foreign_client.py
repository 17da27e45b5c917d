"""A MessagePack-RPC client that this project did not write (pynvim's) drives the real agent."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pynvim.msgpack_rpc.async_session import AsyncSession
from pynvim.msgpack_rpc.event_loop import EventLoop
from pynvim.msgpack_rpc.msgpack_stream import MsgpackStream
from pynvim.msgpack_rpc.session import Session

from tests.beds.agentbed import AgentProcess, attached_pack

Request = Callable[..., object]


@pytest.fixture
def request_of() -> Iterator[Callable[[str], Request]]:
    """A factory: ``request_of(socket path)`` returns what sends a request and waits."""
    sessions = []

    def connect(path: str) -> Request:
        loop = EventLoop("socket", path)
        session = Session(AsyncSession(MsgpackStream(loop)))
        session.error_wrapper = lambda error: LookupError(error)
        sessions.append((session, loop))
        return session.request

    yield connect
    for session, loop in sessions:
        # its close() ends the loop before the loop can close the socket
        loop._transport.close()
        loop._loop.call_soon(loop._loop.stop)
        loop._loop.run_forever()
        session.close()


def test_hello_mount_and_list(tmp_path: Path, request_of: Callable[[str], Request]) -> None:
    with attached_pack(tmp_path, 1) as pack, AgentProcess() as agent:
        with agent.client():
            pass  # it serves by now
        request = request_of(agent.socket)
        with pytest.raises(LookupError) as refused:
            request("layer.list", {})
        assert refused.value.args[0]["code"] == "denied"
        hello = request("agent.hello", {"versions": [1], "client": "pynvim"})
        assert hello["version"] == 1
        assert "dm-verity" in hello["features"]
        assert request("layer.list") == {"layers": []}
        layer = pack.layers[0]
        spec = {
            "layer_id": "a",
            "device": {"kind": "path", "path": pack.node},
            "mapping": {
                "offset_bytes": layer.mapping.offset_bytes,
                "size_bytes": layer.mapping.size_bytes,
            },
            "verity": {"root_digest": layer.root_digest.hex()},
            "filesystem": "erofs",
        }
        mounted = request("layer.mount", spec)
        assert mounted["verity"]["status"] == "V"
        (listed,) = request("layer.list", {})["layers"]
        assert listed["layer_id"] == "a"
        assert listed["dm"] == mounted["dm"]
        request("layer.unmount", {"layer_id": "a"})
