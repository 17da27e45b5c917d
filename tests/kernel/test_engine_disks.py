"""A disk that is gone is told in replies, lists, the status and events, also after a restart; and
of two agents each keeps to its own devices."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestagent.api import DeviceScratch, LayerSpec, PathDevice, ScsiDevice, Verity
from guestagent.api.devices import Device, DeviceRemove
from guestagent.engine.unplug import remove_disk
from guestagent.storage import blockdev
from rootfs.verity.formatter import format_image
from tests.beds import dmbed
from tests.beds.agentbed import AgentProcess, EngineBed, Pack, World, overlay
from tests.beds.calls import call_error, run
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log

PACK_LAYERS = 2
_HOSTS = Path("/sys/bus/pseudo/drivers/scsi_debug/add_host")


@pytest.fixture(scope="module", autouse=True)
def _scsi_hosts() -> Iterator[None]:
    with dmbed.scsi_debug("dev_size_mb=8", "max_luns=1", "delay=0", "add_host=0"):
        yield


@contextlib.contextmanager
def scsi_disk() -> Iterator[tuple[ScsiDevice, str]]:
    """Plug a disk in; all of them have the same content. Yields it and its kernel name."""
    hosts = Path("/sys/class/scsi_host")
    before = set(os.listdir(hosts))
    _HOSTS.write_text("1")
    try:
        (host,) = set(os.listdir(hosts)) - before
        device = ScsiDevice(controller=int(host.removeprefix("host")), lun=0)
        with Deadline(10) as deadline:
            yield device, blockdev.wait_for(device, deadline).name
    finally:
        _HOSTS.write_text("-1")


def unplug(name: str) -> None:
    Path(f"/sys/block/{name}/device/delete").write_text("1")


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_disk_is_removed_when_nothing_uses_it(bed: EngineBed, pack: Pack) -> None:
    with scsi_disk() as (device, name):
        node, dev = f"/dev/{name}", dmbed.dev_of(f"/dev/{name}")
        scratch = DeviceScratch(device=device, existing="fresh")
        with bed.operation() as op:
            bed.engine.layers.mount(pack.spec(0), op)
            bed.engine.overlays.mount(overlay("o", "layer0", scratch=scratch), op)
        hint = refused(bed, device, "busy")
        assert "overlay o (its scratch)" in hint
        bed.ask(bed.engine.overlays.unmount, "o")
        with open(node, "rb"):
            assert f"[{os.getpid()}] (fd " in refused(bed, device, "busy")
        dmbed.run("dmsetup", "create", "other", "--table", f"0 8 linear {node} 0")
        try:
            assert "dm other" in refused(bed, device, "busy")
        finally:
            dmbed.run("dmsetup", "remove", "--retry", "other")
        with bed.operation() as op:
            reply = remove_disk(bed.engine.state, device, op)
        assert reply.removed[0] == node  # then the partitions that it may have
        assert reply.written == f"/sys/class/block/{name}/device/delete"
        assert not reply.already
        assert not os.path.exists(f"/sys/dev/block/{dev}")
        with bed.operation() as op:
            assert remove_disk(bed.engine.state, device, op).already
        wait_until(lambda: "device_vanished" in kinds_of(bed))
        # the host still has it: a request for it finds it by a rescan, which is logged
        number = log.number
        with bed.operation() as op:
            adopted = scratch.replace(existing="adopt")
            bed.engine.overlays.mount(overlay("o", "layer0", scratch=adopted), op)
        texts = [line.text for line in log.since(number)[0]]
        assert "a device stays away: rescanning" in texts
        bed.ask(bed.engine.overlays.unmount, "o")


def test_a_layer_keeps_its_disk(bed: EngineBed, tmp_path: Path) -> None:
    with scsi_disk() as (device, name):
        digest = verity_image(tmp_path, name)
        verity = Verity(root_digest=digest)
        spec = LayerSpec(layer_id="l", device=device, filesystem="erofs", verity=verity)
        bed.ask(bed.engine.layers.mount, spec)
        assert f"layer l (is on /dev/{name})" in refused(bed, device, "busy")
        with bed.operation() as op:
            bed.engine.layers.unmount("l", op)
            assert remove_disk(bed.engine.state, device, op).removed[0] == f"/dev/{name}"


def test_removal_of_anything_but_a_whole_scsi_disk_is_refused(bed: EngineBed, pack: Pack) -> None:
    assert "host" in refused(bed, PathDevice(path=pack.node), "unsupported")
    with pytest.raises(ValueError, match="as a whole"):
        DeviceRemove(device=ScsiDevice(controller=0, lun=0, partition=1))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(("kind", "code"), [("EIO", "device"), ("LATE", "timeout")])
def test_a_removal_that_fails_leaves_the_disk(
    bed: EngineBed, number: int, kind: str, code: str
) -> None:
    with scsi_disk() as (device, name):
        bed.faults.arm(f"#{number}:{kind}")
        with bed.operation() as op, pytest.raises(CallError) as caught:
            remove_disk(bed.engine.state, device, op)
        bed.faults.arm("")
        assert caught.value.code == code
        assert os.path.exists(f"/sys/block/{name}")


def refused(bed: EngineBed, device: Device, code: str) -> str:
    """See that a disk is not removed; return the hint."""
    with bed.operation() as op, call_error(code) as caught:
        remove_disk(bed.engine.state, device, op)
    assert blockdev.find(device) is not None
    return caught.value.hint or ""


def kinds_of(bed: EngineBed) -> list[str]:
    return [event.kind for event in bed.engine.events.since(0)[0]]


def verity_image(path: Path, name: str) -> bytes:
    """Write an image with its hash tree to a disk; return the root digest."""
    source = path / "source"
    source.mkdir()
    (source / "file").write_bytes(os.urandom(100_000))
    image = path / "image"
    run("mkfs.erofs", "-T0", image, source)
    os.truncate(image, -(-image.stat().st_size // 4096) * 4096)
    made = format_image(image, workers=1)
    with open(f"/dev/{name}", "wb") as disk:
        disk.write(image.read_bytes())
        disk.flush()
        os.fsync(disk.fileno())
    return made.root_digest


@pytest.mark.parametrize("which", ["data", "hash"])
def test_a_disk_of_a_layer(bed: EngineBed, tmp_path: Path, which: str) -> None:
    with scsi_disk() as (data, data_name), scsi_disk() as (hashes, hash_name):
        digest = verity_image(tmp_path, data_name)
        size_bytes = (tmp_path / "image").stat().st_size
        superblock_at = next(
            offset
            for offset in range(0, size_bytes, 512)
            if (tmp_path / "image").read_bytes()[offset : offset + 6] == b"verity"
        )
        verity = Verity(root_digest=digest, hash_device=hashes, hash_offset_bytes=superblock_at)
        spec = LayerSpec(layer_id="l", device=data, filesystem="erofs", verity=verity)
        with bed.operation() as op:
            assert bed.engine.layers.mount(spec, op).state == "mounted"
            bed.engine.overlays.mount(overlay("o", "l"), op)
        unplug({"data": data_name, "hash": hash_name}[which])
        wait_until(lambda: "layer_device_lost" in kinds_of(bed))  # the last of what is noted
        for _ in range(2):
            assert [report.state for report in bed.engine.layers.list()] == ["device_lost"]
            assert bed.engine.overlays.get("o").state == "device_lost"
            assert any("'l'" in problem for problem in bed.engine.problems())
            kinds = [event.kind for event in bed.engine.events.since(0)[0]]
            assert "layer_device_lost" in kinds
            with bed.operation() as op:
                assert bed.engine.layers.mount(spec, op).state == "device_lost"
            bed.reopen()
        with bed.operation() as op:
            bed.engine.overlays.unmount("o", op)
            bed.engine.layers.unmount("l", op, force=True)
        assert bed.engine.problems() == ()


def test_the_disk_of_a_scratch(bed: EngineBed, pack: Pack) -> None:
    with scsi_disk() as (device, name):
        scratch = DeviceScratch(device=device, existing="fresh")
        with bed.operation() as op:
            bed.engine.layers.mount(pack.spec(0), op)
            bed.engine.overlays.mount(overlay("o", "layer0", scratch=scratch), op)
        unplug(name)
        wait_until(lambda: "overlay_device_lost" in kinds_of(bed))
        for _ in range(2):
            assert [report.state for report in bed.engine.overlays.list()] == ["device_lost"]
            assert [report.state for report in bed.engine.layers.list()] == ["mounted"]
            assert any("'o'" in problem for problem in bed.engine.problems())
            kinds = [event.kind for event in bed.engine.events.since(0)[0]]
            assert "overlay_device_lost" in kinds
            bed.reopen()
        bed.ask(bed.engine.overlays.unmount, "o", force=True)
        assert bed.engine.problems() == ()


def test_a_state_directory_has_one_agent(bed: EngineBed, pack: Pack) -> None:
    bed.ask(bed.engine.layers.mount, pack.spec(0))
    files = {path.name: path.read_bytes() for path in bed.directory.glob("*.entry")}
    with call_error("conflict", match="another agent"):
        EngineBed(bed.directory)
    assert bed.engine.layers.get("layer0").state == "mounted"
    assert {path.name: path.read_bytes() for path in bed.directory.glob("*.entry")} == files


def test_a_second_agent_process_is_refused(pack: Pack) -> None:
    with AgentProcess() as first, first.client() as guest:
        guest.layer_mount(pack.spec(0))
        before = sorted(path.name for path in Path(first.state).iterdir())
        second = AgentProcess(directory=first.directory)
        second.start()
        assert second.wait() == 1
        assert sorted(path.name for path in Path(first.state).iterdir()) == before
        assert "another agent has the state directory" in first.log.read_text()
        assert guest.layer_get("layer0").state == "mounted"
        guest.layer_unmount("layer0")


def test_the_devices_of_another_agent_are_no_orphans(
    bed: EngineBed, pack: Pack, tmp_path: Path
) -> None:
    bed.ask(bed.engine.layers.mount, pack.spec(0))
    before = World.now()
    with EngineBed(tmp_path / "other") as other:
        assert other.engine.layers.list() == ()
        assert World.now() == before
        with other.operation() as op:
            other.engine.layers.mount(pack.spec(1), op)
        bed.reopen()
        assert [report.layer_id for report in bed.engine.layers.list()] == ["layer0"]
        assert other.engine.layers.get("layer1").state == "mounted"
    assert World.now() == before
