"""Requests for pools and volumes that fail at any step, or whose agent is killed at any step."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestagent.api.devices import PathDevice
from guestagent.api.thin import VolumeGrow, VolumeTrim
from tests.beds.dmbed import run
from tests.beds.thinbed import MIB, POOL, Disks, ThinBed, disk, pool_disks
from tests.kernel.test_engine_transactions import FAILURES
from vsock.errors import CallError

Request = Callable[[ThinBed, Disks, str], object]
MAX_STEPS = 60


def grow_volume(bed: ThinBed, volume_id: str) -> object:
    request = VolumeGrow(pool_id=POOL, volume_id=volume_id, size_bytes=48 * MIB)
    with bed.operation() as op:
        return bed.thin.volumes.grow(request, op)


def trim_volume(bed: ThinBed) -> object:
    with bed.operation() as op:
        return bed.thin.mounts.trim(VolumeTrim(pool_id=POOL, volume_id="a"), op)


def nothing(bed: ThinBed, disks: Disks, more: str) -> None:
    pass


def open_pool(bed: ThinBed, disks: Disks, more: str) -> None:
    bed.open(disks.matching())


def make(bed: ThinBed, disks: Disks, more: str) -> None:
    open_pool(bed, disks, more)
    bed.create("a")


def make_and_mount(bed: ThinBed, disks: Disks, more: str) -> None:
    make(bed, disks, more)
    bed.mount("a")
    Path("/run/volumes/a/x").write_bytes(b"content")


#: Name -> what is done before, what is killed or fails, and the volumes there are after it.
REQUESTS: dict[str, tuple[Request, Request, tuple[str, ...]]] = {
    "open": (nothing, open_pool, ()),
    "create": (open_pool, lambda bed, disks, more: bed.create("a"), ("a",)),
    "snapshot": (make, lambda bed, disks, more: bed.snapshot("b", "a"), ("a", "b")),
    "snapshot of a mounted volume": (
        make_and_mount,
        lambda bed, disks, more: bed.snapshot("b", "a"),
        ("a", "b"),
    ),
    "mount": (make, lambda bed, disks, more: bed.mount("a", rootfs=True), ("a",)),
    "unmount": (make_and_mount, lambda bed, disks, more: bed.unmount("a"), ("a",)),
    "delete": (make, lambda bed, disks, more: bed.delete("a"), ()),
    "deferred delete": (
        make_and_mount,
        lambda bed, disks, more: bed.delete("a", deferred=True),
        ("a",),
    ),
    "grow a volume": (make_and_mount, lambda bed, disks, more: grow_volume(bed, "a"), ("a",)),
    "trim": (make_and_mount, lambda bed, disks, more: trim_volume(bed), ("a",)),
    "grow a pool": (
        make_and_mount,
        lambda bed, disks, more: bed.grow_pool(data_device=PathDevice(path=more)),
        ("a",),
    ),
    "close": (make, lambda bed, disks, more: bed.close(), ()),
}


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    with pool_disks(tmp_path / "disks") as disks:
        yield disks


@pytest.fixture
def more(tmp_path: Path) -> Iterator[str]:
    with disk(tmp_path / "more.img", 32 * MIB) as node:
        yield node


def look(bed: ThinBed) -> dict[str, object]:
    """Return what there is of pools and volumes, by the agent and by the kernel."""
    found: dict[str, object] = {
        "devices": sorted(name for name, _, _ in bed.engine.state.control.list_devices()),
        "mounts": sorted(line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()),
        "files": sorted(str(path) for path in Path("/run").glob("volumes/*")),
    }
    if not bed.thin.pools.all():
        return found
    seen = bed.thin.pools.all()[0].see()
    assert seen is not None
    volumes = {
        name: (each.device_id, each.size_bytes, each.holders, each.deleting)
        for name, each in bed.volumes().items()
    }
    status = bed.status()
    found |= {
        "ids": sorted(seen.devices),
        "volumes": volumes,
        "pool": (status.mode, status.data.total_bytes, status.foreign_ids),
    }
    assert sorted(seen.devices) == [0, *sorted(each[0] for each in volumes.values())]
    return found


def outcome(ask: Callable[[], object]) -> CallError | None:
    try:
        ask()
    except CallError as error:
        return error
    return None


def can_write(bed: ThinBed) -> None:
    """See that no device is left suspended."""
    control = bed.engine.state.control
    names = [name for name, _, _ in control.list_devices()]
    assert [name for name in names if control.info(name).suspended] == []


def finish(bed: ThinBed, disks: Disks, volumes: tuple[str, ...]) -> None:
    """See that the volumes are as they should be, and the disks sound."""
    if bed.thin.pools.all():
        assert tuple(sorted(bed.volumes())) == volumes
        for name, each in bed.volumes().items():
            for holder in each.holders:
                bed.unmount(name, holder)
        count = len(bed.volumes())
        bed.close()
        assert len(disks.thin_ids()) == count + 1
    disks.thin_check()


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("kind", FAILURES)
def test_request_that_fails_at_any_step_changes_nothing(
    tmp_path: Path, disks: Disks, more: str, name: str, kind: str
) -> None:
    prepare, request, volumes = REQUESTS[name]
    with ThinBed(tmp_path / "state") as bed:
        prepare(bed, disks, more)
        before = look(bed)
        for step in range(1, MAX_STEPS):
            bed.faults.arm(f"#{step}:{kind}")
            error = outcome(lambda: request(bed, disks, more))
            bed.faults.arm("")
            if error is None:
                break
            assert error.step
            assert kind != "LATE" or error.code == "timeout", error
            assert "not undone" not in (error.hint or ""), error.hint
            can_write(bed)
            if name == "close" and error.step == "commit":  # the devices are gone
                continue
            now = look(bed)
            if name == "delete" and now != before:  # there is no way back
                assert now["volumes"] == {}
                bed.create("a")
                before = look(bed)
            elif name == "grow a volume" and error.step == "thin-grow":  # nor from this
                assert bed.volumes()["a"].size_bytes == 48 * MIB
            else:
                assert now == before, f"step {step}"
        else:
            raise AssertionError("the request never succeeds")
        assert step > 1
        assert bed.engine.problems() == ()
        finish(bed, disks, volumes)


def die_in(directory: Path, work: Callable[[ThinBed], object], step: int) -> bool:
    """Do ``work`` in a child that dies at its ``step``-th step; return whether it did."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            bed = ThinBed(directory)
            bed.faults.arm(f"#{step}:KILL")
            work(bed)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", REQUESTS)
def test_agent_that_is_killed_at_any_step(
    tmp_path: Path, disks: Disks, more: str, name: str
) -> None:
    """The next one has the state from before or from after, and the request then succeeds."""
    prepare, request, volumes = REQUESTS[name]
    directory = tmp_path / "state"
    after: dict[str, object] = {}
    for step in range(1, MAX_STEPS):
        with ThinBed(directory) as bed:
            prepare(bed, disks, more)
            before = look(bed)
            bed.engine.close()
            died = die_in(directory, lambda bed: request(bed, disks, more), step)
            bed.reopen()
            assert bed.engine.problems() == ()
            can_write(bed)
            now = look(bed)
            if now != before:
                after = after or now
                assert now.get("volumes") == after.get("volumes"), f"step {step}"
            request(bed, disks, more)
            assert bed.engine.problems() == ()
            finish(bed, disks, volumes)
        disks.blank()
        Path(more).write_bytes(bytes(131072))
        if not died:
            return
    raise AssertionError("the request never ends")


def power_cut() -> None:
    """Take away what a machine that ends takes away: all but what is on the disks."""
    names = [line.split()[0] for line in run("dmsetup", "ls").splitlines()]
    for name in names:
        run("dmsetup", "resume", name)
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[1].startswith("/run/volumes/"):
            run("umount", line.split()[1])
    names = [line.split()[0] for line in run("dmsetup", "ls").splitlines()]
    last = {"thin-p-pool": 1, "thin-p-data": 2}
    for name in sorted(names, key=lambda name: last.get(name, 0)):
        if name.startswith("thin-p-"):
            run("dmsetup", "remove", "--deferred", name)
    for path in ("/run/volumes/a", "/run/volumes"):
        if os.path.isdir(path):
            os.rmdir(path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["create", "snapshot of a mounted volume", "delete"])
def test_machine_that_ends_at_any_step(tmp_path: Path, disks: Disks, more: str, name: str) -> None:
    """The journal is gone with it; the pool's own disks tell a later one how far it was."""
    prepare, request, volumes = REQUESTS[name]
    for step in range(1, MAX_STEPS):
        first = ThinBed(tmp_path / f"state{step}")
        prepare(first, disks, more)
        before = tuple(first.volumes())
        first.engine.close()
        died = die_in(tmp_path / f"state{step}", lambda bed: request(bed, disks, more), step)
        power_cut()
        with ThinBed(tmp_path / f"later{step}") as later:
            report = later.open(disks.matching())
            assert (report.mode, report.foreign_ids) == ("rw", ())
            assert tuple(later.volumes()) in (before, volumes), f"step {step}"
            request(later, disks, more)
            if name.startswith("snapshot"):
                later.mount("b")
                assert Path("/run/volumes/b/x").read_bytes() == b"content"
                later.unmount("b")
            finish(later, disks, volumes)
        disks.blank()
        if not died:
            return
    raise AssertionError("the request never ends")


def test_deletion_that_waited_is_done_by_a_later_machine(tmp_path: Path, disks: Disks) -> None:
    bed = ThinBed(tmp_path / "state")
    make_and_mount(bed, disks, "")
    bed.delete("a", deferred=True)
    bed.engine.close()
    power_cut()
    with ThinBed(tmp_path / "later") as later:
        later.open(disks.matching())
        until = time.monotonic() + 20
        while later.volumes() and time.monotonic() < until:
            time.sleep(0.01)
        assert later.volumes() == {}
        later.close()
    assert disks.thin_ids() == [0]
