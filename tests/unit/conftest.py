"""A running server, and a peer that speaks raw bytes to it."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.beds.peer import WAIT_SECONDS, Peer
from vsock.address import UnixAddress
from vsock.dial import listen
from vsock.errors import CallError
from vsock.server import Call, Outcome, Server


class Handler:
    """Methods for tests. ``gate`` holds until the test opens it."""

    quick = frozenset({"echo", "cancel", "hello"})

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.at_gate = threading.Semaphore(0)
        self.finished = threading.Semaphore(0)
        self.calls: list[Call] = []
        self.errors: list[CallError] = []

    def __call__(self, call: Call) -> Outcome:
        self.calls.append(call)
        return Outcome(None, getattr(self, "do_" + call.method, self.unknown)(call))

    def unknown(self, call: Call) -> object:
        raise CallError("unsupported", f"no method {call.method!r}")

    def do_echo(self, call: Call) -> object:
        return call.params

    do_slow_echo = do_echo

    def do_hello(self, call: Call) -> object:
        call.connection.said_hello = True
        return None

    def do_cancel(self, call: Call) -> object:
        msgid = call.params["msgid"]
        assert isinstance(msgid, int)
        return call.connection.cancel(msgid)

    def do_gate(self, call: Call) -> object:
        self.at_gate.release()
        assert self.gate.wait(WAIT_SECONDS)
        self.finished.release()
        return "through"

    def do_wait(self, call: Call) -> object:
        call.cancel_on_disconnect = bool(call.params.get("leave"))
        self.at_gate.release()
        try:
            call.deadline.wait((), "wait for the test", at_most=WAIT_SECONDS)
        except CallError as error:
            self.errors.append(error)
            self.finished.release()
            raise
        return "waited"

    def do_big(self, call: Call) -> object:
        size = call.params["bytes"]
        assert isinstance(size, int)
        return b"x" * size

    def do_late_big(self, call: Call) -> object:
        assert self.gate.wait(WAIT_SECONDS)
        return self.do_big(call)

    def do_notify(self, call: Call) -> object:
        return call.connection.notify("event", call.params)

    def do_odd(self, call: Call) -> object:
        return {"a set": {1}}

    def do_bug(self, call: Call) -> object:
        raise KeyError("bug")

    def passed(self, semaphore: threading.Semaphore, times: int = 1) -> None:
        for _ in range(times):
            assert semaphore.acquire(timeout=WAIT_SECONDS)


class Running:
    """A server with its thread."""

    def __init__(self, path: Path, options: dict[str, object]) -> None:
        self.address = UnixAddress(path=str(path))
        self.handler = Handler()
        self.lines: list[str] = []
        options.setdefault("quick", Handler.quick)
        options.setdefault("hello_seconds", None)
        self.server = Server(self.handler, report=self.lines.append, **options)  # type: ignore[arg-type]
        self.server.add_listener(listen(self.address))
        self._peers: list[Peer] = []
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def peer(self) -> Peer:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.address.path)
        return self.adopt(sock)

    def peer_at_gate(self, method: str = "gate") -> Peer:
        """Return a peer whose request 1 is being worked on, up to the gate."""
        peer = self.peer()
        self.send_to_gate(peer, method)
        return peer

    def send_to_gate(self, peer: Peer, method: str = "gate") -> None:
        """Have request 1 of a peer worked on, up to the gate."""
        peer.request(1, method)
        self.handler.passed(self.handler.at_gate)

    def open_gate(self, peer: Peer) -> None:
        """Let all requests through, of which the next to be answered is request 1 of the peer."""
        self.handler.gate.set()
        assert peer.next() == [1, 1, None, "through"]

    def pair(self) -> tuple[Peer, socket.socket]:
        """Return a peer, and the other end for the server to take."""
        ours, theirs = socket.socketpair()
        return self.adopt(ours), theirs

    def adopt(self, sock: socket.socket) -> Peer:
        peer = Peer(sock)
        self._peers.append(peer)
        return peer

    def stop(self, grace_seconds: float = 5.0) -> None:
        self.server.stop(grace_seconds)
        self.thread.join(WAIT_SECONDS)
        assert not self.thread.is_alive()

    def close(self) -> None:
        self.handler.gate.set()
        for peer in self._peers:
            peer.sock.close()
        self.stop(0.0)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start servers that end with the test."""
    running: list[Running] = []

    def start(**options: object) -> Running:
        running.append(Running(tmp_path / f"socket{len(running)}", options))
        return running[-1]

    yield start
    for one in running:
        one.close()
