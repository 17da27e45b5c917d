"""What a virtual machine consists of, and the command line of QEMU that says so. Pure.

Values go through QEMU's JSON syntax wherever it has one, so that no character in a path can be
mistaken for a separator.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guestagent.api.share import TAG_BYTES

__all__ = (
    "DiskSpec",
    "MachineSpec",
    "NetworkSpec",
    "PmemSpec",
    "Runtime",
    "ShareSpec",
    "blockdev",
    "disk_device",
    "port_path",
    "qemu_command",
    "tty_path",
)

PMEM_ALIGN_BYTES = 2 << 20  # the kernel wants whole sections of a namespace; see ND_MIN_PMEM
#: Room for each NVDIMM that is plugged in later.
_PLUGGED_PMEM_MIB = 1024
_SPARE_MEMORY_MIB = 4096
#: Self-tests of the kernel's ciphers are 0.4 s of an emulated boot; a panic ends the machine.
_CMDLINE = "console=ttyS0 quiet panic=-1 cryptomgr.notests"
#: Emulation moves what ``rep movsb`` would byte by byte, and saves each vector register by a call
#: at each switch of processes; without both a guest takes a fifth less time to mount a layer.
#: What needs AVX needs XSAVE: a processor with the one and not the other does not exist, and Linux
#: 7.2 panics on it.
_TCG_CPU = "max,-erms,-xsave,-avx,-avx2,-f16c,-fma,-vaes,-vpclmulqdq"
#: Linux looks whether its timer ticks while it waits (check_timer, arch/x86/kernel/apic/io_apic.c).
#: An emulated processor that does not run meanwhile misses the ticks: the kernel tries other ways,
#: and panics where none of them ticks.
_TCG_CMDLINE = "no_timer_check"
#: Linux distrusts an emulated TSC and reads the HPET instead, which takes QEMU's one big lock; but
#: it is the same for all processors, and as steady as the host's.
_STEADY_TSC_CMDLINE = "tsc=reliable clocksource=tsc"
_SCSI_BUS = "scsi0.0"
#: The device behind each line, by the guest's name for it. ttyS0 is UART 0.
_TTY_DEVICES: dict[str, dict[str, object]] = {
    "hvc0": {"driver": "virtconsole", "bus": "serial0.0"},
    "ttyS1": {"driver": "isa-serial", "index": 1},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PmemSpec:
    """An NVDIMM backed by ``path``; /dev/pmemN in the order given. Its size is the file's.

    With ``kind`` virtio it is a virtio-pmem device. Its driver knows no read-only device: what a
    guest writes to a ``readonly`` one is lost.
    """

    path: Path
    readonly: bool = True
    kind: str = "nvdimm"

    def __post_init__(self) -> None:
        if self.kind not in ("nvdimm", "virtio"):
            raise ValueError(f"unknown kind {self.kind!r} of pmem: nvdimm or virtio")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpec:
    """A raw disk. ``serial`` is what the guest sees; ``lun`` is for SCSI only."""

    path: Path
    serial: str
    bus: str = "virtio-blk"
    readonly: bool = True
    lun: int = 0

    def __post_init__(self) -> None:
        if self.bus not in ("virtio-blk", "scsi"):
            raise ValueError(f"unknown bus {self.bus!r}: virtio-blk or scsi")
        limit = 20 if self.bus == "virtio-blk" else 36  # VIRTIO_BLK_ID_BYTES; QEMU for SCSI
        if not self.serial or len(self.serial) > limit:
            raise ValueError(f"serial {self.serial!r}: 1 to {limit} characters on {self.bus}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """A virtio network interface with the address ``mac``.

    With ``socket``, a path, it is joined to that of another machine: of the two, the one that
    ``listens`` is to be started first. Without, it leads to the host's network (QEMU's user mode).
    """

    mac: str
    socket: Path | None = None
    listens: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{2}(:[0-9a-f]{2}){5}", self.mac):
            raise ValueError(f"mac {self.mac!r} is no address like 52:54:00:12:34:56")
        if self.listens and self.socket is None:
            raise ValueError("an interface that listens needs a socket")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareSpec:
    """A directory of the host that the guest may mount by ``tag``.

    For 9p ``path`` is the directory, which QEMU serves with the rights of its own user. For
    virtiofs it is the socket of a virtiofsd that serves the directory, and listens already; whether
    the guest may write is up to that program.
    """

    path: Path
    tag: str
    kind: str = "virtiofs"
    readonly: bool = True

    def __post_init__(self) -> None:
        if self.kind not in TAG_BYTES:
            raise ValueError(f"unknown kind {self.kind!r} of share: {' or '.join(TAG_BYTES)}")
        if not 0 < len(self.tag.encode()) <= TAG_BYTES[self.kind]:
            raise ValueError(
                f"tag {self.tag!r}: 1 to {TAG_BYTES[self.kind]} bytes with {self.kind}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """A virtual machine.

    ``accel`` is auto, kvm or tcg. ``vsock_cid`` None means no vsock. ``pcie_root_ports`` is how
    many devices can be plugged in later, ``pmem_slots`` how many NVDIMMs. ``serial_ports`` are
    names of virtio-serial ports. ``ttys`` are serial lines besides the console's ttyS0, by the
    names that the guest has for them: hvc0 (virtio; the guest needs virtio_console) and ttyS1.
    ``console_path`` is where the console is written to, by default in the machine's own directory;
    with ``console_stdio`` it is also on the standard streams, where Ctrl-a x ends the machine.
    """

    kernel: Path
    initrd: Path
    cmdline: str = ""
    memory_mib: int = 512
    cpus: int = 2
    pmem: tuple[PmemSpec, ...] = ()
    disks: tuple[DiskSpec, ...] = ()
    networks: tuple[NetworkSpec, ...] = ()
    shares: tuple[ShareSpec, ...] = ()
    vsock_cid: int | None = 3
    accel: str = "auto"
    console_path: Path | None = None
    console_stdio: bool = False
    qmp: bool = True
    pcie_root_ports: int = 0
    pmem_slots: int = 0
    serial_ports: tuple[str, ...] = ()
    ttys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.accel not in ("auto", "kvm", "tcg"):
            raise ValueError(f"unknown accelerator {self.accel!r}: auto, kvm or tcg")
        if self.vsock_cid is not None and not 3 <= self.vsock_cid < 0xFFFFFFFF:
            raise ValueError(f"CID {self.vsock_cid} is outside of 3..{0xFFFFFFFF - 1}")
        if self.memory_mib < 128 or self.cpus < 1:
            raise ValueError(f"{self.memory_mib} MiB, {self.cpus} CPUs: at least 128 and 1")
        luns = [disk.lun for disk in self.disks if disk.bus == "scsi"]
        if len(luns) != len(set(luns)):
            raise ValueError(f"SCSI disks with the same LUN: {luns}")
        tags = [(share.kind, share.tag) for share in self.shares]
        if len(tags) != len(set(tags)):
            raise ValueError(f"shares with the same tag: {sorted(tag for _, tag in tags)}")
        for name in self.ttys:
            if name not in _TTY_DEVICES:
                raise ValueError(f"unknown tty {name!r}: {' or '.join(_TTY_DEVICES)}")
            if self.ttys.count(name) > 1:
                raise ValueError(f"tty {name!r} is there more than once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What is known only when a machine starts.

    ``qmp_fd`` is a listening socket that QEMU inherits; ``vhost_socket`` None means the kernel's
    own vhost. ``steady_tsc`` is as ``has_steady_tsc`` says.
    """

    program: str
    accel: str
    run_dir: Path
    console_path: Path
    qmp_fd: int | None = None
    vhost_socket: Path | None = None
    steady_tsc: bool = False


def port_path(run_dir: Path, name: str) -> Path:
    """Return the Unix socket of the virtio-serial port ``name``."""
    return run_dir / f"port-{name}"


def tty_path(run_dir: Path, name: str) -> Path:
    """Return the Unix socket at the far end of the guest's /dev/``name``."""
    return run_dir / f"tty-{name}"


def qemu_command(spec: MachineSpec, runtime: Runtime) -> list[str]:
    """Return the argument vector.

    Raises:
        ValueError: the file of a pmem device has no usable size.
        OSError: it cannot be examined.
    """
    return [
        runtime.program,
        *_base(spec, runtime),
        *_console(spec, runtime),
        *_pmem(spec),
        *_vsock(spec, runtime),
        *_disks(spec),
        *_networks(spec),
        *_shares(spec),
        *_serial_ports(spec, runtime),
        *_root_ports(spec),
    ]


def _base(spec: MachineSpec, runtime: Runtime) -> Iterator[str]:
    kvm = runtime.accel == "kvm"
    nvdimm = ",nvdimm=on" if spec.pmem or spec.pmem_slots else ""
    yield from ("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot")
    yield from ("-machine", f"q35,memory-backend=ram{nvdimm}")
    yield from ("-accel", "kvm" if kvm else "tcg,thread=multi")
    yield from ("-cpu", "host" if kvm else _TCG_CPU)
    yield from ("-smp", str(spec.cpus), "-m", _memory(spec))
    yield from _json("-object", {
        "qom-type": "memory-backend-memfd",
        "id": "ram",
        "size": spec.memory_mib << 20,
        "share": True,
    })  # fmt: skip
    yield from ("-kernel", str(spec.kernel), "-initrd", str(spec.initrd))
    emulated = () if kvm else (_TCG_CMDLINE, _STEADY_TSC_CMDLINE if runtime.steady_tsc else "")
    yield from ("-append", " ".join(filter(None, (_CMDLINE, *emulated, spec.cmdline))))
    if runtime.qmp_fd is not None:
        yield from ("-chardev", f"socket,id=qmp,fd={runtime.qmp_fd},server=on,wait=off")
        yield from ("-mon", "chardev=qmp,mode=control")


def _memory(spec: MachineSpec) -> str:
    slots = len(spec.pmem) + spec.pmem_slots
    if not slots:
        return f"{spec.memory_mib}M"
    # each is placed on a boundary of 1 GiB at worst
    pmem_mib = sum((_pmem_size(pmem) >> 20) + 1024 for pmem in spec.pmem)
    pmem_mib += spec.pmem_slots * (_PLUGGED_PMEM_MIB + 1024)
    maximum_mib = spec.memory_mib + pmem_mib + _SPARE_MEMORY_MIB
    return f"{spec.memory_mib}M,slots={slots},maxmem={maximum_mib}M"


def _console(spec: MachineSpec, runtime: Runtime) -> Iterator[str]:
    path = _escaped(runtime.console_path)
    kind = f"stdio,mux=on,signal=off,logfile={path}" if spec.console_stdio else f"file,path={path}"
    yield from ("-chardev", f"{kind},id=console", "-serial", "chardev:console")


def _pmem(spec: MachineSpec) -> Iterator[str]:
    for number, pmem in enumerate(spec.pmem):
        yield from _json("-object", pmem_backend(pmem, f"pmem{number}"))
        yield from _json("-device", pmem_device(pmem, f"pmem{number}"))


def pmem_backend(pmem: PmemSpec, name: str) -> dict[str, object]:
    """Return the memory of a pmem device as QEMU's object, on the command line or by QMP."""
    return {
        "qom-type": "memory-backend-file",
        "id": f"{name}-file",
        "mem-path": str(pmem.path),
        "size": _pmem_size(pmem),
        "share": not pmem.readonly,
        "readonly": pmem.readonly,
    }


def pmem_device(pmem: PmemSpec, name: str) -> dict[str, object]:
    """Return the device over the memory of the same name."""
    device: dict[str, object] = {"id": name, "memdev": f"{name}-file"}
    if pmem.kind == "virtio":
        return {"driver": "virtio-pmem-pci", **device}
    return {"driver": "nvdimm", **device, "unarmed": pmem.readonly}


def _pmem_size(pmem: PmemSpec) -> int:
    size = pmem.path.stat().st_size
    if size == 0 or size % PMEM_ALIGN_BYTES:
        raise ValueError(
            f"{str(pmem.path)!r} cannot be a pmem device: {size} bytes, not a multiple of "
            f"{PMEM_ALIGN_BYTES}"
        )
    return size


def _vsock(spec: MachineSpec, runtime: Runtime) -> Iterator[str]:
    if spec.vsock_cid is None:
        return
    if runtime.vhost_socket is None:
        yield from _json("-device", {"driver": "vhost-vsock-pci", "guest-cid": spec.vsock_cid})
        return
    yield from ("-chardev", f"socket,id=vsock,path={_escaped(runtime.vhost_socket)}")
    yield from _json("-device", {"driver": "vhost-user-vsock-pci", "chardev": "vsock"})


def _disks(spec: MachineSpec) -> Iterator[str]:
    if any(disk.bus == "scsi" for disk in spec.disks):
        yield from _json("-device", {"driver": "virtio-scsi-pci", "id": "scsi0"})
    for number, disk in enumerate(spec.disks):
        yield from _json("-blockdev", blockdev(disk, f"disk{number}"))
        yield from _json("-device", disk_device(disk, f"disk{number}"))


def _networks(spec: MachineSpec) -> Iterator[str]:
    for number, network in enumerate(spec.networks):
        name = f"net{number}"
        backend: dict[str, object] = {"type": "user", "id": name}
        if network.socket is not None:
            where = {"type": "unix", "path": str(network.socket)}
            backend = {"type": "stream", "id": name, "server": network.listens, "addr": where}
        yield from _json("-netdev", backend)
        # without its boot ROM, for which there is no use
        yield from _json("-device", {
            "driver": "virtio-net-pci",
            "netdev": name,
            "mac": network.mac,
            "romfile": "",
        })  # fmt: skip


def _shares(spec: MachineSpec) -> Iterator[str]:
    for number, share in enumerate(spec.shares):
        name, path = f"share{number}", _escaped(share.path)
        if share.kind == "virtiofs":
            yield from ("-chardev", f"socket,id={name},path={path}")
            device: dict[str, object] = {"driver": "vhost-user-fs-pci", "chardev": name}
            device["tag"] = share.tag
        else:
            readonly = "on" if share.readonly else "off"
            where = f"path={path},security_model=none,readonly={readonly}"
            yield from ("-fsdev", f"local,id={name},{where}")
            device = {"driver": "virtio-9p-pci", "fsdev": name, "mount_tag": share.tag}
        yield from _json("-device", device)


def blockdev(disk: DiskSpec, node: str) -> dict[str, object]:
    """Return the arguments of ``blockdev-add`` for a disk; ``node`` names it."""
    return {
        "driver": "raw",
        "node-name": node,
        "read-only": disk.readonly,
        "file": {
            "driver": "file",
            "filename": str(disk.path),
            "read-only": disk.readonly,
            "locking": "auto",
        },
    }


def disk_device(disk: DiskSpec, node: str, *, bus: str | None = None) -> dict[str, object]:
    """Return the arguments of ``device_add`` for a disk on block node ``node``."""
    device: dict[str, object] = {"id": f"{node}-device", "drive": node, "serial": disk.serial}
    if disk.bus == "scsi":
        where = {"bus": _SCSI_BUS, "channel": 0, "scsi-id": 0, "lun": disk.lun}
        return {"driver": "scsi-hd", **device, **where}
    return {"driver": "virtio-blk-pci", **device, **({} if bus is None else {"bus": bus})}


def _serial_ports(spec: MachineSpec, runtime: Runtime) -> Iterator[str]:
    if spec.serial_ports or "hvc0" in spec.ttys:
        yield from _json("-device", {"driver": "virtio-serial-pci", "id": "serial0"})
    for name in spec.ttys:
        path = _escaped(tty_path(runtime.run_dir, name))
        yield from ("-chardev", f"socket,id=tty-{name},path={path},server=on,wait=off")
        yield from _json("-device", {**_TTY_DEVICES[name], "chardev": f"tty-{name}"})
    for number, name in enumerate(spec.serial_ports):
        path = _escaped(port_path(runtime.run_dir, name))
        yield from ("-chardev", f"socket,id=port{number},path={path},server=on,wait=off")
        yield from _json("-device", {
            "driver": "virtserialport",
            "chardev": f"port{number}",
            "name": name,
        })  # fmt: skip


def _root_ports(spec: MachineSpec) -> Iterator[str]:
    for number in range(spec.pcie_root_ports):
        yield from _json("-device", {
            "driver": "pcie-root-port",
            "id": f"port{number}",
            "chassis": number + 1,
        })  # fmt: skip


def _json(option: str, value: dict[str, object]) -> Iterator[str]:
    yield from (option, json.dumps(value))


def _escaped(path: Path) -> str:
    """In QEMU's own syntax a comma ends a value, and two of them are one."""
    return str(path).replace(",", ",,")
