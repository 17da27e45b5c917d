"""Kill, fault and load together: what ``scripts/soak`` runs inside User Mode Linux.

The last line is ``operations=N faults=N kills=N leaks=N``; the status is 0 only if nothing leaked
and every answer was what the models predicted.
"""

import argparse
import contextlib
import random
import selectors
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import msgpack

from tests.kernel.agentbed import AgentProcess, attached_pack
from tests.kernel.soak import Soak, answered_within
from vsock.errors import ConnectionClosed

_PACKED = 64
_KINDS = ("EIO", "ENOMEM", "ENOSPC", "EBUSY")
_FAULTS_EACH_LIFE = 12
_RSS_EVERY_SECONDS = 5.0
_FOLLOW = (("agent.hello", {"versions": [1]}), ("agent.subscribe", {}))


class Crowd(threading.Thread):
    """Connections that follow the events and do nothing else; one thread reads them all."""

    def __init__(self, path: str, count: int) -> None:
        super().__init__(daemon=True)
        self._path = path
        self._count = count
        self._selector = selectors.DefaultSelector()
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def gather(self) -> None:
        """Connect everybody, again after a kill."""
        for _ in range(self._count):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(self._path)
            for number, (method, params) in enumerate(_FOLLOW):
                peer.sendall(msgpack.packb([0, number, method, [params]]))
            with self._lock:
                self._selector.register(peer, selectors.EVENT_READ)

    def run(self) -> None:
        while not self._ended.is_set():
            for key, _ in self._selector.select(0.1):
                peer = key.fileobj
                assert isinstance(peer, socket.socket)
                with contextlib.suppress(ConnectionError):
                    if peer.recv(65536):
                        continue
                with self._lock:
                    self._selector.unregister(peer)
                peer.close()

    def leave(self) -> None:
        self._ended.set()
        self.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()


def faults(chance: random.Random) -> str:
    """Return a life's share of failures, at steps that the load may come to."""
    steps = sorted(chance.sample(range(20, 2000), _FAULTS_EACH_LIFE))
    return ",".join(f"#{step}:{chance.choice(_KINDS)}" for step in steps)


def run(options: argparse.Namespace, agent: AgentProcess, soak: Soak) -> list[int]:
    """Load, kill and look until the time is over; return the memory as it went, in bytes."""
    chance = random.Random(options.seed)
    crowd = Crowd(agent.socket, options.connections)
    crowd.start()
    crowd.gather()
    memory: list[int] = []
    ends_at = time.monotonic() + options.seconds
    with soak:
        while time.monotonic() < ends_at and len(soak.tally.wrong) < 20:
            if options.kills:
                time.sleep(chance.uniform(0.2, 2.0))
                agent.kill()
                agent.start(f"fault={faults(chance)}")
                soak.tally.kills += 1
                with soak.gate.closed():
                    answered_within(agent.address)
                    soak.look_closely()
                    crowd.gather()
            else:
                time.sleep(min(_RSS_EVERY_SECONDS, max(0.0, ends_at - time.monotonic())))
                soak.look()
                memory.append(_rss(agent))
    crowd.leave()
    return memory


def _rss(agent: AgentProcess) -> int:
    with agent.client() as guest:
        return guest.status().rss_bytes


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--layers", type=int, default=1000, help="ids that are mounted, in all")
    parser.add_argument("--connections", type=int, default=55, help="that only follow events")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--no-kills", dest="kills", action="store_false", help="load alone")
    options = parser.parse_args()
    say(f"seed {options.seed}")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pack = stack.enter_context(attached_pack(directory / "pack", _PACKED))
        first = f"fault={faults(random.Random(options.seed))}" if options.kills else "log=error"
        agent = AgentProcess("log=error")
        agent.directory.mkdir()
        agent.start(first)
        stack.callback(agent.__exit__)
        answered_within(agent.address)
        soak = Soak(
            pack,
            agent.address,
            workers=options.clients,
            layers_each=max(4, options.layers // options.clients),
            seed=options.seed,
        )
        memory = run(options, agent, soak)
        agent.kill()
        agent.start()
        leaks = _leaks(agent, soak)
    return tell(soak, memory, leaks)


def _leaks(agent: AgentProcess, soak: Soak) -> list[str]:
    try:
        answered_within(agent.address)
        return soak.leaks()
    except (ConnectionClosed, OSError) as error:
        return [f"the agent does not come back: {error}"]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tell(soak: Soak, memory: list[int], leaks: list[str]) -> int:
    tally = soak.tally
    for text in (*tally.wrong[:20], *leaks[:20]):
        say(f"WRONG {text}")
    if memory:
        shown = " ".join(f"{size / (1 << 20):.1f}" for size in memory)
        say(f"resident MiB every {_RSS_EVERY_SECONDS:.0f} s: {shown}")
    say(
        f"operations={tally.operations} faults={tally.faults} kills={tally.kills} "
        f"leaks={len(leaks)}"
    )
    return 1 if leaks or tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
