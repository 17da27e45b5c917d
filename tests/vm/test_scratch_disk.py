"""Blank virtio disks as scratches, formatted and encrypted by our own boot image."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from guestagent.api import DeviceScratch, LayerSpec, OverlaySpec, VirtioBlkDevice
from guestagent.host.client import GuestAgent
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.image.images import build_image
from rootfs.machine.qemu import DiskSpec, Machine, MachineSpec, PmemSpec
from rootfs.machine.qemu_command import PMEM_ALIGN_BYTES
from tests.beds.loopbed import sparse_file
from vsock.deadline import Deadline

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache"
BOOT_SECONDS = 60.0
FEATURES = (
    *("pmem", "virtio-blk", "verity", "erofs", "overlay", "vsock"),
    *("mkfs-ext4", "mkfs-xfs", "crypt"),
)
DISKS = {"plain": 16 << 20, "secret": 16 << 20, "xfs": 320 << 20}
EXT4_MAGIC, EXT4_MAGIC_AT = b"\x53\xef", 1024 + 56

#: Writes to the root that it is run in, and ends the machine.
INIT = """\
#!/bin/busybox sh
echo "on an encrypted disk" > /written
/bin/busybox sync
echo "FOUND $(/bin/busybox cat /written) ON $(/bin/busybox grep -c dm- /proc/partitions)"
/bin/busybox poweroff -f
"""


@pytest.fixture(scope="module")
def initrd(kernel: Kernel) -> Path:
    spec = InitramfsSpec(kernel=kernel, features=FEATURES)
    return build_initramfs(spec, cache_dir=CACHE_DIR).path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with BusyBox and an init."""
    tree = tmp_path_factory.mktemp("root") / "tree"
    for part in ("proc", "sys", "dev", "run", "sbin", "bin"):
        (tree / part).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    (tree / "sbin/init").write_text(INIT)
    (tree / "sbin/init").chmod(0o755)
    image = tree.parent / "root.erofs"
    build_image(tree, image)
    os.truncate(image, -(-image.stat().st_size // PMEM_ALIGN_BYTES) * PMEM_ALIGN_BYTES)
    return image


@pytest.fixture
def blank(tmp_path: Path) -> Callable[[str], DiskSpec]:
    def make(name: str) -> DiskSpec:
        path = sparse_file(tmp_path / f"{name}.img", DISKS[name])
        return DiskSpec(path=path, serial=name, readonly=False)

    return make


def machine_spec(
    kernel: Kernel, initrd: Path, root: Path, *disks: DiskSpec, cmdline: str = ""
) -> MachineSpec:
    return MachineSpec(
        kernel=kernel.image,
        initrd=initrd,
        memory_mib=384,
        pmem=(PmemSpec(path=root),),
        disks=disks,
        cmdline=cmdline,
    )


def test_blank_disks_become_scratches(
    kernel: Kernel, initrd: Path, root: Path, blank: Callable[[str], DiskSpec]
) -> None:
    disks = {name: blank(name) for name in DISKS}
    spec = machine_spec(kernel, initrd, root, *disks.values())
    with Machine(spec, cache_dir=CACHE_DIR) as machine:
        with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as guest:
            assert {"dm-crypt", "scratch-device-ext4", "scratch-device-xfs"} <= {
                *guest.hello.features
            }
            assert guest.status().problems == ()
            base = LayerSpec.from_wire(
                {"layer_id": "base", "device": {"kind": "pmem", "number": 0}, "filesystem": "erofs"}
            )
            guest.layer_mount(base)
            for name in disks:
                scratch = DeviceScratch(
                    device=VirtioBlkDevice(serial=name),
                    filesystem="xfs" if name == "xfs" else "ext4",
                    encrypted=name == "secret",
                    existing="fresh",
                )
                report = guest.overlay_mount(
                    OverlaySpec(overlay_id=name, layers=("base",), scratch=scratch)
                )
                assert report.state == "mounted"
                assert report.scratch is not None
                assert report.scratch.formatted
                crypt = [device.table.split()[2:5] for device in report.scratch.dm]
                key = f":64:logon:guestagent:{report.scratch.dm[0].name}" if crypt else ""
                assert crypt == ([["crypt", "aes-xts-plain64", key]] if name == "secret" else [])
            for name in disks:
                guest.overlay_unmount(name)
            guest.shutdown()
        with closing(Deadline(BOOT_SECONDS)) as deadline:
            assert machine.wait(deadline) == 0
    heads = {name: disk.path.read_bytes()[:4096] for name, disk in disks.items()}
    assert heads["plain"][EXT4_MAGIC_AT:][:2] == EXT4_MAGIC
    assert heads["xfs"].startswith(b"XFSB")
    assert heads["secret"][EXT4_MAGIC_AT:][:2] != EXT4_MAGIC
    assert any(heads["secret"][1024:2048])


def test_a_root_is_booted_that_writes_to_an_encrypted_disk(
    kernel: Kernel, initrd: Path, root: Path, blank: Callable[[str], DiskSpec]
) -> None:
    disk = blank("secret")
    cmdline = (
        "guestagent.layer=pmem:0,id=base,root=none "
        "guestagent.overlay=root,scratch=device:virtio-blk:secret,fresh,encrypted"
    )
    spec = machine_spec(kernel, initrd, root, disk, cmdline=cmdline)
    with (
        closing(Deadline(BOOT_SECONDS)) as deadline,
        Machine(spec, cache_dir=CACHE_DIR) as machine,
    ):
        machine.wait_console("FOUND on an encrypted disk ON 1", deadline)
        assert machine.wait(deadline) == 0
    written = disk.path.read_bytes()
    assert any(written)
    assert b"on an encrypted disk" not in written
