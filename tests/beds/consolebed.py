"""A console on a real socket over plain directories, without a device-mapper; a client of its own.

``Client`` speaks the protocol by its table in docs/console.md, not by the code under test.
"""

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgpack

from guestagent.api import Event, LayerReport, OverlayReport, PathDevice
from guestagent.api.agent import StatusReply
from guestagent.api.inspect import PlaceRequest
from guestagent.api.inspect_devices import DeviceListReply, FilesystemsReply, MountPointsReply
from guestagent.console.command import Guest
from guestagent.console.debugview import DebugView
from guestagent.console.service import Console
from guestagent.engine.engine import Engine
from guestagent.engine.reconciliation import Finding, Outcome
from guestagent.engine.state import EngineState
from guestagent.engine.transaction import Transaction
from guestagent.inspect.methods import Inspection
from guestagent.inspect.place import Place
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
        size_bytes=3 << 20,
        used_by=(),
        overlaps=(),
        timings_ms={"device": 0.5, "mount": 1.25},
        already=False,
    )


class PlainDebug:
    """The debugger's view of layers that are directories."""

    def __init__(self, engine: "PlainEngine") -> None:
        self._engine = engine
        self.findings: list[Finding] = []
        self.settled: list[Finding] = []
        self.reconciliation = SimpleNamespace(look=self._look, settle=self._settle)

    def _look(self, op: Transaction) -> tuple[Finding, ...]:
        return tuple(self.findings)

    def _settle(self, finding: Finding, op: Transaction) -> Outcome:
        self.settled.append(finding)
        return Outcome(finding=finding, result="undone")

    def layer_ids(self) -> tuple[str, ...]:
        return tuple(self._engine.directories)

    def overlay_ids(self) -> tuple[str, ...]:
        return ("root",)

    def dm_devices(self) -> tuple[tuple[str, str], ...]:
        return (("dm-linear-pmem0-0-4096", "253:0"),)

    def dev_of_layer(self, layer_id: str) -> str | None:
        return "253:1" if layer_id in self._engine.directories else None

    def plan_of(self, layer_id: str) -> object:
        steps = ("create dm-linear: 0 8 linear 259:0 0", f"mount erofs on /run/layers/{layer_id}")
        known = layer_id in self._engine.directories
        return SimpleNamespace(describe=lambda: steps) if known else None

    def place(self, request: PlaceRequest) -> Place:
        if request.layer_id not in self._engine.directories:
            raise CallError("not_found", f"{request.layer_id!r} is not mounted")
        path = self._engine.directories[request.layer_id]
        return Place(cast(EngineState, None), f"layer {request.layer_id!r}", str(path), ())


class PlainEvents:
    def __init__(self) -> None:
        self.events = [
            Event(sequence=1, kind="agent_started", unix_ms=0, detail="adopted 0 layers"),
            Event(sequence=2, kind="layer_mounted", unix_ms=1500, layer_id="base"),
        ]
        self.listeners: list[object] = []

    def since(self, sequence: int) -> tuple[tuple[Event, ...], int]:
        return tuple(event for event in self.events if event.sequence > sequence), 0

    def listen(self, listener: object) -> object:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def publish(self, sequence: int, detail: str) -> None:
        event = Event(sequence=sequence, kind="device_appeared", unix_ms=2000, detail=detail)
        self.events.append(event)
        for listener in list(self.listeners):
            listener(event)  # type: ignore[operator]


class PlainEngine:
    """What the console asks of an engine, over directories as layers."""

    def __init__(self, directories: Mapping[str, Path]) -> None:
        self.directories = dict(directories)
        self.debug = PlainDebug(self)
        self.events = PlainEvents()
        self.unmounted: list[bool] = []
        self.layers = SimpleNamespace(
            list=lambda: tuple(layer_report(n, str(p)) for n, p in self.directories.items()),
            get=self._layer,
        )
        self.overlays = SimpleNamespace(list=self._overlays)
        self.dm = SimpleNamespace(list=tuple)
        self.inspection = SimpleNamespace(
            devices=SimpleNamespace(
                list_devices=lambda: DeviceListReply(devices=()),
                list_partitions=lambda: DeviceListReply(devices=()),
                list_filesystems=lambda op: FilesystemsReply(filesystems={}),
                mountpoints=lambda: MountPointsReply(mounts=()),
            )
        )

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

    def operation(self, deadline: Deadline, *, traceparent: str | None = None) -> Transaction:
        return Transaction(deadline, traceparent=traceparent)

    def unmount_everything(self, op: Transaction, *, force: bool) -> None:
        self.unmounted.append(force)


def plain_status() -> StatusReply:
    blank: dict[str, object] = dict.fromkeys(StatusReply._fields, 0)
    return StatusReply(**{**blank, "state": "ready", "problems": ()})  # type: ignore[arg-type]


class Bed:
    """A running console. ``modes`` is how it was told to end."""

    def __init__(self, path: Path, directories: Mapping[str, Path], **options: object) -> None:
        self.path = str(path)
        self.engine = PlainEngine(directories)
        self.modes: list[str] = []
        self.guest = Guest(
            cast(Engine, self.engine),
            boot={"pid1": True, "modules_ms": 12.5, **cast(dict[str, object], options)},
            shell=bool(options.get("shell")),
            status=plain_status,
            end=self.modes.append,
        )
        self.guest.debug = cast(DebugView, self.engine.debug)
        self.guest.inspection = cast(Inspection, self.engine.inspection)
        line = options.get("line")
        lines = (f"serial://{line}",) if line else ()
        self.console = Console(self.guest, (f"unix://{path}", *lines))
        self.console.start()

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
        bed.console.close()


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


def wait_until(true: object, what: str) -> None:
    """Wait for something that no descriptor tells of."""
    until = time.monotonic() + WAIT_SECONDS
    while not true():  # type: ignore[operator]
        assert time.monotonic() < until, what
        select.select([], [], [], 0.005)


def thread_count() -> int:
    return threading.active_count()


def fd_count() -> int:
    return len(os.listdir("/proc/self/fd"))
