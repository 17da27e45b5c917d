"""The same machine for other monitors: exact configurations of Cloud Hypervisor and Firecracker.

Nothing is started here; what is printed is to be run where these monitors and KVM are.

Source: cloud-hypervisor docs/api.md and vmm/src/api/openapi (VmConfig); firecracker
docs/getting-started.md, docs/vsock.md and src/firecracker/swagger (FullVmConfiguration).
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from guestagent.api.agent import AGENT_PORT
from rootfs.machine.run_image import IMAGE_ID, Prepared

__all__ = ("VMMS", "Configuration", "cloud_hypervisor", "firecracker")

VMMS = ("qemu", "cloud-hypervisor", "firecracker")
_CID = 3
_CMDLINE = "console=ttyS0 quiet panic=-1 cryptomgr.notests"


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """``config`` goes to ``config_path`` as JSON; ``command`` starts the machine with it, ``mount``
    mounts the layers once it is up. Both are lines for a shell."""

    vmm: str
    config: dict[str, object]
    config_path: Path | None
    command: str
    mount: str

    def to_json(self) -> dict[str, object]:
        return {
            "vmm": self.vmm,
            "config": self.config,
            "config_path": None if self.config_path is None else str(self.config_path),
            "command": self.command,
            "mount": self.mount,
        }


def cloud_hypervisor(
    prepared: Prepared, vmlinux: Path, directory: Path, *, memory_mib: int, cpus: int
) -> Configuration:
    """Return the machine with the pack as /dev/pmem0. ``config`` is the body of ``vm.create``."""
    socket = directory / "vsock"
    config: dict[str, object] = {
        "payload": {
            "kernel": str(vmlinux),
            "initramfs": str(prepared.initrd),
            "cmdline": _CMDLINE,
        },
        "cpus": {"boot_vcpus": cpus, "max_vcpus": cpus},
        "memory": {"size": memory_mib << 20},
        "pmem": [{"file": str(prepared.pack), "discard_writes": True}],
        "vsock": {"cid": _CID, "socket": str(socket)},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    }
    command = [
        "cloud-hypervisor",
        "--kernel", str(vmlinux),
        "--initramfs", str(prepared.initrd),
        "--cmdline", _CMDLINE,
        "--cpus", f"boot={cpus}",
        "--memory", f"size={memory_mib}M",
        "--pmem", f"file={prepared.pack},discard_writes=on",
        "--vsock", f"cid={_CID},socket={socket}",
        "--serial", "tty",
        "--console", "off",
    ]  # fmt: skip
    return Configuration(
        vmm="cloud-hypervisor",
        config=config,
        config_path=None,
        command=shlex.join(command),
        mount=_mount(socket, prepared, "--device", "pmem:0"),
    )


def firecracker(
    prepared: Prepared, vmlinux: Path, directory: Path, *, memory_mib: int, cpus: int
) -> Configuration:
    """Return the machine with the pack as /dev/vda: its first and only drive."""
    socket = directory / "vsock"
    config: dict[str, object] = {
        "boot-source": {
            "kernel_image_path": str(vmlinux),
            "initrd_path": str(prepared.initrd),
            "boot_args": f"{_CMDLINE} reboot=k i8042.noaux",
        },
        "drives": [
            {
                "drive_id": "layers",
                "path_on_host": str(prepared.pack),
                "is_root_device": False,
                "is_read_only": True,
            }
        ],
        "machine-config": {"vcpu_count": cpus, "mem_size_mib": memory_mib},
        "vsock": {"guest_cid": _CID, "uds_path": str(socket)},
    }
    config_path = directory / "firecracker.json"
    return Configuration(
        vmm="firecracker",
        config=config,
        config_path=config_path,
        command=shlex.join(["firecracker", "--no-api", "--config-file", str(config_path)]),
        mount=_mount(socket, prepared, "--device", "/dev/vda"),
    )


def _mount(socket: Path, prepared: Prepared, *device: str) -> str:
    address = f"hybrid://{socket}:{AGENT_PORT}"
    command = ["guestctl", "--connect", address, "--wait", "60", "pack", "mount", *device]
    option = "--image" if prepared.manifest.find_image(IMAGE_ID) else "--overlay"
    return shlex.join([*command, option, IMAGE_ID, str(prepared.pack)])
