"""Every request is a transaction: whichever step fails, is cancelled or runs out of time, the
world is afterwards as it was before, and the same request then succeeds."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestagent.api import (
    DeviceScratch,
    DirectoryScratch,
    LayersMount,
    LayersUnmount,
    PathDevice,
    TmpfsScratch,
)
from guestagent.engine.transaction import Transaction
from tests.beds.agentbed import EngineBed, Pack, World, overlay, settled_world
from tests.beds.dmbed import loop_device
from tests.beds.loopbed import sparse_file
from vsock.errors import CallError

PACK_LAYERS = 4


Request = Callable[[EngineBed, Transaction], Any]
MAX_STEPS = 200
#: Directories of the agent itself, made once.
KEPT = ("empty", "scratch", "links")
#: A step fails, or the deadline passes at it.
FAILURES = ("EIO", "LATE")
SCRATCHES = ("none", "tmpfs", "device", "directory", "encrypted", "shared")


@pytest.fixture
def scratch_disk(tmp_path: Path) -> Iterator[str]:
    image = sparse_file(tmp_path / "scratch.img", 8 * 1024 * 1024)
    with loop_device(image, readonly=False) as node:
        yield node


def prepare(bed: EngineBed, *requests: Request) -> None:
    for request in requests:
        with bed.operation() as op:
            request(bed, op)


def look(bed: EngineBed) -> tuple[World, list[str], dict[str, str]]:
    journal = sorted(path.name for path in bed.directory.rglob("*"))
    return World.now(), [name for name in journal if name not in KEPT], bed.books()


def outcome(bed: EngineBed, request: Request) -> CallError | None:
    with bed.operation() as op:
        try:
            request(bed, op)
        except CallError as error:
            return error
    return None


def fail_at_every_step(bed: EngineBed, request: Request, kind: str = "EIO") -> int:
    """Fail ``request`` at step 1, 2, ... until it succeeds; return how many steps it has."""
    before = look(bed)
    bed.faults.struck = 0
    for number in range(1, MAX_STEPS):
        bed.faults.arm(f"#{number}:{kind}")
        error = outcome(bed, request)
        if error is None:
            assert bed.faults.struck == number - 1
            bed.faults.arm("")
            assert bed.engine.problems() == ()
            return number - 1
        assert bed.faults.struck == number, f"not injected: {error}"
        assert error.step
        assert kind != "LATE" or error.code == "timeout", error
        assert "not undone" not in (error.hint or "")
        world = settled_world(before[0])
        assert world.minus(before[0]) == [], f"left by a failure at step {number}"
        assert before[0].minus(world) == [], f"lost by a failure at step {number}"
        assert look(bed) == before, f"step {number}"
    raise AssertionError("the request never succeeds")


def mount_layer(pack: Pack, number: int, **changes: object) -> Request:
    spec = pack.spec(number, **changes)
    return lambda bed, op: bed.engine.layers.mount(spec, op)


def mount_overlay(name: str, *layers: str, **fields: object) -> Request:
    spec = overlay(name, *layers, **fields)
    return lambda bed, op: bed.engine.overlays.mount(spec, op)


def scratch_of(kind: str, disk: str) -> dict[str, object]:
    match kind:
        case "tmpfs":
            return {"scratch": TmpfsScratch(size_bytes=1 << 20)}
        case "device":
            device = PathDevice(path=disk)
            return {
                "scratch": DeviceScratch(device=device, ensure_filesystem=True, existing="adopt")
            }
        case "encrypted":
            device = PathDevice(path=disk)
            return {"scratch": DeviceScratch(device=device, encrypted=True, existing="fresh")}
        case "shared":
            device = PathDevice(path=disk)
            scratch = DeviceScratch(device=device, ensure_filesystem=True, existing="adopt")
            return {"scratch": scratch.replace(shared=True)}
        case "directory":
            return {"scratch": DirectoryScratch(path="/run/changes", existing="adopt")}
    return {}


@pytest.fixture
def changes_directory() -> Iterator[Path]:
    path = Path("/run/changes")
    path.mkdir()
    yield path
    for name in ("work/work", "work/index", "work", "upper", ""):
        with contextlib.suppress(FileNotFoundError):
            (path / name).rmdir()


@pytest.fixture(params=FAILURES)
def failure(request: pytest.FixtureRequest) -> str:
    """The kind of fault that strikes at every step."""
    return str(request.param)


@pytest.mark.parametrize("parts", ["plain", "linear", "verity", "both"])
def test_layer_mount(bed: EngineBed, pack: Pack, parts: str, failure: str) -> None:
    changes: dict[str, object] = {}
    if parts in ("plain", "linear"):
        changes["verity"] = None
    if parts in ("plain", "verity"):
        changes["mapping"] = None
    request = mount_layer(pack, 0, **changes)
    steps = fail_at_every_step(bed, request, failure)
    assert steps >= {"plain": 8, "linear": 9, "verity": 11, "both": 13}[parts]


@pytest.mark.parametrize("kind", SCRATCHES)
def test_overlay_mount(
    bed: EngineBed,
    pack: Pack,
    scratch_disk: str,
    changes_directory: Path,
    kind: str,
    failure: str,
) -> None:
    prepare(bed, mount_layer(pack, 0), mount_layer(pack, 1))
    request = mount_overlay("o", "layer0", "layer1", **scratch_of(kind, scratch_disk))
    assert fail_at_every_step(bed, request, failure) >= 5


def test_batch_mount_with_overlay(bed: EngineBed, pack: Pack, failure: str) -> None:
    prepare(bed, mount_layer(pack, 3))
    request = LayersMount(
        layers=tuple(pack.spec(number) for number in range(4)),
        overlay=overlay("o", "layer3", "layer0", scratch=TmpfsScratch(size_bytes=1 << 20)),
    )

    def mount(bed: EngineBed, op: Transaction) -> None:
        bed.engine.batches.mount(request, op)

    assert fail_at_every_step(bed, mount, failure) >= 41


def unmount_layer(bed: EngineBed, op: Transaction) -> None:
    bed.engine.layers.unmount("layer0", op)


def test_layer_unmount(bed: EngineBed, pack: Pack, failure: str) -> None:
    prepare(bed, mount_layer(pack, 0))
    assert fail_at_every_step(bed, unmount_layer, failure) >= 3


@pytest.mark.parametrize("kind", SCRATCHES)
def test_overlay_unmount(
    bed: EngineBed,
    pack: Pack,
    scratch_disk: str,
    changes_directory: Path,
    kind: str,
    failure: str,
) -> None:
    prepare(
        bed,
        mount_layer(pack, 0),
        mount_overlay("o", "layer0", **scratch_of(kind, scratch_disk)),
    )
    if kind != "none":
        Path("/run/overlays/o/kept").write_text("kept")
    fail_at_every_step(bed, lambda bed, op: _check_kept_and_unmount(bed, op, kind), failure)
    if kind == "directory":
        (changes_directory / "upper/kept").unlink()


def _check_kept_and_unmount(bed: EngineBed, op: Transaction, kind: str) -> None:
    """What was written is there each time: an unmount undone loses nothing."""
    assert kind == "none" or Path("/run/overlays/o/kept").read_text() == "kept"
    bed.engine.overlays.unmount("o", op)


def test_batch_unmount_with_overlay(bed: EngineBed, pack: Pack, failure: str) -> None:
    layers = tuple(f"layer{number}" for number in range(3))
    prepare(
        bed,
        *(mount_layer(pack, number) for number in range(3)),
        mount_overlay("o", *layers, scratch=TmpfsScratch(size_bytes=1 << 20)),
    )
    request = LayersUnmount(layers=layers, overlay="o")

    def unmount(bed: EngineBed, op: Transaction) -> None:
        bed.engine.batches.unmount(request, op)

    assert fail_at_every_step(bed, unmount, failure) >= 10


def cancel_when_blocked(bed: EngineBed, op: Transaction, before: int) -> None:
    """Cancel the operation once it hangs in the injected block."""
    ended = threading.Event()
    while bed.faults.struck == before and not ended.wait(0.002) and not op.deadline.expired:
        pass
    op.deadline.cancel()


@pytest.mark.parametrize("what", ["layer", "batch", "unmount"])
def test_cancelled_at_every_step(bed: EngineBed, pack: Pack, what: str) -> None:
    batch = LayersMount(
        layers=(pack.spec(0), pack.spec(1)), overlay=overlay("o", "layer0", "layer1")
    )
    mount = mount_layer(pack, 0)
    requests: dict[str, Request] = {
        "layer": mount,
        "batch": lambda bed, op: bed.engine.batches.mount(batch, op),
        "unmount": unmount_layer,
    }
    if what == "unmount":
        prepare(bed, mount)
    codes = set()

    def cancelled(bed: EngineBed, op: Transaction) -> None:
        arguments = (bed, op, bed.faults.struck)
        watcher = threading.Thread(target=cancel_when_blocked, args=arguments)
        watcher.start()
        try:
            requests[what](bed, op)
        except CallError as error:
            codes.add(error.code)
            raise
        finally:
            op.deadline.limit(0.0)
            watcher.join()

    fail_at_every_step(bed, cancelled, "BLOCK")
    assert codes == {"cancelled"}
