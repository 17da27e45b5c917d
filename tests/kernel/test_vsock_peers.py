"""Which AF_VSOCK peers a listener serves: the host, and no process of the guest unless allowed."""

import _socket
import os
import socket
from collections.abc import Iterator

import pytest

from vsock.address import VMADDR_CID_ANY, VMADDR_CID_LOCAL, VsockAddress
from vsock.deadline import Deadline
from vsock.dial import listen
from vsock.log import log
from vsock.stream import Listener

PORT = 7700
ADDRESS = VsockAddress(cid=None, port=PORT)


@pytest.fixture
def deadline() -> Iterator[Deadline]:
    with Deadline(60.0) as deadline:
        yield deadline


def local_peer() -> socket.socket:
    """Connect as any process of the guest can, over the loopback transport."""
    peer = socket.socket(socket.AF_VSOCK)
    peer.settimeout(60.0)
    peer.connect((VMADDR_CID_LOCAL, PORT))
    return peer


def test_a_process_of_the_guest_is_refused_unread_counted_and_logged_once(
    deadline: Deadline,
) -> None:
    before = log.number
    with listen(ADDRESS) as listener:
        for _ in range(3):
            with local_peer() as peer:
                peer.sendall(b"x")
                deadline.wait((listener.fileno(),), "wait for the peer")
                with pytest.raises(BlockingIOError, match="CID 1 is not allowed"):
                    listener.accept()
                assert ended(peer)
        assert listener.refused == 3
    lines, _ = log.since(before)
    assert [(line.text, line.fields["cid"]) for line in lines] == [("peer refused", 1)]


@pytest.mark.parametrize("cid", [VMADDR_CID_LOCAL, VMADDR_CID_ANY])
def test_a_peer_is_served_where_its_cid_is_allowed(deadline: Deadline, cid: int) -> None:
    with listen(ADDRESS, allowed_cids=frozenset((cid,))) as listener, local_peer() as peer:
        deadline.wait((listener.fileno(),), "wait for the peer")
        with listener.accept() as stream:
            assert stream.peer.startswith("vsock://1:")
            stream.sendall(b"served", deadline)
            assert peer.recv(6) == b"served"


def test_a_listener_on_a_socket_of_another_process_refuses_as_well(deadline: Deadline) -> None:
    """The agent is handed the socket that PID 1 listens on."""
    with listen(ADDRESS) as held:
        sock = _socket.socket(fileno=os.dup(held.fileno()))
        with Listener(ADDRESS, sock) as listener, local_peer() as peer:
            deadline.wait((listener.fileno(),), "wait for the peer")
            with pytest.raises(BlockingIOError):
                listener.accept()
            assert ended(peer)


def ended(peer: socket.socket) -> bool:
    try:
        return peer.recv(1) == b""
    except ConnectionResetError:
        return True
