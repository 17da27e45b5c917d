"""The console of a real machine: over vsock, over a serial line, and a shell in it.

``guestctl console`` runs in a pseudo-terminal, where pexpect types.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from guestagent.api.console import CONSOLE_PORT
from guestagent.host.client import GuestAgent
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.machine.qemu import Machine, PmemSpec
from tests.beds.ctlbed import GUESTCTL
from tests.beds.terminal import ask, ended, spawn
from tests.vm.conftest import CACHE_DIR, PackedLayers, mount_root
from vsock.deadline import Deadline

PROJECT = Path(__file__).resolve().parents[2]
BUSYBOX = Path("/usr/bin/busybox")
WAIT_SECONDS = 60
PORT = "console"


@pytest.fixture(scope="module")
def machine(
    start_machine: Callable[..., Machine], kernel: Kernel, pack: PackedLayers
) -> Iterator[Machine]:
    """A machine with a console on vsock and on a virtio-serial port, with layers and a shell."""
    spec = InitramfsSpec(kernel=kernel, files=(("bin/busybox", BUSYBOX),))
    machine = start_machine(
        initrd=build_initramfs(spec, cache_dir=CACHE_DIR).path,
        cmdline=f"guestagent.console=vsock:{CONSOLE_PORT},/dev/virtio-ports/{PORT} "
        "guestagent.console_shell=1 TERM=dumb",
        pmem=(PmemSpec(path=pack.path),),
        serial_ports=(PORT,),
    )
    mount_root(machine, pack, connect_seconds=WAIT_SECONDS)
    return machine


def start(*arguments: str) -> pexpect.spawn:
    return spawn(*arguments, timeout_seconds=WAIT_SECONDS, environment={"TERM": "xterm"})


@pytest.fixture
def terminal(machine: Machine) -> Iterator[pexpect.spawn]:
    child = start("--connect", machine.agent_address(), "console")
    child.expect_exact("guest> ")
    yield child
    child.close(force=True)


@pytest.fixture
def line(machine: Machine) -> Iterator[pexpect.spawn]:
    child = start("console", "--line", f"unix://{machine.port_path(PORT)}")
    child.expect_exact("Press Enter for the guest's console.")
    ask(child, "\r", "guest> ")
    yield child
    child.close(force=True)


def look_around(child: pexpect.spawn) -> None:
    """Use the console as a person does, with nothing but what is in the guest."""
    ask(child, "lay\tba\t\r", "layers base")
    child.expect(r"root digest +[0-9a-f]{64}")
    child.expect_exact("linear 259:0")
    child.expect_exact("guest> ")
    ask(child, "cat root:/etc/mo\t\r", "from the top\r\n", "guest> ")
    ask(child, "help\r", "--more--")
    ask(child, "q", "guest> ")
    ask(child, "sleep 1000\r", "sleep 1000\r\n")
    ask(child, "\x03", "^C", "guest> ")
    ask(child, "uptime\r", "the agent", "guest> ")
    ask(child, "la\x1b[A\x1b[A\x15mod\t\r", "MODULE", "--more--")
    ask(child, "q", "guest> ")


def test_a_person_over_vsock(terminal: pexpect.spawn) -> None:
    look_around(terminal)
    terminal.send("\x04")
    assert ended(terminal) == 0


def test_a_person_over_a_serial_line(line: pexpect.spawn) -> None:
    look_around(line)
    ask(line, "term 132x50\r", "dumb 132x50", "guest> ")
    ask(line, "exit\r", "Press Enter for the guest's console.")
    ask(line, "\r", "guest> ")
    line.send("~.")
    assert ended(line) == 0


def test_a_serial_line_of_a_dumb_terminal_has_no_escape_codes(machine: Machine) -> None:
    child = start("console", "--line", f"unix://{machine.port_path(PORT)}")
    child.logfile_read = log = _Log()
    child.expect_exact("Press Enter")
    ask(child, "\r", "guest> ")
    look_around(child)
    ask(child, "top -n 1\r", "COMMAND", "guest> ")
    child.send("~.")
    ended(child)
    assert b"\x1b" not in log.data
    rows = [row.rstrip(b"\r").rpartition(b"\r")[2] for row in log.data.split(b"\n")]
    wide = [row for row in rows if len(row) > 80 and b"\b" not in row]
    # a digest or a table of device-mapper is not cut
    assert not [row for row in wide if b"linear" not in row and b"verity" not in row]


class _Log:
    """Keeps what was read."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data

    def flush(self) -> None:
        return


def test_two_people_at_once(terminal: pexpect.spawn, line: pexpect.spawn) -> None:
    ask(terminal, "sleep 1000\r", "sleep 1000\r\n")
    ask(line, "events\r", "overlay_mounted overlay=root", "guest> ")
    ask(terminal, "\x03", "guest> ")
    terminal.send("~.")
    line.send("~.")
    assert (ended(terminal), ended(line)) == (0, 0)


def test_a_shell(terminal: pexpect.spawn, machine: Machine) -> None:
    ask(terminal, "sh\r", "guest# ")
    ask(terminal, "busybox stty size; busybox tty\r", "24 80", "/dev/pts/0")
    terminal.setwinsize(40, 120)
    ask(
        terminal,
        "until busybox stty size | busybox grep '40 120'; do busybox sleep 0.1; done\r",
        "\n40 120",
        "guest# ",
    )
    # the shell takes what is typed for its own editor until it has run the line
    ask(terminal, "echo ready; busybox cat\r", "\nready")
    ask(terminal, "ping\r", "ping\r\nping\r\n")
    ask(terminal, "\x03", "guest# ")
    ask(terminal, "exit 9\r", "guest> ")
    terminal.send("exit\r")
    assert ended(terminal) == 9


def guestctl(machine: Machine, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [*GUESTCTL, "--connect", machine.agent_address(), "console", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=WAIT_SECONDS,
        cwd=PROJECT,
    )


def test_scripts(machine: Machine) -> None:
    layers = guestctl(machine, "-c", "layers")
    assert (layers.returncode, layers.stderr) == (0, b"")
    assert [row.split()[0] for row in layers.stdout.splitlines()] == [b"LAYER", b"top", b"base"]
    shell = guestctl(machine, "-c", "sh -c 'echo out; echo err >&2; exit 42'")
    assert (shell.returncode, shell.stdout, shell.stderr) == (42, b"out\n", b"err\n")
    assert guestctl(machine, "-c", "reconcile").stdout.startswith(b"journal, inventory and kernel")
    size = guestctl(machine, "-c", "sh -c 'busybox head -c 1000000 /dev/zero'")
    assert (size.returncode, size.stdout) == (0, bytes(1_000_000))


def test_memory_of_an_agent_with_a_console(machine: Machine) -> None:
    with GuestAgent(machine.agent_address()) as guest:
        before = guest.status()
        for _ in range(20):
            guestctl(machine, "-c", "layers")
        after = guest.status()
    assert after.rss_bytes - before.rss_bytes < 1 << 20
    assert after.threads <= before.threads + 1


def test_poweroff_is_the_last(terminal: pexpect.spawn, machine: Machine) -> None:
    """The last test of the machine: it ends it."""
    ask(terminal, "poweroff\r", "everything is unmounted; poweroff")
    assert ended(terminal) == 0
    with Deadline(WAIT_SECONDS) as deadline:
        assert machine.wait(deadline) == 0
    assert "Kernel panic" not in machine.console.read()
