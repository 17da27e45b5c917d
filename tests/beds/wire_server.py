"""The service behind a server in a process of its own, with an engine that only waits.

Run as a program with the path of its socket and a state directory; ends with its standard input.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Self

from guestagent.engine.events import EventLog
from guestagent.engine.journal import Journal
from guestagent.policy.gate import Gate
from guestagent.service.dispatch import QUICK_METHODS, URGENT_METHODS, Service
from guestagent.storage.syscalls import bound_malloc
from tests.beds.peer import WAIT_SECONDS, Peer
from vsock.address import UnixAddress
from vsock.dial import listen
from vsock.server import Server

__all__ = ("WireServer",)

PROJECT = Path(__file__).resolve().parents[2]


class WireServer:
    """The process. ``layer.get`` waits until the process ends; ``layer.list`` answers."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "socket")
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.path, str(directory / "state")],
            stdin=subprocess.PIPE,
            env={"PYTHONPATH": str(PROJECT)},
        )
        self._peers: list[Peer] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: TracebackType | type | BaseException | None) -> None:
        for peer in self._peers:
            peer.sock.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(WAIT_SECONDS)

    def peer(self, *, hello: bool = True) -> Peer:
        import socket

        sock = socket.socket(socket.AF_UNIX)
        ends_at = time.monotonic() + WAIT_SECONDS
        while sock.connect_ex(self.path):
            assert time.monotonic() < ends_at
            time.sleep(0.01)
        peer = Peer(sock)
        self._peers.append(peer)
        if hello:
            peer.ask(0, "agent.hello", versions=[1])
        return peer

    def rss_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) * 1024


class _Layers:
    def get(self, _layer_id: str) -> None:
        threading.Event().wait()

    def list(self) -> tuple[()]:
        return ()


class _Engine:
    def __init__(self, state: str) -> None:
        self.state = SimpleNamespace(gate=Gate())
        self.events = EventLog(Journal(state))
        self.layers = _Layers()

    def features(self) -> tuple[str, ...]:
        return ()

    def problems(self) -> tuple[str, ...]:
        return ()

    def counts(self) -> dict[str, int]:
        return {"layers": 0, "overlays": 0, "dm_devices": 0}


def main(path: str, state: str) -> None:
    bound_malloc()
    service = Service(
        _Engine(state),  # type: ignore[arg-type]
        boot={},
        deadline_seconds=60,
        on_shutdown=lambda mode: None,
    )
    server = Server(service.handle, quick=QUICK_METHODS, urgent=URGENT_METHODS)
    service.attach(server)
    server.add_listener(listen(UnixAddress(path=path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
