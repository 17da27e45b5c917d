"""The real service on a real socket over plain directories, without a device-mapper."""

import contextlib
import socket as socket_module
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from guestagent.api import OverlaySpec
from guestagent.engine.engine import Engine
from guestagent.engine.inventory import LiveLayer, LiveOverlay
from guestagent.engine.transaction import Transaction
from guestagent.host.client import GuestAgent
from guestagent.policy.gate import Gate
from guestagent.service.dispatch import QUICK_METHODS, Service
from guestagent.storage import syscalls
from tests.beds.agentbed import layer_on
from tests.beds.peer import Peer
from vsock.address import UnixAddress
from vsock.deadline import Deadline
from vsock.dial import listen
from vsock.server import Connection, Server

WAIT_SECONDS = 60.0


class _Books:
    """The two questions that the inspection has for the inventory."""

    def __init__(self, layers: Mapping[str, LiveLayer], overlays: Mapping[str, LiveOverlay]):
        self.layer = layers.get
        self.overlay = overlays.get


class _State:
    """What the inspection needs of an engine's state."""

    def __init__(self, layers: Mapping[str, LiveLayer], overlays: Mapping[str, LiveOverlay]):
        self.inventory = _Books(layers, overlays)
        self.gate = Gate()


class PlainEngine:
    """An engine whose layers are directories. Only what looking needs is there."""

    def __init__(self, layers: Mapping[str, Path], overlays: Mapping[str, Path]) -> None:
        self.state = _State(
            {name: _live_layer(name, path) for name, path in layers.items()},
            {name: _live_overlay(name, path, tuple(layers)) for name, path in overlays.items()},
        )
        self.events = None  # nobody subscribes

    def features(self) -> tuple[str, ...]:
        return ("batch",)

    def operation(self, deadline: Deadline, *, traceparent: str | None = None) -> Transaction:
        return Transaction(deadline, traceparent=traceparent)


def _live_layer(layer_id: str, path: Path) -> LiveLayer:
    spec = layer_on("/dev/null", layer_id, target=str(path))
    plan = type("Plan", (), {"verity": None})()
    blank = dict.fromkeys(LiveLayer._fields)
    return LiveLayer(**{**blank, "spec": spec, "plan": plan, "state": "mounted", **_mount(path)})  # type: ignore[arg-type]


def _live_overlay(overlay_id: str, path: Path, layers: tuple[str, ...]) -> LiveOverlay:
    spec = OverlaySpec(overlay_id=overlay_id, layers=layers, target=str(path))
    blank = dict.fromkeys(LiveOverlay._fields)
    return LiveOverlay(**{**blank, "spec": spec, **_mount(path)})  # type: ignore[arg-type]


def _mount(path: Path) -> dict[str, object]:
    dev, mount_id = syscalls.mount_of(str(path))
    return {"dev": dev, "mount_id": mount_id}


class Bed:
    """A running service."""

    def __init__(
        self, engine: "PlainEngine", server: Server, service: Service, address: str
    ) -> None:
        self.engine = engine
        self.server = server
        self.service = service
        self.address = address
        self.path = address.removeprefix("unix://")

    def connections(self) -> list[Connection]:
        return list(self.server._connections)


@contextlib.contextmanager
def serving(
    socket: Path, layers: Mapping[str, Path], overlays: Mapping[str, Path] | None = None
) -> Iterator[Bed]:
    """Serve directories as layers and overlays; yields what runs."""
    engine = PlainEngine(layers, overlays or {})
    service = Service(
        cast(Engine, engine), boot={}, deadline_seconds=60.0, on_shutdown=lambda mode: None
    )
    server = Server(service.handle, quick=QUICK_METHODS, hello_seconds=None)
    service.attach(server)
    server.add_listener(listen(UnixAddress(path=str(socket))))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Bed(engine, server, service, f"unix://{socket}")
    finally:
        server.stop(0.0)
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


@contextlib.contextmanager
def peer_of(bed: Bed) -> Iterator[Peer]:
    """A raw peer."""
    with socket_module.socket(socket_module.AF_UNIX) as sock:
        sock.connect(bed.path)
        yield Peer(sock)


def connect(bed: Bed) -> GuestAgent:
    return GuestAgent(bed.address)
