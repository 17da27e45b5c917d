"""An engine that is killed at any step leaves what the next one adopts or undoes, and no more."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from guestagent.api import DeviceScratch, LayersMount, LayersUnmount, PathDevice, TmpfsScratch
from guestagent.engine.transaction import Transaction
from tests.beds.agentbed import EngineBed, Pack, World, overlay, settled_world
from tests.beds.dmbed import loop_device
from tests.beds.loopbed import sparse_file

PACK_LAYERS = 10


Request = Callable[[EngineBed, Transaction], object]
MAX_STEPS = 200


def die_in(
    directory: Path, request: Request, step: int, bed_type: type[EngineBed] = EngineBed
) -> bool:
    """Do ``request`` in a child that dies at its ``step``-th step; return whether it did."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            bed = bed_type(directory)
            bed.faults.arm(f"#{step}:KILL")
            with bed.operation() as op:
                request(bed, op)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def ids(bed: EngineBed) -> tuple[list[str], list[str]]:
    return (
        sorted(report.layer_id for report in bed.engine.layers.list()),
        sorted(report.overlay_id for report in bed.engine.overlays.list()),
    )


def crash_at_every_step(
    directory: Path,
    prepare: list[Request],
    request: Request,
    stride: int = 1,
) -> None:
    """Whatever the step, the next life has the state from before, or the one from after."""
    for step in range(1, MAX_STEPS, stride):
        with EngineBed(directory) as bed:
            for action in prepare:
                with bed.operation() as op:
                    action(bed, op)
            before, ids_before = World.now(), ids(bed)
            bed.engine.close()
            died = die_in(directory, request, step)
            bed.reopen()
            world = settled_world(before, seconds=0.3) if died else World.now()
            if ids(bed) == ids_before:
                assert (world.minus(before), before.minus(world)) == ([], []), f"step {step}"
            with bed.operation() as op:
                request(bed, op)
            assert bed.engine.problems() == ()
        if not died:
            return
    raise AssertionError("the request never ends")


def mount(pack: Pack, number: int) -> Request:
    return lambda bed, op: bed.engine.layers.mount(pack.spec(number), op)


def test_layer_mount(tmp_path: Path, pack: Pack) -> None:
    crash_at_every_step(tmp_path / "state", [], mount(pack, 0))


def test_layer_unmount(tmp_path: Path, pack: Pack) -> None:
    unmount: Request = lambda bed, op: bed.engine.layers.unmount("layer0", op)  # noqa: E731
    crash_at_every_step(tmp_path / "state", [mount(pack, 0), mount(pack, 1)], unmount)


def test_overlay_mount_and_unmount(tmp_path: Path, pack: Pack) -> None:
    spec = overlay("o", "layer0", scratch=TmpfsScratch(size_bytes=1 << 20))
    make: Request = lambda bed, op: bed.engine.overlays.mount(spec, op)  # noqa: E731
    crash_at_every_step(tmp_path / "state", [mount(pack, 0)], make)
    unmake: Request = lambda bed, op: bed.engine.overlays.unmount("o", op)  # noqa: E731
    crash_at_every_step(tmp_path / "state", [mount(pack, 0), make], unmake)


@pytest.mark.parametrize("kind", ["encrypted", "shared", "joined"])
def test_scratch_device(tmp_path: Path, pack: Pack, kind: str) -> None:
    """With ``joined`` another overlay is on the disk, and stays."""
    image = sparse_file(tmp_path / "scratch.img", 8 << 20)
    with loop_device(image, readonly=False) as node:
        scratch = DeviceScratch(
            device=PathDevice(path=node), ensure_filesystem=True, existing="adopt", shared=True
        )
        if kind == "encrypted":
            scratch = scratch.replace(existing="fresh", encrypted=True)

        def make(bed: EngineBed, op: Transaction, name: str = "o") -> object:
            return bed.engine.overlays.mount(overlay(name, "layer0", scratch=scratch), op)

        prepare = [mount(pack, 0)]
        if kind == "joined":
            prepare.append(lambda bed, op: make(bed, op, "p"))
        crash_at_every_step(tmp_path / "state", prepare, make)
        unmake: Request = lambda bed, op: bed.engine.overlays.unmount("o", op)  # noqa: E731
        crash_at_every_step(tmp_path / "state", [*prepare, make], unmake)


def test_batch_mount(tmp_path: Path, pack: Pack) -> None:
    """A batch is all there or not there at all, also through a crash."""
    spec = overlay("o", "layer2", "layer0", scratch=TmpfsScratch(size_bytes=1 << 20))
    request = LayersMount(layers=(pack.spec(0), pack.spec(1)), overlay=spec)
    make: Request = lambda bed, op: bed.engine.batches.mount(request, op)  # noqa: E731
    # its layers go through the same steps in turn, so that every third is enough
    crash_at_every_step(tmp_path / "state", [mount(pack, 2)], make, stride=3)


def test_batch_unmount(tmp_path: Path, pack: Pack) -> None:
    layers = ("layer0", "layer1")
    request = LayersUnmount(layers=layers, overlay="o")
    make: Request = lambda bed, op: bed.engine.overlays.mount(overlay("o", *layers), op)  # noqa: E731
    unmake: Request = lambda bed, op: bed.engine.batches.unmount(request, op)  # noqa: E731
    crash_at_every_step(tmp_path / "state", [mount(pack, 0), mount(pack, 1), make], unmake)


def test_a_batch_that_was_decided_is_adopted_whole(tmp_path: Path, pack: Pack) -> None:
    """Killed right after the decision: what the overlay noted of its beginning is still there."""
    request = LayersMount(
        layers=(pack.spec(0), pack.spec(1)),
        overlay=overlay("o", "layer0", "layer1", scratch=TmpfsScratch(size_bytes=1 << 20)),
    )

    def killed_when_decided(bed: EngineBed, op: Transaction) -> None:
        overlays = bed.engine.overlays
        overlays.settle = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        bed.engine.batches.mount(request, op)

    directory = tmp_path / "state"
    EngineBed(directory).engine.close()
    assert die_in(directory, killed_when_decided, MAX_STEPS)
    assert list(directory.glob("*.begun")) == [directory / "overlay-o.begun"]
    with EngineBed(directory) as bed:
        assert ids(bed) == (["layer0", "layer1"], ["o"])
        (report,) = bed.engine.overlays.list()
        assert report.lowerdirs == ("/run/layers/layer0", "/run/layers/layer1")


def test_a_large_batch(tmp_path: Path, pack: Pack) -> None:
    """More layers than threads: some are mounted, some half made, some not begun."""
    request = LayersMount(layers=tuple(pack.spec(number) for number in range(9)))
    make: Request = lambda bed, op: bed.engine.batches.mount(request, op)  # noqa: E731
    crash_at_every_step(tmp_path / "state", [mount(pack, 9)], make, stride=5)


def test_a_damaged_entry_is_put_aside_and_told(tmp_path: Path, pack: Pack) -> None:
    directory = tmp_path / "state"
    bed = EngineBed(directory)
    bed.ask(bed.engine.layers.mount, pack.spec(0))
    bed.engine.close()
    entry = directory / "layer-layer0.entry"
    entry.write_bytes(entry.read_bytes()[:-7])
    (directory / "layer-x.entry.new").write_bytes(b"half")
    before = World.now()
    with EngineBed(directory) as bed:
        assert ids(bed) == ([], [])
        assert any("layer-layer0" in problem for problem in bed.engine.problems())
        # its devices are known by their uuid, and what is mounted on them goes with them
        assert any(line.startswith("dm-verity") for line in before.dm)
        assert World.now().dm == ()
    assert not (directory / "layer-x.entry.new").exists()
    Path("/run/layers/layer0").rmdir()
    Path("/run/layers").rmdir()
