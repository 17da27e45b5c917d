"""Pools: opened, refused, closed and adopted, with dmsetup and thin_check as judges."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestagent.api.devices import PathDevice
from tests.beds.dmbed import run
from tests.beds.thinbed import MIB, Disks, ThinBed, disk, pool_disks
from vsock.errors import CallError


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    with pool_disks(tmp_path / "disks") as disks:
        yield disks


@pytest.fixture
def bed(tmp_path: Path, disks: Disks) -> Iterator[ThinBed]:
    with ThinBed(tmp_path / "state") as bed:
        yield bed


@contextlib.contextmanager
def no_devices_left() -> Iterator[None]:
    before = run("dmsetup", "ls")
    yield
    assert run("dmsetup", "ls") == before


def refusal(ask: Callable[[], Any]) -> CallError:
    with pytest.raises(CallError) as caught:
        ask()
    return caught.value


def test_pool_is_made_and_closed(bed: ThinBed, disks: Disks) -> None:
    report = bed.open(disks.spec())
    assert (report.mode, report.transaction_id, report.volumes) == ("rw", 0, 0)
    assert report.created
    assert report.data.total_bytes == 64 * MIB
    assert report.data.used_bytes == 64 * 1024  # the records
    assert report.metadata.total_bytes == 4 * MIB
    assert (report.block_size_bytes, report.on_full) == (65536, "error")
    assert report.devices == (disks.metadata, disks.data)
    assert report.foreign_ids == ()
    table = run("dmsetup", "table", "thin-p-pool").split()
    assert table[:3] == ["0", "131072", "thin-pool"]
    assert table[5:] == ["128", "102", "1", "error_if_no_space"]
    assert " rw " in run("dmsetup", "status", "thin-p-pool")
    assert bed.open(disks.spec()).already
    assert [pool.pool_id for pool in bed.pools()] == ["p"]
    reply = bed.close()
    assert reply.removed_devices == ("thin-p-0", "thin-p-pool", "thin-p-data")
    assert bed.close().already
    disks.thin_check()
    assert disks.thin_ids() == [0]
    assert refusal(bed.status).code == "not_found"


def test_pool_is_adopted(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    bed.create("a")
    before = bed.get("a")
    bed.close()
    report = bed.open(disks.matching())
    assert (report.volumes, report.transaction_id, report.created) == (1, 1, False)
    assert bed.get("a") == before


def test_pool_of_another_block_size_is_adopted_as_it_is(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec(block_size_bytes=131072))
    bed.close()
    error = refusal(lambda: bed.open(disks.matching(block_size_bytes=65536)))
    assert error.code == "conflict"
    assert bed.open(disks.matching()).block_size_bytes == 131072


def test_pool_that_is_there_is_refused(bed: ThinBed, disks: Disks) -> None:
    """Docker would silently go on with whatever volumes are in it."""
    bed.open(disks.spec())
    bed.create("a")
    assert refusal(lambda: bed.open(disks.spec(on_full="queue"))).code == "conflict"
    bed.close()
    with no_devices_left():
        error = refusal(lambda: bed.open(disks.spec()))
        assert error.code == "conflict"
        assert "transaction id 1" in error.message
        assert "adopt: matching" in (error.hint or "")
        error = refusal(lambda: bed.open(disks.spec(adopt="empty")))
        assert (error.code, "1 volumes" in error.message) == ("conflict", True)
        error = refusal(lambda: bed.open(disks.matching(pool_id="q")))
        assert (error.code, error.object) == ("conflict", "p")
    disks.thin_check()


def test_garbage_on_the_metadata_device_is_told(bed: ThinBed, disks: Disks) -> None:
    Path(disks.metadata).write_bytes(b"\x01" * 4096)
    with no_devices_left():
        error = refusal(lambda: bed.open(disks.matching()))
    assert error.code == "conflict"
    assert "4096 bytes of zeros" in (error.hint or "")
    assert Path(disks.metadata).read_bytes()[:4096] == b"\x01" * 4096


def test_damaged_metadata_is_told(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    bed.close()
    run("blockdev", "--flushbufs", disks.metadata)
    with open(disks.metadata, "r+b") as file:
        file.seek(60)
        file.write(b"\xff")
    with no_devices_left():
        assert refusal(lambda: bed.open(disks.matching())).code == "integrity"


def test_pool_that_needs_a_check_is_refused(bed: ThinBed, disks: Disks) -> None:
    from guestagent.thin import metadata

    bed.open(disks.spec())
    bed.close()
    run("blockdev", "--flushbufs", disks.metadata)
    with open(disks.metadata, "r+b") as file:
        block = bytearray(file.read(4096))
        block[4] |= 1
        block[:4] = metadata.checksum(bytes(block), 160774).to_bytes(4, "little")
        file.seek(0)
        file.write(block)
    error = refusal(lambda: bed.open(disks.matching()))
    assert (error.code, "needs a check" in error.message) == ("integrity", True)
    run("thin_check", "--clear-needs-check-flag", disks.metadata)
    assert bed.open(disks.matching()).mode == "rw"


def test_pool_of_another_program_is_refused(bed: ThinBed, disks: Disks) -> None:
    table = f"0 131072 thin-pool {disks.metadata} {disks.data} 128 0"
    run("dmsetup", "create", "foreign", "--table", table)
    try:
        error = refusal(lambda: bed.open(disks.spec()))
        assert (error.code, "dm-" in (error.hint or "")) == ("busy", True)
        run("dmsetup", "message", "foreign", "0", "create_thin 7")
    finally:
        run("dmsetup", "remove", "foreign")
    error = refusal(lambda: bed.open(disks.matching()))
    assert (error.code, "1 thin devices" in error.message) == ("conflict", True)
    assert disks.thin_ids() == [7]


def test_empty_pool_of_another_program_is_adopted_when_asked(bed: ThinBed, disks: Disks) -> None:
    table = f"0 131072 thin-pool {disks.metadata} {disks.data} 128 0"
    run("dmsetup", "create", "foreign", "--table", table)
    run("dmsetup", "remove", "foreign")
    assert refusal(lambda: bed.open(disks.spec())).code == "conflict"
    report = bed.open(disks.spec(adopt="empty"))
    assert (report.volumes, report.created) == (0, False)


def test_transaction_id_that_differs_is_told(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    run("dmsetup", "message", "thin-p-pool", "0", "set_transaction_id 0 9")
    error = refusal(lambda: bed.create("a"))
    assert (error.code, "transaction id 9" in error.message) == ("conflict", True)
    bed.close()
    with no_devices_left():
        error = refusal(lambda: bed.open(disks.matching()))
    assert (error.code, "transaction id 9" in error.message) == ("conflict", True)


def test_disks_of_two_pools(bed: ThinBed, disks: Disks, tmp_path: Path) -> None:
    bed.open(disks.spec())
    with pool_disks(tmp_path / "other") as other:
        for changes in (
            {"metadata_device": PathDevice(path=disks.metadata)},
            {"data_device": PathDevice(path=disks.data)},
        ):
            error = refusal(lambda: bed.open(other.spec("q", **changes)))  # noqa: B023
            assert (error.code, "'p'" in error.message) == ("conflict", True)
        bed.close()
        # the metadata of one pool with the data of the other
        bed.open(other.spec("q"))
        bed.close("q")
        mixed = disks.matching(data_device=PathDevice(path=other.data))
        error = refusal(lambda: bed.open(mixed))
        assert (error.code, "pool 'q'" in error.message) == ("conflict", True)


def test_data_disk_with_content_is_refused(bed: ThinBed, disks: Disks) -> None:
    run("mkfs.ext4", "-q", disks.data)
    error = refusal(lambda: bed.open(disks.spec()))
    assert (error.code, "ext4" in error.message) == ("conflict", True)
    disks.blank()
    bed.open(disks.spec())
    bed.close()
    Path(disks.metadata).write_bytes(bytes(4096))
    error = refusal(lambda: bed.open(disks.spec()))
    assert (error.code, "records of a pool" in error.message) == ("conflict", True)
    disks.blank()
    with open(disks.data, "r+b") as file:
        file.seek(100_000)
        file.write(b"what nobody knows")
    error = refusal(lambda: bed.open(disks.spec()))
    assert (error.code, "unknown data" in error.message) == ("conflict", True)


@pytest.mark.parametrize(("metadata_bytes", "data_bytes"), [(MIB, 64 * MIB), (4 * MIB, 512 * 1024)])
def test_disks_that_are_too_small(
    bed: ThinBed, tmp_path: Path, metadata_bytes: int, data_bytes: int
) -> None:
    sizes = {"metadata_bytes": metadata_bytes, "data_bytes": data_bytes}
    with pool_disks(tmp_path / "small", **sizes) as small, no_devices_left():
        error = refusal(lambda: bed.open(small.spec()))
    assert (error.code, "are needed" in error.message) == ("invalid", True)


def test_adopted_disk_that_is_too_small(bed: ThinBed, disks: Disks, tmp_path: Path) -> None:
    bed.open(disks.spec())
    bed.close()
    with disk(tmp_path / "short.img", 32 * MIB) as short:
        mixed = disks.matching(data_device=PathDevice(path=short))
        error = refusal(lambda: bed.open(mixed))
    assert (error.code, str(64 * MIB) in error.message) == ("conflict", True)


def test_pool_of_an_agent_that_ended_is_taken_over(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    bed.create("a")
    bed.reopen()
    report = bed.status()
    assert (report.volumes, report.mode) == (1, "rw")
    assert bed.engine.problems() == ()
    assert bed.open(disks.spec()).already
    bed.close()
    bed.reopen()
    assert bed.pools() == ()


def test_foreign_thin_devices_are_told_and_stay(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    bed.create("a")
    for device_id in (2, 3, 9):
        run("dmsetup", "message", "thin-p-pool", "0", f"create_thin {device_id}")
    assert bed.create("b").device_id == 4
    assert bed.status().foreign_ids == (2, 3, 9)
    bed.delete("a")
    bed.close()
    assert disks.thin_ids() == [0, 2, 3, 4, 9]
    assert bed.open(disks.matching()).foreign_ids == (2, 3, 9)
    bed.reopen()
    assert bed.status().foreign_ids == (2, 3, 9)


def test_snapshot_of_the_metadata_that_a_killed_agent_left(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    bed.create("a")
    for take_over in (bed.reopen, lambda: (bed.close(), bed.open(disks.matching()))):
        run("dmsetup", "message", "thin-p-pool", "0", "reserve_metadata_snap")
        take_over()
        assert bed.get("a").mapped_sectors is not None
    bed.close()
    disks.thin_check()


def test_pool_that_another_program_removed(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    bed.create("a")
    run("dmsetup", "remove", "thin-p-0")
    run("dmsetup", "remove", "thin-p-pool")
    assert bed.status().mode == "gone"
    asks: list[Callable[[], Any]] = [
        lambda: bed.get("a"),
        bed.volumes,
        lambda: bed.create("b"),
        lambda: bed.mount("a"),
        lambda: bed.delete("a"),
        bed.grow_pool,
    ]
    for ask in asks:
        error = refusal(ask)
        assert (error.code, error.errno) == ("device", errno.ENXIO), str(error)
    assert bed.close().removed_devices == ("thin-p-data",)
    assert list(bed.open(disks.matching()).deleting) == []
    assert list(bed.volumes()) == ["a"]


def test_pool_grows_with_its_disks(bed: ThinBed, disks: Disks) -> None:
    bed.open(disks.spec())
    bed.create("a")
    assert bed.grow_pool().already
    os.truncate(disks.data_file, 96 * MIB)
    os.truncate(disks.metadata_file, 8 * MIB)
    for node in (disks.data, disks.metadata):
        run("losetup", "--set-capacity", node)
    report = bed.grow_pool()
    assert (report.data.total_bytes, report.metadata.total_bytes) == (96 * MIB, 8 * MIB)
    assert not report.already
    os.truncate(disks.data_file, 64 * MIB)
    run("losetup", "--set-capacity", disks.data)
    error = refusal(bed.grow_pool)
    assert (error.code, "shrunk" in error.message) == ("conflict", True)
    assert bed.status().mode == "rw"
    assert "ACTIVE" in run("dmsetup", "info", "thin-p-pool")
    os.truncate(disks.data_file, 96 * MIB)
    run("losetup", "--set-capacity", disks.data)
    bed.close()
    disks.thin_check()
    assert bed.open(disks.matching()).data.total_bytes == 96 * MIB


def test_pool_grows_by_a_disk(bed: ThinBed, disks: Disks, tmp_path: Path) -> None:
    bed.open(disks.spec())
    bed.create("a")
    with disk(tmp_path / "more.img", 32 * MIB) as node:
        more = PathDevice(path=node)
        report = bed.grow_pool(data_device=more)
        assert report.data.total_bytes == 96 * MIB
        assert report.devices == (disks.metadata, disks.data, node)
        bed.reopen()
        assert bed.status().devices == report.devices
        bed.close()
        error = refusal(lambda: bed.open(disks.matching()))
        assert (error.code, "name all data devices" in (error.hint or "")) == ("conflict", True)
        wrong = disks.matching(data_device=more, more_data_devices=(disks.spec().data_device,))
        with no_devices_left():
            assert refusal(lambda: bed.open(wrong)).code in ("conflict", "integrity")
        disks.thin_check()
        assert bed.open(disks.matching(more_data_devices=(more,))).volumes == 1
        bed.close()
