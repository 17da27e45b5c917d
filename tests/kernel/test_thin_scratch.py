"""Overlays whose changes go into a volume of a pool, which is gone with them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import OverlayReport, ThinScratch
from guestagent.api.thin import VolumeTrim
from guestagent.engine.reconciliation import Finding, Reconciliation
from tests.beds.agentbed import Pack, attached_pack, overlay
from tests.beds.dmbed import run
from tests.beds.thinbed import MIB, POOL, Disks, ThinBed, pool_disks
from tests.kernel.test_engine_transactions import FAILURES
from tests.kernel.test_thin_crashes import can_write, die_in, grow_volume, look, outcome

SCRATCH = ThinScratch(pool_id=POOL, size_bytes=16 * MIB)
MAX_STEPS = 60
SECRET = b"content of a file that the host must not see"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    with attached_pack(tmp_path_factory.mktemp("pack"), 1) as pack:
        yield pack


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    with pool_disks(tmp_path / "disks") as disks:
        yield disks


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """An empty directory, for a mount of the test's own."""
    (tmp_path / "more").mkdir()
    return tmp_path / "more"


@pytest.fixture
def bed(tmp_path: Path, disks: Disks, pack: Pack) -> Iterator[ThinBed]:
    with ThinBed(tmp_path / "state") as bed:
        with bed.operation() as op:
            bed.engine.layers.mount(pack.spec(0), op)
        yield bed


def mount(bed: ThinBed, name: str = "o", *, encrypted: bool = False) -> OverlayReport:
    scratch = SCRATCH.replace(encrypted=encrypted)
    with bed.operation() as op:
        return bed.engine.overlays.mount(overlay(name, "layer0", scratch=scratch), op)


def findings(bed: ThinBed) -> tuple[Finding, ...]:
    """Return what the agent has that nothing accounts for."""
    engine = bed.engine
    with bed.operation() as op:
        return Reconciliation(engine.state, engine.layers, engine.overlays).look(op)


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


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_encrypted_scratch_goes_with_its_key(bed: ThinBed, tmp_path: Path, filesystem: str) -> None:
    is_large = filesystem == "xfs"
    scratch = SCRATCH.replace(encrypted=True, filesystem=filesystem)
    scratch = scratch.replace(size_bytes=320 * MIB if is_large else SCRATCH.size_bytes)
    with pool_disks(tmp_path / "more", data_bytes=512 * MIB if is_large else 64 * MIB) as disks:
        bed.open(disks.spec())
        with bed.operation() as op:
            report = bed.engine.overlays.mount(overlay("o", "layer0", scratch=scratch), op)
        assert report.scratch is not None
        (device,) = report.scratch.dm
        assert (device.target_type, device.deferred_remove) == ("crypt", True)
        under = bed.engine.state.control.info(f"thin-{POOL}-{bed.get('o').device_id}")
        assert under.deferred_remove
        table = (
            f"0 {scratch.size_bytes // 512} crypt aes-xts-plain64 "
            f":64:logon:guestagent:{device.name} 0 {under.dev} 0 1 allow_discards"
        )
        assert run("dmsetup", "table", "--showkeys", device.name).strip() == table
        assert device.table == table
        assert "guestagent" not in Path("/proc/keys").read_text()
        assert bed.get("o").mounts == (report.scratch.path,)
        Path(report.target, "new").write_bytes(SECRET * 1000)
        unmount(bed)
        assert bed.volumes() == {}
        assert "crypt" not in run("dmsetup", "ls")
        assert bed.engine.problems() == ()
        bed.close()
        assert disks.thin_ids() == [0]
        disks.thin_check()
        content = disks.data_file.read_bytes()
    assert SECRET not in content
    assert b"upper" not in content


def test_encrypted_scratch_gives_space_back_to_the_pool(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    report = mount(bed, encrypted=True)
    new = Path(report.target, "new")
    new.write_bytes(b"x" * 4 * MIB)
    os.sync()
    before = bed.status().data.used_bytes
    new.unlink()
    os.sync()
    with bed.operation() as op:
        assert bed.engine.overlays.trim("o", op).trimmed_bytes >= 4 * MIB
    assert bed.status().data.used_bytes <= before - 3 * MIB
    unmount(bed)


def test_encrypted_scratch_outlives_the_agent(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    report = mount(bed, encrypted=True)
    Path(report.target, "new").write_bytes(b"kept")
    assert findings(bed) == ()
    bed.reopen()
    assert bed.engine.problems() == ()
    assert findings(bed) == ()
    (again,) = bed.engine.overlays.list()
    assert again.scratch is not None
    assert report.scratch is not None
    assert again.scratch.dm == report.scratch.dm
    assert Path(report.target, "new").read_bytes() == b"kept"
    with bed.operation() as op:
        bed.engine.unmount_everything(op, force=False)
    assert bed.thin.pools.all() == ()
    assert "crypt" not in run("dmsetup", "ls")
    bed.open(disks.matching())
    assert bed.volumes() == {}


def test_encrypted_scratch_that_is_being_made_is_no_orphan(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    seen: list[tuple[str, tuple[Finding, ...]]] = []

    def look_at(step: str, *_: object) -> None:
        bed.engine.on_step = None  # the steps of the look are not looked at
        if step in ("format", "journal") and "crypt" in run("dmsetup", "ls"):
            seen.append((step, findings(bed)))

    bed.engine.on_step = look_at
    mount(bed, encrypted=True)
    assert seen == [("format", ()), ("journal", ())]
    unmount(bed)


def test_encrypted_scratch_is_unmounted_with_its_overlay_alone(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    report = mount(bed, encrypted=True)
    before = look(bed)
    error = outcome(lambda: grow_volume(bed, "o"))
    assert error is not None
    assert error.code == "unsupported"
    error = outcome(lambda: bed.unmount("o", "overlay.o"))
    assert error is not None
    assert error.code == "busy"
    assert look(bed) == before
    with Path(report.target, "new").open("wb") as file:
        error = outcome(lambda: unmount(bed))
        assert error is not None
        assert error.code == "busy"
        file.write(b"x")
    assert look(bed) == before
    unmount(bed)
    assert bed.volumes() == {}


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("kind", FAILURES)
def test_mount_that_fails_at_any_step_leaves_nothing(
    bed: ThinBed, disks: Disks, encrypted: bool, kind: str
) -> None:
    bed.open(disks.spec())
    before = look(bed)
    for step in range(1, MAX_STEPS):
        bed.faults.arm(f"#{step}:{kind}")
        error = outcome(lambda: mount(bed, encrypted=encrypted))
        bed.faults.arm("")
        if error is None:
            break
        assert kind != "LATE" or error.code == "timeout", error
        assert "not undone" not in (error.hint or ""), error.hint
        can_write(bed)
        assert look(bed) == before, f"step {step}"
    assert step > 15
    assert bed.engine.problems() == ()
    unmount(bed)


@pytest.mark.parametrize("kind", FAILURES)
def test_unmount_of_an_encrypted_scratch_that_fails_at_any_step(
    bed: ThinBed, disks: Disks, more: Path, kind: str
) -> None:
    """It stays mounted with its content, or it is gone for good."""
    bed.open(disks.spec())
    for step in range(1, MAX_STEPS):
        run("mount", "-t", "tmpfs", "lower", str(more))
        report = mount(bed, encrypted=True)
        run("umount", str(more))  # what is mounted again takes this number
        new = Path(report.target, "new")
        new.write_bytes(b"kept")
        struck = bed.faults.struck
        bed.faults.arm(f"#{step}:{kind}")
        error = outcome(lambda: unmount(bed))
        bed.faults.arm("")
        struck = bed.faults.struck - struck
        if error is not None:
            assert kind != "LATE" or error.code == "timeout", error
            assert "not undone" not in (error.hint or ""), error.hint
            assert new.read_bytes() == b"kept", f"step {step}"
            with bed.operation() as op:
                bed.thin.mounts.trim(VolumeTrim(pool_id=POOL, volume_id="o"), op)
            unmount(bed)
        bed.reopen()
        assert bed.volumes() == {}, f"step {step}"
        assert "crypt" not in run("dmsetup", "ls")
        can_write(bed)
        if not struck:
            assert step > 5
            return
    raise AssertionError("the request never ends")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("request_name", ["mount", "unmount"])
def test_agent_that_is_killed_at_any_step(
    bed: ThinBed, disks: Disks, request_name: str, encrypted: bool
) -> None:
    def work(bed: ThinBed) -> None:
        if request_name == "unmount":
            unmount(bed)
        else:
            mount(bed, encrypted=encrypted)

    bed.open(disks.spec())
    for step in range(1, MAX_STEPS):
        if request_name == "unmount":
            mount(bed, encrypted=encrypted)
        bed.engine.close()
        died = die_in(bed.directory, work, step)
        bed.reopen()
        assert bed.engine.problems() == ()
        mounted = [each.overlay_id for each in bed.engine.overlays.list()]
        unmount(bed)
        assert bed.volumes() == {}, f"step {step}, {mounted}"
        assert "crypt" not in run("dmsetup", "ls")
        can_write(bed)
        if not died:
            return
    raise AssertionError("the request never ends")
