"""A MessagePack-RPC client that this project did not write: pynvim's, without the editor."""

import pytest
from pynvim.msgpack_rpc.async_session import AsyncSession
from pynvim.msgpack_rpc.event_loop import EventLoop
from pynvim.msgpack_rpc.msgpack_stream import MsgpackStream
from pynvim.msgpack_rpc.session import Session


@pytest.fixture
def session(serve):
    running = serve()
    loop = EventLoop("socket", running.address.path)
    one = Session(AsyncSession(MsgpackStream(loop)))
    one.error_wrapper = lambda error: LookupError(error)
    yield one
    # its close() ends the loop before the loop can close the socket
    loop._transport.close()
    loop._loop.call_soon(loop._loop.stop)
    loop._loop.run_forever()
    one.close()


def test_foreign_client_gets_answers_to_its_calls(session):
    assert session.request("hello", {"versions": [1]}) is None
    assert session.request("echo", {"a": [1, "text", b"\x00\xff", {"b": None}]}) == {
        "a": [1, "text", b"\x00\xff", {"b": None}]
    }
    assert session.request("slow_echo") == {}
    assert session.request("big", {"bytes": 1 << 20}) == b"x" * (1 << 20)


def test_its_errors_are_maps(session):
    with pytest.raises(LookupError) as caught:
        session.request("nonsense", {})
    [error] = caught.value.args
    assert error["code"] == "unsupported"
    assert "nonsense" in error["message"]
    with pytest.raises(LookupError) as caught:
        session.request("echo", 1, 2)
    assert caught.value.args[0]["code"] == "invalid"
    assert session.request("echo", {"a": 1}) == {"a": 1}


def test_foreign_client_gets_notifications(session):
    assert session.request("notify", {"a": 1}) is True
    assert session.next_message() == ("notification", "event", [{"a": 1}])
