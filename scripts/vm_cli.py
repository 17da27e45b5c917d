"""The command line of ``scripts/vm``: boots the agent in QEMU, for a person."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rootfs.bootimage.closure import ClosureError
from rootfs.bootimage.features import DEFAULT_FEATURES, FEATURES
from rootfs.bootimage.initramfs import (
    CACHE_DIR,
    COMPRESSIONS,
    DEFAULT_COMPRESSION,
    InitramfsSpec,
    build_initramfs,
)
from rootfs.bootimage.kernel import KernelNotFoundError, ModuleNotFoundInKernelError, cached_kernel
from rootfs.machine.accelerator import choose_accelerator
from rootfs.machine.qemu import DiskSpec, Machine, MachineError, MachineSpec, PmemSpec
from scripts.uml_bed.uml_cli import stop_signals
from vsock.deadline import Deadline

__all__ = ("main",)

_FAILURES = (
    OSError, ValueError, KernelNotFoundError, ModuleNotFoundInKernelError, ClosureError,
    MachineError, subprocess.CalledProcessError,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(argv)
    with stop_signals():
        try:
            return _run(options)
        except _FAILURES as problem:
            _say(str(problem))
            return 1
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


def _say(text: str) -> None:
    for line in text.splitlines():
        sys.stderr.write(f"vm: {line}\n")


def _parser() -> argparse.ArgumentParser:
    features = "\n".join(f"  {name:12}{feature.summary}" for name, feature in FEATURES.items())
    parser = argparse.ArgumentParser(
        prog="vm",
        description="Build the boot image and boot it in QEMU, with its console here.",
        epilog=f"features:\n{features}\n(default: {','.join(DEFAULT_FEATURES)})",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--with", dest="features", metavar="A,B,...", help="features of the boot image")
    add(
        "--compression",
        choices=COMPRESSIONS,
        default=DEFAULT_COMPRESSION,
        help="of the boot image (default %(default)s)",
    )
    add("--output", metavar="FILE", type=Path, help="write the boot image there and boot nothing")
    add(
        "--pmem",
        metavar="FILE[:rw]",
        action="append",
        default=[],
        help="NVDIMM /dev/pmemN, read-only unless :rw (repeat for more)",
    )
    add(
        "--virtio-pmem",
        metavar="FILE[:rw]",
        action="append",
        default=[],
        help="the same as a virtio-pmem device",
    )
    add("--disk", metavar="SERIAL=FILE[:rw]", action="append", default=[], help="virtio disk")
    add("--scsi", metavar="LUN=FILE[:rw]", action="append", default=[], help="SCSI disk")
    add("--append", metavar="WORDS", default="", help="add to the kernel command line")
    add("--memory", metavar="MIB", type=int, default=512, help="memory (default %(default)s)")
    add("--cpus", metavar="N", type=int, default=2, help="processors (default %(default)s)")
    add("--cid", metavar="N", type=int, default=3, help="vsock CID (default %(default)s)")
    add(
        "--accel",
        choices=("auto", "kvm", "tcg"),
        default="auto",
        help="how to run it (default: KVM where it works)",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    kernel = cached_kernel(CACHE_DIR)
    features = DEFAULT_FEATURES
    if options.features is not None:
        features = tuple(name for name in options.features.split(",") if name)
    spec = InitramfsSpec(kernel=kernel, features=features, compression=options.compression)
    report = build_initramfs(spec, cache_dir=CACHE_DIR, output=options.output)
    _say(report.describe())
    if options.output is not None:
        return 0
    interactive = os.isatty(0) and os.isatty(1)
    machine_spec = MachineSpec(
        kernel=kernel.image,
        initrd=report.path,
        cmdline=options.append,
        memory_mib=options.memory,
        cpus=options.cpus,
        pmem=(
            *(_pmem(text, "nvdimm") for text in options.pmem),
            *(_pmem(text, "virtio") for text in options.virtio_pmem),
        ),
        disks=(*map(_disk, options.disk), *map(_scsi, options.scsi)),
        vsock_cid=options.cid,
        accel=options.accel,
        console_stdio=True,
        pcie_root_ports=2,
    )
    return _boot(machine_spec, interactive)


def _boot(spec: MachineSpec, interactive: bool) -> int:
    accel, reason = choose_accelerator(spec.accel, spec.kernel, CACHE_DIR)
    _say(f"kernel {spec.kernel.name}, {accel} ({reason})")
    with Machine(spec) as machine, contextlib.closing(Deadline()) as forever:
        address = machine.agent_address()
        _say(f"the agent: {address}")
        _say(f"for example: .cache/venv/bin/guestctl --connect {address} status")
        _say("Ctrl-a x ends the machine" if interactive else "a signal ends the machine")
        status = machine.wait(forever)
    return status if status >= 0 else 128 - status


def _file(text: str) -> tuple[Path, bool]:
    """Split ``FILE[:rw]`` into (path, read-only)."""
    path = text.removesuffix(":rw")
    return Path(path), path == text


def _pmem(text: str, kind: str) -> PmemSpec:
    path, readonly = _file(text)
    return PmemSpec(path=path, readonly=readonly, kind=kind)


def _disk(text: str) -> DiskSpec:
    serial, equals, rest = text.partition("=")
    if not equals:
        raise ValueError(f"--disk {text!r} is not SERIAL=FILE")
    path, readonly = _file(rest)
    return DiskSpec(path=path, serial=serial, readonly=readonly)


def _scsi(text: str) -> DiskSpec:
    lun, equals, rest = text.partition("=")
    if not equals or not lun.isdigit():
        raise ValueError(f"--scsi {text!r} is not LUN=FILE")
    path, readonly = _file(rest)
    return DiskSpec(path=path, serial=f"lun{lun}", bus="scsi", lun=int(lun), readonly=readonly)
