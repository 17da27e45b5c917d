"""``guestctl run``: a container image in a virtual machine, mounted and verified; and
``guestctl initramfs build``: the boot image alone."""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from guestagent.host.client import GuestAgent
from guestagent.host.ctl.overlay import describe_batch
from guestagent.host.ctl.progress import progress_bar
from guestagent.host.ctl.session import emit, reports_errors
from guestagent.host.ctl.style import table
from rootfs.bootimage.closure import ClosureError
from rootfs.bootimage.elf import ElfError
from rootfs.bootimage.features import DEFAULT_FEATURES, FEATURES
from rootfs.bootimage.initramfs import (
    COMPRESSIONS,
    DEFAULT_COMPRESSION,
    PROJECT,
    InitramfsReport,
    InitramfsSpec,
    build_initramfs,
)
from rootfs.bootimage.kernel import (
    Kernel,
    KernelNotFoundError,
    ModuleNotFoundInKernelError,
    cached_kernel,
    open_kernel,
)
from rootfs.image.source import FORMATS
from rootfs.imagefile.errors import from_os_error
from rootfs.machine.qemu import Machine, MachineError, MachineSpec, PmemSpec
from rootfs.machine.run_image import Prepared, mount_request, prepare
from rootfs.machine.vmlinux import write_vmlinux
from rootfs.machine.vmms import VMMS, Configuration, cloud_hypervisor, firecracker
from vsock.address import parse_address
from vsock.deadline import Deadline
from vsock.errors import CallError, RpcError

__all__ = ("COMMANDS",)

_CACHE_DIR = PROJECT / ".cache"
_BOOT_SECONDS = 120.0
_END_SECONDS = 30.0
_CONSOLE_SECONDS = 10.0
_CONSOLE = "guestagent.console=vsock:1025 guestagent.console_shell=1"


@click.command("run")
@click.argument("image", type=click.Path())
@click.option("--vmm", type=click.Choice(VMMS), default="qemu", show_default=True)
@click.option("--shell", is_flag=True, help="Open the debug console of the machine here.")
@click.option("--keep", is_flag=True, help="Leave the machine up until Ctrl-C.")
@click.option("--platform", metavar="OS/ARCH", help="Which image of several, e.g. linux/arm64.")
@click.option("--reference", metavar="NAME", help="Which image of several, by name.")
@click.option("--format", "source_format", type=click.Choice(FORMATS), default="auto")
@click.option("--scratch", type=click.IntRange(4096), metavar="BYTES", help="Writable, in memory.")
@click.option("--memory", type=click.IntRange(128), default=768, metavar="MIB", show_default=True)
@click.option("--cpus", type=click.IntRange(1), default=2, show_default=True)
@click.option("--kernel", "kernel_root", metavar="DIR", help="With boot/ and lib/modules/.")
@click.option("--directory", metavar="DIR", help="Where the pack is made, and stays.")
@reports_errors
def run_command(
    *,
    image: str,
    vmm: str,
    shell: bool,
    keep: bool,
    platform: str | None,
    reference: str | None,
    source_format: str,
    scratch: int | None,
    memory: int,
    cpus: int,
    kernel_root: str | None,
    directory: str | None,
    as_json: bool,
) -> None:
    """Run IMAGE, an OCI layout or docker archive: every layer verified, overlaid in a machine.

    Prints the agent's report. For Cloud Hypervisor and Firecracker it prints how to start the same
    machine there, and starts nothing.
    """
    if vmm != "qemu" and (shell or keep or scratch):
        raise click.UsageError("--shell, --keep and --scratch are for --vmm qemu")
    if vmm != "qemu" and directory is None:
        raise click.UsageError(f"--vmm {vmm} starts nothing: say --directory, where all is to stay")
    with _failures(), _place(directory) as place:
        with progress_bar("building", as_json) as progress:
            prepared = prepare(
                image,
                place,
                _kernel(kernel_root),
                cache_dir=_CACHE_DIR,
                platform=platform,
                reference=reference,
                source_format=source_format,
                progress=progress,
            )
        if vmm == "qemu":
            spec = MachineSpec(
                kernel=prepared.kernel.image,
                initrd=prepared.initrd,
                cmdline=_CONSOLE if shell else "",
                memory_mib=memory,
                cpus=cpus,
                pmem=(PmemSpec(path=prepared.pack),),
            )
            _run(spec, prepared, scratch, shell=shell, keep=keep, as_json=as_json)
        else:
            _print_configuration(vmm, prepared, place, memory, cpus, as_json)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Make a CallError of what the parts raise."""
    try:
        yield
    except (KernelNotFoundError, ModuleNotFoundInKernelError) as problem:
        raise CallError("not_found", str(problem), step="find the kernel") from problem
    except (ClosureError, ElfError, subprocess.CalledProcessError) as problem:
        raise CallError("internal", str(problem), step="build the boot image") from problem
    except MachineError as problem:
        raise CallError("internal", str(problem), step="run the machine") from problem
    except ValueError as problem:
        raise CallError("invalid", str(problem)) from problem
    except RpcError as problem:
        if isinstance(problem, CallError):
            raise
        raise CallError("internal", str(problem), step="talk to the agent") from problem
    except OSError as problem:
        raise from_os_error(problem, step="run", object=problem.filename) from problem


@contextlib.contextmanager
def _place(directory: str | None) -> Iterator[Path]:
    if directory is not None:
        yield Path(directory).resolve()
        return
    place = Path(tempfile.mkdtemp(prefix="guestctl-run-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _kernel(root: str | None) -> Kernel:
    return cached_kernel(_CACHE_DIR) if root is None else open_kernel(Path(root))


def _run(
    spec: MachineSpec,
    prepared: Prepared,
    scratch: int | None,
    *,
    shell: bool,
    keep: bool,
    as_json: bool,
) -> None:
    request = mount_request(prepared.manifest, {"kind": "pmem", "number": 0}, scratch_bytes=scratch)
    with Machine(spec, cache_dir=_CACHE_DIR) as machine:
        address = machine.agent_address()
        with (
            machine.while_up() as up,
            GuestAgent(address, connect_seconds=_BOOT_SECONDS, until=up) as guest,
        ):
            reply = guest.layers_mount(request)
            if as_json:
                emit(reply.to_wire())
            else:
                click.echo(describe_batch(reply))
            if shell:
                _open_shell(address)
            if keep:
                click.echo(f"guestctl --connect {address} ...; Ctrl-C ends it", err=True)
                with contextlib.suppress(KeyboardInterrupt), contextlib.closing(Deadline()) as ever:
                    machine.wait(ever)
            guest.shutdown("poweroff", force=True)
        with contextlib.closing(Deadline(_END_SECONDS)) as deadline:
            machine.wait(deadline)


def _open_shell(address: str) -> None:
    """Open the debug console of the machine at this terminal."""
    try:
        from guestagent.host.ctl.console import Dialler
        from guestagent.host.ctl.console_client import ConsoleClient
    except ImportError:
        text = "this guestctl has no console to open"
        raise CallError("unsupported", text, step="open a shell") from None
    dialler = Dialler(parse_address(address), _CONSOLE_SECONDS, is_agent=True)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    ConsoleClient(dialler.dial, command=None, is_terminal=is_terminal).run()


def _print_configuration(
    vmm: str, prepared: Prepared, place: Path, memory_mib: int, cpus: int, as_json: bool
) -> None:
    vmlinux = write_vmlinux(prepared.kernel.image, place / "vmlinux")
    make = cloud_hypervisor if vmm == "cloud-hypervisor" else firecracker
    configuration: Configuration = make(prepared, vmlinux, place, memory_mib=memory_mib, cpus=cpus)
    if configuration.config_path is not None:
        configuration.config_path.write_text(json.dumps(configuration.config, indent=2) + "\n")
    if as_json:
        emit(configuration.to_json())
        return
    click.echo(json.dumps(configuration.config, indent=2))
    click.echo(configuration.command)
    click.echo(configuration.mount)


@click.group("initramfs")
def initramfs() -> None:
    """The boot image with the agent in it."""


@initramfs.command("build")
@click.option("--with", "features", metavar="A,B,...", help="Features; see `initramfs features`.")
@click.option("--kernel", "kernel_root", metavar="DIR", help="With boot/ and lib/modules/.")
@click.option(
    "--compression", type=click.Choice(COMPRESSIONS), default=DEFAULT_COMPRESSION, show_default=True
)
@click.option(
    "--module-signatures", is_flag=True, help="Keep them, for a kernel that loads no other modules."
)
@click.option("--output", type=click.Path(path_type=Path), help="Default: it stays in the cache.")
@reports_errors
def initramfs_build_command(
    *,
    features: str | None,
    kernel_root: str | None,
    compression: str,
    module_signatures: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Build the boot image, and print what takes the space in it."""
    names: tuple[str, ...] = DEFAULT_FEATURES
    if features is not None:
        names = tuple(name for name in features.split(",") if name)
        unknown = [name for name in names if name not in FEATURES]
        if unknown:
            known = ", ".join(FEATURES)
            raise click.BadParameter(f"unknown feature {unknown[0]!r}; known: {known}")
    with _failures():
        spec = InitramfsSpec(
            kernel=_kernel(kernel_root),
            features=names,
            compression=compression,
            module_signatures=module_signatures,
        )
        report = build_initramfs(spec, cache_dir=_CACHE_DIR, output=output)
    if as_json:
        emit(_facts(report))
    else:
        click.echo(report.describe())


def _facts(report: InitramfsReport) -> dict[str, object]:
    return {
        "path": str(report.path),
        "size_bytes": report.size_bytes,
        "unpacked_bytes": report.unpacked_bytes,
        "sha256": report.digest,
        "parts": dict(sorted(report.parts.items(), key=lambda part: -part[1])),
        "kernel_modules": list(report.kernel_modules),
        "python_modules": list(report.python_modules),
    }


@initramfs.command("features")
@reports_errors
def initramfs_features_command(*, as_json: bool) -> None:
    """List what a boot image can be asked to serve."""
    if as_json:
        emit({name: feature.summary for name, feature in FEATURES.items()})
        return
    rows = [
        [name, "yes" if name in DEFAULT_FEATURES else "", feature.summary]
        for name, feature in FEATURES.items()
    ]
    click.echo(table(["FEATURE", "DEFAULT", "WHAT"], rows))


COMMANDS = (run_command, initramfs)
