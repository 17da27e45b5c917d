"""A pool on virtio disks, made in one machine and taken up in another, by our own boot image."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from guestagent.api import VirtioBlkDevice
from guestagent.api.thin import PoolOpen, VolumeCreate, VolumeMount
from guestagent.host.client import GuestAgent
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.machine.qemu import DiskSpec, Machine, MachineSpec
from vsock.deadline import Deadline
from vsock.errors import CallError

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache"
BOOT_SECONDS = 60.0
FEATURES = ("virtio-blk", "vsock", "thin", "mkfs-ext4", "mkfs-xfs")
MIB = 1024**2
DISKS = {"meta": 4 * MIB, "data": 256 * MIB}
Boot = Callable[[], AbstractContextManager[GuestAgent]]


@pytest.fixture(scope="module")
def initrd(kernel: Kernel) -> Path:
    spec = InitramfsSpec(kernel=kernel, features=FEATURES)
    return build_initramfs(spec, cache_dir=CACHE_DIR).path


@pytest.fixture
def booted(kernel: Kernel, initrd: Path, tmp_path: Path) -> Boot:
    """A factory of machines on the same two disks, each as a context of a handle on its agent."""
    disks = []
    for name, size_bytes in DISKS.items():
        path = tmp_path / f"{name}.img"
        with path.open("wb") as file:
            file.truncate(size_bytes)
        disks.append(DiskSpec(path=path, serial=name, readonly=False))

    @contextmanager
    def boot() -> Iterator[GuestAgent]:
        spec = MachineSpec(kernel=kernel.image, initrd=initrd, memory_mib=384, disks=tuple(disks))
        with Machine(spec, cache_dir=CACHE_DIR) as machine:
            address = machine.agent_address()
            with GuestAgent(address, connect_seconds=BOOT_SECONDS) as guest:
                yield guest
                guest.shutdown()
            with closing(Deadline(BOOT_SECONDS)) as deadline:
                assert machine.wait(deadline) == 0

    return boot


def pool(adopt: str) -> PoolOpen:
    return PoolOpen(
        pool_id="p",
        metadata_device=VirtioBlkDevice(serial="meta"),
        data_device=VirtioBlkDevice(serial="data"),
        adopt=adopt,
    )


def test_pool_outlives_its_machine(
    booted: Boot,
) -> None:
    with booted() as guest:
        assert "dm-thin-pool" in guest.hello.features
        assert guest.pool_open(pool("never")).created
        for filesystem in ("ext4", "xfs"):
            request = VolumeCreate(
                pool_id="p", volume_id=filesystem, size_bytes=400 * MIB, filesystem=filesystem
            )
            guest.volume_create(request)
            path = f"/run/volumes/{filesystem}"
            guest.volume_mount(VolumeMount(pool_id="p", volume_id=filesystem, path=path))
            guest.volume_grow("p", filesystem, 800 * MIB)
        guest.volume_snapshot("p", "copy", "xfs")
        # two file systems of the same uuid are mounted beside each other
        guest.volume_mount(VolumeMount(pool_id="p", volume_id="copy", path="/run/volumes/copy"))
        assert guest.volume_trim("p", "xfs").trimmed_bytes > 600 * MIB
        used = guest.pool_status("p").data.used_bytes
    with booted() as guest:
        with pytest.raises(CallError) as caught:
            guest.pool_open(pool("never"))
        assert caught.value.code == "conflict"
        report = guest.pool_open(pool("matching"))
        assert (report.volumes, report.transaction_id) == (3, 5)
        assert report.data.used_bytes <= used + 4 * MIB
        for each in guest.volume_list("p"):
            assert each.size_bytes == 800 * MIB
            path = f"/run/volumes/{each.volume_id}"
            guest.volume_mount(VolumeMount(pool_id="p", volume_id=each.volume_id, path=path))
        guest.volume_delete("p", "xfs", deferred=True)
        assert guest.volume_unmount("p", "xfs").deleted
