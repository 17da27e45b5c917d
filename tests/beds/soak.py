"""Load that knows what must be true: workers that mount and unmount, each against its own model.

A worker owns layers that nobody else touches, so that it can predict the answer to every request,
faults and kills of the agent included: an injected error changes nothing, and what was in flight
when the agent died may have gone either way until the next ``check`` looks.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from guestagent.api import (
    LayerReport,
    LayersMount,
    LayersUnmount,
    OverlaySpec,
    TmpfsScratch,
    Verity,
)
from guestagent.host.client import GuestAgent
from tests.beds.agentbed import Pack, World, overlay, settled_world, who
from vsock.errors import CallError, ConnectionClosed

__all__ = ("Gate", "Soak", "Tally", "Worker")

_INJECTED = "injected"
_FILL_BATCH = 16
#: As many as the agent keeps.
_LOG_LINES = 2000
_CONNECT_SECONDS = 20.0


class Gate:
    """Lets workers through one request at a time each, and holds them all for a look."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Hold everybody outside for the length of the block."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


@dataclass(slots=True)
class Tally:
    """What has happened. ``wrong`` holds what the model did not predict."""

    operations: int = 0
    faults: int = 0
    kills: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def did(self, *, operations: int = 0, faults: int = 0) -> None:
        with self.lock:
            self.operations += operations
            self.faults += faults

    def note(self, text: str) -> None:
        with self.lock:
            self.wrong.append(text)


class Worker(threading.Thread):
    """One client. Its ids begin with its name."""

    def __init__(
        self,
        soak: "Soak",
        number: int,
        layers: Sequence[int],
        *,
        live: int | None,
        seed: int,
        pause: float,
    ) -> None:
        """With ``live``, begin with so many layers mounted, and stay near that number."""
        super().__init__(name=f"w{number}", daemon=True)
        self._soak = soak
        self._pack = soak.pack
        self._random = random.Random(seed)
        self._pause = pause
        self._live = live
        self._guest: GuestAgent | None = None
        self.numbers = {f"{self.name}-l{layer}": layer for layer in layers}
        self._overlay_id = f"{self.name}-o"
        #: The model: what is mounted, the overlay's layers, and the ids that nobody knows of.
        self.mounted: set[str] = set()
        self.overlay: tuple[str, ...] = ()
        self.unsure: set[str] = set()

    def run(self) -> None:
        try:
            while not self._soak.ended.wait(self._pause):
                with self._soak.gate.passing():
                    self._step()
        finally:
            if self._guest is not None:
                self._guest.close()

    def fill(self) -> int:
        """Mount as many layers as are to be live, and return their number; before the start."""
        names = self._random.sample(sorted(self.numbers), self._live or 0)
        self._connected(_CONNECT_SECONDS)
        for start in range(0, len(names), _FILL_BATCH):
            batch = names[start : start + _FILL_BATCH]
            specs = tuple(self._pack.spec(self.numbers[name], name) for name in batch)
            self._connected().layers_mount(LayersMount(layers=specs))
            self.mounted.update(batch)
        return len(names)

    def _chosen(self) -> tuple[Callable[[], None], Sequence[str]]:
        """Draw what to do next, of what does not lead away from how many are to be live."""
        choices = self._choices()
        if self._live is not None:
            away: tuple[Callable[[], None], ...] = (self._unmount, self._unmount_batch)
            if len(self.mounted) > self._live:
                away = (self._mount, self._mount_late, self._mount_batch)
            choices = [choice for choice in choices if choice[0] not in away]
        return self._random.choice(choices)

    def _step(self) -> None:
        action, ids = self._chosen()
        if self.unsure:
            return  # until the next look
        self.unsure = set(ids)
        try:
            self._connected()
            action()
        except CallError as error:
            if _INJECTED in error.message:
                self._soak.tally.did(faults=1)
            else:
                self._soak.tally.note(f"{self.name}: {action.__name__}: {error} {error.hint}")
        except (ConnectionClosed, OSError):
            if self._guest is None:
                self.unsure = set()  # nothing was asked
            self._drop()
            return
        self.unsure = set()
        self._soak.tally.did(operations=1)

    def _connected(self, seconds: float = 0.02) -> GuestAgent:
        if self._guest is None:
            # not for long: whoever waits inside the gate holds up a look
            self._guest = GuestAgent(self._soak.address, connect_seconds=seconds)
        return self._guest

    def _drop(self) -> None:
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.close()

    # --- requests, and what must come of them

    def _choices(self) -> list[tuple[Callable[[], None], Sequence[str]]]:
        everything = [*self.numbers, self._overlay_id]
        return [
            (self._mount, everything),
            (self._mount, everything),
            (self._unmount, everything),
            (self._mount_late, everything),
            (self._mount_overlay, [self._overlay_id]),
            (self._unmount_overlay, [self._overlay_id]),
            (self._mount_batch, everything),
            (self._unmount_batch, everything),
            (self._verify, []),
            (self._mount_wrong, []),
            (self._look, []),
        ]

    def _expect(self, condition: bool, what: str) -> None:
        if not condition:
            self._soak.tally.note(f"{self.name}: {what}")

    def _any(self) -> str:
        return self._random.choice(sorted(self.numbers))

    def _mount(self) -> None:
        name = self._any()
        report = self._connected().layer_mount(self._pack.spec(self.numbers[name], name))
        self._expect(report.already == (name in self.mounted), f"already of {name}")
        self.mounted.add(name)

    def _mount_late(self) -> None:
        """A deadline that passes somewhere on the way: all or nothing."""
        name = self._any()
        spec = self._pack.spec(self.numbers[name], name)
        try:
            self._connected().layer_mount(spec, deadline_ms=self._random.randint(1, 15))
        except CallError as error:
            if error.code != "timeout":
                raise
            return
        self.mounted.add(name)

    def _unmount(self) -> None:
        name = self._any()
        try:
            reply = self._connected().layer_unmount(name)
        except CallError as error:
            if error.code != "busy" or name not in self.overlay:
                raise
            return
        self._expect(name not in self.overlay, f"{name} went from under an overlay")
        self._expect(reply.already == (name not in self.mounted), f"already of unmounted {name}")
        self.mounted.discard(name)

    def _mount_overlay(self) -> None:
        names = self._random.sample(sorted(self.numbers), self._random.randint(1, 4))
        if self.overlay:
            names = list(self.overlay)
        try:
            report = self._connected().overlay_mount(self._overlay_spec(names))
        except CallError as error:
            if error.code != "not_found" or self.mounted.issuperset(names):
                raise
            return
        wanted = tuple(f"/run/layers/{name}" for name in names)
        self._expect(report.lowerdirs == wanted, f"lowerdirs {report.lowerdirs}")
        self._expect(report.already == bool(self.overlay), "already of the overlay")
        self.overlay = tuple(names)

    def _overlay_spec(self, names: Sequence[str]) -> OverlaySpec:
        writable: dict[str, Any] = (
            {"scratch": TmpfsScratch(size_bytes=65536)} if len(names) % 2 else {}
        )
        return overlay(self._overlay_id, *names, **writable)

    def _unmount_overlay(self) -> None:
        reply = self._connected().overlay_unmount(self._overlay_id)
        self._expect(reply.already == (not self.overlay), "already of the unmounted overlay")
        self.overlay = ()

    def _mount_batch(self) -> None:
        count = min(self._random.choice((1, 2, 3, 4, 12)), len(self.numbers))
        names = self._random.sample(sorted(self.numbers), count)
        stacked = names if not self.overlay else []
        request = LayersMount(
            layers=tuple(self._pack.spec(self.numbers[name], name) for name in names),
            overlay=self._overlay_spec(stacked) if stacked else None,
        )
        reply = self._connected().layers_mount(request)
        said = {report.layer_id for report in reply.layers if report.already}
        self._expect(said == self.mounted & set(names), f"already in a batch: {said}")
        self.mounted.update(names)
        self.overlay = self.overlay or tuple(stacked)

    def _unmount_batch(self) -> None:
        names = self.overlay or tuple(self._random.sample(sorted(self.numbers), 3))
        request = LayersUnmount(layers=names, overlay=self._overlay_id)
        self._connected().layers_unmount(request)
        self.mounted.difference_update(names)
        self.overlay = ()

    def _verify(self) -> None:
        name = self._any()
        try:
            reply = self._connected().layer_verify(name)
        except CallError as error:
            if error.code != "not_found" or name in self.mounted:
                raise
            return
        self._expect(reply.corrupt_blocks == () and name in self.mounted, f"verify of {name}")

    def _mount_wrong(self) -> None:
        """A wrong digest, or a target that is taken: refused, and nothing changes."""
        name = self._any()
        spec = self._pack.spec(self.numbers[name], f"{self.name}-wrong")
        spec = spec.replace(verity=Verity(root_digest=bytes(32)))
        try:
            self._connected().layer_mount(spec)
        except CallError as error:
            if error.code != "integrity":
                raise
            return
        self._expect(False, "a wrong digest was taken")

    def _look(self) -> None:
        found = {report.layer_id for report in self._connected().layer_list()}
        own = found & set(self.numbers)
        self._expect(own == self.mounted, f"listed {sorted(own)}, not {sorted(self.mounted)}")

    def settle(self, layers: set[str], overlays: dict[str, tuple[str, ...]]) -> None:
        """Compare the model with what is there; take over what nobody could know."""
        own = layers & set(self.numbers)
        stacked = overlays.get(self._overlay_id, ())
        for name in self.numbers:
            if name in self.unsure:
                continue
            if (name in own) != (name in self.mounted):
                self._soak.tally.note(f"{name} is {'there' if name in own else 'gone'}")
        if self._overlay_id not in self.unsure and stacked != self.overlay:
            self._soak.tally.note(f"{self._overlay_id} is of {stacked}, not {self.overlay}")
        self.mounted, self.overlay, self.unsure = own, stacked, set()


class Soak:
    """Workers at one agent. A context manager: they work inside the block."""

    def __init__(
        self,
        pack: Pack,
        address: str,
        *,
        workers: int = 4,
        layers_each: int = 6,
        live_each: int | None = None,
        seed: int = 0,
        pause: float = 0.0,
    ) -> None:
        self.pack = pack
        self.address = address
        self.gate = Gate()
        self.tally = Tally()
        self.ended = threading.Event()
        self.before = World.now()
        count = len(pack.layers)
        self.workers = [
            Worker(
                self,
                number,
                [(number * layers_each + i) % count for i in range(layers_each)],
                live=live_each,
                seed=seed + number,
                pause=pause,
            )
            for number in range(workers)
        ]

    def __enter__(self) -> "Soak":
        if sum(worker.fill() for worker in self.workers):
            self._fill_log()
        for worker in self.workers:
            worker.start()
        return self

    def _fill_log(self) -> None:
        """Have the agent keep as many lines of its log as it ever does: each refusal is one."""
        with GuestAgent(self.address, connect_seconds=_CONNECT_SECONDS) as guest:
            for _ in range(_LOG_LINES):
                with contextlib.suppress(CallError):
                    guest.layer_get("nobody")

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for worker in self.workers:
            worker.join(60)

    def kill(self, times: int, kill_and_start: Callable[[], None]) -> list[float]:
        """Kill the agent at random moments, and look closely each time; return how many seconds
        each next agent took to answer."""
        chance = random.Random(1)
        seconds = []
        for _ in range(times):
            time.sleep(chance.uniform(0.0, 0.06))  # the moment is the point: nothing to wait for
            kill_and_start()
            self.tally.kills += 1
            with self.gate.closed():
                seconds.append(answered_within(self.address))
                self.look_closely()
            assert self.tally.wrong == []
        return seconds

    def look(self) -> None:
        """Hold the workers, and hold the agent, the kernel and the models against each other."""
        with self.gate.closed():
            self.look_closely()

    def look_closely(self) -> None:
        """As ``look``, with the gate closed already."""
        with GuestAgent(self.address, connect_seconds=_CONNECT_SECONDS) as guest:
            layers = guest.layer_list()
            overlays = {found.overlay_id: found.layers for found in guest.overlay_list()}
            problems = guest.status().problems
        names = {report.layer_id for report in layers}
        for worker in self.workers:
            worker.settle(names, overlays)
        for problem in problems:
            self.tally.note(f"problem: {problem}")
        self._read(layers)
        self._account({d.name for report in layers for d in report.dm}, names, overlays)

    def _read(self, layers: Sequence[LayerReport]) -> None:
        """Every layer is mounted, and its file can be read and is its own."""
        numbers = {name: n for worker in self.workers for name, n in worker.numbers.items()}
        for report in layers:
            if report.state != "mounted":
                self.tally.note(f"{report.layer_id} is {report.state}")
            elif who(report.target) != self.pack.layers[numbers[report.layer_id]].marker:
                self.tally.note(f"{report.layer_id} holds {who(report.target)!r}")

    def _account(self, devices: set[str], layers: set[str], overlays: Iterable[str]) -> None:
        """Every device and every mount of the kernel belongs to what the agent tells of."""
        world = World.now()
        found = {line.split()[0] for line in set(world.dm) - set(self.before.dm)}
        if found != devices:
            self.tally.note(f"devices {sorted(found ^ devices)} belong to no layer")
        targets = {f"/run/layers/{name}" for name in layers}
        targets |= {f"/run/overlays/{name}" for name in overlays}
        mounts = {line.split()[0] for line in set(world.mounts) - set(self.before.mounts)}
        mounts = {target for target in mounts if "/scratch/" not in target}
        if mounts != targets:
            self.tally.note(f"mounts {sorted(mounts ^ targets)} belong to nothing")

    def leaks(self) -> list[str]:
        """Unmount everything through the agent; return what is there still."""
        with GuestAgent(self.address, connect_seconds=_CONNECT_SECONDS) as guest:
            for found in guest.overlay_list():
                guest.overlay_unmount(found.overlay_id)
            names = tuple(report.layer_id for report in guest.layer_list())
            for start in range(0, len(names), 64):
                guest.layers_unmount(LayersUnmount(layers=names[start : start + 64]))
        world = settled_world(self.before, skip=("/run/agent-",))
        skipped = World(dm=self.before.dm, mounts=self.before.mounts, files=world.files)
        return [*world.minus(skipped), *_left_directories(world)]


def _left_directories(world: World) -> list[str]:
    return [name for name in world.files if name.startswith(("/run/layers", "/run/overlays"))]


def answered_within(address: str) -> float:
    """Return the seconds until an agent answers there."""
    begin = time.monotonic()
    while True:
        try:
            with GuestAgent(address, connect_seconds=0.01):
                return time.monotonic() - begin
        except ConnectionClosed:  # of the one that is dying, or that is not there yet
            if time.monotonic() - begin > _CONNECT_SECONDS:
                raise
            time.sleep(0.005)
