"""``guestctl run``: a container image in a virtual machine, mounted and verified; and
``guestctl initramfs build``: the boot image alone."""

import contextlib
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Unpack

import click

from guestagent.api.console import CONSOLE_PORT
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.console import Dialler
from guestagent.host.ctl.console_client import ConsoleClient
from guestagent.host.ctl.overlay import describe_batch
from guestagent.host.ctl.progress import progress_bar
from guestagent.host.ctl.session import emit, reports_errors
from guestagent.host.ctl.style import guarded, plain, table
from rootfs.bootimage.closure import ClosureError
from rootfs.bootimage.elf import ElfError
from rootfs.bootimage.features import DEFAULT_FEATURES, FEATURES
from rootfs.bootimage.initramfs import (
    CACHE_DIR,
    COMPRESSIONS,
    DEFAULT_COMPRESSION,
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
from rootfs.cli.pack import source_options
from rootfs.cli.packmount import find_image, image_facts, root_of
from rootfs.image.source import SourceChoices
from rootfs.imagefile.errors import OsErrors, from_os_error
from rootfs.imagefile.output import write_file
from rootfs.machine.qemu import Machine, MachineError, MachineSpec, PmemSpec
from rootfs.machine.run_image import Prepared, mount_request, prepare
from rootfs.machine.vmlinux import write_vmlinux
from rootfs.machine.vmms import VMMS, Configuration, cloud_hypervisor, firecracker
from rootfs.pack.manifest import Manifest
from vsock.address import parse_address
from vsock.deadline import Deadline
from vsock.errors import CallError, RpcError

__all__ = ("COMMANDS",)

_BOOT_SECONDS = 120.0
_END_SECONDS = 30.0
_CONSOLE_SECONDS = 10.0
#: Where the manifest of a pack is in a boot image.
_MANIFEST_PATH = "etc/pack.json"
_CONSOLE = f"guestagent.console=vsock:{CONSOLE_PORT} guestagent.console_shell=1"


@click.command("run")
@click.argument("image", type=click.Path())
@click.option("--vmm", type=click.Choice(VMMS), default="qemu", show_default=True)
@click.option("--shell", is_flag=True, help="Run the shell of the mounted image here.")
@click.option("--keep", is_flag=True, help="Leave the machine up until Ctrl-C powers it off.")
@source_options
@click.option(
    "--scratch",
    type=click.IntRange(4096),
    metavar="BYTES",
    help="Make the overlay writable, with this much memory.",
)
@click.option("--memory", type=click.IntRange(128), default=768, metavar="MIB", show_default=True)
@click.option("--cpus", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--kernel", "kernel_root", metavar="DIR", help="A directory with boot/ and lib/modules/."
)
@click.option("--directory", metavar="DIR", help="Where the pack is made and kept.")
@reports_errors
def run_command(
    *,
    image: str,
    vmm: str,
    shell: bool,
    keep: bool,
    scratch: int | None,
    memory: int,
    cpus: int,
    kernel_root: str | None,
    directory: str | None,
    as_json: bool,
    **choices: Unpack[SourceChoices],
) -> None:
    """Run IMAGE, an OCI layout or docker archive: every layer verified, in a machine.

    Its layers are merged into one mount; a guest before Linux 6.4 overlays them.

    Prints the agent's report. With --shell the image's own /bin/sh runs in the overlay, at this
    terminal or reading commands from a pipe, and its exit status is that of this command. For Cloud
    Hypervisor and Firecracker it prints how to start the same machine there, and starts nothing.
    """
    if vmm != "qemu" and (shell or keep or scratch):
        raise click.UsageError("--shell, --keep and --scratch are for --vmm qemu")
    if vmm != "qemu" and directory is None:
        raise click.UsageError(
            f"--vmm {vmm} starts nothing: give --directory for the files to keep"
        )
    with _failures(), _place(directory) as place:
        with progress_bar("building", as_json) as progress:
            choices["progress"] = progress
            prepared = prepare(
                image,
                place,
                _kernel(kernel_root),
                cache_dir=CACHE_DIR,
                report=_reporter(as_json),
                **choices,
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
            status = _run(spec, prepared, scratch, shell=shell, keep=keep, as_json=as_json)
            if status:
                sys.exit(status)
        else:
            _print_configuration(vmm, prepared, place, memory, cpus, as_json)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Turn the exceptions of the parts into CallErrors."""
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
    return cached_kernel(CACHE_DIR) if root is None else open_kernel(Path(root))


def _reporter(as_json: bool) -> Callable[[str], None]:
    """Return a function that prints the step that begins on the standard error."""

    def report(step: str) -> None:
        if not as_json:
            click.echo(f"guestctl: {plain(step)} ...", err=True)

    return report


def _run(
    spec: MachineSpec,
    prepared: Prepared,
    scratch: int | None,
    *,
    shell: bool,
    keep: bool,
    as_json: bool,
) -> int:
    """Boot the machine, mount, and power it off; return the exit status of the shell, else 0."""
    report = _reporter(as_json)
    status = 0
    with Machine(spec, cache_dir=CACHE_DIR) as machine:
        report(f"booting with {machine.accel} ({machine.accel_reason})")
        address = machine.agent_address()
        with (
            machine.while_up() as up,
            GuestAgent(address, connect_seconds=_BOOT_SECONDS, until=up) as guest,
        ):
            device: dict[str, object] = {"kind": "pmem", "number": 0}
            plan, request = mount_request(
                prepared.manifest, device, guest.hello, scratch_bytes=scratch
            )
            report(f"mounting the image: {plan.reason}")
            reply = guest.layers_mount(request)
            if as_json:
                emit({**reply.to_wire(), "image": image_facts(plan, reply)})
            else:
                click.echo(guarded(describe_batch(reply)))
            if shell:
                status = _run_shell(address, root_of(reply))
            if keep:
                click.echo(f"guestctl --connect {address} ...; Ctrl-C powers it off", err=True)
                with contextlib.suppress(KeyboardInterrupt), contextlib.closing(Deadline()) as ever:
                    machine.wait(ever)
            report("powering off")
            guest.shutdown("poweroff", force=True)
        with contextlib.closing(Deadline(_END_SECONDS)) as deadline:
            end = machine.wait(deadline)
    if end:
        raise MachineError(f"QEMU ended with status {end}, not by a power-off of the guest")
    return status


def _run_shell(address: str, root: str) -> int:
    """Run the shell of a root in the guest at this terminal; return its exit status."""
    dialler = Dialler(parse_address(address), _CONSOLE_SECONDS, is_agent=True)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    command = shlex.join(("sh", "--root", root))
    return ConsoleClient(dialler.dial, command=command, is_terminal=is_terminal).run()


def _print_configuration(
    vmm: str, prepared: Prepared, place: Path, memory_mib: int, cpus: int, as_json: bool
) -> None:
    vmlinux = write_vmlinux(prepared.kernel.image, place / "vmlinux")
    make = cloud_hypervisor if vmm == "cloud-hypervisor" else firecracker
    configuration: Configuration = make(prepared, vmlinux, place, memory_mib=memory_mib, cpus=cpus)
    if configuration.config_path is not None:
        text = json.dumps(configuration.config, indent=2) + "\n"
        write_file(configuration.config_path, text.encode())
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
@click.option(
    "--kernel", "kernel_root", metavar="DIR", help="A directory with boot/ and lib/modules/."
)
@click.option(
    "--compression", type=click.Choice(COMPRESSIONS), default=DEFAULT_COMPRESSION, show_default=True
)
@click.option(
    "--module-signatures",
    is_flag=True,
    help="Keep the signatures of modules, for kernels that require them.",
)
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="SOURCE:PATH",
    help="Put a file into the image under this path; may be repeated.",
)
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    help=f"Put the manifest of a pack into the image, as /{_MANIFEST_PATH}.",
)
@click.option(
    "--image", "image_id", metavar="ID", help="With --manifest: boot with this image of the pack."
)
@click.option("--output", type=click.Path(path_type=Path), help="Default: a file in the cache.")
@reports_errors
def initramfs_build_command(
    *,
    features: str | None,
    kernel_root: str | None,
    compression: str,
    module_signatures: bool,
    files: tuple[str, ...],
    manifest: Path | None,
    image_id: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Build the boot image, and print the size of its parts.

    With --manifest it also prints the setting by which the image mounts the pack at boot; the
    feature signatures is added if root digests in it are signed.
    """
    names: tuple[str, ...] = DEFAULT_FEATURES
    if features is not None:
        names = tuple(name for name in features.split(",") if name)
        unknown = [name for name in names if name not in FEATURES]
        if unknown:
            known = ", ".join(FEATURES)
            raise click.BadParameter(f"unknown feature {unknown[0]!r}; known: {known}")
    added = [_added_file(text) for text in files]
    setting = None
    if manifest is not None:
        added.append((_MANIFEST_PATH, manifest))
        loaded = Manifest.load(manifest)
        setting = _manifest_setting(manifest, loaded, image_id)
        if loaded.is_signed and "signatures" not in names:
            names += ("signatures",)
    elif image_id is not None:
        raise click.UsageError("--image names an image of a --manifest")
    with _failures():
        spec = InitramfsSpec(
            kernel=_kernel(kernel_root),
            features=names,
            files=tuple(added),
            compression=compression,
            module_signatures=module_signatures,
        )
        report = build_initramfs(spec, cache_dir=CACHE_DIR, output=output)
    if as_json:
        emit({**_facts(report), "setting": setting})
        return
    click.echo(report.describe())
    if setting is not None:
        click.echo(f"boot with {setting}")


def _added_file(text: str) -> tuple[str, Path]:
    """Read SOURCE:PATH; the source may hold colons, the path not."""
    source, colon, path = text.rpartition(":")
    if not colon or not source:
        raise click.BadParameter(f"--file {text!r}: expected SOURCE:PATH")
    return path.lstrip("/"), Path(source)


def _manifest_setting(path: Path, manifest: Manifest, image_id: str | None) -> str:
    image = ""
    if image_id is not None:
        image = f",image={find_image(manifest, image_id).image_id}"
    with OsErrors("read the manifest", path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"guestagent.manifest=/{_MANIFEST_PATH},DEVICE,sha256={digest}{image}"


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
    """List the features of boot images."""
    if as_json:
        emit({name: feature.summary for name, feature in FEATURES.items()})
        return
    rows = [
        [name, "yes" if name in DEFAULT_FEATURES else "", feature.summary]
        for name, feature in FEATURES.items()
    ]
    click.echo(table(["FEATURE", "DEFAULT", "WHAT"], rows))


COMMANDS = (run_command, initramfs)
