"""Run a command under a real Linux kernel that is one process of the host: User Mode Linux.

The command sees the host's own root directory through an overlay whose writes stay in memory, with
device-mapper, verity, erofs, squashfs, overlay, loop and vsock at hand. Nothing on the host
changes, except below the directories that are bound writable.

    result = run_uml(["dmsetup", "targets"], timeout_seconds=60)
    result.returncode, result.stdout, result.stderr, result.console
"""

import contextlib
import marshal
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rootfs.kernel import ModuleIndex

__all__ = ("UmlBootError", "UmlError", "UmlResult", "UmlSpec", "UmlTimeoutError", "run_uml")

#: What every run has loaded. dm-verity brings dm-mod along.
MODULES = ("overlay", "dm-verity", "erofs", "squashfs", "loop", "vsock", "vsock_loopback")
_VSOCK_DEVICE_ID = 19  # virtio_ids.h: VIRTIO_ID_VSOCK
_CONSOLE_TAIL_BYTES = 64 * 1024
_CHUNK_BYTES = 64 * 1024
#: Directories that are empty and fresh inside; see rootfs.uml_init.
_FRESH = (Path("/tmp"), Path("/run"), Path("/dev/shm"))


class UmlError(Exception):
    """The command did not run to its end. ``console`` is the tail of what the kernel printed."""

    def __init__(self, message: str, console: bytes) -> None:
        super().__init__(message)
        self.console = console


class UmlBootError(UmlError):
    """The kernel did not come up, or it died under the command."""


class UmlTimeoutError(UmlError):
    """The time was over; the kernel and all in it were killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UmlSpec:
    """What to run, and with what around it.

    ``binds`` are directories of the host that stay writable; ``vsock_socket`` is where a vhost-user
    vsock device listens; ``disks`` become /dev/ubda, /dev/ubdb, ...; ``append`` goes to the kernel
    command line; ``stdin`` is given to the command as a file; ``terminal`` connects the command to
    the terminal of this process instead.
    """

    argv: tuple[str, ...]
    memory_mib: int = 512
    binds: tuple[Path, ...] = ()
    vsock_socket: Path | None = None
    disks: tuple[Path, ...] = ()
    append: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    stdin: bytes = b""
    terminal: bool = False
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.argv:
            raise ValueError("no command to run")
        if self.memory_mib < 64:
            raise ValueError(f"memory_mib is {self.memory_mib}: the kernel needs 64 to come up")
        for path in self.binds:
            if not path.is_dir():
                raise ValueError(f"cannot bind {str(path)!r}: not a directory")
        for disk in self.disks:
            if not disk.exists() or "," in str(disk) or ":" in str(disk):
                raise ValueError(f"cannot use {str(disk)!r} as a disk: missing, or has , or :")


@dataclass(frozen=True, slots=True, kw_only=True)
class UmlResult:
    """How the command ended: as subprocess.CompletedProcess, with the kernel's console beside.

    ``returncode`` is 128 + N for a command that signal N ended, as a shell gives it. ``stdout`` and
    ``stderr`` are empty when they were passed on instead of kept. ``boot_seconds`` is the time to
    the start of the command.
    """

    args: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes
    console: bytes
    boot_seconds: float
    seconds: float

    def check_returncode(self) -> None:
        """Raise subprocess.CalledProcessError, with the output, unless the status is 0."""
        if self.returncode:
            raise subprocess.CalledProcessError(
                self.returncode, self.args, self.stdout, self.stderr
            )


def run_uml(
    argv: Sequence[str],
    *,
    memory_mib: int = 512,
    binds: Sequence[Path] = (),
    vsock_socket: Path | None = None,
    disks: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes = b"",
    timeout_seconds: float | None = 300,
) -> UmlResult:
    """Run ``argv`` to its end and return its status and output.

    Raises:
        UmlBootError: the kernel did not come up or died.
        UmlTimeoutError: it took longer than ``timeout_seconds``.
        FileNotFoundError: User Mode Linux is not installed.
    """
    spec = UmlSpec(
        argv=tuple(argv),
        memory_mib=memory_mib,
        binds=tuple(binds),
        vsock_socket=vsock_socket,
        disks=tuple(disks),
        env=env,
        cwd=cwd,
        stdin=stdin,
        timeout_seconds=timeout_seconds,
    )
    return run_spec(spec)


def run_spec(spec: UmlSpec, *, stdout: int | None = None, stderr: int | None = None) -> UmlResult:
    """As ``run_uml``; with descriptors given, output is passed on to them as it comes."""
    with contextlib.ExitStack() as stack:
        run_dir = Path(tempfile.mkdtemp(prefix="guestagent-uml-"))
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        pipes = _Pipes(stack, {1: stdout, 2: stderr})
        started = time.monotonic()
        process = _start(spec, run_dir, pipes, stack)
        return pipes.follow(spec, process, started)


class _Pipes:
    """The host ends of the consoles. 0: kernel, 1: output, 2: errors, 3: reports."""

    def __init__(self, stack: contextlib.ExitStack, forward: Mapping[int, int | None]) -> None:
        self._forward = forward
        self.read: dict[int, int] = {}
        self.write: dict[int, int] = {}
        for number in range(4):
            self.read[number], self.write[number] = os.pipe()
            stack.callback(os.close, self.read[number])
        # the guest sees a hang-up on this one when this process ends, however it ends
        self.life_read, self._life_write = os.pipe()
        stack.callback(os.close, self._life_write)
        self._kept: dict[int, bytearray] = {number: bytearray() for number in range(4)}

    def inherited(self) -> list[int]:
        return [*self.write.values(), self.life_read]

    def close_inherited(self) -> None:
        for fd in self.inherited():
            os.close(fd)

    def follow(
        self, spec: UmlSpec, process: "subprocess.Popen[bytes]", started: float
    ) -> UmlResult:
        """Copy and keep what comes until the kernel has ended."""
        boot_seconds = 0.0
        deadline = None if spec.timeout_seconds is None else started + spec.timeout_seconds
        poller = select.poll()
        for fd in self.read.values():
            poller.register(fd, select.POLLIN)
        open_count = len(self.read)
        numbers = {fd: number for number, fd in self.read.items()}
        while open_count:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise UmlTimeoutError(
                    f"killed after {spec.timeout_seconds:g} s: {' '.join(spec.argv)}",
                    bytes(self._kept[0]),
                )
            for fd, _ in poller.poll(None if left is None else left * 1000):
                if not self._take(numbers[fd], os.read(fd, _CHUNK_BYTES)):
                    poller.unregister(fd)
                    open_count -= 1
                elif not boot_seconds and self._kept[3]:
                    boot_seconds = time.monotonic() - started
        exit_status = process.wait()
        return self._result(spec, exit_status, boot_seconds, time.monotonic() - started)

    def _take(self, number: int, data: bytes) -> bool:
        sink = self._forward.get(number)
        if sink is None:
            self._kept[number] += data
            if number == 0:
                del self._kept[0][:-_CONSOLE_TAIL_BYTES]
        else:
            _write(sink, data)
        return bool(data)

    def _result(
        self, spec: UmlSpec, exit_status: int, boot_seconds: float, seconds: float
    ) -> UmlResult:
        console = bytes(self._kept[0])
        status = None
        for line in self._kept[3].decode().splitlines():
            word, _, value = line.partition(" ")
            status = int(value) if word == "status" else status
        if status is None:
            when = "under the command" if boot_seconds else "while it booted"
            raise UmlBootError(f"the kernel died {when} (exit status {exit_status})", console)
        return UmlResult(
            args=spec.argv,
            returncode=status,
            stdout=bytes(self._kept[1]),
            stderr=bytes(self._kept[2]),
            console=console,
            boot_seconds=boot_seconds,
            seconds=seconds,
        )


def _start(
    spec: UmlSpec, run_dir: Path, pipes: _Pipes, stack: contextlib.ExitStack
) -> "subprocess.Popen[bytes]":
    program = shutil.which("linux.uml")
    if program is None:
        raise FileNotFoundError("linux.uml is not installed (package user-mode-linux)")
    modules_dir = _modules_dir()
    config_path = _write_config(spec, run_dir, modules_dir)
    terminal = os.open(os.ttyname(0), os.O_RDWR) if spec.terminal else None
    argv = [
        program,
        *kernel_arguments(spec, run_dir, config_path, pipes.write, pipes.life_read, terminal),
    ]
    inherited = pipes.inherited() + ([] if terminal is None else [terminal])
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=pipes.write[0],
        stderr=pipes.write[0],
        pass_fds=inherited,
        start_new_session=True,
        env={"TMPDIR": str(_memory_dir(spec.memory_mib)), "HOME": str(run_dir), "PATH": os.defpath},
    )
    stack.callback(_kill, process)
    resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
    pipes.close_inherited()
    if terminal is not None:
        os.close(terminal)
    return process


def kernel_arguments(
    spec: UmlSpec,
    run_dir: Path,
    config_path: Path,
    consoles: Mapping[int, int],
    life_fd: int,
    terminal_fd: int | None,
) -> list[str]:
    """Return the kernel command line; descriptors are those that the kernel inherits."""
    output = (
        f"null,fd:{consoles[1]}" if terminal_fd is None else f"fd:{terminal_fd},fd:{terminal_fd}"
    )
    arguments = [
        f"mem={spec.memory_mib}M",
        "root=/dev/root",
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
        f"uml_dir={run_dir}/",
        "umid=uml",
        f"con0=null,fd:{consoles[0]}",
        f"con1={output}",
        f"con2=null,fd:{consoles[2]}",
        f"con3=fd:{life_fd},fd:{consoles[3]}",
        "con=null",
        "ssl=null",
        "quiet",
        "noreboot",
        "panic=-1",
    ]
    if spec.vsock_socket is not None:
        arguments.append(f"virtio_uml.device={spec.vsock_socket}:{_VSOCK_DEVICE_ID}")
    arguments += [f"ubd{number}={disk.resolve()}" for number, disk in enumerate(spec.disks)]
    arguments += spec.append
    script = Path(__file__).with_name("uml_init.py")
    init = [f"init={_interpreter()}", "--", "-I", "-S", "-B", str(script), str(config_path)]
    return arguments + init


def _interpreter() -> str:
    """Return the real interpreter: a virtual environment may lie where the new root hides it."""
    return os.path.realpath(sys.executable)


def _modules_dir() -> Path:
    """Return where the modules of the installed User Mode Linux kernel are."""
    found = sorted(Path("/usr/lib/uml/modules").glob("*/modules.dep"))
    if not found:
        raise FileNotFoundError("no modules in /usr/lib/uml/modules (package user-mode-linux)")
    return found[-1].parent


def _write_config(spec: UmlSpec, run_dir: Path, modules_dir: Path) -> Path:
    wanted = [*MODULES, *(["vmw_vsock_virtio_transport"] if spec.vsock_socket else [])]
    cwd = (spec.cwd or Path.cwd()).resolve()
    scratch = run_dir / "scratch"
    scratch.mkdir()
    stdin_path = Path(os.devnull)
    if spec.stdin:
        stdin_path = run_dir / "stdin"
        stdin_path.write_bytes(spec.stdin)
    config: dict[str, object] = {
        "argv": list(spec.argv),
        "env": dict(os.environ if spec.env is None else spec.env),
        "cwd": str(cwd),
        "modules": [str(path) for path in ModuleIndex(modules_dir=modules_dir).closure(wanted)],
        "modules_dir": str(modules_dir),
        "scratch": str(scratch),
        "binds": [str(path.resolve()) for path in spec.binds],
        "keep": sorted({str(path) for path in _needed(cwd, run_dir) if _is_hidden(path)}),
        "stdin": str(stdin_path),
        "terminal": list(os.get_terminal_size(0))[::-1] if spec.terminal else None,
    }
    path = run_dir / "config"
    path.write_bytes(marshal.dumps(config))
    return path


def _needed(cwd: Path, run_dir: Path) -> Iterator[Path]:
    """Yield the directories of the host that the command cannot do without."""
    yield cwd
    yield run_dir
    yield Path(__file__).resolve().parent.parent
    yield Path(sys.prefix).resolve()


def _is_hidden(path: Path) -> bool:
    return any(fresh in path.parents for fresh in _FRESH)


def _memory_dir(memory_mib: int) -> Path:
    """Return a memory file system with room for the memory of the guest.

    Raises:
        OSError: there is none; on a disk the guest would be slow, and every page would be written.
    """
    tried = []
    for name in (os.environ.get("TMPDIR"), "/dev/shm", "/tmp", "/run"):
        if not name or not os.path.isdir(name) or not os.access(name, os.W_OK):
            continue
        free = os.statvfs(name)
        free_mib = free.f_bavail * free.f_frsize >> 20
        if _is_memory(name) and free_mib >= memory_mib:
            return Path(name)
        tried.append(f"{name} ({free_mib} MiB free)")
    raise OSError(f"no memory file system with {memory_mib} MiB free: tried {', '.join(tried)}")


def _is_memory(directory: str) -> bool:
    device = os.stat(directory).st_dev
    with open("/proc/self/mountinfo") as file:
        for line in file:
            fields, _, kind = line.partition(" - ")
            major, minor = fields.split()[2].split(":")
            if os.makedev(int(major), int(minor)) == device:
                return kind.startswith(("tmpfs ", "ramfs "))
    return False


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the kernel and every process that it made; it leads their process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
