"""An agent that dials its host: served there, again after each end, and listening besides."""

import contextlib
import itertools
import os
import queue
import socket
import time
from collections.abc import Iterator

import msgpack
import pytest

from guestagent.api.observe import LogLine
from guestagent.host.client import GuestAgent
from tests.beds.agentbed import AgentProcess

WAIT_SECONDS = 60.0


class Host:
    """What the agent dials: a listener that speaks raw MessagePack-RPC."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(WAIT_SECONDS)
        self._listener.bind(self.path)
        self._listener.listen()

    def accept(self) -> socket.socket:
        assert self._listener is not None
        peer, _ = self._listener.accept()
        peer.settimeout(WAIT_SECONDS)
        return peer

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def ask(peer: socket.socket, method: str, params: dict[str, object]) -> object:
    peer.sendall(msgpack.packb([0, 1, method, [params]]))
    unpacker = msgpack.Unpacker()
    while True:
        unpacker.feed(peer.recv(65536))
        for kind, _, error, result in unpacker:
            assert (kind, error) == (1, None)
            return result


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host(f"/run/host-{os.getpid()}")
    yield host
    host.close()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(host.path)


def failed_attempts(guest: GuestAgent, count: int, since: int | None = None) -> list[float]:
    """Wait for so many attempts to dial that fail, from a line of the log on or from now on; return
    their times in seconds."""
    lines: queue.SimpleQueue[LogLine] = queue.SimpleQueue()
    guest.follow_log(lines.put, since=since, level="debug")
    times: list[float] = []
    while len(times) < count:
        line = lines.get(timeout=WAIT_SECONDS)
        if line.text == "cannot dial":
            times.append(line.uptime_seconds)
    return times


def test_the_host_restarts_and_is_dialled_again(host: Host) -> None:
    host.listen()
    with AgentProcess(f"dial=unix://{host.path}") as agent:
        for _ in range(3):
            with host.accept() as peer:
                ask(peer, "agent.hello", {"versions": [1]})
                status = ask(peer, "agent.status", {})
                assert isinstance(status, dict)
        with agent.client() as guest:
            assert guest.status().state == "ready", "it must listen at the same time"
            host.close()
            failed_attempts(guest, 3)
        host.listen()
        begin = time.monotonic()
        with host.accept() as peer:
            assert time.monotonic() - begin < 3.0, "the back-off is not bounded"
            ask(peer, "agent.hello", {"versions": [1]})
            ask(peer, "agent.shutdown", {"mode": "exit"})
        assert agent.wait() == 0


def test_agent_dials_a_late_host_without_spinning(host: Host) -> None:
    with AgentProcess(f"dial=unix://{host.path}") as agent:
        with agent.client() as guest:
            times = failed_attempts(guest, 6, since=0)
        pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert pauses[0] >= 0.05
        assert pauses[-1] >= 0.8, "the pauses do not grow"
        host.listen()
        with host.accept() as peer:
            ask(peer, "agent.hello", {"versions": [1]})


def test_a_host_that_hangs_up_at_once_is_not_dialled_in_a_loop(host: Host) -> None:
    host.listen()
    with AgentProcess(f"dial=unix://{host.path}"):
        host.accept().close()
        count = 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            host._listener.settimeout(max(0.01, end - time.monotonic()))  # type: ignore[union-attr]
            try:
                host.accept().close()
            except TimeoutError:
                break
            count += 1
        assert count <= 25, f"dialled {count} times in a second"
