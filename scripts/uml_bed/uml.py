"""Run a command under a real Linux kernel that is one process of the host: User Mode Linux.

The command sees the host's own root directory through an overlay whose writes stay in memory, with
device-mapper, verity, erofs, squashfs, overlay, loop and vsock at hand. Nothing on the host
changes, except below the directories that are bound writable.

    result = run_uml(["dmsetup", "targets"], timeout_seconds=60)
    result.returncode, result.stdout, result.stderr, result.console
"""

import contextlib
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rootfs.machine.rundir import RunDirectory, run_directory
from scripts.uml_bed.kernels import user_mode_linux
from scripts.uml_bed.uml_boot import UmlSpec, kernel_arguments, memory_dir, write_config

__all__ = (
    "UmlBootError",
    "UmlError",
    "UmlResult",
    "UmlSpec",
    "UmlTimeoutError",
    "run_spec",
    "run_uml",
)

_CONSOLE_TAIL_BYTES = 64 * 1024
_CHUNK_BYTES = 64 * 1024


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
        run = stack.enter_context(run_directory("guestagent-uml-"))
        pipes = _Pipes(stack, {1: stdout, 2: stderr})
        started = time.monotonic()
        process = _start(spec, run, pipes, stack)
        return pipes.follow(spec, process, started)


class _Pipes:
    """The host ends of the consoles. 0: kernel, 1: output, 2: errors, 3: reports."""

    def __init__(self, stack: contextlib.ExitStack, forward: Mapping[int, int | None]) -> None:
        self._forward = forward
        self.read: dict[int, int] = {}
        self.write: dict[int, int] = {}
        #: Closes the ends that the kernel inherits.
        self.inherited = stack.enter_context(contextlib.ExitStack())
        for number in range(4):
            self.read[number], self.write[number] = os.pipe()
            stack.callback(os.close, self.read[number])
            self.inherited.callback(os.close, self.write[number])
        # the guest sees a hang-up on this one when this process ends, however it ends
        self.life_read, life_write = os.pipe()
        stack.callback(os.close, life_write)
        self.inherited.callback(os.close, self.life_read)
        self._kept: dict[int, bytearray] = {number: bytearray() for number in range(4)}

    def follow(
        self, spec: UmlSpec, process: "subprocess.Popen[bytes]", started: float
    ) -> UmlResult:
        """Copy and keep what comes until the kernel has ended."""
        boot_seconds = 0.0
        deadline = None if spec.timeout_seconds is None else started + spec.timeout_seconds
        numbers = {fd: number for number, fd in self.read.items()}
        poller = select.poll()
        process_fd = os.pidfd_open(process.pid)
        try:
            for fd in (process_fd, *numbers):
                poller.register(fd, select.POLLIN)
            while numbers:
                for fd in self._ready(poller, deadline, spec):
                    if fd == process_fd:
                        # its helpers hold the pipes open if it was killed
                        _end_group(process)
                        poller.unregister(fd)
                    elif not self._take(numbers[fd], os.read(fd, _CHUNK_BYTES)):
                        poller.unregister(fd)
                        del numbers[fd]
                    elif not boot_seconds and self._kept[3]:
                        boot_seconds = time.monotonic() - started
        finally:
            os.close(process_fd)
        exit_status = _end_group(process)
        return self._result(spec, exit_status, boot_seconds, time.monotonic() - started)

    def _ready(self, poller: select.poll, deadline: float | None, spec: UmlSpec) -> list[int]:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise UmlTimeoutError(
                f"killed after {spec.timeout_seconds:g} s: {' '.join(spec.argv)}",
                bytes(self._kept[0]),
            )
        return [fd for fd, _ in poller.poll(None if left is None else left * 1000)]

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
    spec: UmlSpec, run: RunDirectory, pipes: _Pipes, stack: contextlib.ExitStack
) -> "subprocess.Popen[bytes]":
    program, modules = user_mode_linux()
    config = write_config(spec, run.path, modules)
    terminal = None
    if spec.terminal:
        # opened anew: the kernel makes its descriptor non-blocking, and ours is the shell's too
        terminal = os.open(os.ttyname(0), os.O_RDWR)
        pipes.inherited.callback(os.close, terminal)
    arguments = kernel_arguments(spec, run.path, config, pipes.write, pipes.life_read, terminal)
    inherited = [*pipes.write.values(), pipes.life_read, run.lock_fd]
    process = subprocess.Popen(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=pipes.write[0],
        stderr=pipes.write[0],
        pass_fds=inherited if terminal is None else [*inherited, terminal],
        start_new_session=True,
        env={"TMPDIR": str(memory_dir(spec.memory_mib)), "HOME": str(run.path), "PATH": os.defpath},
    )
    stack.callback(_end_group, process)
    resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
    pipes.inherited.close()
    return process


def _end_group(process: "subprocess.Popen[bytes]") -> int:
    """End the kernel and every process that it made, whose group it leads; return its status.

    Nothing else reaps it: until then no other process gets its number, which names the group.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
