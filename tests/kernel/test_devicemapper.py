"""Device-mapper against a real kernel, with dmsetup and veritysetup as oracles both ways."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestagent.storage import blockdev
from guestagent.storage.devicemapper import devices, dmioctl
from guestagent.storage.devicemapper.control import Control, DeviceInfo
from guestagent.storage.devicemapper.targets import (
    Target,
    VerityTable,
    linear_target,
    parse_verity,
    parse_verity_status,
)
from guestagent.storage.mount import mount_filesystem, unmount
from guestagent.storage.uevents import Uevent, UeventSocket
from guestagent.storage.verity import VerityParameters
from tests.beds import dmbed
from tests.beds.calls import at_once
from vsock.deadline import Deadline
from vsock.errors import CallError

pytestmark = pytest.mark.kernel

MIB = 1 << 20
Within = Callable[[float], Deadline]
DMSETUP_ENVIRONMENT = {"DM_DISABLE_UDEV": "1"}


@pytest.fixture(autouse=True)
def _no_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in DMSETUP_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with dmbed.no_leaks():
        yield


@pytest.fixture
def control() -> Iterator[Control]:
    with Control() as control:
        yield control


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A writable disk of 2 MiB whose every sector differs."""
    image = tmp_path / "disk"
    image.write_bytes(b"".join(index.to_bytes(512, "big") for index in range(2 * MIB // 512)))
    with dmbed.loop_device(image, readonly=False) as node:
        yield node


@pytest.fixture
def verity(tmp_path: Path) -> dmbed.VerityImage:
    files = {f"file{index}": os.urandom(64 * 1024) for index in range(8)}
    return dmbed.VerityImage(dmbed.erofs_image(tmp_path, "layer", files))


def verity_of(image: dmbed.VerityImage, dev: str, **changes: object) -> Target:
    parameters = VerityParameters(
        root_digest=image.root_digest,
        salt=image.salt,
        algorithm="sha256",
        hash_type=1,
        data_blocks=image.data_blocks,
        data_block_size=4096,
        hash_block_size=4096,
        hash_offset_bytes=image.data_bytes,
        superblock=True,
    )
    table = VerityTable(parameters=parameters, data_device=dev, hash_device=dev)
    if "root_digest" in changes:
        table = table.replace(parameters=parameters.replace(**changes))
    else:
        table = table.replace(**changes)
    return table.target()


def make(control: Control, name: str, *targets: Target, **options: bool) -> DeviceInfo:
    return devices.create_device(
        control, name=name, uuid=f"guestagent-test-{name}", targets=targets, **options
    )


@pytest.fixture
def within() -> Iterator[Callable[[float], Deadline]]:
    """Deadlines that are closed at the end of the test."""
    made: list[Deadline] = []

    def make_deadline(seconds: float) -> Deadline:
        made.append(Deadline(seconds))
        return made[-1]

    yield make_deadline
    for deadline in made:
        deadline.close()


def read_file(node: str, offset: int = 0, length: int = -1) -> bytes:
    with open(node, "rb", buffering=0) as file:
        file.seek(offset)
        if length < 0:
            return file.readall()
        return file.read(length)


def test_linear_maps_the_bytes_of_its_range(control: Control, disk: str, within: Within) -> None:
    target = linear_target(length_bytes=64 * 1024, device=disk, offset_bytes=MIB)
    info = make(control, "t-linear", target)
    assert (info.live_table, info.inactive_table, info.suspended) == (True, False, False)
    assert info.readonly
    assert info.uuid == "guestagent-test-t-linear"
    assert read_file(info.node) == read_file(disk, MIB, 64 * 1024)
    with open(info.node, "r+b", buffering=0) as file, pytest.raises(PermissionError):
        file.write(bytes(512))
    assert devices.remove_device(control, "t-linear", within(5))
    assert not devices.remove_device(control, "t-linear", within(5))


def test_writable_table_of_several_targets(control: Control, disk: str, within: Within) -> None:
    """Three ranges in another order, one of them an error target."""
    targets = (
        linear_target(length_bytes=4096, device=disk, offset_bytes=8192),
        Target(start_sectors=8, length_sectors=8, target_type="error"),
        linear_target(start_bytes=8192, length_bytes=4096, device=disk, offset_bytes=0),
    )
    info = make(control, "t-many", *targets, readonly=False)
    assert not info.readonly
    assert info.target_count == 3
    assert read_file(info.node, 0, 4096) == read_file(disk, 8192, 4096)
    assert read_file(info.node, 8192, 4096) == read_file(disk, 0, 4096)
    with pytest.raises(OSError, match="Input/output error"):
        read_file(info.node, 4096, 512)
    fd = os.open(info.node, os.O_WRONLY | os.O_SYNC)
    os.pwrite(fd, b"x" * 4096, 0)
    os.close(fd)
    blockdev.flush(disk)  # the write went below the cached pages of the disk
    assert read_file(disk, 8192, 4096) == b"x" * 4096
    table = control.table("t-many")
    assert [line.start_sectors for line in table] == [0, 8, 16]
    assert table[2].params.startswith(dmbed.dev_of(disk))
    assert [line.line() for line in table] == _dmsetup_table("t-many")
    devices.remove_device(control, "t-many", within(5))


def _dmsetup_table(name: str) -> list[str]:
    return [line.rstrip() for line in dmbed.run("dmsetup", "table", name).splitlines()]


def test_many_targets_outgrow_the_first_buffer(control: Control, disk: str, within: Within) -> None:
    """1000 targets: 48 KB in, and as much out."""
    targets = [
        linear_target(
            start_bytes=512 * index,
            length_bytes=512,
            device=disk,
            offset_bytes=512 * (4000 - index),
        )
        for index in range(1000)
    ]
    info = make(control, "t-wide", *targets)
    table = control.table("t-wide")
    assert len(table) == 1000
    assert [line.line() for line in table] == _dmsetup_table("t-wide")
    assert read_file(info.node, 999 * 512, 512) == read_file(disk, 3001 * 512, 512)
    devices.remove_device(control, "t-wide", within(5))


def test_dmsetup_reads_ours(control: Control, verity: dmbed.VerityImage, within: Within) -> None:
    with dmbed.loop_device(verity.path) as loop:
        ours = verity_of(verity, dmbed.dev_of(loop), options=("ignore_zero_blocks",))
        make(control, "t-verity", ours)
        assert _dmsetup_table("t-verity") == [ours.line()]
        assert (
            dmbed.run("dmsetup", "status", "t-verity").strip()
            == control.status("t-verity")[0].line()
        )
        text = dmbed.run("dmsetup", "info", "-c", "--noheadings", "-o", "name,uuid", "t-verity")
        assert text.strip() == "t-verity:guestagent-test-t-verity"
        found = parse_verity(control.table("t-verity")[0]).parameters
        assert found.root_digest == verity.root_digest
        devices.remove_device(control, "t-verity", within(5))


def test_control_reads_devices_made_by_dmsetup(control: Control, verity: dmbed.VerityImage) -> None:
    with dmbed.loop_device(verity.path) as loop:
        offset = f"--hash-offset={verity.data_bytes}"
        root = verity.root_digest.hex()
        dmbed.run("veritysetup", "open", loop, "t-tool", loop, root, offset)
        theirs = parse_verity(control.table("t-tool")[0])
        assert theirs.target().line() == verity_of(verity, dmbed.dev_of(loop)).line()
        assert parse_verity_status(control.status("t-tool")[0].status).state == "V"
        info = control.info("t-tool")
        assert info.uuid.startswith("CRYPT-VERITY-")
        assert control.find(uuid=info.uuid) == info
        assert (info.name, info.dev, info.uuid) in control.list_devices()
        dmbed.run("dmsetup", "remove", "t-tool")
        assert control.find(name="t-tool") is None


@pytest.mark.parametrize("stacked", [False, True])
def test_verity_gives_the_data(
    control: Control, verity: dmbed.VerityImage, stacked: bool, within: Within
) -> None:
    with dmbed.loop_device(verity.path) as loop:
        dev = dmbed.dev_of(loop)
        if stacked:
            linear = linear_target(length_bytes=verity.size_bytes, device=dev)
            dev = make(control, "t-below", linear).dev
        info = make(control, "t-verity", verity_of(verity, dev))
        assert control.deps("t-verity") == (dev,)
        assert read_file(info.node) == verity.path.read_bytes()[: verity.data_bytes]
        assert parse_verity_status(control.status("t-verity")[0].status).state == "V"
        devices.remove_device(control, "t-verity", within(5))
        if stacked:
            devices.remove_device(control, "t-below", within(5))


def test_a_wrong_root_loads_and_the_first_read_fails(
    control: Control, verity: dmbed.VerityImage, within: Within
) -> None:
    """The kernel's own behaviour, on which the engine's read after the mount is founded."""
    with dmbed.loop_device(verity.path) as loop:
        wrong = bytes([verity.root_digest[0] ^ 1]) + verity.root_digest[1:]
        info = make(control, "t-wrong", verity_of(verity, dmbed.dev_of(loop), root_digest=wrong))
        with pytest.raises(OSError, match="Input/output error"):
            read_file(info.node, 0, 4096)
        assert parse_verity_status(control.status("t-wrong")[0].status).corrupted
        devices.remove_device(control, "t-wrong", within(5))


def test_a_corrupt_block_fails_and_is_announced(
    control: Control, verity: dmbed.VerityImage, within: Within
) -> None:
    bad_block = verity.data_blocks - 1
    with open(verity.path, "r+b") as file:
        file.seek(bad_block * 4096 + 100)
        old = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old[0] ^ 0x80]))
    with dmbed.loop_device(verity.path) as loop:
        info = make(control, "t-corrupt", verity_of(verity, dmbed.dev_of(loop)))
        assert len(read_file(info.node, 0, 4096)) == 4096
        with UeventSocket() as events:
            with pytest.raises(OSError, match="Input/output error"):
                read_file(info.node, bad_block * 4096, 4096)
            limit = within(5)
            told: list[Uevent] = []
            while not told:
                limit.wait([events.fileno()], "wait for the uevent")
                told = [e for e in events.receive() if "DM_VERITY_ERR_BLOCK_NR" in e.fields]
        assert told[0].fields["DM_VERITY_ERR_BLOCK_NR"] == f"0,{bad_block}"
        assert parse_verity_status(control.status("t-corrupt")[0].status).state == "C"
        devices.remove_device(control, "t-corrupt", within(5))


def test_deferred_removal_takes_the_whole_stack_at_the_unmount(
    control: Control, verity: dmbed.VerityImage, tmp_path: Path, within: Within
) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    with dmbed.loop_device(verity.path) as loop:
        linear = linear_target(length_bytes=verity.size_bytes, device=dmbed.dev_of(loop))
        below = make(control, "t-below", linear)
        above = make(control, "t-above", verity_of(verity, below.dev))
        mount_filesystem(source=above.node, target=str(target), filesystem="erofs")
        assert not devices.set_deferred_remove(control, "t-above")
        assert not devices.set_deferred_remove(control, "t-below")
        assert control.info("t-above").deferred_remove
        assert (target / "file3").read_bytes()
        unmount(str(target))
        devices.wait_gone(control, ("t-below",), within(5), uuids=(above.uuid,))


def test_a_device_is_gone_only_when_its_disk_is_free(
    control: Control, disk: str, within: Within
) -> None:
    """The name goes first, the hold on the disk a moment later: whoever waited may have the disk
    for itself, as a host that unplugs it will. The moment is short, so that it is tried often."""
    for turn in range(60):
        name = f"t-free-{turn}"
        info = make(control, name, linear_target(length_bytes=4096, device=disk))
        fd = os.open(info.node, os.O_RDONLY)
        assert not devices.set_deferred_remove(control, name)
        os.close(fd)
        if turn % 2:
            devices.wait_gone(control, (name,), within(5))
        else:
            devices.remove_device(control, name, within(5))
        os.close(dmbed.open_free_disk(disk))


def test_deferred_removal_can_be_taken_back(control: Control, disk: str) -> None:
    info = make(control, "t-back", linear_target(length_bytes=4096, device=disk))
    fd = os.open(info.node, os.O_RDONLY)
    assert not devices.set_deferred_remove(control, "t-back")
    control.cancel_deferred_remove("t-back")
    assert not control.info("t-back").deferred_remove
    os.close(fd)
    assert control.find(name="t-back") is not None
    assert devices.set_deferred_remove(control, "t-back")


def test_removal_of_a_busy_device_waits_for_its_user(
    control: Control, disk: str, within: Within
) -> None:
    info = make(control, "t-busy", linear_target(length_bytes=4096, device=disk))
    fd = os.open(info.node, os.O_RDONLY)
    with pytest.raises(OSError, match="DM_DEV_REMOVE") as caught:
        control.remove("t-busy")
    assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, "t-busy")
    closer = threading.Timer(0.3, os.close, (fd,))
    closer.start()
    started = time.monotonic()
    assert devices.remove_device(control, "t-busy", within(10))
    assert 0.2 < time.monotonic() - started < 5
    closer.join()


def test_removal_of_a_busy_device_gives_up_without_a_trace(
    control: Control, disk: str, within: Within
) -> None:
    info = make(control, "t-busy", linear_target(length_bytes=4096, device=disk))
    fd = os.open(info.node, os.O_RDONLY)
    with pytest.raises(OSError, match="still in use") as caught:
        devices.remove_device(control, "t-busy", within(0.2))
    assert caught.value.errno == errno.EBUSY
    assert not control.info("t-busy").deferred_remove
    deadline = within(30)
    threading.Timer(0.2, deadline.cancel).start()
    with pytest.raises(CallError, match="cancelled"):
        devices.remove_device(control, "t-busy", deadline)
    assert not control.info("t-busy").deferred_remove
    os.close(fd)
    devices.remove_device(control, "t-busy", within(5))


def test_a_promised_removal_is_not_taken_back(control: Control, disk: str, within: Within) -> None:
    """Who finds a removal already deferred must leave it so: another relies on it."""
    info = make(control, "t-promise", linear_target(length_bytes=4096, device=disk))
    fd = os.open(info.node, os.O_RDONLY)
    devices.set_deferred_remove(control, "t-promise")
    with pytest.raises(OSError, match="still in use"):
        devices.remove_device(control, "t-promise", within(0.1))
    assert control.info("t-promise").deferred_remove
    os.close(fd)
    devices.wait_gone(control, ("t-promise",), within(5))


def test_names_and_uuids_are_taken_once(control: Control, disk: str, within: Within) -> None:
    target = linear_target(length_bytes=4096, device=disk)
    make(control, "t-one", target)
    for name, uuid in (("t-one", "other"), ("t-two", "guestagent-test-t-one")):
        with pytest.raises(devices.DmStepError) as caught:
            devices.create_device(control, name=name, uuid=uuid, targets=[target])
        assert (caught.value.step, caught.value.errno) == ("dm-create", errno.EBUSY)
    assert [name for name, _, _ in control.list_devices()] == ["t-one"]
    devices.remove_device(control, "t-one", within(5))


@pytest.mark.parametrize(
    ("target_type", "params", "number"),
    [
        ("linear", "259:4242 0", errno.ENODEV),  # no such device
        ("verity", "1 nonsense", errno.EINVAL),
        ("no-such-type", "", errno.EINVAL),
    ],
)
def test_a_refused_table_leaves_no_device(
    control: Control, target_type: str, params: str, number: int
) -> None:
    target = Target(start_sectors=0, length_sectors=8, target_type=target_type, params=params)
    with pytest.raises(devices.DmStepError) as caught:
        make(control, "t-refused", target)
    assert caught.value.step == "dm-load"
    assert caught.value.errno in (number, errno.ENXIO)
    assert target.line() in str(caught.value)
    assert control.list_devices() == ()


def test_a_mapping_past_the_end_leaves_no_device(control: Control, disk: str) -> None:
    target = linear_target(length_bytes=MIB, device=disk, offset_bytes=2 * MIB - 4096)
    with pytest.raises(devices.DmStepError) as caught:
        make(control, "t-past", target)
    assert caught.value.step == "dm-load"
    assert control.list_devices() == ()


def test_a_writable_verity_table_is_refused(control: Control, verity: dmbed.VerityImage) -> None:
    with dmbed.loop_device(verity.path) as loop:
        with pytest.raises(devices.DmStepError) as caught:
            make(control, "t-rw", verity_of(verity, dmbed.dev_of(loop)), readonly=False)
        assert caught.value.errno == errno.EINVAL
    assert control.list_devices() == ()


@pytest.mark.parametrize("step", ["load_table", "resume"])
def test_any_failed_step_leaves_no_device(
    control: Control, disk: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No real kernel refuses to resume a good table, so that the fault is put in here."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "out of memory", "t-fault")

    monkeypatch.setattr(control, step, fail)
    with pytest.raises(devices.DmStepError) as caught:
        make(control, "t-fault", linear_target(length_bytes=4096, device=disk))
    assert caught.value.step == {"load_table": "dm-load", "resume": "dm-resume"}[step]
    assert control.list_devices() == ()


def test_a_lost_node_is_made_again(control: Control, disk: str, within: Within) -> None:
    info = make(control, "t-node", linear_target(length_bytes=4096, device=disk))
    os.unlink(info.node)
    blockdev.ensure_node(info.node, info.dev)
    assert read_file(info.node) == read_file(disk, 0, 4096)
    os.unlink(info.node)
    os.mknod(info.node, 0o600 | 0o060000, os.makedev(7, 200))
    blockdev.ensure_node(info.node, info.dev)
    assert dmbed.dev_of(info.node) == info.dev
    devices.remove_device(control, "t-node", within(5))


def test_a_table_is_replaced(control: Control, disk: str) -> None:
    first = linear_target(length_bytes=4096, device=disk)
    second = linear_target(length_bytes=4096, device=disk, offset_bytes=4096)
    control.create("t-old", "u-1")
    assert not control.info("t-old").live_table
    control.load_table("t-old", [first], readonly=True)
    assert control.info("t-old").inactive_table
    assert control.table("t-old", inactive=True)[0].params == f"{dmbed.dev_of(disk)} 0"
    control.resume("t-old")
    control.load_table("t-old", [second], readonly=True)
    info = control.resume("t-old")
    assert not info.suspended
    assert read_file(info.node) == read_file(disk, 4096, 4096)
    control.remove("t-old")


def test_minor_number_and_version(control: Control) -> None:
    control.create("t-minor", "u-minor", 300)
    info = control.info("t-minor")
    assert (info.dev, info.node) == (f"{info.dev.split(':')[0]}:300", "/dev/dm-300")
    control.remove("t-minor")
    assert control.version()[0] == 4
    text = dmbed.run("dmsetup", "targets")
    theirs = {
        line.split()[0]: tuple(int(word) for word in line.split()[1].lstrip("v").split("."))
        for line in text.splitlines()
    }
    assert control.list_versions() == theirs


def test_missing_devices_are_enxio(control: Control) -> None:
    for call in (control.info, control.table, control.status, control.remove, control.resume):
        with pytest.raises(OSError, match="No such device") as caught:
            call("t-none")
        assert (caught.value.errno, caught.value.filename) == (errno.ENXIO, "t-none")


def test_wait_event_wakes_on_an_event_and_on_the_deadline(
    control: Control, disk: str, within: Within, tmp_path: Path
) -> None:
    """A thin pool raises an event when it runs low: here, when 2 of its 16 blocks are used."""
    dmbed.run("modprobe", "dm-thin-pool")
    metadata = tmp_path / "metadata"
    metadata.write_bytes(bytes(4 * MIB))
    with dmbed.loop_device(metadata, readonly=False) as metadata_disk:
        params = f"{metadata_disk} {disk} 128 30"
        length = 2 * MIB // 512
        pool = Target(
            start_sectors=0, length_sectors=length, target_type="thin-pool", params=params
        )
        pool_node = make(control, "t-pool", pool, readonly=False).node
        control.message("t-pool", 0, "create_thin 0")
        thin = Target(
            start_sectors=0, length_sectors=length, target_type="thin", params=f"{pool_node} 0"
        )
        node = make(control, "t-thin", thin, readonly=False).node
        number = control.info("t-pool").event_number
        with pytest.raises(CallError, match="deadline"):
            control.wait_event("t-pool", number, within(0.2))

        def write() -> None:
            with open(node, "r+b", buffering=0) as file:
                file.write(b"x" * 4 * 65536)
                os.fsync(file.fileno())

        thread = threading.Timer(0.2, write)
        thread.start()
        assert control.wait_event("t-pool", number, within(10)).event_number > number
        thread.join()
        devices.remove_device(control, "t-thin", within(5))
        devices.remove_device(control, "t-pool", within(5))


def test_wait_event_ends_when_the_device_goes(control: Control, disk: str, within: Within) -> None:
    info = make(control, "t-going", linear_target(length_bytes=4096, device=disk))
    thread = threading.Timer(0.2, control.remove, ("t-going",))
    thread.start()
    with pytest.raises(OSError, match="No such device"):
        control.wait_event("t-going", info.event_number, within(10))
    thread.join()


def test_events_of_others_do_not_keep_a_waiter_busy(
    control: Control, disk: str, within: Within, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = make(control, "t-quiet", linear_target(length_bytes=4096, device=disk))
    looks = 0
    look = control.info

    def count(name: str) -> DeviceInfo:
        nonlocal looks
        looks += 1
        return look(name)

    def disturb() -> None:
        with Control() as other:
            other.create("t-noise", "u-noise")
            other.remove("t-noise")

    monkeypatch.setattr(control, "info", count)
    thread = threading.Timer(0.1, disturb)
    thread.start()
    with pytest.raises(CallError, match="deadline"):
        control.wait_event("t-quiet", info.event_number, within(0.5))
    thread.join()
    assert 2 <= looks <= 4
    control.remove("t-quiet")


def test_message_answers(control: Control, disk: str, within: Within) -> None:
    """dm-dust answers its messages: a target that can be told to fail blocks."""
    dmbed.run("modprobe", "dm-dust")
    target = Target(start_sectors=0, length_sectors=16, target_type="dust", params=f"{disk} 0 512")
    info = make(control, "t-dust", target, readonly=False)
    control.message("t-dust", 0, "addbadblock 3")
    assert "3" in control.message("t-dust", 0, "queryblock 3")
    control.message("t-dust", 0, "enable")
    with pytest.raises(OSError, match="Input/output error"):
        read_file(info.node, 3 * 512, 512)
    with pytest.raises(OSError, match="DM_TARGET_MSG"):
        control.message("t-dust", 0, "no-such-message")
    devices.remove_device(control, "t-dust", within(5))


def test_control_node_is_made_where_devtmpfs_lacks_it() -> None:
    # a device node works on a file system that was not mounted nodev, so on devtmpfs
    path = Path("/dev/guestagent-test/control")
    with Control(str(path)) as control:
        assert control.version()[0] == 4
    assert path.is_char_device()
    path.unlink()
    path.parent.rmdir()


def test_threads_create_and_remove_at_once(control: Control, disk: str, within: Within) -> None:
    def work(number: int) -> None:
        for turn in range(5):
            name = f"t-thread-{number}-{turn}"
            info = make(control, name, linear_target(length_bytes=4096, device=disk))
            assert len(read_file(info.node)) == 4096
            devices.remove_device(control, name, within(10))

    at_once(work, range(4))


def test_the_interpreter_runs_while_the_kernel_works(
    control: Control, disk: str, within: Within
) -> None:
    """A suspend waits for reads under way, here delayed by 0.4 s; other threads must not."""
    dmbed.run("modprobe", "dm-delay")
    target = Target(start_sectors=0, length_sectors=8, target_type="delay", params=f"{disk} 0 400")
    # on a suspend of its own the target would give its reads free at once
    slow = make(control, "t-slow", target)
    info = make(control, "t-above", linear_target(length_bytes=4096, device=slow.dev))
    reader = threading.Thread(target=read_file, args=(info.node, 0, 4096))
    reader.start()
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.005):
            ticks.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    ticker.start()
    time.sleep(0.05)  # no event tells that the read has reached the device
    started = time.monotonic()
    control._call(dmioctl.DM_DEV_SUSPEND, "t-above", flags=dmioctl.DM_SUSPEND_FLAG)
    ended = time.monotonic()
    stop.set()
    ticker.join()
    control.resume("t-above")
    reader.join()
    assert ended - started > 0.2
    assert len([tick for tick in ticks if started < tick < ended]) > 10
    devices.remove_device(control, "t-above", within(5))
    devices.remove_device(control, "t-slow", within(5))


def test_describe_says_what_info_table_and_status_say(control: Control, disk: str) -> None:
    make(control, "t", linear_target(length_bytes=1 << 20, device=disk, offset_bytes=0))
    assert control.describe("t") == (control.info("t"), control.table("t"), control.status("t"))
    control.remove("t")
