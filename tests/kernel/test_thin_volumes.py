"""Volumes: made, mounted, shared by holders, grown, trimmed and deleted; what Docker's driver did,
and what it did wrong."""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestagent.api.devices import PathDevice
from guestagent.api.thin import VolumeGrow, VolumeTrim
from guestagent.storage.devicemapper.thin import DEVICE_ID_MAX
from tests.beds.dmbed import dev_of, loop_device, run
from tests.beds.thinbed import MIB, POOL, Disks, ThinBed, pool_disks
from vsock.errors import CallError


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    with pool_disks(tmp_path / "disks") as disks:
        yield disks


@pytest.fixture
def bed(tmp_path: Path, disks: Disks) -> Iterator[ThinBed]:
    with ThinBed(tmp_path / "state") as bed:
        bed.open(disks.spec())
        yield bed


def refusal(ask: Callable[[], Any]) -> CallError:
    with pytest.raises(CallError) as caught:
        ask()
    return caught.value


def grow(bed: ThinBed, volume_id: str, size_bytes: int) -> Any:
    with bed.operation() as op:
        request = VolumeGrow(pool_id=POOL, volume_id=volume_id, size_bytes=size_bytes)
        return bed.thin.volumes.grow(request, op)


def trim(bed: ThinBed, volume_id: str) -> Any:
    with bed.operation() as op:
        return bed.thin.mounts.trim(VolumeTrim(pool_id=POOL, volume_id=volume_id), op)


def devices() -> list[str]:
    return sorted(line.split()[0] for line in run("dmsetup", "ls").splitlines())


def test_volume_is_made_and_described(bed: ThinBed, disks: Disks) -> None:
    made = bed.create("a")
    assert (made.device_id, made.size_bytes, made.sectors) == (1, 16 * MIB, 32768)
    assert (made.transaction_id, made.filesystem, made.origin) == (1, "ext4", None)
    assert made.mapped_sectors
    assert made.highest_mapped_sector
    assert set(made.timings_ms) >= {"thin-begin", "thin-message", "format", "thin-commit"}
    assert bed.create("a").already
    # reading has not activated it
    assert not bed.get("a").active
    assert devices() == ["thin-p-0", "thin-p-data", "thin-p-pool"]
    assert bed.status().transaction_id == 1
    error = refusal(lambda: bed.create("a", 32 * MIB))
    assert (error.code, "is another" in error.message) == ("conflict", True)
    assert refusal(lambda: bed.get("b")).code == "not_found"
    bed.close()
    disks.thin_check()


def test_what_is_told_unread_is_what_the_kernel_tells_of_an_active_volume(bed: ThinBed) -> None:
    bed.create("a")
    told = bed.get("a")
    bed.mount("a")
    active = bed.get("a")
    words = run("dmsetup", "status", "thin-p-1").split()
    assert words[3:] == [str(active.mapped_sectors), str(active.highest_mapped_sector)]
    assert (active.active, active.open_count, active.mounts) == (True, 1, ("/run/volumes/a",))
    assert active.holders == ("default",)
    # an ext4 that was mounted has written little
    assert told.mapped_sectors is not None
    assert active.mapped_sectors is not None
    assert told.mapped_sectors <= active.mapped_sectors


def test_blank_volume(bed: ThinBed) -> None:
    made = bed.create("a", filesystem=None)
    assert (made.mapped_sectors, made.highest_mapped_sector) == (0, None)
    error = refusal(lambda: bed.mount("a"))
    assert (error.code, "no file system" in error.message) == ("invalid", True)


def test_snapshot_of_an_inactive_volume(bed: ThinBed) -> None:
    bed.create("a")
    bed.mount("a")
    Path("/run/volumes/a/x").write_bytes(b"first")
    bed.unmount("a")
    made = bed.snapshot("b", "a")
    assert (made.origin, made.device_id, made.size_bytes) == ("a", 2, 16 * MIB)
    bed.mount("a")
    bed.mount("b")
    Path("/run/volumes/a/x").write_bytes(b"second")
    assert Path("/run/volumes/b/x").read_bytes() == b"first"
    assert bed.snapshot("b", "a").already
    # the origin can go, the snapshot stays
    bed.unmount("a")
    assert bed.delete("a").deleted
    assert Path("/run/volumes/b/x").read_bytes() == b"first"


def test_snapshot_of_a_mounted_volume_is_consistent(bed: ThinBed) -> None:
    bed.create("a")
    bed.mount("a")
    Path("/run/volumes/a/x").write_bytes(b"not synced by anybody" * 1000)
    bed.snapshot("b", "a", size_bytes=32 * MIB)
    Path("/run/volumes/a/y").write_bytes(b"goes on")
    bed.mount("b")
    assert Path("/run/volumes/b/x").read_bytes() == b"not synced by anybody" * 1000
    assert not Path("/run/volumes/b/y").exists()
    space = os.statvfs("/run/volumes/b")
    assert space.f_blocks * space.f_frsize > 24 * MIB
    assert "ACTIVE" in run("dmsetup", "info", "thin-p-1")


def test_origin_goes_on_whatever_becomes_of_its_snapshot(bed: ThinBed) -> None:
    bed.create("a")
    bed.mount("a")
    for step in ("thin-begin", "thin-message", "thin-record", "thin-commit"):
        bed.faults.arm(f"{step}:EIO")
        refusal(lambda: bed.snapshot("b", "a"))
        bed.faults.arm("")
        Path("/run/volumes/a/x").write_bytes(step.encode())
        os.sync()
    assert refusal(lambda: bed.get("b")).code == "not_found"


def test_snapshot_of_what_is_not_there(bed: ThinBed) -> None:
    assert refusal(lambda: bed.snapshot("b", "a")).code == "not_found"
    bed.create("a")
    error = refusal(lambda: bed.snapshot("b", "a", size_bytes=8 * MIB))
    assert (error.code, error.object) == ("invalid", "params.size_bytes")


def test_delete(bed: ThinBed, disks: Disks) -> None:
    bed.create("first", filesystem=None)  # both slots of the records have been written then
    bed.delete("first")
    used = bed.status().data.used_bytes
    bed.create("a")
    assert bed.status().data.used_bytes > used
    assert bed.delete("a").deleted
    assert bed.delete("a").already
    assert bed.status().data.used_bytes == used
    bed.close()
    assert disks.thin_ids() == [0]
    disks.thin_check()


def test_delete_of_a_mounted_volume(bed: ThinBed) -> None:
    bed.create("a")
    bed.mount("a", holder="h1")
    error = refusal(lambda: bed.delete("a"))
    assert (error.code, "h1" in (error.hint or "")) == ("busy", True)
    reply = bed.delete("a", deferred=True)
    assert (reply.deleted, reply.deferred) == (False, True)
    assert bed.status().deleting == ("a",)
    assert bed.get("a").deleting
    for ask in (lambda: bed.create("a"), lambda: bed.mount("a", holder="h2")):
        assert refusal(ask).code == "conflict"
    assert refusal(lambda: bed.snapshot("b", "a")).code == "not_found"
    bed.reopen()
    assert bed.status().deleting == ("a",)
    reply = bed.unmount("a", "h1")
    assert (reply.unmounted, reply.deleted) == ("/run/volumes/a", True)
    assert bed.status().deleting == ()


def test_mount_is_counted_by_holder(bed: ThinBed) -> None:
    bed.create("a")
    first = bed.mount("a", holder="h1")
    assert (first.already, first.holders, first.root) == (False, ("h1",), "/run/volumes/a")
    assert bed.mount("a", holder="h1").already
    again = bed.mount("a", holder="h2")
    assert (again.already, again.holders) == (False, ("h1", "h2"))
    error = refusal(lambda: bed.mount("a", "/run/volumes/elsewhere", holder="h1"))
    assert (error.code, "/run/volumes/a" in error.message) == ("conflict", True)
    # a Put without a Get changes nothing
    reply = bed.unmount("a", "h3")
    assert (reply.already, reply.holders, reply.unmounted) == (True, ("h1", "h2"), "")
    assert bed.unmount("a", "h1").holders == ("h2",)
    assert bed.unmount("a", "h1").already
    assert os.path.ismount("/run/volumes/a")
    reply = bed.unmount("a", "h2")
    assert (reply.unmounted, reply.holders) == ("/run/volumes/a", ())
    assert not os.path.exists("/run/volumes")
    assert devices() == ["thin-p-0", "thin-p-data", "thin-p-pool"]
    assert bed.unmount("a", "h2").already


def test_second_mount_has_the_same_root(bed: ThinBed) -> None:
    """One version of Docker's driver returned another directory the second time."""
    bed.create("a")
    first = bed.mount("a", holder="h1", rootfs=True)
    assert first.root == "/run/volumes/a/rootfs"
    assert bed.mount("a", holder="h2", rootfs=True).root == first.root
    assert Path("/run/volumes/a/id").read_bytes() == b"a\n"
    assert os.stat("/run/volumes/a/id").st_mode & 0o777 == 0o600
    assert refusal(lambda: bed.mount("a", holder="h3")).code == "conflict"


def test_mount_that_another_program_undid(bed: ThinBed) -> None:
    bed.create("a")
    bed.mount("a", holder="h1")
    run("umount", "/run/volumes/a")
    error = refusal(lambda: bed.mount("a", holder="h2"))
    assert error.code in ("conflict", "mount")
    reply = bed.unmount("a", "h1")
    assert (reply.unmounted, reply.already) == ("", False)
    assert not bed.mount("a", holder="h2").already


def test_unmount_of_a_volume_in_use(bed: ThinBed) -> None:
    bed.create("a")
    bed.mount("a")
    with open("/run/volumes/a/x", "wb"):
        error = refusal(lambda: bed.unmount("a"))
        assert (error.code, "pid" in str(error.hint) or "process" in str(error.hint)) == (
            "busy",
            True,
        )
        assert bed.get("a").holders == ("default",)
    assert bed.unmount("a").unmounted


def test_mounts_outlive_the_agent(bed: ThinBed) -> None:
    bed.create("a")
    bed.create("b")
    bed.mount("a", holder="h1")
    bed.mount("a", holder="h2")
    bed.mount("b")
    run("umount", "/run/volumes/b")
    bed.reopen()
    assert bed.engine.problems() == ()
    assert bed.get("a").holders == ("h1", "h2")
    assert bed.get("b").holders == ()
    error = refusal(lambda: bed.close())
    assert (error.code, "h1, h2" in (error.hint or "")) == ("busy", True)
    bed.unmount("a", "h1")
    bed.unmount("a", "h2")
    bed.close()


def test_grow_of_a_mounted_volume(bed: ThinBed) -> None:
    bed.create("a")
    bed.mount("a")
    report = grow(bed, "a", 48 * MIB)
    assert (report.size_bytes, report.already) == (48 * MIB, False)
    space = os.statvfs("/run/volumes/a")
    assert space.f_blocks * space.f_frsize > 40 * MIB
    assert grow(bed, "a", 48 * MIB).already
    error = refusal(lambda: grow(bed, "a", 16 * MIB))
    assert (error.code, error.object) == ("invalid", "params.size_bytes")
    bed.unmount("a")
    run("dmsetup", "create", "judge", "--table", f"0 {48 * 2048} thin {_pool_dev()} 1")
    try:
        run("e2fsck", "-fn", _node("judge"))
    finally:
        run("dmsetup", "remove", "judge")


def _pool_dev() -> str:
    return dev_of(_node("thin-p-pool"))


def test_grow_of_an_unmounted_volume_is_seen_at_its_mount(bed: ThinBed) -> None:
    bed.create("a")
    grow(bed, "a", 48 * MIB)
    bed.mount("a")
    space = os.statvfs("/run/volumes/a")
    assert space.f_blocks * space.f_frsize > 40 * MIB


def test_trim_gives_space_back(bed: ThinBed) -> None:
    bed.create("a", 32 * MIB)
    assert refusal(lambda: trim(bed, "a")).code == "invalid"
    bed.mount("a")
    file = Path("/run/volumes/a/x")
    file.write_bytes(os.urandom(8 * MIB))
    os.sync()
    used = bed.status().data.used_bytes
    file.unlink()
    reply = trim(bed, "a")
    assert reply.trimmed_bytes >= 8 * MIB
    assert reply.freed_bytes >= 7 * MIB
    assert bed.status().data.used_bytes <= used - 7 * MIB


def test_ids_end_at_24_bits_and_begin_again(bed: ThinBed, disks: Disks) -> None:
    pool = bed.thin.pools.all()[0]
    pool.write(pool.records.replace(next_device_id=DEVICE_ID_MAX))
    assert bed.create("a", filesystem=None).device_id == DEVICE_ID_MAX
    assert bed.create("b", filesystem=None).device_id == 1
    bed.reopen()
    assert bed.create("c", filesystem=None).device_id == 2
    bed.close()
    assert disks.thin_ids() == [0, 1, 2, DEVICE_ID_MAX]


def test_pool_that_is_full_fails_writes_and_hangs_none(bed: ThinBed) -> None:
    bed.create("a", 256 * MIB)
    bed.mount("a")
    with pytest.raises(OSError, match=r"No space|Input/output") as caught:
        _fill("/run/volumes/a/x", 80 * MIB)
    assert caught.value.errno in (errno.ENOSPC, errno.EIO)
    report = bed.status()
    assert report.mode == "out_of_data_space"
    error = refusal(lambda: bed.create("b"))
    assert (error.code, "grow" in (error.hint or "")) == ("resource", True)
    assert refusal(lambda: bed.snapshot("b", "a")).code == "resource"
    bed.unmount("a")
    assert bed.delete("a").deleted
    assert bed.status().mode == "rw"
    assert not bed.create("b").already


def _fill(path: str, size_bytes: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for _ in range(size_bytes // MIB):
            os.write(fd, os.urandom(MIB))
            os.fsync(fd)
    finally:
        os.close(fd)


def test_least_free_share_is_kept(bed: ThinBed, disks: Disks, tmp_path: Path) -> None:
    bed.create("a", 128 * MIB)
    bed.mount("a")
    _fill("/run/volumes/a/x", 60 * MIB - bed.status().data.used_bytes)
    assert bed.status().mode == "rw"
    error = refusal(lambda: bed.create("b"))
    assert (error.code, error.errno) == ("resource", errno.ENOSPC)
    assert "less than 10 percent" in error.message
    assert refusal(lambda: bed.snapshot("b", "a")).code == "resource"


@pytest.mark.parametrize("size_bytes", [1 << 55, 1 << 62])
def test_size_that_no_file_system_has(bed: ThinBed, disks: Disks, size_bytes: int) -> None:
    with bed.operation(seconds=5) as op:
        from guestagent.api.thin import VolumeCreate

        request = VolumeCreate(pool_id=POOL, volume_id="a", size_bytes=size_bytes)
        error = refusal(lambda: bed.thin.volumes.create(request, op))
    assert error.code in ("device", "resource", "timeout", "invalid")
    assert bed.volumes() == {}
    assert bed.status().data.used_bytes <= 2 * 65536
    bed.close()
    assert disks.thin_ids() == [0]


def test_volume_over_a_read_only_disk(bed: ThinBed, tmp_path: Path) -> None:
    image = tmp_path / "origin.img"
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "x").write_bytes(b"from the origin")
    image.touch()
    os.truncate(image, 8 * MIB)
    run("mkfs.ext4", "-q", "-d", tree, image)
    with loop_device(image) as node:
        origin = PathDevice(path=node)
        assert refusal(lambda: bed.create("o", 4 * MIB, origin=origin)).code == "invalid"
        error = refusal(lambda: bed.create("o", origin=origin, filesystem="xfs"))
        assert "holds ext4" in error.message
        held = tmp_path / "held"
        held.mkdir()
        run("mount", "-o", "ro,noload", node, held)
        error = refusal(lambda: bed.create("o", origin=origin))
        assert (error.code, error.errno) == ("busy", errno.EBUSY), str(error)
        assert bed.volumes() == {}
        run("umount", held)
        made = bed.create("o", origin=origin)
        assert (made.mapped_sectors, made.external_origin) == (0, f"block device {node!r}")
        bed.mount("o")
        assert Path("/run/volumes/o/x").read_bytes() == b"from the origin"
        Path("/run/volumes/o/x").write_bytes(b"changed")
        bed.snapshot("s", "o")
        bed.mount("s")
        assert Path("/run/volumes/s/x").read_bytes() == b"changed"
        bed.unmount("o")
        bed.unmount("s")
    with loop_device(image, readonly=False) as node:
        error = refusal(lambda: bed.create("w", origin=PathDevice(path=node)))
        assert (error.code, "not read-only" in error.message) == ("invalid", True)


def test_volume_over_blocks_of_4_kib_is_refused(bed: ThinBed, tmp_path: Path) -> None:
    """As a dm-verity device has: a volume on it could be made, and not be mounted."""
    image = tmp_path / "origin.img"
    image.touch()
    os.truncate(image, 8 * MIB)
    run("mkfs.ext4", "-q", image)
    node = run("losetup", "--show", "-f", "-r", "-b", "4096", image).strip()
    try:
        error = refusal(lambda: bed.create("o", origin=PathDevice(path=node)))
    finally:
        run("losetup", "-d", node)
    assert (error.code, "overlay" in (error.hint or "")) == ("unsupported", True)


def test_data_disk_that_fails(tmp_path: Path) -> None:
    """The disk goes away under a mounted volume: errors, no hang, and everything can be closed."""
    with pool_disks(tmp_path / "disks") as disks, ThinBed(tmp_path / "state") as bed:
        size = 64 * MIB // 512
        run("dmsetup", "create", "frail", "--table", f"0 {size} linear {disks.data} 0")
        try:
            bed.open(disks.spec(data_device=PathDevice(path=_node("frail"))))
            bed.create("a")
            bed.create("b")
            bed.mount("a")
            run("dmsetup", "suspend", "--noflush", "frail")
            run("dmsetup", "load", "frail", "--table", f"0 {size} error")
            run("dmsetup", "resume", "frail")
            error = refusal(lambda: bed.create("c"))
            assert (error.code, error.errno) == ("device", errno.EIO)
            error = refusal(lambda: bed.delete("b"))
            assert (error.code, error.errno) == ("device", errno.EIO)
            with pytest.raises(OSError, match=r"Input/output|Read-only"):
                _fill("/run/volumes/a/x", MIB)
            bed.unmount("a")
            bed.close()
        finally:
            run("dmsetup", "remove", "frail")


def _node(name: str) -> str:
    return "/dev/" + run("dmsetup", "info", "-c", "--noheadings", "-o", "blkdevname", name).strip()


def test_metadata_disk_that_fails(tmp_path: Path) -> None:
    with pool_disks(tmp_path / "disks") as disks, ThinBed(tmp_path / "state") as bed:
        size = 4 * MIB // 512
        run("dmsetup", "create", "frail", "--table", f"0 {size} linear {disks.metadata} 0")
        try:
            bed.open(disks.spec(metadata_device=PathDevice(path=_node("frail"))))
            bed.create("a")
            run("dmsetup", "suspend", "--noflush", "frail")
            run("dmsetup", "load", "frail", "--table", f"0 {size} error")
            run("dmsetup", "resume", "frail")
            refusal(lambda: bed.create("c"))
            assert bed.status().mode in ("ro", "failed")
            assert bed.status().needs_check or bed.status().mode == "failed"
            assert refusal(lambda: bed.create("c")).code in ("resource", "device")
            bed.close()
            run("dmsetup", "suspend", "--noflush", "frail")
            run("dmsetup", "load", "frail", "--table", f"0 {size} linear {disks.metadata} 0")
            run("dmsetup", "resume", "frail")
            metadata = PathDevice(path=_node("frail"))
            report = bed.open(disks.matching(metadata_device=metadata))
            assert (report.mode, report.volumes) == ("rw", 1)
            bed.close()
        finally:
            run("dmsetup", "remove", "frail")
        disks.thin_check()


def test_requests_at_once_on_one_pool(bed: ThinBed, disks: Disks) -> None:
    """Volumes come and go on several threads, some deleted while they are mounted."""
    bed.create("base")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        name = f"v{number}"
        try:
            for turn in range(4):
                bed.snapshot(name, "base")
                bed.mount(name)
                Path(f"/run/volumes/{name}/x").write_bytes(name.encode())
                if turn % 2:
                    assert bed.delete(name, deferred=True).deferred
                    assert bed.unmount(name).deleted
                else:
                    bed.unmount(name)
                    assert bed.delete(name).deleted
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert list(bed.volumes()) == ["base"]
    assert bed.engine.problems() == ()
    bed.close()
    assert disks.thin_ids() == [0, 1]
    disks.thin_check()


def kinds(bed: ThinBed, *wanted: str) -> list[str]:
    events, _ = bed.engine.events.since(0)
    return [event.kind for event in events if event.kind in wanted]


def await_event(bed: ThinBed, kind: str, seconds: float = 20.0) -> None:
    came = threading.Event()
    stop = bed.engine.events.listen(lambda event: came.set() if event.kind == kind else None)
    try:
        assert kinds(bed, kind) or came.wait(seconds), f"no event {kind}"
    finally:
        stop()


def test_pool_tells_when_space_becomes_tight(bed: ThinBed) -> None:
    bed.create("a", 256 * MIB)
    bed.mount("a")
    with pytest.raises(OSError, match=r"No space|Input/output"):
        _fill("/run/volumes/a/x", 80 * MIB)
    await_event(bed, "pool_low_space")
    await_event(bed, "pool_out_of_space")
    assert "pool 'p' is out_of_data_space" in bed.engine.problems()
    bed.unmount("a")
    bed.delete("a")
    assert bed.status().mode == "rw"
    await_event(bed, "pool_recovered")
    assert bed.engine.problems() == ()


def test_volume_that_another_program_lets_go_is_deleted_then(bed: ThinBed) -> None:
    """No request comes: the kernel's event is what deletes it, also for the next agent."""
    for name in ("a", "b"):
        bed.create(name)
        bed.mount(name)
        assert bed.delete(name, deferred=True).deferred
    run("umount", "/run/volumes/a")
    await_event(bed, "volume_deleted")
    bed.reopen()
    assert list(bed.volumes()) == ["b"]
    count = len(kinds(bed, "volume_deleted"))
    run("umount", "/run/volumes/b")
    until = time.monotonic() + 20
    while len(kinds(bed, "volume_deleted")) == count and time.monotonic() < until:
        time.sleep(0.01)
    assert bed.volumes() == {}
    assert bed.engine.problems() == ()


def test_pool_that_queues_writes_goes_on_once_it_grows(tmp_path: Path, disks: Disks) -> None:
    with ThinBed(tmp_path / "queue") as bed:
        bed.open(disks.spec(on_full="queue"))
        bed.create("a", 256 * MIB)
        bed.mount("a")
        child = subprocess.Popen(
            ["dd", "if=/dev/urandom", "of=/run/volumes/a/x", "bs=1M", "count=72", "conv=fsync"],
            stderr=subprocess.DEVNULL,
        )
        await_event(bed, "pool_out_of_space", 60)
        assert child.poll() is None
        os.truncate(disks.data_file, 128 * MIB)
        run("losetup", "--set-capacity", disks.data)
        assert bed.grow_pool().data.total_bytes == 128 * MIB
        assert child.wait(60) == 0
        await_event(bed, "pool_recovered")
        bed.unmount("a")
