"""The layer engine beside the bare system calls that it cannot do without, in one run.

Every mount goes over the socket of a real agent; ``bare`` is the same ioctls and mounts called one
after the other in this process, with tables and directories prepared before the clock starts.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from guestagent.api import ByteRange, LayersMount, LayerSpec, LayersUnmount
from guestagent.host.client import GuestAgent
from guestagent.storage.devicemapper import devices
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.devicemapper.targets import Target, parse_line
from guestagent.storage.mount import mount_filesystem, unmount
from scripts.benchmarks.rows import Row, milliseconds, print_rows, row, timed, write_rows
from scripts.benchmarks.start import start_rows
from scripts.benchmarks.thin import thin_rows
from tests.beds.agentbed import AgentProcess, Pack, attached_pack, overlay
from tests.beds.soak import Soak
from tests.beds.supervised import SupervisedAgent
from vsock.deadline import Deadline
from vsock.errors import ConnectionClosed

__all__ = ("engine_rows",)

BED = "uml"
PACKED = 64
OVERLAYS = (2, 64, 500)
BATCHES = (1, 8, 64)
RECOVERED = 100
RESTARTS = 20
KILLS_UNDER_LOAD = 50
RANGES = (64, 1024)
BARE = "bare system calls"
_LOOK_SECONDS = 0.002
_MIB = 2**20


def engine_rows(rounds: int = 30, *, short: bool = False) -> list[Row]:
    """Measure everything, or the ``short`` part; needs a kernel with device-mapper, and root."""
    with (
        tempfile.TemporaryDirectory() as name,
        attached_pack(Path(name, "pack"), PACKED) as pack,
        AgentProcess("log=error") as agent,
    ):
        with agent.client(deadline_ms=120_000) as guest:
            memory = {"at the start": _rss_mib(guest)}
            rows = [row(BED, "round trip, no work", "ms", milliseconds(_nothing(guest), 300))]
            rows += _single_layers(guest, pack, rounds)
            rows += _ranges(guest, pack, rounds)
            memory["after verity mounts"] = _rss_mib(guest)
            if short:
                return rows
            rows += _batches(guest, pack)
            rows += _overlays(guest, pack)
            memory["after 500 layers"] = _rss_mib(guest)
            rows += thin_rows(guest, Path(name, "thin"), rounds, bed=BED)
        rows += start_rows(BED)
        rows += _recovery(agent, pack)
        rows += _recovery_of_a_child(pack)
        rows += [row(BED, f"memory {when}", "MiB", [size]) for when, size in memory.items()]
        return rows


def _nothing(guest: GuestAgent) -> Callable[[], object]:
    return lambda: guest.cancel(0)


def _rss_mib(guest: GuestAgent) -> float:
    return guest.status().rss_bytes / _MIB


# --- one layer


def _single_layers(guest: GuestAgent, pack: Pack, rounds: int) -> Iterator[Row]:
    for parts in ("linear", "verity", "linear and verity"):
        spec = _spec_of(parts, pack)
        bare = Bare(guest, spec)
        agent_ms: tuple[list[float], list[float]] = ([], [])
        bare_ms: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):  # in turn, so that what else goes on meets both
            with timed(agent_ms[0]):
                guest.layer_mount(spec)
            with timed(agent_ms[1]):
                guest.layer_unmount(spec.layer_id)
            with timed(bare_ms[0]):
                bare.mount()
            with timed(bare_ms[1]):
                bare.unmount()
        bare.close()
        for what, own, floor in zip(("mount", "unmount"), agent_ms, bare_ms, strict=True):
            yield row(BED, f"{what} {parts}, {BARE}", "ms", floor)
            yield row(BED, f"{what} {parts}", "ms", own, versus=BARE, floor=floor)


def _ranges(guest: GuestAgent, pack: Pack, rounds: int) -> Iterator[Row]:
    """The same verity layer in one range, and sector by sector with padding behind it."""
    whole = pack.spec(0)
    (place,) = whole.ranges
    sectors = [
        ByteRange(offset_bytes=at, size_bytes=512)
        for at in range(place.offset_bytes, place.end_bytes, 512)
    ]
    padded = {count: (*sectors, *[sectors[0]] * (count - len(sectors))) for count in RANGES}
    specs = {1: whole, **{count: whole.replace(mapping=padded[count]) for count in RANGES}}
    spent_ms: dict[int, list[float]] = {count: [] for count in specs}
    for _ in range(rounds):
        for count, spec in specs.items():
            with timed(spent_ms[count]):
                guest.layer_mount(spec)
            guest.layer_unmount(spec.layer_id)
    for count in RANGES:
        name = f"mount linear of {count} ranges and verity"
        yield row(BED, name, "ms", spent_ms[count], versus="one range", floor=spent_ms[1])


def _spec_of(parts: str, pack: Pack) -> LayerSpec:
    changes: dict[str, Any] = {}
    if "verity" not in parts:
        changes["verity"] = None
    if "linear" not in parts:
        changes["mapping"] = None
    return pack.spec(0, **changes)


class Bare:
    """The same devices and mount as the agent makes for ``spec``, by nothing but the calls."""

    def __init__(self, guest: GuestAgent, spec: LayerSpec) -> None:
        report = guest.layer_mount(spec)
        guest.layer_unmount(spec.layer_id)
        self._source = report.device_node
        # bottom first; above a device that is yet to be made a table needs its number
        self._targets = [parse_line(device.table) for device in reversed(report.dm)]
        self._target = f"/run/bare-{os.getpid()}"
        os.mkdir(self._target)
        self._control = Control()

    def mount(self) -> None:
        node, below = self._source, None
        for number, planned in enumerate(self._targets):
            target = planned if below is None else _stand_on(planned, below)
            info = devices.create_device(
                self._control, name=f"bare-{number}", uuid=f"bare-{number}", targets=[target]
            )
            node, below = info.node, info.dev
        mount_filesystem(source=node, target=self._target, filesystem="erofs")
        for number in reversed(range(len(self._targets))):
            devices.set_deferred_remove(self._control, f"bare-{number}")

    def unmount(self) -> None:
        unmount(self._target)
        names = [f"bare-{number}" for number in range(len(self._targets))]
        with Deadline(30.0) as deadline:
            devices.wait_gone(self._control, names, deadline)

    def close(self) -> None:
        self._control.close()
        os.rmdir(self._target)


def _stand_on(target: Target, dev: str) -> Target:
    """Return a verity target of a table with another device below it."""
    words = target.params.split(" ")
    words[1] = words[2] = dev
    return target.replace(params=" ".join(words))


# --- many layers


def _batches(guest: GuestAgent, pack: Pack) -> Iterator[Row]:
    singles: tuple[list[float], list[float]] = ([], [])
    batches: dict[int, tuple[list[float], list[float]]] = {size: ([], []) for size in BATCHES}
    for _ in range(3):
        with timed(singles[0]):
            for number in range(PACKED):
                guest.layer_mount(pack.spec(number))
        with timed(singles[1]):
            for number in range(PACKED):
                guest.layer_unmount(f"layer{number}")
        for size, (mounts, unmounts) in batches.items():
            specs = tuple(pack.spec(number) for number in range(size))
            names = tuple(spec.layer_id for spec in specs)
            with timed(mounts):
                guest.layers_mount(LayersMount(layers=specs))
            with timed(unmounts):
                guest.layers_unmount(LayersUnmount(layers=names))
    many = f"{PACKED} single requests"
    yield row(BED, f"mount by {many}", "ms", singles[0])
    yield row(BED, f"unmount by {many}", "ms", singles[1])
    for size, (mounts, unmounts) in batches.items():
        whole = size == PACKED
        versus = many if whole else None
        for what, samples, floor in (
            ("mount", mounts, singles[0]),
            ("unmount", unmounts, singles[1]),
        ):
            name = f"{what} a batch of {size}"
            yield row(BED, name, "ms", samples, versus=versus, floor=floor if whole else None)


def _overlays(guest: GuestAgent, pack: Pack) -> Iterator[Row]:
    names = tuple(f"plain{number}" for number in range(max(OVERLAYS)))
    specs = tuple(
        pack.spec(number % PACKED, name, verity=None) for number, name in enumerate(names)
    )
    up: list[float] = []
    down: list[float] = []
    with timed(up):
        guest.layers_mount(LayersMount(layers=specs))
    for size in OVERLAYS:
        mounts: list[float] = []
        unmounts: list[float] = []
        for _ in range(5):
            with timed(mounts):
                guest.overlay_mount(overlay("o", *names[:size]))
            with timed(unmounts):
                guest.overlay_unmount("o")
        yield row(BED, f"mount an overlay of {size} layers", "ms", mounts)
        yield row(BED, f"unmount an overlay of {size} layers", "ms", unmounts)
    with timed(down):
        guest.layers_unmount(LayersUnmount(layers=names))
    yield row(BED, f"mount {len(names)} linear layers in a batch", "ms", up)
    yield row(BED, f"unmount {len(names)} linear layers in a batch", "ms", down)


# --- a restart


def _recovery(agent: AgentProcess, pack: Pack) -> Iterator[Row]:
    """Of an agent that is a process by itself: the interpreter and its imports are counted."""

    def kill_and_start() -> None:
        agent.kill()
        agent.start()

    answers, engines = _answers_after(agent, pack, lambda: kill_and_start)
    yield from _answer_rows(f"{RECOVERED} layers, by exec", answers)
    yield row(BED, f"adopting {RECOVERED} layers alone", "ms", engines)


def _recovery_of_a_child(pack: Pack) -> Iterator[Row]:
    """Of an agent as in a machine: PID 1 has imported everything, and forks."""
    agent = SupervisedAgent("log=error")
    with agent:
        answers, _ = _answers_after(
            agent, pack, lambda: partial(os.kill, agent.child(), signal.SIGKILL)
        )
        yield from _answer_rows(f"{RECOVERED} layers, by PID 1", answers)
        soak = Soak(pack, agent.address)
        with soak:
            seconds = soak.kill(KILLS_UNDER_LOAD, agent.kill_child)
        if leaks := soak.leaks():
            raise RuntimeError(f"left after kills: {leaks}")
        yield from _answer_rows("under load, by PID 1", [1000 * each for each in seconds])


def _answer_rows(what: str, answers: list[float]) -> Iterator[Row]:
    """Yield a row of all restarts, and one of the slowest of them."""
    name = f"kill -9 to first answer, {what}"
    yield row(BED, name, "ms", answers)
    yield row(BED, f"{name}: the worst of {len(answers)}", "ms", [max(answers)])


def _answers_after(
    agent: AgentProcess, pack: Pack, aim: Callable[[], Callable[[], None]]
) -> tuple[list[float], list[float]]:
    """Return the milliseconds from each kill to the next answer, and the engine's part of it.

    ``aim`` finds whom to kill, for which no time is taken, and returns what does.
    """
    names = tuple(f"kept{number}" for number in range(RECOVERED))
    specs = tuple(pack.spec(number % PACKED, name) for number, name in enumerate(names))
    with agent.client() as guest:
        guest.layers_mount(LayersMount(layers=specs))
    answers: list[float] = []
    engines: list[float] = []
    for _ in range(RESTARTS):
        kill = aim()
        with timed(answers):
            kill()
            guest = _next_agent(agent)
        with guest:
            boot = guest.hello.boot
            assert boot["adopted_layers"] == RECOVERED
            engines.append(float(str(boot["engine_ms"])))
    with agent.client() as guest:
        guest.layers_unmount(LayersUnmount(layers=names))
    return answers, engines


def _next_agent(agent: AgentProcess) -> GuestAgent:
    """Return a client of the next agent process as soon as that process answers."""
    while True:
        if agent.is_listening():
            with contextlib.suppress(ConnectionClosed):
                return agent.client()
        time.sleep(_LOOK_SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmarks.engine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--short", action="store_true", help="single layers alone")
    arguments = parser.parse_args()
    rows = engine_rows(arguments.rounds, short=arguments.short)
    print_rows(rows)
    if arguments.json:
        write_rows(rows, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
