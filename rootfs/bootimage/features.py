"""What a boot image can be asked to serve, and what each of these needs."""

from collections.abc import Mapping
from dataclasses import dataclass

from guestagent.api.layers import LAYER_FILESYSTEMS
from guestagent.storage.filesystems import TABLE as FILESYSTEMS

__all__ = ("DEFAULT_FEATURES", "FEATURES", "Feature")


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """What an image can be asked to serve, as kernel modules and programs.

    ``optional_modules`` are taken where the kernel has them. ``programs`` are names of this
    machine's programs, which come with the libraries that they need. ``entries`` are
    modules of ours that the agent starts in a child, and which it does not import itself.
    """

    summary: str
    modules: tuple[str, ...] = ()
    optional_modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()


FEATURES: Mapping[str, Feature] = {
    "pmem": Feature(
        summary="/dev/pmemN from NVDIMM and virtio-pmem",
        modules=("nd_pmem",),
        optional_modules=("nfit", "virtio_pci", "virtio_pmem"),
    ),
    "virtio-mmio": Feature(
        summary="virtio devices of machines without PCI", modules=("virtio_mmio",)
    ),
    "virtio-blk": Feature(summary="virtio disks", modules=("virtio_pci", "virtio_blk")),
    "scsi": Feature(summary="SCSI disks", modules=("virtio_pci", "virtio_scsi", "sd_mod")),
    "verity": Feature(
        summary="dm-linear and dm-verity",
        modules=("dm-mod", "dm-verity", "crypto-sha256"),
        optional_modules=("crypto-sha512",),
    ),
    **{
        name: Feature(summary=f"the file system {name}", modules=row.modules)
        for name, row in FILESYSTEMS.items()
    },
    **{
        f"mkfs-{name}": Feature(
            summary=f"scratch disks that the guest formats as {name}",
            modules=row.modules,
            programs=row.mkfs[:1],
        )
        for name, row in FILESYSTEMS.items()
        if row.mkfs
    },
    "crypt": Feature(
        summary="encrypted scratch disks (dm-crypt)",
        modules=("dm-mod", "dm-crypt", "xts"),
        optional_modules=("aes_generic", "aesni-intel", "aes-ce-blk"),
    ),
    "thin": Feature(summary="pools of thin volumes (dm-thin)", modules=("dm-mod", "dm-thin-pool")),
    "share": Feature(
        summary="directories that the host serves (virtiofs, 9p)",
        modules=("virtio_pci",),
        optional_modules=("virtiofs", "9p", "9pnet_virtio"),
    ),
    "overlay": Feature(summary="overlayfs", modules=("overlay",)),
    "vsock": Feature(
        summary="AF_VSOCK to the host",
        modules=("virtio_pci", "vmw_vsock_virtio_transport"),
    ),
    "hyper-v": Feature(
        summary="Hyper-V: SCSI disks, and AF_VSOCK to the host",
        modules=("hv_vmbus", "hv_storvsc", "sd_mod", "hv_sock"),
        optional_modules=("pci-hyperv", "hv_utils"),
    ),
    "vmware": Feature(
        summary="VMware: SCSI disks, and AF_VSOCK to the host",
        modules=("vmw_pvscsi", "sd_mod", "vmw_vsock_vmci_transport"),
    ),
    "vsock-loopback": Feature(
        # with it any process of the guest can be a peer, with CID 1
        summary="AF_VSOCK inside the guest, for tests",
        modules=("vsock_loopback",),
    ),
    "console": Feature(
        summary="virtio serial ports and hvc0", modules=("virtio_pci", "virtio_console")
    ),
    "net": Feature(
        summary="virtio networks, set up by the agent",
        modules=("virtio_net",),
        optional_modules=("virtio_pci", "ipv6", "8021q"),
        entries=("guestagent.net.child",),
    ),
    "signatures": Feature(
        # the kernel checks them; what is not built in must be loaded before it is asked for
        summary="root digests that the kernel checks by signature",
        modules=("crypto-sha256",),
        optional_modules=("crypto-rsa", "crypto-ecdsa-nist-p256", "crypto-sha512"),
    ),
}
DEFAULT_FEATURES = (
    "pmem", "virtio-blk", "scsi", "verity", *LAYER_FILESYSTEMS, "overlay", "vsock",
    "console",
)  # fmt: skip
