"""What engine tests stand on: packs of many small layers, an agent as a process, the world's state.

The state is read without the code under test where that is possible: from /proc, from the file
system, and by the ioctl wrapper that has tests of its own.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from guestagent.api import ByteRange, LayerSpec, OverlaySpec, PathDevice, Verity
from guestagent.engine.engine import Engine
from guestagent.engine.faults import Faults
from guestagent.engine.state import Rules
from guestagent.engine.transaction import Transaction
from guestagent.host.client import GuestAgent
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.mountinfo import read_mounts
from guestagent.storage.verity import VerityTerms
from rootfs.verity.formatter import format_image
from tests.beds.calls import run
from tests.beds.dmbed import loop_device
from vsock.deadline import Deadline
from vsock.errors import CallError

T = TypeVar("T")

PROJECT = Path(__file__).resolve().parents[2]
#: The interpreter's own packages, for an agent that is started as in an initramfs (-I -S).
SITE = next(path for path in sys.path if path.endswith("site-packages"))
_MARKER = b"layer-%05d".ljust(11)
_START = "import sys; sys.path[:0] = {paths!r}; from guestagent.__main__ import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One layer of a pack: where it is, and what it must prove to be."""

    mapping: ByteRange
    root_digest: bytes
    marker: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A loop device full of layers. Each holds ``who`` with its marker, and ``same``."""

    image: Path
    node: str
    layers: tuple[Packed, ...]

    def spec(self, number: int, layer_id: str | None = None, **changes: Any) -> LayerSpec:
        """Return a request for linear and verity; ``changes`` replace its fields."""
        layer = self.layers[number]
        return LayerSpec(
            layer_id=layer_id or f"layer{number}",
            device=PathDevice(path=self.node),
            mapping=layer.mapping,
            verity=Verity(root_digest=layer.root_digest),
            filesystem="erofs",
        ).replace(**changes)


def build_pack(directory: Path, count: int) -> tuple[Path, tuple[Packed, ...]]:
    """Write ``count`` layers that differ into one image, each behind the other."""
    source = directory / "source"
    source.mkdir(parents=True)
    # a whole block of its own, so that its bytes lie in the image as they are
    marker = _MARKER % 99999
    (source / "who").write_bytes(marker * (4096 // len(marker)) + b"\n" * (4096 % len(marker)))
    (source / "same").write_bytes(b"the same in every layer\n" * 40)
    template, image = directory / "template", directory / "pack.img"
    run("mkfs.erofs", "-T0", "--all-root", template, source)
    data = template.read_bytes()
    data = data.ljust(-(-len(data) // 4096) * 4096, b"\0")
    assert data.count(marker) == 4096 // len(marker)
    layers, offset_bytes = [], 0
    with image.open("wb") as pack:
        for number in range(count):
            layer, own = directory / "layer", _MARKER % number
            layer.write_bytes(data.replace(marker, own))
            made = format_image(layer, terms=VerityTerms(salt=number.to_bytes(8, "big")), workers=1)
            content = layer.read_bytes()
            content = content.ljust(-(-len(content) // 4096) * 4096, b"\0")
            pack.write(content)
            place = ByteRange(offset_bytes=offset_bytes, size_bytes=len(content))
            layers.append(Packed(mapping=place, root_digest=made.root_digest, marker=own))
            offset_bytes += len(content)
    return image, tuple(layers)


@contextlib.contextmanager
def attached_pack(directory: Path, count: int) -> Iterator[Pack]:
    image, layers = build_pack(directory, count)
    with loop_device(image) as node:
        yield Pack(image=image, node=node, layers=layers)


def who(directory: str) -> bytes:
    """Return the marker of the layer whose file ``who`` is seen in a directory."""
    return Path(directory, "who").read_bytes()[: len(_MARKER % 0)]


class AgentProcess:
    """The real agent on a unix socket, started as an initramfs starts it. A context manager."""

    def __init__(self, *settings: str, directory: Path | None = None) -> None:
        self.directory = directory or Path(f"/run/agent-{os.getpid()}-{time.monotonic_ns()}")
        self.socket = f"{self.directory}.sock"
        self.address = f"unix://{self.socket}"
        self.state = f"{self.directory}/state"
        self.log = Path(f"{self.directory}.log")
        self.settings: tuple[str, ...] = settings
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "AgentProcess":
        self.directory.mkdir(exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        run("rm", "-rf", "--one-file-system", self.directory)
        for path in (self.socket, self.log):
            Path(path).unlink(missing_ok=True)

    def command(self, *settings: str) -> list[str]:
        code = _START.format(paths=[str(PROJECT), SITE])
        return [sys.executable, "-I", "-S", "-c", code, *self.all_settings(settings)]

    def all_settings(self, settings: Sequence[str]) -> list[str]:
        """Return the settings, with the own address and state directory unless others are named."""
        given = [*self.settings, *settings]
        names = {word.partition("=")[0] for word in given}
        own = {"listen": self.address, "state": self.state}
        return [*(f"{name}={value}" for name, value in own.items() if name not in names), *given]

    def start(self, *settings: str) -> None:
        """Start it, not waiting until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(*settings), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """Kill it as ``kill -9`` does, and see it dead."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def wait(self, seconds: float = 30) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def client(self, seconds: float = 20, **options: object) -> GuestAgent:
        return GuestAgent(self.address, connect_seconds=seconds, **options)  # type: ignore[arg-type]

    def stop(self) -> None:
        """Kill it, if it runs."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self.process = None

    def is_listening(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.socket) == 0


class EngineBed:
    """An engine in this process, with faults that can be armed. A context manager."""

    def __init__(self, directory: Path, rules: Rules | None = None) -> None:
        self.directory = directory
        self.faults = Faults()
        self._rules = rules or Rules(target_roots=("/run",))
        self.engine = self._open()

    def _open(self) -> Engine:
        engine = Engine(state_directory=str(self.directory), rules=self._rules, faults=self.faults)
        engine.start()
        return engine

    def __enter__(self) -> "EngineBed":
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.arm("")
        with contextlib.ExitStack() as stack:
            stack.callback(self.engine.close)
            with self.operation() as op:
                self.engine.unmount_everything(op, force=True)

    def reopen(self) -> None:
        """Let the engine go as a crash does, and open another on what it left."""
        self.engine.close()
        self.engine = self._open()

    @contextlib.contextmanager
    def operation(self, seconds: float = 20.0) -> Iterator[Transaction]:
        deadline = Deadline(seconds)
        try:
            yield self.engine.operation(deadline)
        finally:
            deadline.close()

    def ask(self, method: Callable[..., T], *arguments: object, **options: object) -> T:
        """Call a method of the engine in an operation of its own."""
        with self.operation() as op:
            return method(*arguments, op, **options)

    def refusal(self, request: Callable[[Transaction], object]) -> CallError:
        """Return the error of a request that fails; it has changed nothing."""
        before = World.now(), self.books()
        with pytest.raises(CallError) as caught, self.operation() as op:
            request(op)
        assert (settled_world(before[0]), self.books()) == before
        return caught.value

    def books(self) -> dict[str, str]:
        """Return what the inventory holds, as text by part."""
        parts = vars(self.engine.state.inventory)
        return {
            name: repr(sorted(map(str, value)) if name == "_dm_names" else _settled(value))
            for name, value in parts.items()
            if name not in ("_lock", "_problems")
        }


def _settled(value: object) -> object:
    """Drop what may differ after something was taken away and put back: numbers and times."""
    if isinstance(value, dict):
        return {name: _settled(item) for name, item in sorted(value.items(), key=str)}
    if hasattr(value, "as_dict"):
        fields = {**value.as_dict(), "timings_ms": {}, "dev": "", "mount_id": 0}
        return {name: _settled(item) for name, item in fields.items()}
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What the kernel and the file system hold of layers, in a form that can be compared."""

    dm: tuple[str, ...]
    mounts: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def now(cls, *, root: str = "/run", skip: Sequence[str] = ()) -> "World":
        mounts = [mount for mount in read_mounts() if mount.target.startswith(root + "/")]
        names = {
            "/".join((directory, name))
            for directory, inner, files in os.walk(root)
            for name in (*_prune(directory, inner, mounts), *files)
        }
        return cls(
            dm=_dm_state(),
            mounts=tuple(
                sorted(f"{m.target} {m.filesystem} {','.join(m.options)}" for m in mounts)
            ),
            files=tuple(sorted(name for name in names if not name.startswith(tuple(skip)))),
        )

    def minus(self, other: "World") -> list[str]:
        """Return what is here and not there."""
        return [
            f"{kind}: {item}"
            for kind in ("dm", "mounts", "files")
            for item in sorted(set(getattr(self, kind)) - set(getattr(other, kind)))
        ]


def _prune(directory: str, inner: list[str], mounts: Sequence[object]) -> list[str]:
    """Keep os.walk out of what is mounted, and name what is there."""
    names = list(inner)
    inner[:] = [name for name in inner if not os.path.ismount(f"{directory}/{name}")]
    return names


def _dm_state() -> tuple[str, ...]:
    with Control() as control:
        names = [(name, uuid) for name, _, uuid in control.list_devices()]
        lines = []
        for name, uuid in names:
            info = control.find(name=name)
            if info is not None:
                deferred = "deferred" if info.deferred_remove else "kept"
                lines.append(f"{name} {uuid} {deferred}")
        return tuple(sorted(lines))


def settled_world(expected: World, *, seconds: float = 3.0, **where: object) -> World:
    """Return the world once it equals ``expected``, or as it is when the time is over."""
    end = time.monotonic() + seconds
    while True:
        world = World.now(**where)  # type: ignore[arg-type]
        if world == expected or time.monotonic() > end:
            return world
        time.sleep(0.01)


def layer_on(node: str, layer_id: str, filesystem: str = "erofs", **fields: Any) -> LayerSpec:
    """Return the request to mount a layer that is on a device node."""
    device = PathDevice(path=node)
    return LayerSpec(layer_id=layer_id, device=device, filesystem=filesystem, **fields)


def overlay(overlay_id: str, *layers: str, **fields: Any) -> OverlaySpec:
    return OverlaySpec(overlay_id=overlay_id, layers=layers, **fields)
