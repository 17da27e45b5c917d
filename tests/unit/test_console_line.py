"""The console on a bare line: a pseudo-terminal stands for hvc0 and ttyS1."""

import errno
import itertools
import os
import select
import socket
import subprocess
import sys
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from guestagent.console import service as service_module
from guestagent.console.command import Guest
from guestagent.console.service import Console, line_term
from tests.beds.consolebed import WAIT_SECONDS, Bed, fd_count, serving, thread_count, wait_until
from vsock.address import SerialAddress
from vsock.serial import SerialStream, find_device
from vsock.stream import Listener, Stream

PROMPT = "guest> "
ENTER = "Press Enter for the guest's console."


class Line:
    """The far side of a line: what came, and typing."""

    def __init__(self) -> None:
        self.fd, far = os.openpty()
        tty.setraw(far)
        self.path = os.ttyname(far)
        self.output = b""
        self._seen = 0
        os.close(far)

    def type(self, text: str | bytes) -> None:
        os.write(self.fd, text.encode() if isinstance(text, str) else text)

    def ask(self, text: str, *shown: str) -> None:
        """Type, then wait for what is shown."""
        self.type(text)
        for each in shown:
            self.expect(each)

    def expect(self, text: str) -> str:
        until = time.monotonic() + WAIT_SECONDS
        while (at := self.output.find(text.encode(), self._seen)) < 0:
            assert time.monotonic() < until, (text, self.output[self._seen :])
            self.read(1.0)
        between = self.output[self._seen : at]
        self._seen = at + len(text)
        return between.decode(errors="replace")

    def read(self, seconds: float) -> None:
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                self.output += os.read(self.fd, 65536)
            except OSError:  # the other end is not open
                time.sleep(0.01)


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    if line.fd >= 0:
        os.close(line.fd)


@pytest.fixture
def bed(tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bed]:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(service_module, "_REST_SECONDS", 0.1)
    (tmp_path / "motd").write_text("hello\n")
    with serving(tmp_path / "socket", {"base": tmp_path}, line=line.path, shell=True) as bed:
        yield bed


def test_a_session_and_the_next(bed: Bed, line: Line) -> None:
    for _ in range(2):
        line.expect(ENTER)
        line.ask("\r", "guest> ")
        line.ask("cat base:/mo\t\r", "hello\r\n", "guest> ")
        line.ask("term vt100 132x50\rterm\r", "vt100 132x50\r\n", "vt100 132x50\r\n")
        line.type("exit\r")
    line.expect(ENTER)
    assert b"\x1b" not in line.output


def test_a_shell_on_a_line(bed: Bed, line: Line) -> None:
    line.expect(ENTER)
    line.ask("\rterm 132x50\rsh\r", "guest# ")
    line.ask("stty size\r", "50 132")
    line.ask("exit\r", "guest> ")


def test_junk_on_a_line(bed: Bed, line: Line) -> None:
    line.expect(ENTER)
    line.type(bytes(range(0x0E, 0x100)) * 4)
    line.ask("\r", "guest> ")
    for _ in range(200):
        line.type(b"\xff\x00noise\x1b[999" * 20)
        line.read(0.0)
    line.ask("\x03\x15", "\r\nguest> ")
    line.ask("\ruptime\r", "the agent")


def test_a_line_that_was_cut_uses_no_processor_time(bed: Bed, line: Line) -> None:
    line.expect(ENTER)
    line.ask("\r", "guest> ")
    os.close(line.fd)
    line.fd = -1
    wait_until(lambda: bed.console.session_count == 0, "the session lives on")
    began = time.process_time()
    select.select([], [], [], 0.5)
    assert time.process_time() - began < 0.1
    assert bed.run("plan base")[0] == 0


class _DeadLine(Listener):
    """A device that can be opened and ends at once, as a port without hardware does."""

    def __init__(self) -> None:
        super().__init__(SerialAddress(path="/dev/dead"), None)  # type: ignore[arg-type]
        self._ready = os.eventfd(1, os.EFD_CLOEXEC)
        self.opened_at: list[float] = []

    def fileno(self) -> int:
        return self._ready

    def accept(self) -> Stream:
        if self._busy:
            raise BlockingIOError
        self.opened_at.append(time.monotonic())
        near, far = socket.socketpair()
        far.close()
        fd = near.detach()
        self._busy = True
        return SerialStream(fd, "dead", self._ended)

    _busy = False

    def _ended(self, fd: int) -> None:
        if fd >= 0:
            os.close(fd)
        self._busy = False

    def close(self) -> None:
        os.close(self._ready)


def test_a_line_that_ends_at_once_is_opened_again_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_module, "_REST_SECONDS", 0.1)
    console, dead = Console(cast(Guest, SimpleNamespace(shell=False)), ()), _DeadLine()
    console._add_listener(dead)
    console.start()
    wait_until(lambda: len(dead.opened_at) >= 4, "it is not looked for again")
    console.close()
    pauses = [later - at for at, later in itertools.pairwise(dead.opened_at)]
    assert min(pauses) >= 0.1


def test_a_line_whose_device_comes_late(tmp_path: Path, line: Line) -> None:
    path = tmp_path / "ttyLATE"
    with serving(tmp_path / "socket", {}, line=str(path)) as bed:
        assert bed.run("uptime")[0] == 0
        path.symlink_to(line.path)
        line.expect(ENTER)


def test_an_address_that_cannot_be_listened_on_is_logged_and_the_others_serve(
    tmp_path: Path,
) -> None:
    from vsock.log import log

    threads, fds = thread_count(), fd_count()
    with serving(tmp_path / "socket", {}, line=str(tmp_path)) as bed:
        assert bed.run("uptime")[0] == 0
        assert "cannot listen" in str([entry.text for entry in log.tail(50)])
    assert (thread_count(), fd_count()) == (threads, fds)


def test_a_port_is_found_by_its_name(tmp_path: Path) -> None:
    for number, name in enumerate(("agent", "console")):
        port = tmp_path / f"class/virtio-ports/vport0p{number + 1}"
        port.mkdir(parents=True)
        (port / "name").write_text(f"{name}\n")
    (tmp_path / "class/virtio-ports/vport1p1").mkdir()
    root = str(tmp_path)
    assert find_device("/dev/virtio-ports/console", sys_root=root) == "/dev/vport0p2"
    assert find_device("/dev/virtio-ports/none", sys_root=root) == "/dev/virtio-ports/none"
    assert find_device("/dev/hvc0", sys_root=root) == "/dev/hvc0"
    assert find_device("/dev/virtio-ports/x", sys_root=f"{root}/no") == "/dev/virtio-ports/x"


def test_a_console_that_never_ran_is_closed(tmp_path: Path) -> None:
    fds = fd_count()
    console = Console(None, ())  # type: ignore[arg-type]
    console.start()
    console.close()
    assert fd_count() == fds


def test_a_node_without_a_uart_is_no_line(tmp_path: Path) -> None:
    for name, kind in (("ttyS1", "4"), ("ttyS2", "0")):
        (tmp_path / "class/tty" / name).mkdir(parents=True)
        (tmp_path / "class/tty" / name / "type").write_text(f"{kind}\n")
    root = str(tmp_path)
    assert find_device("/dev/ttyS1", sys_root=root) == "/dev/ttyS1"
    with pytest.raises(OSError, match="no UART is there") as caught:
        find_device("/dev/ttyS2", sys_root=root)
    assert (caught.value.errno, caught.value.filename) == (errno.ENXIO, "/dev/ttyS2")


def test_a_link_to_a_node_without_a_uart_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "class/tty/ttyS2").mkdir(parents=True)
    (tmp_path / "class/tty/ttyS2/type").write_text("0\n")
    link = tmp_path / "line"
    link.symlink_to(tmp_path / "ttyS2")
    with pytest.raises(OSError, match="no UART"):
        find_device(str(link), sys_root=str(tmp_path))


@pytest.mark.parametrize(
    ("ours", "line"), [("", "dumb"), ("linux", "dumb"), ("dumb", "dumb"), ("vt220", "vt220")]
)
def test_the_terminal_of_a_line_is_dumb_unless_configured(ours: str, line: str) -> None:
    assert line_term(ours) == line


_OPENS_A_LINE = """
import os, sys
from types import SimpleNamespace
from guestagent.console.service import Console, line_term

os.setsid()  # a session leader without a terminal gets the first that it opens
console = Console(SimpleNamespace(shell=False), (sys.argv[1],))
console.start()
sys.stdin.read()
with open("/proc/self/stat") as file:
    print(file.read().rpartition(")")[2].split()[4])
console.close()
"""


def test_a_line_does_not_become_the_controlling_terminal() -> None:
    """Else ^C at the line, or its hang-up, would be a signal to the agent."""
    near, far = os.openpty()
    try:
        agent = subprocess.Popen(
            [sys.executable, "-c", _OPENS_A_LINE, f"serial://{os.ttyname(far)}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        with agent:
            assert select.select([near], [], [], WAIT_SECONDS)[0], "the line says nothing"
            assert os.read(near, 100).startswith(b"Press Enter")
            output, _ = agent.communicate(timeout=WAIT_SECONDS)
    finally:
        os.close(far)
        os.close(near)
    assert (agent.returncode, output) == (0, "0\n")


def test_an_interrupt_right_behind_enter_is_for_the_command(tmp_path: Path) -> None:
    line = Line()
    with serving(tmp_path / "socket", {}, line=line.path):
        line.expect("Press Enter")
        line.ask("\r", PROMPT)
        line.ask("sleep 1000\r" + "forgotten\x03" + "uptime\r", "sleep 1000\r\n^C\r\n" + PROMPT)
        assert "forgotten" not in line.expect("the agent")
    os.close(line.fd)
