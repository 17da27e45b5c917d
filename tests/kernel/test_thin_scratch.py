"""Overlays whose changes go into a volume of a pool, which is gone with them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import OverlayReport, ThinScratch
from tests.beds.agentbed import Pack, attached_pack, overlay
from tests.beds.thinbed import MIB, POOL, Disks, ThinBed, pool_disks
from tests.kernel.test_thin_crashes import can_write, die_in, look, outcome

SCRATCH = ThinScratch(pool_id=POOL, size_bytes=16 * MIB)
MAX_STEPS = 60


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    with attached_pack(tmp_path_factory.mktemp("pack"), 1) as pack:
        yield pack


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    with pool_disks(tmp_path / "disks") as disks:
        yield disks


@pytest.fixture
def bed(tmp_path: Path, disks: Disks, pack: Pack) -> Iterator[ThinBed]:
    with ThinBed(tmp_path / "state") as bed:
        with bed.operation() as op:
            bed.engine.layers.mount(pack.spec(0), op)
        yield bed


def mount(bed: ThinBed, name: str = "o") -> OverlayReport:
    with bed.operation() as op:
        return bed.engine.overlays.mount(overlay(name, "layer0", scratch=SCRATCH), op)


def unmount(bed: ThinBed, name: str = "o") -> None:
    with bed.operation() as op:
        bed.engine.overlays.unmount(name, op)


def test_changes_go_into_a_volume_that_goes_with_the_overlay(bed: ThinBed, disks: Disks) -> None:
    error = outcome(lambda: mount(bed))
    assert error is not None
    assert (error.code, "no open pool" in error.message) == ("not_found", True)
    bed.open(disks.spec())
    report = mount(bed)
    assert report.scratch is not None
    assert (report.scratch.kind, report.scratch.filesystem) == ("thin", "ext4")
    Path("/run/overlays/o/new").write_bytes(b"x" * MIB)
    os.sync()
    assert bed.get("o").holders == ("overlay.o",)
    mount(bed, "o2")
    unmount(bed)
    assert list(bed.volumes()) == ["o2"]
    bed.reopen()
    assert bed.get("o2").mounts
    unmount(bed, "o2")
    assert bed.volumes() == {}
    assert bed.engine.problems() == ()
    bed.close()
    assert disks.thin_ids() == [0]
    disks.thin_check()


def test_volume_of_that_name_is_not_touched(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    bed.create("o")
    error = outcome(lambda: mount(bed))
    assert error is not None
    assert error.code == "conflict"
    assert list(bed.volumes()) == ["o"]


def test_mount_that_fails_at_any_step_leaves_nothing(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    before = look(bed)
    for step in range(1, MAX_STEPS):
        bed.faults.arm(f"#{step}:EIO")
        error = outcome(lambda: mount(bed))
        bed.faults.arm("")
        if error is None:
            break
        assert "not undone" not in (error.hint or ""), error.hint
        can_write(bed)
        assert look(bed) == before, f"step {step}"
    assert step > 15
    assert bed.engine.problems() == ()
    unmount(bed)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("request_name", ["mount", "unmount"])
def test_agent_that_is_killed_at_any_step(bed: ThinBed, disks: Disks, request_name: str) -> None:
    bed.open(disks.spec())
    work = mount if request_name == "mount" else unmount
    for step in range(1, MAX_STEPS):
        if request_name == "unmount":
            mount(bed)
        bed.engine.close()
        died = die_in(bed.directory, lambda bed: work(bed), step)
        bed.reopen()
        assert bed.engine.problems() == ()
        mounted = [each.overlay_id for each in bed.engine.overlays.list()]
        unmount(bed)
        assert bed.volumes() == {}, f"step {step}, {mounted}"
        can_write(bed)
        if not died:
            return
    raise AssertionError("the request never ends")
