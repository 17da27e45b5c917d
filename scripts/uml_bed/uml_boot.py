"""How User Mode Linux is told what to run: kernel command line, configuration, memory."""

import marshal
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rootfs.bootimage.kernel import ModuleIndex

__all__ = ("UmlSpec", "kernel_arguments", "memory_dir", "write_config")

#: What every run has loaded. dm-verity brings dm-mod along.
MODULES = ("overlay", "dm-verity", "erofs", "squashfs", "loop", "vsock", "vsock_loopback")
_VSOCK_DEVICE_ID = 19  # virtio_ids.h: VIRTIO_ID_VSOCK
#: Directories that are empty and fresh inside; see scripts.uml_bed.uml_init.
_FRESH = (Path("/tmp"), Path("/run"), Path("/dev/shm"))


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


def write_config(spec: UmlSpec, run_dir: Path, modules: Path) -> Path:
    """Write the configuration of ``scripts.uml_bed.uml_init`` into ``run_dir``; return its path.

    ``modules`` is the directory of the kernel's modules.
    """
    wanted = [*MODULES, *(["vmw_vsock_virtio_transport"] if spec.vsock_socket else [])]
    cwd = (spec.cwd or Path.cwd()).resolve()
    scratch = run_dir / "scratch"
    scratch.mkdir()
    stdin_path = Path(os.devnull)
    if spec.stdin:
        stdin_path = run_dir / "stdin"
        stdin_path.write_bytes(spec.stdin)
    env = dict(os.environ if spec.env is None else spec.env)
    config: dict[str, object] = {
        "argv": list(spec.argv),
        "env": env,
        "cwd": str(cwd),
        "modules": [str(path) for path in ModuleIndex(modules_dir=modules).closure(wanted)],
        "modules_dir": str(modules),
        "scratch": str(scratch),
        "binds": [str(path.resolve()) for path in spec.binds],
        "keep": sorted({str(path) for path in _needed(cwd, run_dir) if _is_hidden(path)}),
        "make": [path for path in (env.get("TMPDIR"),) if path and _is_hidden(Path(path))],
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
    yield Path(__file__).resolve().parents[2]
    yield Path(sys.prefix).resolve()


def _is_hidden(path: Path) -> bool:
    return any(fresh in path.parents for fresh in _FRESH)


def memory_dir(memory_mib: int) -> Path:
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
