"""Finding block devices in made-up sysfs trees."""

from collections.abc import Callable
from pathlib import Path

import pytest

from guestagent.api import (
    LabelDevice,
    PathDevice,
    PmemDevice,
    ScsiDevice,
    VirtioBlkDevice,
    VmbusScsiDevice,
)
from guestagent.api.devices import Device, is_label
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice
from tests.beds.calls import call_error
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import Line, log

AddDisk = Callable[..., Path]
GUID = "f8b3781a-1e82-4818-a1c3-63d806ec15bb"


@pytest.fixture
def sys_root(tmp_path: Path) -> Path:
    for path in ("class/block", "dev/block", "block", "devices"):
        (tmp_path / path).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def add_disk(sys_root: Path) -> AddDisk:
    """``add_disk(name, dev, sectors=8, ...)``: a disk, or with ``parent`` a partition of one."""

    def add(
        name: str,
        dev: str,
        sectors: int = 8,
        *,
        parent: Path | None = None,
        partition: int = 0,
        readonly: bool = False,
        block_size: int = 512,
        serial: str = "",
    ) -> Path:
        path = (parent or sys_root / "devices") / name
        path.mkdir()
        (path / "dev").write_text(f"{dev}\n")
        (path / "size").write_text(f"{sectors}\n")
        (path / "ro").write_text(f"{int(readonly)}\n")
        if parent is None:
            (path / "queue").mkdir()
            (path / "queue/logical_block_size").write_text(f"{block_size}\n")
            (path / "holders").mkdir()
        else:
            (path / "partition").write_text(f"{partition}\n")
        if serial:
            (path / "serial").write_text(serial)
        (sys_root / "class/block" / name).symlink_to(path)
        (sys_root / "dev/block" / dev).symlink_to(path)
        return path

    return add


def find(device: Device, sys_root: Path) -> BlockDevice | None:
    return blockdev.find(device, sys_root=str(sys_root))


def test_facts(sys_root: Path, add_disk: AddDisk) -> None:
    add_disk("pmem0", "259:0", 4096, readonly=True, block_size=4096)
    expected = BlockDevice(
        node="/dev/pmem0",
        dev="259:0",
        name="pmem0",
        size_bytes=4096 * 512,
        logical_block_size=4096,
        readonly=True,
        serial=None,
        kind="pmem",
    )
    assert find(PmemDevice(number=0), sys_root) == expected
    assert blockdev.inspect("259:0", sys_root=str(sys_root)) == expected
    assert find(PmemDevice(number=1), sys_root) is None
    with pytest.raises(FileNotFoundError):
        blockdev.inspect("pmem1", sys_root=str(sys_root))


def test_kinds_and_odd_names(sys_root: Path, add_disk: AddDisk) -> None:
    names = ("pmem12", "vda", "vdaa", "sdb", "sr0", "dm-3", "loop7", "nvme0n1", "dm", "cciss!c0d0")
    for minor, name in enumerate(names):
        add_disk(name, f"8:{minor}")
    found = {
        disk.name: (disk.kind, disk.node) for disk in blockdev.list_all(sys_root=str(sys_root))
    }
    assert found == {
        "pmem12": ("pmem", "/dev/pmem12"),
        "vda": ("virtio-blk", "/dev/vda"),
        "vdaa": ("virtio-blk", "/dev/vdaa"),
        "sdb": ("scsi", "/dev/sdb"),
        "sr0": ("scsi", "/dev/sr0"),
        "dm-3": ("dm", "/dev/dm-3"),
        "loop7": ("loop", "/dev/loop7"),
        "nvme0n1": ("other", "/dev/nvme0n1"),
        "dm": ("other", "/dev/dm"),
        "cciss!c0d0": ("other", "/dev/cciss/c0d0"),
    }


def test_virtio_by_serial(sys_root: Path, add_disk: AddDisk) -> None:
    add_disk("vda", "254:0", serial="layer-1")
    add_disk("vdb", "254:16", serial="layer-10")
    add_disk("vdc", "254:32")
    add_disk("sda", "8:0", serial="layer-3")
    for serial, name in (("layer-1", "vda"), ("layer-10", "vdb")):
        found = find(VirtioBlkDevice(serial=serial), sys_root)
        assert found is not None
        assert (found.name, found.serial) == (name, serial)
    for serial in ("layer", "layer-3", "layer-2"):
        assert find(VirtioBlkDevice(serial=serial), sys_root) is None
    add_disk("vdd", "254:48", serial="layer-1")
    with call_error("conflict", match="vda and vdd"):
        find(VirtioBlkDevice(serial="layer-1"), sys_root)


def add_names(
    disk: Path, *, serial: str | None = None, wwid: str = "", hardware: Path | None = None
) -> None:
    """Give a disk the names that SCSI has: the page with the serial, and the WWN."""
    hardware = hardware or disk.parent / f"hardware-of-{disk.name}"
    hardware.mkdir(parents=True, exist_ok=True)
    (disk / "device").symlink_to(hardware)
    if serial is not None:
        page = serial.encode()
        (hardware / "vpd_pg80").write_bytes(b"\0\x80" + len(page).to_bytes(2, "big") + page)
    if wwid:
        (hardware / "wwid").write_text(f"{wwid}\n")


def add_namespace(sys_root: Path, disk: Path, number: int, *, name: str, dimms: int) -> None:
    """Put a pmem disk on a namespace of a region of so many DIMMs, of one bus."""
    bus = sys_root / "devices/ndbus0"
    region = bus / f"region{number}"
    (region / "namespace0.0").mkdir(parents=True)
    (region / "namespace0.0/alt_name").write_text(f"{name}\n")
    (region / "mappings").write_text(f"{dimms}\n")
    for dimm in range(dimms):
        (region / f"mapping{dimm}").write_text(f"nmem{number}{dimm},0,4096,0\n")
        nfit = bus / f"nmem{number}{dimm}/nfit"
        nfit.mkdir(parents=True)
        (nfit / "id").write_text(f"8680-0000000{dimm}\n")
    (disk / "device").symlink_to(region / "namespace0.0")


def test_disks_by_label(sys_root: Path, add_disk: AddDisk) -> None:
    add_disk("vda", "254:0", serial="base")
    add_names(add_disk("sda", "8:0"), serial="  disk_2 ", wwid="naa.5000c500a1b2c3d4")
    add_names(add_disk("sdb", "8:16"), serial="", wwid="t10.QEMU    QEMU HARDDISK   x")
    add_namespace(sys_root, add_disk("pmem0", "259:0"), 0, name="layers", dimms=2)
    add_namespace(sys_root, add_disk("pmem1", "259:1"), 1, name="", dimms=0)
    expected = {
        "vda": ("base",),
        "sda": ("disk_2", "5000c500a1b2c3d4"),
        "sdb": (),
        "pmem0": ("layers", "8680-00000000", "8680-00000001"),
        "pmem1": (),
    }
    for name, labels in expected.items():
        assert blockdev.labels(name, sys_root=str(sys_root)) == labels
        for label in labels:
            found = find(LabelDevice(label=label), sys_root)
            assert found is not None
            assert found.name == name
    for label in ("bas", "base1", "naa"):
        assert find(LabelDevice(label=label), sys_root) is None


def test_a_disk_with_a_map_of_its_own_has_the_names_of_its_namespace(
    sys_root: Path, add_disk: AddDisk
) -> None:
    disk = add_disk("pmem0", "259:0")
    add_namespace(sys_root, disk, 0, name="layers", dimms=1)
    pfn = sys_root / "devices/ndbus0/region0/pfn0.1"
    pfn.mkdir()
    (pfn / "namespace").write_text("namespace0.0\n")
    (disk / "device").unlink()
    (disk / "device").symlink_to(pfn)
    assert blockdev.labels("pmem0", sys_root=str(sys_root)) == ("layers", "8680-00000000")


def test_a_label_of_two_disks_is_a_conflict_that_names_both(
    sys_root: Path, add_disk: AddDisk
) -> None:
    add_disk("vdb", "254:16", serial="same")
    add_names(add_disk("sda", "8:0"), serial="same")
    with call_error("conflict", match="sda and vdb all have label 'same'"):
        find(LabelDevice(label="same"), sys_root)


@pytest.mark.parametrize("label", ["", "a" * 65, "a b", "a.b", "a/b", "\u00e9", "a\n", "../x"])
def test_invalid_label_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="label must be"):
        LabelDevice(label=label)
    assert not is_label(label)


def test_disks_are_in_the_order_in_which_their_hardware_came(
    sys_root: Path, add_disk: AddDisk
) -> None:
    """Directories are numbered here as in sysfs: a later one has a larger number."""
    hardware = [sys_root / f"devices/{number}" for number in range(3)]
    made = sorted(hardware, key=lambda path: (path.mkdir(), path.stat().st_ino)[1])
    for name, dev, place in (("vda", "254:0", 2), ("vdb", "254:16", 0), ("sda", "8:0", 1)):
        add_names(add_disk(name, dev), hardware=made[place])
    disk = sys_root / "devices/vdb"
    add_disk("vdb1", "254:17", parent=disk, partition=1)
    order = sorted(
        ("sda", "vda", "vdb", "vdb1"),
        key=lambda name: (blockdev.order_of(name, sys_root=str(sys_root)), name),
    )
    assert order == ["vdb", "vdb1", "sda", "vda"]


def test_a_disk_of_no_size_is_not_there_yet(sys_root: Path, add_disk: AddDisk) -> None:
    path = add_disk("vda", "254:0", 0, serial="s")
    assert find(VirtioBlkDevice(serial="s"), sys_root) is None
    (path / "size").write_text("8\n")
    assert find(VirtioBlkDevice(serial="s"), sys_root) is not None


def test_a_device_that_is_half_gone_is_not_there(sys_root: Path, add_disk: AddDisk) -> None:
    path = add_disk("vda", "254:0", serial="s")
    (path / "ro").unlink()
    assert find(VirtioBlkDevice(serial="s"), sys_root) is None
    assert blockdev.list_all(sys_root=str(sys_root)) == ()


def test_scsi_disks_and_partitions(sys_root: Path, add_disk: AddDisk) -> None:
    disk = add_disk("sdb", "8:16", 1000, block_size=4096)
    add_disk("sdb1", "8:17", 300, parent=disk, partition=1)
    add_disk("sdb12", "8:28", 400, parent=disk, partition=12)
    (sys_root / "bus/scsi/devices/1:0:0:5/block/sdb").mkdir(parents=True)
    sizes = {}
    for partition in (0, 1, 2, 12):
        found = find(ScsiDevice(controller=1, lun=5, partition=partition), sys_root)
        sizes[partition] = found and (found.name, found.size_bytes, found.logical_block_size)
    assert sizes == {
        0: ("sdb", 1000 * 512, 4096),
        1: ("sdb1", 300 * 512, 4096),
        2: None,
        12: ("sdb12", 400 * 512, 4096),
    }
    assert find(ScsiDevice(controller=0, lun=5), sys_root) is None
    (sys_root / "bus/scsi/devices/1:0:0:6/block").mkdir(parents=True)
    assert find(ScsiDevice(controller=1, lun=6), sys_root) is None


def test_scsi_disks_of_a_vmbus_device(sys_root: Path, add_disk: AddDisk) -> None:
    """As hv_storvsc shows them: the controller's device has a host, whose number is not known."""
    disk = add_disk("sdc", "8:32", 1000)
    add_disk("sdc1", "8:33", 300, parent=disk, partition=1)
    (sys_root / "bus/scsi/devices/3:0:0:5/block/sdc").mkdir(parents=True)
    (sys_root / "bus/scsi/devices/0:0:0:5/block/sdx").mkdir(parents=True)
    device = VmbusScsiDevice(guid=GUID.upper(), lun=5)
    assert find(device, sys_root) is None
    controller = sys_root / "bus/vmbus/devices" / GUID
    for name in ("host_info", "driver", "channels"):
        (controller / name).mkdir(parents=True)
    assert find(device, sys_root) is None
    (controller / "host3").mkdir()
    names = [find(device.replace(partition=number), sys_root) for number in (0, 1, 2)]
    assert [found and found.name for found in names] == ["sdc", "sdc1", None]
    assert find(device.replace(lun=6), sys_root) is None
    assert find(device.replace(guid=GUID.replace("f8", "00")), sys_root) is None


def test_a_vmbus_guid_is_one() -> None:
    for guid in ("", "f8b3781a", "../../../../x", "f8b3781a-1e82-4818-a1c3-63d806ec15b/", "-" * 36):
        with pytest.raises(ValueError, match="hexadecimal"):
            VmbusScsiDevice(guid=guid, lun=0)


def test_holders(sys_root: Path, add_disk: AddDisk) -> None:
    disk = add_disk("pmem0", "259:0")
    assert blockdev.holders("259:0", sys_root=str(sys_root)) == ()
    for name in ("dm-1", "dm-0"):
        (disk / "holders" / name).touch()
    assert blockdev.holders("259:0", sys_root=str(sys_root)) == ("dm-0", "dm-1")
    assert blockdev.holders("259:9", sys_root=str(sys_root)) == ()


@pytest.mark.parametrize(
    ("device", "written"),
    [
        (PmemDevice(number=3), {"bus/pci/rescan": "1"}),
        (VirtioBlkDevice(serial="s"), {"bus/pci/rescan": "1"}),
        (ScsiDevice(controller=2, lun=9), {"class/scsi_host/host2/scan": "0 0 9"}),
        (
            PathDevice(path="/dev/nonexistent"),
            {"bus/pci/rescan": "1", "class/scsi_host/host2/scan": "- - -"},
        ),
        (VmbusScsiDevice(guid=GUID, lun=7), {"class/scsi_host/host2/scan": "0 0 7"}),
    ],
)
def test_a_device_that_stays_away_is_looked_for_on_its_bus(
    sys_root: Path,
    device: Device,
    written: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    add_disk: AddDisk,
) -> None:
    monkeypatch.setattr(blockdev, "_RESCAN_AFTER_SECONDS", (0.01,))
    add_disk("vda", "254:0", serial="another")
    (sys_root / "bus/vmbus/devices" / GUID / "host2").mkdir(parents=True)
    switches = [sys_root / "bus/pci/rescan", sys_root / "class/scsi_host/host2/scan"]
    for switch in switches:
        switch.parent.mkdir(parents=True)
        switch.touch()
    told: list[Line] = []
    stop = log.add_sink(told.append)
    deadline = Deadline(0.1)
    with pytest.raises(CallError, match="is not there") as caught:
        blockdev.wait_for(device, deadline, sys_root=str(sys_root))
    deadline.close()
    stop()
    assert caught.value.code == "timeout"
    assert "vda (virtio-blk, 4096 bytes, serial 'another')" in caught.value.message
    found = {str(path.relative_to(sys_root)): path.read_text() for path in switches}
    assert {path: text for path, text in found.items() if text} == written
    logged = {str(line.fields["path"]): line.fields["written"] for line in told}
    assert logged == {f"{sys_root}/{path}": text for path, text in written.items()}


def test_paths() -> None:
    with call_error("invalid", match="not a block device"):
        blockdev.find(PathDevice(path="/dev/null"))
    assert blockdev.find(PathDevice(path="/dev/nonexistent")) is None
