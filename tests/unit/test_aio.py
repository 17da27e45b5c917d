import asyncio
import contextlib
import socket
import threading

import msgpack
import pytest

import vsock.aio
from tests.beds.calls import call_error
from vsock.aio import AsyncClient
from vsock.client import ClosedHandleError
from vsock.dial import connect
from vsock.errors import CallError, ConnectionClosed, LocalProtocolError
from vsock.rpc import Limits

WAIT_SECONDS = 60.0


@pytest.fixture
def run(serve):
    """Run a coroutine function with a client and the server that it is connected to."""

    def start(scenario, **options):
        running = serve()

        async def main():
            client = await AsyncClient.connect(
                str(running.address), cancel_method="cancel", **options
            )
            async with client:
                await asyncio.wait_for(scenario(client, running), WAIT_SECONDS)

        asyncio.run(main())

    return start


def test_calls_and_errors(run):
    async def scenario(client, running):
        assert await client.call("echo", {"a": 1}) == {"a": 1}
        assert await client.call("slow_echo", {"a": bytes(250_000)}) == {"a": bytes(250_000)}
        assert await client.call("big", {"bytes": 4_000_000}) == b"x" * 4_000_000
        with pytest.raises(CallError, match="no method"):
            await client.call("nonsense")

    run(scenario)


def test_many_at_once(run):
    async def scenario(client, running):
        values = [{"n": n} for n in range(200)]
        assert await asyncio.gather(*(client.call("slow_echo", v) for v in values)) == values

    run(scenario)


def test_much_to_send_waits_for_the_reader(run):
    async def scenario(client, running):
        value = {"a": bytes(250_000)}
        answers = await asyncio.gather(*(client.call("echo", value) for _ in range(50)))
        assert answers == [value] * 50

    run(scenario)


def test_deadlines_timeouts_and_cancel(run):
    async def scenario(client, running):
        with call_error("timeout", step="wait for the test"):
            await client.call("wait", deadline_ms=20)
        with pytest.raises(CallError, match="no answer to gate within"):
            await client.call("gate", timeout_seconds=0.02)
        running.handler.gate.set()
        held = await client.start_call("wait")
        assert not held.done
        await held.cancel()
        with call_error("cancelled"):
            await held.result(WAIT_SECONDS)
        await held.cancel()
        assert await client.call("echo") == {}
        forgotten = await client.start_call("wait", deadline_ms=1000)
        forgotten.forget()
        with pytest.raises(CallError, match="given up"):
            await forgotten.result()

    run(scenario)


def test_a_cancelled_task_leaves_nothing_behind(run):
    async def scenario(client, running):
        task = asyncio.create_task(client.call("gate"))
        while not client._protocol.pending:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client._protocol.pending == {}
        running.handler.gate.set()
        assert await client.call("echo") == {}

    run(scenario)


def test_notifications_both_ways(run):
    got = []

    async def scenario(client, running):
        assert await client.call("notify", {"a": 1}) is True
        assert got == [("event", {"a": 1})]
        await client.notify("input")
        assert await client.call("echo") == {}
        assert got[1][0] == "rpc.error"

    run(scenario, on_notification=lambda method, params: got.append((method, params)))


def test_call_with_unencodable_params_raises_local_protocol_error(run):
    async def scenario(client, running):
        for params in ({"a": object()}, {"a": bytes(1 << 20)}):
            with pytest.raises(LocalProtocolError):
                await client.call("echo", params)
        assert client._protocol.pending == {}
        assert await client.call("echo") == {}

    run(scenario)


def test_an_answer_over_the_limit_fails_its_call_and_ends_the_connection(run):
    async def scenario(client, running):
        with call_error("resource"):
            await client.call("big", {"bytes": 100_000})
        with pytest.raises(ConnectionClosed, match="more than 4096"):
            await client.call("echo")

    run(scenario, limits=Limits(max_reply_bytes=4096))


def test_closed_by_either_side(run):
    async def scenario(client, running):
        held = await client.start_call("wait")
        await asyncio.to_thread(running.handler.passed, running.handler.at_gate)
        running.handler.calls[0].connection.close()
        with pytest.raises(ConnectionClosed, match="the peer closed"):
            await held.result()
        with pytest.raises(ConnectionClosed):
            await client.call("echo")
        async with await AsyncClient.connect(running.address) as other:
            held = await other.start_call("gate")
            await other.close()
            assert other.closed
            with pytest.raises(ClosedHandleError):
                await held.result()
            with pytest.raises(ClosedHandleError):
                await other.call("echo")
        running.handler.gate.set()

    run(scenario)


def test_connect_without_listener_raises_connection_closed(tmp_path):
    async def main():
        with pytest.raises(ConnectionClosed, match="No such file"):
            await AsyncClient.connect(f"unix://{tmp_path}/s", connect_seconds=0.05)

    asyncio.run(main())


def test_a_connect_that_is_cancelled_leaves_no_descriptor(serve, monkeypatch):
    begun, go_on, streams = threading.Event(), threading.Event(), []

    def slow_connect(*args):
        begun.set()
        assert go_on.wait(WAIT_SECONDS)
        streams.append(connect(*args))
        return streams[-1]

    monkeypatch.setattr(vsock.aio, "connect", slow_connect)

    async def main():
        task = asyncio.create_task(AsyncClient.connect(serve().address))
        assert await asyncio.to_thread(begun.wait, WAIT_SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name.startswith("rpc-connect"):
            thread.join(WAIT_SECONDS)
    assert [stream.fileno() for stream in streams] == [-1]


def test_unsent_requests_of_async_client_are_bounded(run):
    async def scenario(client, running):
        client._stream.send, send = lambda _: 0, client._stream.send
        tasks = [asyncio.create_task(client.call("echo", {"a": bytes(250_000)})) for _ in range(30)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(client._unsent) < 2_000_000
        client._stream.send = send
        assert len(await asyncio.gather(*tasks)) == 30

    run(scenario)


@pytest.mark.parametrize(
    "data",
    [b"\xc1", msgpack.packb([2, "rpc.error", [{"code": "resource", "message": "full"}]]), b""],
)
def test_a_peer_that_answers_no_call(tmp_path, data):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def script():
            sock, _ = server.accept()
            with sock:
                sock.sendall(msgpack.packb([7]) + msgpack.packb([0, 1, "ask", [{}]]) + data)
                with contextlib.suppress(ConnectionResetError):
                    sock.recv(10)

        thread = threading.Thread(target=script)
        thread.start()

        async def main():
            async with await AsyncClient.connect(f"unix://{path}") as client:
                with pytest.raises(ConnectionClosed):
                    await client.call("m", timeout_seconds=WAIT_SECONDS)

        asyncio.run(main())
        thread.join()
