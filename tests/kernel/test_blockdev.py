"""Finding and waiting for real block devices; device events; keys; the kernel log."""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestagent import api
from guestagent.storage import blockdev, syscalls
from guestagent.storage.devicemapper import devices
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.devicemapper.targets import Target, linear_target
from guestagent.storage.fscontext import FsContext
from guestagent.storage.holders import find_holders
from guestagent.storage.keyring import ThreadKey
from guestagent.storage.kmsg import KernelLog
from guestagent.storage.uevents import LOST, UeventSocket
from tests.beds import dmbed
from tests.beds.calls import call_error
from vsock.deadline import Deadline
from vsock.log import log as agent_log

pytestmark = pytest.mark.kernel

Within = Callable[[float], Deadline]


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with dmbed.no_leaks():
        yield


@pytest.fixture
def within() -> Iterator[Within]:
    """Deadlines that are closed at the end of the test."""
    made: list[Deadline] = []

    def make_deadline(seconds: float) -> Deadline:
        made.append(Deadline(seconds))
        return made[-1]

    yield make_deadline
    for deadline in made:
        deadline.close()


@pytest.fixture
def control() -> Iterator[Control]:
    with Control() as control:
        yield control


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "disk"
    image.write_bytes(b"".join(index.to_bytes(512, "big") for index in range(4096)))
    with dmbed.loop_device(image) as node:
        yield node


def test_facts_of_a_loop_device(disk: str) -> None:
    found = blockdev.inspect(os.path.basename(disk))
    assert found == blockdev.inspect(dmbed.dev_of(disk))
    assert (found.node, found.kind, found.readonly) == (disk, "loop", True)
    assert (found.size_bytes, found.logical_block_size) == (2 << 20, 512)
    assert found in blockdev.list_all()
    link = "/dev/guestagent-test-link"
    os.symlink(disk, link)
    assert blockdev.find(api.PathDevice(path=link)) == found
    os.unlink(link)


def test_wait_for_refuses_character_device_at_once(within: Within) -> None:
    with call_error("invalid", match="not a block device"):
        blockdev.wait_for(api.PathDevice(path="/dev/null"), within(10))


def test_an_unbound_loop_device_is_not_ready() -> None:
    free = dmbed.run("losetup", "-f").strip()
    assert blockdev.find(api.PathDevice(path=free)) is None


def test_a_device_that_appears_ends_the_wait(control: Control, disk: str, within: Within) -> None:
    control.create("t-late", "u-late", 400)
    control.load_table("t-late", [linear_target(length_bytes=8192, device=disk)], readonly=True)
    appeared: list[float] = []

    def appear() -> None:
        appeared.append(time.monotonic())
        control.resume("t-late")

    assert blockdev.find(api.PathDevice(path="/dev/dm-400")) is None  # size 0 before its resume
    thread = threading.Timer(0.3, appear)
    thread.start()
    found = blockdev.wait_for(api.PathDevice(path="/dev/dm-400"), within(10))
    ended = time.monotonic()
    thread.join()
    assert (found.name, found.kind, found.size_bytes) == ("dm-400", "dm", 8192)
    assert found.readonly
    assert ended - appeared[0] < 0.25  # by the event: the look again takes a second
    devices.remove_device(control, "t-late", within(5))


def test_a_device_is_waited_for_until_the_kernel_opens_it(
    disk: str, tmp_path: Path, within: Within
) -> None:
    # a disk has its node and its directory in sysfs a moment before it can be opened
    facts = tmp_path / "devices/pmem9"
    (facts / "queue").mkdir(parents=True)
    (tmp_path / "class/block").mkdir(parents=True)
    (tmp_path / "class/block/pmem9").symlink_to("../../devices/pmem9")
    values = {"dev": "259:4077", "size": "4096", "ro": "0", "queue/logical_block_size": "512"}
    for name, text in values.items():
        (facts / name).write_text(text + "\n")
    wanted, sys_root = api.PmemDevice(number=9), str(tmp_path)
    try:
        assert blockdev.find(wanted, sys_root=sys_root) is not None
        with call_error("timeout"):
            blockdev.wait_for(wanted, within(0.1), sys_root=sys_root)
        (facts / "dev").write_text(dmbed.dev_of(disk))
        found = blockdev.wait_for(wanted, within(10), sys_root=sys_root)
        assert dmbed.dev_of(found.node) == dmbed.dev_of(disk)
    finally:
        os.unlink("/dev/pmem9")


def test_a_device_that_stays_away_is_told_with_what_is_there(disk: str, within: Within) -> None:
    with call_error("timeout", object="pmem 7") as caught:
        blockdev.wait_for(api.PmemDevice(number=7), within(0.7))
    assert f"{os.path.basename(disk)} (loop, 2097152 bytes)" in caught.value.message
    deadline = within(30)
    threading.Timer(0.1, deadline.cancel).start()
    with call_error("cancelled"):
        blockdev.wait_for(api.VirtioBlkDevice(serial="none"), deadline)


def test_a_missing_node_is_made(disk: str, within: Within) -> None:
    found = blockdev.inspect(os.path.basename(disk))
    os.rename(disk, f"{disk}-away")
    try:
        blockdev.ensure_node(found.node, found.dev)
        assert dmbed.dev_of(disk) == found.dev
    finally:
        os.rename(f"{disk}-away", disk)


@pytest.mark.parametrize("theirs", ["the same", "another"])
def test_mknod_race_with_another_process_accepts_only_the_same_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    node, number = str(tmp_path / "dir/node"), os.makedev(7, 1)
    mknod = os.mknod
    made: list[int] = []

    def late(path: str, mode: int, device: int) -> None:
        if not made:
            made.append(device)
            mknod(path, mode, device if theirs == "the same" else device + 1)
        mknod(path, mode, device)

    monkeypatch.setattr(os, "mknod", late)
    blockdev.ensure_node(node, "7:1")
    assert os.stat(node).st_rdev == number == made[0]


def test_holders_of_a_device(control: Control, disk: str, within: Within) -> None:
    target = linear_target(length_bytes=8192, device=disk)
    info = devices.create_device(control, name="t-hold", uuid="u-hold", targets=[target])
    assert blockdev.holders(dmbed.dev_of(disk)) == (os.path.basename(info.node),)
    fd = os.open(disk, os.O_RDONLY)
    found = find_holders(dmbed.dev_of(disk), within(10))
    os.close(fd)
    assert [(holder.kind, holder.name.split("[")[-1]) for holder in found] == [
        ("dm", "t-hold"),
        ("process", f"{os.getpid()}]"),
    ]
    assert blockdev.holders(info.dev) == ()
    devices.remove_device(control, "t-hold", within(5))
    assert find_holders(dmbed.dev_of(disk), within(10)) == ()


def test_search_for_holders_asks_no_server_of_a_file_system(
    disk: str, tmp_path: Path, within: Within
) -> None:
    dmbed.run("modprobe", "fuse")
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)  # which answers no request
    found: list[object] = []
    with FsContext("fuse") as context:
        for key, value in {"rootmode": "40000", "user_id": "0", "group_id": "0"}.items():
            context.set(key, value)
        context.set("fd", str(server))
        context.create("fuse")
        root = context.mount(0, "fuse")
    search = threading.Thread(
        target=lambda: found.append(find_holders(dmbed.dev_of(disk), within(60)))
    )
    search.start()
    try:
        search.join(30)
        assert found == [()]
    finally:
        os.close(server)  # ends what waits for an answer
        search.join()
        os.close(root)


def test_a_loop_device_holds_the_file_system_of_its_image(tmp_path: Path, within: Within) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    number = os.stat(image).st_dev
    dev = f"{os.major(number)}:{os.minor(number)}"
    with dmbed.loop_device(image) as node:
        found = find_holders(dev, within(20))
        assert ("loop", node) in [(holder.kind, holder.name) for holder in found]


def test_swap_holds_its_device(tmp_path: Path, within: Within) -> None:
    image = tmp_path / "swap"
    image.write_bytes(bytes(2 << 20))
    with dmbed.loop_device(image, readonly=False) as node:
        dmbed.run("mkswap", node)
        dmbed.run("swapon", node)
        found = find_holders(dmbed.dev_of(node), within(10))
        dmbed.run("swapoff", node)
    assert [(holder.kind, holder.name) for holder in found] == [("swap", node)]


def test_scsi_disks_are_found_and_unplugged(within: Within) -> None:
    """scsi_debug stands for a host's disk; deleting it is what follows a host's unplug."""
    with dmbed.scsi_debug("dev_size_mb=8", "max_luns=1", "num_parts=1"):
        _find_and_unplug(within)


def _find_and_unplug(within: Within) -> None:
    hosts = os.listdir("/sys/class/scsi_host")
    device = api.ScsiDevice(controller=int(hosts[0].removeprefix("host")), lun=0)
    disk = blockdev.wait_for(device, within(10))
    assert (disk.kind, disk.size_bytes) == ("scsi", 8 << 20)
    partition = blockdev.wait_for(device.replace(partition=1), within(10))
    assert partition.name == f"{disk.name}1"
    assert 0 < partition.size_bytes < disk.size_bytes
    assert partition.logical_block_size == disk.logical_block_size
    assert blockdev.find(device.replace(partition=2)) is None
    labels = blockdev.labels(disk.name)
    wwn = Path(f"/sys/class/block/{disk.name}/device/wwid").read_text().strip()
    assert f"naa.{labels[-1]}" == wwn
    assert len(labels) == 2  # and the serial
    for label in labels:
        assert blockdev.find(api.LabelDevice(label=label)) == disk
    unplug = Path(f"/sys/bus/scsi/devices/{device.controller}:0:0:0/delete")
    unplug.write_text("1")
    assert blockdev.find(device) is None
    number = agent_log.number
    again = blockdev.wait_for(device, within(10))  # by a rescan of its host
    assert again.size_bytes == disk.size_bytes
    (line,) = agent_log.since(number)[0]
    assert line.fields["written"] == "0 0 0"
    unplug.write_text("1")
    number = agent_log.number
    by_label = blockdev.wait_for(api.LabelDevice(label=labels[0]), within(10))
    assert by_label.size_bytes == disk.size_bytes
    assert "- - -" in [line.fields["written"] for line in agent_log.since(number)[0]]
    unplug.write_text("1")


def test_uevent_sent_by_a_process_is_ignored(disk: str, within: Within) -> None:
    """A process with the privilege sends an event of its own; only the kernel's arrives."""
    name = os.path.basename(disk)
    forged = f"remove@/block/{name}\0ACTION=remove\0SUBSYSTEM=block\0".encode()
    with (
        UeventSocket() as events,
        socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15) as forger,
    ):
        forger.bind((0, 0))
        assert forger.sendto(forged, (0, 1)) == len(forged)
        Path(f"/sys/block/{name}/uevent").write_text("change")
        within(5).wait([events.fileno()], "wait for the event")
        seen = events.receive()
    assert [(event.action, event.subsystem) for event in seen] == [("change", "block")]
    assert seen[0].fields["DEVNAME"] == name


def test_lost_events_are_marked(disk: str) -> None:
    path = Path(f"/sys/block/{os.path.basename(disk)}/uevent")
    with UeventSocket() as events:
        events._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(100):
            path.write_text("change")
        seen = [event.action for event in events.receive()]
    assert seen.count(LOST) == 1
    assert "change" in seen


def test_a_signature_is_in_the_keyring_for_as_long_as_it_is_needed() -> None:
    signature = bytes(range(256)) * 4

    def search() -> int:
        keyring = syscalls.KEY_SPEC_THREAD_KEYRING
        return syscalls.keyctl(
            syscalls.KEYCTL_SEARCH, keyring, b"user", b"guestagent:t", 0, filename="guestagent:t"
        )

    with ThreadKey("user", "guestagent:t", signature) as description:
        assert description == "guestagent:t"
        assert search() > 0
        elsewhere: list[int | None] = []

        def look() -> None:
            try:
                elsewhere.append(search())
            except OSError as error:
                elsewhere.append(-(error.errno or 0))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert elsewhere == [-errno.ENOKEY]
    with pytest.raises(OSError, match="keyctl") as caught:
        search()
    assert caught.value.errno in (errno.ENOKEY, errno.EKEYREVOKED)


def test_kernel_lines_since_a_mark(control: Control) -> None:
    log = KernelLog()
    Path("/dev/kmsg").write_text("<6>not from the kernel")
    mark = log.mark()
    target = Target(start_sectors=0, length_sectors=8, target_type="verity", params="1 bad")
    with pytest.raises(devices.DmStepError):
        devices.create_device(control, name="t-log", uuid="u-log", targets=[target])
    lines = log.since(mark)
    assert any("verity" in line for line in lines)
    assert not any("not from the kernel" in line for line in lines)
    assert log.since(log.mark()) == ()
    log.close()
    assert log.since(mark) == lines
