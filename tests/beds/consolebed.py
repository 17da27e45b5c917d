"""A console on a real socket over plain directories, without a device-mapper; a client of its own.

``Client`` speaks the protocol by its table in docs/console.md, not by the code under test.
"""

import contextlib
import os
import select
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgpack

from guestagent.api.devices import PathDevice
from guestagent.api.layers import Holder, LayerReport, LayerSpec
from guestagent.api.overlays import OverlayReport
from guestagent.console.command import Guest
from guestagent.console.lineedit import width_of
from guestagent.console.service import Console
from guestagent.engine.engine import Engine
from guestagent.engine.events import EventLog
from guestagent.engine.journal import Journal
from guestagent.engine.transaction import Transaction
from guestagent.inspect.guestroot import GuestRoot
from guestagent.service.dispatch import Service
from tests.beds.inspectbed import PlainEngine
from vsock.deadline import Deadline
from vsock.errors import CallError

WAIT_SECONDS = 60.0
HELLO, WELCOME, DATA, ERRORS, END, SIZE, SIGNAL, EXIT, REFUSAL = range(1, 10)


def frame(kind: int, payload: bytes | Mapping[str, object] = b"") -> bytes:
    data = payload if isinstance(payload, bytes) else msgpack.packb(dict(payload))
    return bytes([kind]) + len(data).to_bytes(3, "big") + data


def layer_report(layer_id: str, target: str) -> LayerReport:
    return LayerReport(
        layer_id=layer_id,
        state="mounted",
        target=target,
        device=PathDevice(path="/dev/pmem0"),
        device_node="/dev/pmem0",
        dev="253:1",
        mapping=None,
        dm=(),
        verity=None,
        filesystem="erofs",
        mount_id=30,
        options=("ro",),
        readonly=True,
        size_bytes=3 << 20,
        used_by=(),
        overlaps=(),
        timings_ms={"device": 0.5, "mount": 1.25},
        already=False,
    )


class PlainDebug:
    """The debug views of an engine whose layers are directories."""

    def __init__(self, engine: "ConsoleEngine") -> None:
        self._engine = engine
        #: Disagreements: problem, action, and whether the action fails.
        self.findings: list[tuple[str, str, bool]] = []
        #: Problems that were settled.
        self.settled: list[str] = []

    def plan_of(self, layer_id: str) -> tuple[str, ...] | None:
        if layer_id not in self._engine.directories:
            return None
        return (f"mount erofs on /run/layers/{layer_id}",)

    def plan(self, spec: LayerSpec, deadline: Deadline) -> tuple[str, ...]:
        return (f"mount {spec.filesystem} on {spec.mount_point} (ro,nodev,nosuid)",)

    def reconcile(self, deadline: Deadline, *, dry_run: bool) -> Iterator[tuple[str, str, bool]]:
        for problem, action, fails in self.findings:
            if dry_run:
                yield problem, f"would {action}", False
                continue
            self.settled.append(problem)
            yield problem, f"{action}: {'failed' if fails else 'undone'}", fails

    def holders(self, dev: str, deadline: Deadline) -> tuple[Holder, ...]:
        return ()

    def listen(self, listener: Callable[[object], None]) -> Callable[[], None]:
        return self._engine.event_log.listen(listener)


class ConsoleEngine(PlainEngine):
    """What the service asks of an engine for the console's commands, over directories as layers."""

    def __init__(self, directories: Mapping[str, Path], state: Path) -> None:
        super().__init__(directories, {})
        self.directories = dict(directories)
        self.event_log = EventLog(Journal(str(state)))
        self.event_log.publish("agent_started", detail="adopted 0 layers")
        self.event_log.publish("layer_mounted", layer_id="base")
        self.events = self.event_log  # type: ignore[assignment]
        self.debug = PlainDebug(self)
        self.unmounted: list[bool] = []
        self.layers = SimpleNamespace(
            list=lambda: tuple(layer_report(n, str(p)) for n, p in self.directories.items()),
            get=self._layer,
        )
        self.overlays = SimpleNamespace(list=self._overlays)
        self.dm = SimpleNamespace(list=tuple)

    def _layer(self, layer_id: str) -> LayerReport:
        if layer_id not in self.directories:
            raise CallError("not_found", f"there is no layer {layer_id!r}", object=layer_id)
        return layer_report(layer_id, str(self.directories[layer_id]))

    def _overlays(self) -> tuple[OverlayReport, ...]:
        return (
            OverlayReport(
                overlay_id="root",
                state="mounted",
                target="/run/overlays/root",
                layers=tuple(self.directories),
                lowerdirs=tuple(f"/run/layers/{name}" for name in self.directories),
                scratch=None,
                method="fsconfig",
                mount_id=31,
                options=("ro",),
                timings_ms={"mount": 2.0},
                already=False,
            ),
        )

    def counts(self) -> dict[str, int]:
        return {"layers": len(self.directories), "overlays": 1, "dm_devices": 0}

    def problems(self) -> tuple[str, ...]:
        return ()

    def unmount_everything(self, op: Transaction, *, force: bool) -> None:
        self.unmounted.append(force)


class Bed:
    """A running console. ``modes`` is how it was told to end."""

    def __init__(self, path: Path, directories: Mapping[str, Path], **options: object) -> None:
        self.path = str(path)
        self._state = tempfile.TemporaryDirectory(prefix="console-bed-")
        self.engine = ConsoleEngine(directories, Path(self._state.name))
        self.modes: list[str] = []
        #: What else happens when the agent is told to end.
        self.on_shutdown: Callable[[], None] = lambda: None
        service = Service(
            cast(Engine, self.engine),
            boot={"pid1": True, "modules_ms": 12.5, **options},
            deadline_seconds=WAIT_SECONDS,
            on_shutdown=self._shut_down,
        )
        root = GuestRoot(self.engine.operation)
        gate, shell = self.engine.state.gate, bool(options.get("shell"))
        guest = Guest(service, root, self.engine.debug, gate, shell=shell)
        line = options.get("line")
        lines = (f"serial://{line}",) if line else ()
        self.console = Console(guest, (f"unix://{path}", *lines))
        self.console.start()

    def _shut_down(self, mode: str) -> None:
        self.modes.append(mode)
        self.on_shutdown()

    def close(self) -> None:
        self.console.close()
        self.engine.event_log.close()
        self._state.cleanup()

    def client(self, **hello: object) -> "Client":
        return Client(self.path, **hello)

    def run(self, command: str, **hello: object) -> tuple[int, str]:
        """Run one command as a script does; return its status and all of its output."""
        with self.client(command=command, **hello) as client:
            return client.finish()


@contextlib.contextmanager
def serving(path: Path, directories: Mapping[str, Path], **options: object) -> Iterator[Bed]:
    bed = Bed(path, directories, **options)
    try:
        yield bed
    finally:
        bed.close()


class Client:
    """A peer of the console. ``output`` is what it printed, ``errors`` what it said went wrong."""

    def __init__(self, path: str, *, hello: bool = True, **fields: object) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WAIT_SECONDS)
        self.sock.connect(path)
        self.output = bytearray()
        self.errors = b""
        self.status: int | None = None
        self.signal: str | None = None
        self.refusal: dict[str, object] | None = None
        self.welcome: dict[str, object] | None = None
        self._buffer = bytearray()
        self._seen = 0
        if hello:
            self.sock.sendall(frame(HELLO, {"versions": [1], **fields}))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def type(self, text: str | bytes) -> None:
        self.sock.sendall(frame(DATA, text.encode() if isinstance(text, str) else text))

    def ask(self, text: str, *shown: str) -> None:
        """Type, then wait for what is shown."""
        self.type(text)
        for each in shown:
            self.expect(each)

    def send(self, kind: int, payload: bytes | Mapping[str, object] = b"") -> None:
        self.sock.sendall(frame(kind, payload))

    def expect(self, text: str) -> str:
        """Wait for a text behind what was expected before; return what lies between."""
        wanted = text.encode()
        until = time.monotonic() + WAIT_SECONDS
        while (at := self.output.find(wanted, self._seen)) < 0:
            if not self._receive(until):
                raise AssertionError(f"no {text!r} in {self.output[self._seen :]!r}")
        between = self.output[self._seen : at]
        self._seen = at + len(wanted)
        return between.decode(errors="replace")

    def take_output(self) -> None:
        """Read all that has come, without waiting."""
        self.sock.setblocking(False)
        try:
            while data := self.sock.recv(65536):
                self._buffer += data
        except BlockingIOError:
            pass
        finally:
            self.sock.settimeout(WAIT_SECONDS)
        while self._take_frame():
            continue

    def finish(self) -> tuple[int, str]:
        """Read to the end; return the status and the output with what went wrong."""
        while self._receive(time.monotonic() + WAIT_SECONDS):
            continue
        assert self.status is not None, (self.refusal, self.output, self.errors)
        return self.status, (self.output + self.errors).decode(errors="replace")

    def _receive(self, until: float) -> bool:
        while True:
            if self._take_frame():
                return True
            if time.monotonic() > until:
                raise AssertionError(f"nothing more came after {self.output[-500:]!r}")
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                return False
            if not data:
                return False
            self._buffer += data

    def _take_frame(self) -> bool:
        size = int.from_bytes(self._buffer[1:4], "big")
        if len(self._buffer) < 4 + size:
            return False
        kind, payload = self._buffer[0], bytes(self._buffer[4 : 4 + size])
        del self._buffer[: 4 + size]
        if kind == DATA:
            self.output += payload
        elif kind == ERRORS:
            self.errors += payload
        elif kind == EXIT:
            end = msgpack.unpackb(payload)
            self.status, self.signal = end["status"], end["signal"]
        elif kind == REFUSAL:
            self.refusal = msgpack.unpackb(payload)
        elif kind == WELCOME:
            self.welcome = msgpack.unpackb(payload)
        else:
            raise AssertionError(f"frame {kind}")
        return True


class Terminal:
    """The dumbest there is: it knows characters, backspace, CR and LF. ``rows`` are its lines."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: list[list[str]] = [[]]
        self.at = 0
        self.bells = 0

    def show(self, output: str) -> None:
        for c in output:
            if c == "\n":
                self.rows.append([])
                self.at = 0
            elif c == "\r":
                self.at = 0
            elif c == "\b":
                self.at -= 1
                assert self.at >= 0, "moved out of the row"
            elif c == "\a":
                self.bells += 1
            else:
                assert c.isprintable(), repr(c)
                self._put(c)

    def _put(self, c: str) -> None:
        row = self.rows[-1]
        for cell in (c, *[""] * (width_of(c) - 1)):
            row.extend(" " * (self.at + 1 - len(row)))
            row[self.at] = cell
            self.at += 1
        assert self.at < self.columns, "wrapped into the next row"

    @property
    def row(self) -> str:
        return "".join(self.rows[-1]).rstrip(" ")


def wait_until(true: object, what: str) -> None:
    """Wait for something that no descriptor announces."""
    until = time.monotonic() + WAIT_SECONDS
    while not true():  # type: ignore[operator]
        assert time.monotonic() < until, what
        select.select([], [], [], 0.005)


def thread_count() -> int:
    return threading.active_count()


def fd_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
