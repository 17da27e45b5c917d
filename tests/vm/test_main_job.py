"""The main job in a real machine: the built initramfs, /dev/pmem0, disks, vsock from the host."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from guestagent.api import (
    Event,
    LayerReport,
    LayersMount,
    LayerSpec,
    LayersUnmount,
    OverlaySpec,
    PmemDevice,
    ScsiDevice,
    TmpfsScratch,
    Verity,
    VirtioBlkDevice,
)
from guestagent.api.devices import Device
from guestagent.host.client import GuestAgent
from guestagent.storage.verity import VerityTerms
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import cached_kernel
from rootfs.image.images import build_image
from rootfs.machine.qemu import DiskSpec, Machine, MachineSpec, PmemSpec
from rootfs.pack.manifest import ManifestLayer, layer_spec
from rootfs.pack.pack import Pack
from rootfs.verity.formatter import FormatResult, format_image
from scripts.uml_bed.kernels import kernel_cache
from tests.beds.calls import call_error
from vsock.deadline import Deadline

CACHE = Path(__file__).resolve().parents[2] / ".cache"
FEATURES = ("pmem", "virtio-blk", "scsi", "verity", "erofs", "squashfs", "overlay", "vsock")
LAYERS = ("top", "middle", "bottom")


def write_tree(root: Path, layer_id: str) -> Path:
    """Make a tree with a file of its own, one that all layers have, and some megabytes."""
    (root / "dir").mkdir(parents=True)
    (root / "who").write_text(layer_id)
    (root / f"dir/{layer_id}").write_text(layer_id * 1000)
    block = hashlib.sha256(layer_id.encode()).digest()
    (root / f"{layer_id}.bin").write_bytes(block * (2 << 15))
    return root


def build_layer(directory: Path, layer_id: str) -> tuple[Path, FormatResult]:
    image = directory / f"{layer_id}.erofs"
    built = build_image(write_tree(directory / layer_id, layer_id), image)
    return image, format_image(
        image, terms=VerityTerms(salt=built.verity_salt), uuid=built.verity_uuid
    )


class Bed:
    """A machine with its agent, and what is attached to it."""

    def __init__(self, machine: Machine, guest: GuestAgent, layers: tuple[ManifestLayer, ...]):
        self.machine = machine
        self.guest = guest
        self.layers = {layer.layer_id: layer for layer in layers}
        self.disk: tuple[Path, FormatResult]

    def spec(self, layer_id: str) -> LayerSpec:
        return LayerSpec.from_wire(layer_spec(self.layers[layer_id], {"kind": "pmem", "number": 0}))

    def disk_spec(self, layer_id: str, device: Device) -> LayerSpec:
        digest = self.disk[1].parameters.root_digest
        return LayerSpec(
            layer_id=layer_id,
            device=device,
            filesystem="erofs",
            verity=Verity(root_digest=digest),
        )


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    directory = tmp_path_factory.mktemp("main-job")
    with Pack.create(directory / "pack.img") as pack:
        for position, layer_id in enumerate(LAYERS):
            image, formatted = build_layer(directory, layer_id)
            pack.add(image, layer_id, verity=formatted.parameters, position=position)
        layers = pack.layers
    disk = build_layer(directory, "disk")
    disk[0].write_bytes(
        disk[0].read_bytes().ljust(-(-disk[0].stat().st_size // 4096) * 4096, b"\0")
    )
    kernel = cached_kernel(kernel_cache())
    initramfs = build_initramfs(InitramfsSpec(kernel=kernel, features=FEATURES))
    spec = MachineSpec(
        kernel=kernel.image,
        initrd=initramfs.path,
        memory_mib=768,
        pmem=(PmemSpec(path=directory / "pack.img"),),
        disks=(
            DiskSpec(path=disk[0], serial="blk-layer"),
            DiskSpec(path=disk[0], serial="scsi-layer", bus="scsi", lun=3),
        ),
        pcie_root_ports=2,
        pmem_slots=1,
    )
    with Machine(spec) as machine:
        with GuestAgent(machine.agent_address(), connect_seconds=120) as guest:
            bed = Bed(machine, guest, layers)
            bed.disk = disk
            yield bed
            guest.shutdown("poweroff")
        with contextlib.closing(Deadline(30)) as deadline:
            assert machine.wait(deadline) == 0
        assert "Kernel panic" not in machine.console.read()


@pytest.fixture(autouse=True)
def _nothing_left(bed: Bed) -> Iterator[None]:
    yield
    assert bed.guest.layer_list() == ()
    assert bed.guest.overlay_list() == ()
    assert bed.guest.dm_list().devices == ()
    assert bed.guest.status().state == "ready"


def test_the_agent_is_the_child_of_pid_one(bed: Bed) -> None:
    assert bed.guest.hello.boot["pid1"] is True
    assert bed.guest.status().pid != 1
    assert {"dm-linear", "dm-verity", "fs-erofs", "overlay-mount"} <= set(bed.guest.hello.features)


def check_readback(report: LayerReport, layer: ManifestLayer) -> None:
    """See that the kernel has the tables of dm-verity on dm-linear on /dev/pmem0, and the mount."""
    assert layer.verity is not None
    verity, linear = report.dm
    root = layer.verity.root_digest.hex()
    assert linear.name == f"dm-linear-pmem0-{layer.offset_bytes}-{layer.size_bytes}"
    assert linear.table.startswith(f"0 {layer.size_bytes // 512} linear 259:")
    assert linear.table.endswith(f" {layer.offset_bytes // 512}")
    assert verity.name == f"dm-verity-pmem0-{root}"
    assert verity.table == (
        f"0 {layer.verity.data_blocks * 8} verity 1 {linear.dev} {linear.dev} 4096 4096 "
        f"{layer.verity.data_blocks} {layer.verity.hash_start_block} sha256 {root} "
        f"{layer.verity.salt.hex()}"
    )
    assert verity.status.split()[0] == "V"  # newer kernels say more
    assert verity.deferred_remove
    assert report.dev == verity.dev


def test_a_layer_is_verity_on_linear_on_pmem(bed: Bed) -> None:
    check_readback(bed.guest.layer_mount(bed.spec("top")), bed.layers["top"])
    assert bed.guest.layer_mount(bed.spec("top")).already
    bed.guest.layer_unmount("top")


def test_a_layer_is_verity_on_linear_on_virtio_pmem(bed: Bed) -> None:
    """Of a pack that the machine cannot change: its driver knows no read-only device, but the
    agent sets it read-only before use."""
    pack = bed.machine.spec.pmem[0]
    before = pack.path.read_bytes()
    spec = replace(bed.machine.spec, pmem=(replace(pack, kind="virtio"),), disks=(), pmem_slots=0)
    with Machine(spec) as machine:
        with GuestAgent(machine.agent_address(), connect_seconds=120) as guest:
            report = guest.layer_mount(bed.spec("top"))
            check_readback(report, bed.layers["top"])
            assert (report.state, report.device_node) == ("mounted", "/dev/pmem0")
            (device,) = (each for each in guest.fs_list_devices() if each.node == "/dev/pmem0")
            assert (device.kind, device.size_bytes) == ("pmem", len(before))
            assert guest.fs_blockdev_getro("/dev/pmem0")
            assert guest.fs_read_file("/who", layer_id="top") == b"top"
            assert guest.layer_verify("top").corrupt_blocks == ()
            assert guest.layer_unmount("top").unmounted == ("/run/layers/top",)
            assert guest.dm_list().devices == ()
            assert guest.status().problems == ()
            guest.shutdown("poweroff")
        with contextlib.closing(Deadline(30)) as deadline:
            assert machine.wait(deadline) == 0
    assert pack.path.read_bytes() == before


def test_a_batch_with_its_overlay(bed: Bed) -> None:
    overlay = OverlaySpec(
        overlay_id="root", layers=LAYERS, scratch=TmpfsScratch(size_bytes=1 << 20)
    )
    request = LayersMount(layers=tuple(map(bed.spec, LAYERS)), overlay=overlay)
    reply = bed.guest.layers_mount(request)
    assert [layer.layer_id for layer in reply.layers] == list(LAYERS)
    assert reply.overlay is not None
    assert reply.overlay.lowerdirs == tuple(f"/run/layers/{layer_id}" for layer_id in LAYERS)
    with call_error("busy", match="in use") as caught:
        bed.guest.layer_unmount("middle")
    assert "overlay root" in (caught.value.hint or "")
    bed.guest.layers_unmount(LayersUnmount(layers=LAYERS, overlay="root"))


@pytest.mark.parametrize(
    "device",
    [VirtioBlkDevice(serial="blk-layer"), ScsiDevice(controller=0, lun=3)],
    ids=["virtio-blk", "scsi"],
)
def test_a_layer_on_a_disk(bed: Bed, device: VirtioBlkDevice | ScsiDevice) -> None:
    report = bed.guest.layer_mount(bed.disk_spec("disk", device))
    assert [dm.target_type for dm in report.dm] == ["verity"]
    assert bed.guest.layer_verify("disk").corrupt_blocks == ()
    bed.guest.layer_unmount("disk")


def test_a_wrong_digest_is_refused(bed: Bed) -> None:
    spec = bed.spec("top")
    assert spec.verity is not None
    with call_error("integrity"):
        bed.guest.layer_mount(spec.replace(verity=spec.verity.replace(root_digest=bytes(32))))


def test_a_request_waits_for_a_disk_that_is_plugged_in(bed: Bed) -> None:
    reports: list[LayerReport] = []
    events: list[Event] = []
    spec = bed.disk_spec("late", VirtioBlkDevice(serial="late"))
    bed.guest.subscribe(events.append)
    with GuestAgent(bed.machine.agent_address()) as second:
        waiting = threading.Thread(target=lambda: reports.append(second.layer_mount(spec)))
        waiting.start()
        with contextlib.closing(Deadline(30)) as deadline:
            disk = DiskSpec(path=bed.disk[0], serial="late")
            name = bed.machine.plug_disk(disk, deadline, root_port=0)
            waiting.join(60)
            assert reports
            assert reports[0].state == "mounted"
            bed.guest.layer_unmount("late")
            bed.machine.unplug(name, deadline)


def test_a_request_waits_for_an_nvdimm_that_is_plugged_in(bed: Bed, tmp_path: Path) -> None:
    image = tmp_path / "nvdimm.img"
    data = bed.disk[0].read_bytes()
    image.write_bytes(data.ljust(-(-len(data) // (2 << 20)) * (2 << 20), b"\0"))
    spec = bed.disk_spec("late-pmem", PmemDevice(number=1))
    with GuestAgent(bed.machine.agent_address()) as second:
        reports: list[LayerReport] = []
        waiting = threading.Thread(target=lambda: reports.append(second.layer_mount(spec)))
        waiting.start()
        with contextlib.closing(Deadline(30)) as deadline:
            bed.machine.plug_pmem(PmemSpec(path=image), deadline)
        waiting.join(60)
    assert reports
    assert reports[0].device_node == "/dev/pmem1"
    assert reports[0].state == "mounted"
    bed.guest.layer_unmount("late-pmem")


def test_a_disk_that_is_pulled_out_under_its_layer(bed: Bed) -> None:
    lost = threading.Event()

    def on_event(event: Event) -> None:
        if event.kind == "layer_device_lost" and event.layer_id == "pulled":
            lost.set()

    bed.guest.subscribe(on_event)
    with contextlib.closing(Deadline(60)) as deadline:
        disk = DiskSpec(path=bed.disk[0], serial="pulled")
        name = bed.machine.plug_disk(disk, deadline, root_port=1)
        bed.guest.layer_mount(bed.disk_spec("pulled", VirtioBlkDevice(serial="pulled")))
        bed.machine.unplug(name, deadline)
        assert lost.wait(10)
    assert bed.guest.layer_get("pulled").state == "device_lost"
    bed.guest.layer_unmount("pulled", force=True)


def test_a_disk_that_never_comes(bed: Bed) -> None:
    spec = bed.disk_spec("never", VirtioBlkDevice(serial="never"))
    with call_error("timeout", match="blk-layer", step="device"):
        bed.guest.layer_mount(spec, deadline_ms=1500)
