"""A process that starts a machine and is killed takes the machine with it."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rootfs.bootimage.kernel import Kernel
from vsock.deadline import Deadline

PROJECT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0
#: From the end of the parent; a signal takes no time.
END_SECONDS = 10.0

_MACHINE = """
import signal, sys
from pathlib import Path
from rootfs.machine.qemu import Machine, MachineSpec

with Machine(MachineSpec(kernel=Path(sys.argv[1]), initrd=Path(sys.argv[2]))) as machine:
    print(machine.pid, flush=True)
    signal.pause()
"""
_UML = """
import sys
from scripts.uml_bed.uml import UmlSpec, run_spec

run_spec(UmlSpec(argv=("python3", "-c", sys.argv[1])), stdout=1)
"""
_GUEST = """
import os, time
os.write(os.open("/dev/tty1", os.O_WRONLY | os.O_NOCTTY), b"up")  # not by way of init
time.sleep(1000)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Start a Python script in a process that nobody ends but the test."""
    with contextlib.ExitStack() as stack:

        def start(script: str, *arguments: str) -> "subprocess.Popen[bytes]":
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", script, *arguments],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd=PROJECT,
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def children(pid: int) -> list[int]:
    """Return the processes that the main thread of a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def session_of(pid: int) -> list[int]:
    """Return the processes of the session that a process leads."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(entry.name)) == pid:
                found.append(int(entry.name))
    return found


def end_and_watch(parent: "subprocess.Popen[bytes]", how: int, pids: list[int]) -> None:
    """End the parent; wait until all of the others have ended."""
    with contextlib.ExitStack() as stack:
        pid_fds = [os.pidfd_open(pid) for pid in pids]
        for fd in pid_fds:
            stack.callback(os.close, fd)
            stack.callback(kill, fd)
        assert select.select(pid_fds, [], [], 0)[0] == []
        os.kill(parent.pid, how)
        with Deadline(END_SECONDS) as deadline:
            for fd in pid_fds:
                deadline.wait([fd], "waiting for a process to end")
    assert parent.wait(END_SECONDS) == -how


def kill(pid_fd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pid_fd, signal.SIGKILL)


def read_line(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], START_SECONDS)[0], "nothing in time"
    return os.read(process.stdout.fileno(), 100)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "terminate"])
def test_qemu_and_the_vsock_device_end_with_their_parent(
    start: Callable[..., "subprocess.Popen[bytes]"],
    kernel: Kernel,
    initramfs: Path,
    how: signal.Signals,
) -> None:
    parent = start(_MACHINE, str(kernel.image), str(initramfs))
    qemu = int(read_line(parent))
    started = children(parent.pid)  # with the vsock device, where the kernel has none
    assert qemu in started
    end_and_watch(parent, how, started)


def test_user_mode_linux_ends_with_its_parent(
    start: Callable[..., "subprocess.Popen[bytes]"],
) -> None:
    """By itself: its init sees that the parent has gone."""
    parent = start(_UML, _GUEST)
    assert read_line(parent) == b"up"
    (kernel,) = children(parent.pid)
    started = session_of(kernel)
    assert len(started) > 2  # it has helpers
    end_and_watch(parent, signal.SIGKILL, started)
