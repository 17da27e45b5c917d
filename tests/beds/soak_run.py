"""Kill, fault and load together: what ``scripts/soak`` runs inside User Mode Linux.

The last line is ``operations=N faults=N kills=N leaks=N``; the status is 0 only if nothing leaked
and every answer was what the models predicted.

Without kills half of the layers are mounted before the load begins, and about as many layers stay
mounted; which ones changes all the time. What still grows is the agent's log and its list of
events, until both hold as many as they keep. From then on the memory has no reason to grow, and
the status is 0 only if it did not, by more than 2 MiB.
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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import msgpack

from tests.beds.agentbed import AgentProcess, attached_pack
from tests.beds.soak import Soak, Tally, answered_within
from vsock.errors import ConnectionClosed

_PACKED = 64
_KINDS = ("EIO", "ENOMEM", "ENOSPC", "EBUSY")
_FAULTS_EACH_LIFE = 12
_MEMORY_EVERY_SECONDS = 5.0
#: The lines and the events that an agent keeps. The first so many lines are short (Soak).
_LOG_LINES, _EVENTS = 2 * 2000, 4096
_GROWTH_MAX_BYTES = 2 << 20
_FOLLOW = (("agent.hello", {"versions": [1]}), ("agent.subscribe", {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the agent held with so many layers mounted, after so many lines and events."""

    seconds: float
    rss_bytes: int
    layers: int
    log_lines: int
    events: int

    @property
    def is_settled(self) -> bool:
        """Whether the log and the list of events are as full as they get."""
        return self.log_lines >= _LOG_LINES and self.events >= _EVENTS

    def __str__(self) -> str:
        return f"{self.rss_bytes / (1 << 20):.1f} ({self.layers})"


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


def run(options: argparse.Namespace, agent: AgentProcess, soak: Soak) -> list[Memory]:
    """Load, kill and look until the time is over; return the memory as it went."""
    chance = random.Random(options.seed)
    crowd = Crowd(agent.socket, options.connections)
    crowd.start()
    crowd.gather()
    memory: list[Memory] = []
    began_at = time.monotonic()
    ends_at = began_at + options.seconds
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
                time.sleep(min(_MEMORY_EVERY_SECONDS, max(0.0, ends_at - time.monotonic())))
                soak.look()
                memory.append(_memory(agent, began_at))
    crowd.leave()
    return memory


def _memory(agent: AgentProcess, began_at: float) -> Memory:
    with agent.client() as guest:
        status = guest.status()
        metrics = guest.metrics().splitlines()
    return Memory(
        seconds=time.monotonic() - began_at,
        rss_bytes=status.rss_bytes,
        layers=status.layers,
        log_lines=_total(metrics, "guestagent_log_lines_total"),
        events=_total(metrics, "guestagent_events_total"),
    )


def _total(metrics: list[str], name: str) -> int:
    return sum(int(line.split()[-1]) for line in metrics if line.startswith(name + "{"))


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
        layers_each = max(4, options.layers // options.clients)
        soak = Soak(
            pack,
            agent.address,
            workers=options.clients,
            layers_each=layers_each,
            live_each=None if options.kills else layers_each // 2,
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


def tell(soak: Soak, memory: list[Memory], leaks: list[str]) -> int:
    tally = soak.tally
    if memory:
        say(f"resident MiB (layers mounted): {' '.join(map(str, memory))}")
        _judge(memory, tally)
    for text in (*tally.wrong[:20], *leaks[:20]):
        say(f"WRONG {text}")
    say(
        f"operations={tally.operations} faults={tally.faults} kills={tally.kills} "
        f"leaks={len(leaks)}"
    )
    return 1 if leaks or tally.wrong else 0


def _judge(memory: list[Memory], tally: Tally) -> None:
    """Say whether the memory was flat once everything that fills up by itself had."""
    settled = [each for each in memory if each.is_settled]
    if len(settled) < 2:
        last = memory[-1]
        say(
            f"only a longer run tells of growth (--seconds): {last.log_lines} of {_LOG_LINES} "
            f"lines and {last.events} of {_EVENTS} events in {last.seconds:.0f} s"
        )
        return
    sizes = [each.rss_bytes for each in settled]
    counts = [each.layers for each in settled]
    spread_bytes = max(sizes) - min(sizes)
    text = (
        f"after {settled[0].seconds:.0f} s resident memory stays within "
        f"{spread_bytes / (1 << 20):.1f} MiB, with {min(counts)} to {max(counts)} layers"
    )
    say(text)
    if spread_bytes > _GROWTH_MAX_BYTES:
        tally.note(f"{text}: that is more than {_GROWTH_MAX_BYTES >> 20} MiB")


if __name__ == "__main__":
    sys.exit(main())
