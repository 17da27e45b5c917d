"""Server and client over AF_VSOCK: the server in User Mode Linux, the client on the host."""

import contextlib
import os
import shutil
import socket
import statistics
import sys
import threading
import time

import msgpack
import pytest

from tests.beds.calls import call_error
from tests.beds.vsockbed import HERE, PROJECT, UmlBed
from vsock.client import Client
from vsock.errors import ConnectionClosed

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("linux.uml") is None, reason="no User Mode Linux here"),
]
PORT = 5000


class WireBed(UmlBed):
    def command(self):
        uml = [sys.executable, str(PROJECT / "scripts/uml"), "--vsock", self.device.socket_path]
        guest = [os.path.realpath(sys.executable), "-IS", str(HERE / "wire_guest.py")]
        return [*uml, "--", *guest], ()

    def address(self, port=PORT):
        return f"hybrid://{self.device.uds_path}:{port}"


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    with WireBed(tmp_path_factory.mktemp("bed")) as made:
        made.start_guest()
        yield made


@pytest.fixture
def client(bed):
    with Client(bed.address(), cancel_method="cancel") as one:
        yield one


def test_calls_large_and_small(client):
    assert client.call("echo", {"a": 1}) == {"a": 1}
    large = {"a": os.urandom(250_000)}  # near the limit of a request
    assert client.call("echo", large, timeout_seconds=60) == large
    assert str(client.call("peer")).startswith("vsock://2:")


def test_a_thousand_round_trips(client):
    times = []
    for n in range(1000):
        started = time.perf_counter()
        assert client.call("echo", {"n": n}) == {"n": n}
        times.append(time.perf_counter() - started)
    print(f"round trip: {statistics.median(times) * 1e6:.0f} us (median)")  # noqa: T201


def test_many_connections_at_once(bed):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(bed.address())) for _ in range(40)]
        pending = [one.start_call("echo", {"n": n}) for n, one in enumerate(clients)]
        assert [one.result(60) for one in pending] == [{"n": n} for n in range(40)]


def test_cancel_and_deadline(client):
    held = client.start_call("wait")
    held.cancel()
    with call_error("cancelled"):
        held.result(60)
    with call_error("timeout"):
        client.call("wait", deadline_ms=50)


def test_client_connect_to_guest_port_without_listener_names_the_port(bed):
    with pytest.raises(ConnectionClosed, match="no listener on guest port 7777"):
        Client(bed.address(7777), connect_seconds=0.5)


def test_garbage_and_half_close(bed):
    sock = bed.dial(PORT)
    with sock:
        sock.sendall(b"junk" + msgpack.packb([0, 1, "echo", [{"a": 1}]]))
        sock.shutdown(socket.SHUT_WR)
        data = b""
        while piece := sock.recv(65536):
            data += piece
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    complaint, answer = unpacker
    assert complaint[:2] == [2, "rpc.error"]
    assert answer == [1, 1, None, {"a": 1}]


def test_the_guest_dials_the_host(bed, client):
    listener = bed.listen(6000)
    received = []

    def count():
        sock, _ = listener.accept()
        with sock:
            while piece := sock.recv(65536):
                received.append(len(piece))

    thread = threading.Thread(target=count)
    thread.start()
    address = {"address": "vsock://host:6000", "seconds": 30.0}
    assert client.call("dial", address, timeout_seconds=60) == "connected"
    thread.join()
    assert sum(received) == 100_000


@pytest.mark.parametrize("cid", ["host", "77"])
def test_guest_dial_of_host_port_without_listener_fails_in_time(client, cid):
    started = time.monotonic()
    address = {"address": f"vsock://{cid}:6666", "seconds": 5.0}
    ended = client.call("dial", address, timeout_seconds=60)
    assert ended in ("Connection reset by peer", "Connection refused", "No such device")
    assert time.monotonic() - started < 5


def test_the_guest_offers_its_service_to_the_host(bed, client):
    listener = bed.listen(6001)
    client.call("offer", {"address": "vsock://host:6001"}, deadline_ms=30_000)
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(60)
        sock.sendall(msgpack.packb([0, 9, "echo", [{"a": 2}]]))
        assert msgpack.unpackb(sock.recv(1000)) == [1, 9, None, {"a": 2}]


def test_a_guest_that_dies_fails_what_is_pending(bed):
    with Client(bed.address()) as client:
        held = client.start_call("wait")
        bed.kill_guest()
        with pytest.raises(ConnectionClosed):
            held.result(60)
