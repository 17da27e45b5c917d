import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from rootfs.machine.qmp import QmpClient, QmpClosedError, QmpError
from tests.beds.calls import call_error
from vsock.deadline import Deadline


class Peer:
    """QEMU's end of a connection: answers each command with the next scripted lines."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received: list[dict[str, Any]] = []

    def answer(self, *lines: dict[str, Any]) -> threading.Thread:
        def run() -> None:
            command = json.loads(self.connection.makefile("rb").readline())
            self.received.append(command)
            for line in lines:
                if "return" in line or "error" in line:
                    line = {"id": command["id"], **line}
                self.connection.sendall(json.dumps(line).encode() + b"\r\n")

        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture
def ends() -> Iterator[tuple[QmpClient, Peer]]:
    ours, theirs = socket.socketpair()
    with QmpClient(ours) as client, theirs:
        yield client, Peer(theirs)


@pytest.fixture
def deadline() -> Iterator[Deadline]:
    with closing(Deadline(10)) as deadline:
        yield deadline


def test_a_command_returns(ends: tuple[QmpClient, Peer], deadline: Deadline) -> None:
    client, peer = ends
    thread = peer.answer({"return": {"status": "running"}})
    assert client.execute("query-status", {"a": 1}, deadline=deadline) == {"status": "running"}
    thread.join()
    assert peer.received[0]["execute"] == "query-status"
    assert peer.received[0]["arguments"] == {"a": 1}


def test_a_refusal_says_what_and_why(ends: tuple[QmpClient, Peer], deadline: Deadline) -> None:
    client, peer = ends
    thread = peer.answer({"error": {"class": "GenericError", "desc": "no such device"}})
    with pytest.raises(QmpError, match=r"device_del: no such device \(GenericError\)") as caught:
        client.execute("device_del", deadline=deadline)
    thread.join()
    assert (caught.value.command, caught.value.kind) == ("device_del", "GenericError")


def test_events_between_are_kept(ends: tuple[QmpClient, Peer], deadline: Deadline) -> None:
    client, peer = ends
    thread = peer.answer(
        {"event": "OTHER"},
        {"event": "DEVICE_DELETED", "data": {"device": "a"}},
        {"event": "DEVICE_DELETED", "data": {"device": "b"}},
        {"return": {}},
    )
    client.execute("device_del", deadline=deadline)
    thread.join()
    event = client.wait_event("DEVICE_DELETED", deadline, data={"device": "b"})
    assert event == {"device": "b"}


def test_answers_to_others_are_passed_over(
    ends: tuple[QmpClient, Peer], deadline: Deadline
) -> None:
    client, peer = ends
    peer.connection.sendall(b'{"return": "stale", "id": 999}\r\n')
    thread = peer.answer({"return": "mine"})
    assert client.execute("x", deadline=deadline) == "mine"
    thread.join()


def test_lines_come_in_any_pieces(ends: tuple[QmpClient, Peer], deadline: Deadline) -> None:
    client, peer = ends
    first = b'{"event": "A", "data": {"n": 1}}\r\n{"ev'
    peer.connection.sendall(first)
    assert client.wait_event("A", deadline) == {"n": 1}
    peer.connection.sendall(b'ent": "B"}\r\n')
    assert client.wait_event("B", deadline) == {}


def test_the_end_of_qemu_is_told(ends: tuple[QmpClient, Peer], deadline: Deadline) -> None:
    client, peer = ends
    peer.connection.close()
    with pytest.raises(QmpClosedError):
        client.wait_event("SHUTDOWN", deadline)
    with pytest.raises(QmpClosedError):
        client.execute("quit", deadline=deadline)


def test_silence_ends_at_the_deadline(ends: tuple[QmpClient, Peer]) -> None:
    client, _ = ends
    with closing(Deadline(0.05)) as deadline, call_error("timeout", match="QMP: quit"):
        client.execute("quit", deadline=deadline)
