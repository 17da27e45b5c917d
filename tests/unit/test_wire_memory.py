"""What a peer can make the agent hold: the resident memory of its process under attack."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest

from tests.beds.peer import Peer
from tests.beds.wire_server import WireServer

MIB = 1 << 20
ALLOWED_BYTES = 8 * MIB
#: An array of 1000 empty maps.
MAPS = b"\xdc\x03\xe8" + b"\x80" * 1000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WireServer]:
    with WireServer(tmp_path) as server:
        yield server


def push(peer: Peer, data: bytes) -> None:
    """Send as much of ``data`` as the server takes before it ends the connection."""
    try:
        peer.send(data)
    except (BrokenPipeError, ConnectionResetError):
        return


def growth(server: WireServer, attack: Callable[[], None]) -> int:
    """Return the bytes of resident memory that an attack adds while its connections last."""
    host = server.peer()
    host.ask(1, "agent.status")
    host.ask(2, "layer.list")
    before = server.rss_bytes()
    attack()
    host.ask(3, "agent.status")  # an answer in time, too
    host.ask(4, "layer.list")
    return server.rss_bytes() - before


def test_long_methods_and_values_leave_little_in_the_log(server: WireServer) -> None:
    def attack() -> None:
        for _ in range(60):
            peer = server.peer(hello=False)
            push(peer, msgpack.packb([0, 1, "x" * 1_000_000, [{}]]))
            peer.sock.close()
        for n in range(60):
            peer = server.peer(hello=n % 2 == 0)
            push(peer, msgpack.packb([0, 1, "agent.status", [{"y" * 250_000: 1}]]))
            push(peer, msgpack.packb([0, 2, "layer.get", [{"layer_id": "\U0001f600" * 60_000}]]))
            peer.sock.close()

    assert growth(server, attack) < ALLOWED_BYTES


@pytest.mark.parametrize("hello", [True, False])
def test_unfinished_messages_share_one_budget(server: WireServer, hello: bool) -> None:
    def attack() -> None:
        for _ in range(30):
            peer = server.peer(hello=hello)
            push(peer, b"\x94\x00\x01\xa1m\x91\x81\xa1a\xdc\x00\xff" + MAPS * 30)
        for _ in range(30):
            peer = server.peer(hello=hello)
            push(peer, b"\x94\x00\x01\xa1m\x91\x81\xa1a\xc6\x00\x03\xf0\x00" + bytes(250_000))

    assert growth(server, attack) < ALLOWED_BYTES


def test_many_short_requests_share_one_budget(server: WireServer) -> None:
    request = msgpack.packb([0, 0, "layer.get", [{"layer_id": "a", "deadline_ms": 600_000}]])

    def attack() -> None:
        for _ in range(60):
            peer = server.peer()
            push(peer, b"".join(b"\x94\x00\xcd\x01" + bytes([n]) + request[3:] for n in range(256)))

    assert growth(server, attack) < ALLOWED_BYTES


def test_queued_requests_share_one_budget(server: WireServer) -> None:
    def attack() -> None:
        for _ in range(4):
            peer = server.peer()
            for msgid in range(1, 60):
                params = {"layer_id": "a", "deadline_ms": 600_000}
                push(peer, msgpack.packb([0, msgid, "layer.get", [params]]))
        for _ in range(8):
            peer = server.peer()
            for msgid in range(1, 17):
                push(peer, msgpack.packb([0, msgid, "layer.get", [{"a": [{}] * 30_000}]]))

    assert growth(server, attack) < ALLOWED_BYTES
