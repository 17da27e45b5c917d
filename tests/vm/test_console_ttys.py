"""The console at hvc0 and at ttyS1 of a real machine, for a person with a terminal that knows
nothing but characters, carriage return, line feed, backspace and the bell.
"""

import re
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guestagent.api.console import CONSOLE_PORT
from guestagent.host.client import GuestAgent
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.machine.qemu import Machine, MachineError, PmemSpec
from tests.vm.conftest import BOOT_SECONDS, CACHE_DIR, PackedLayers, mount_root
from vsock.address import parse_address
from vsock.deadline import Deadline
from vsock.dial import connect
from vsock.errors import ConnectionClosed

BUSYBOX = Path("/usr/bin/busybox")
TTYS = ("hvc0", "ttyS1")
WAIT_SECONDS = 30.0
#: The console answers in tens of milliseconds: after this much silence there is none.
SILENCE_SECONDS = 2.0
COLUMNS = 80
PROMPT = "guest> "
ENTER = "Press Enter for the guest's console."


class Person:
    """Sits at the far end of a line, behind a dumb terminal of 80 columns."""

    def __init__(self, path: Path) -> None:
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(str(path))
        #: The screen, as the eye sees it; the last row is where the cursor is.
        self.rows = [""]
        #: Rows that did not fit.
        self.wrapped: list[str] = []
        self._cursor = 0
        self._unread = ""
        #: What the last ``expect`` has found.
        self.found = ""

    def leave(self) -> None:
        self._line.close()

    def type(self, text: str) -> None:
        self._line.sendall(text.encode())

    def ask(self, text: str, *patterns: str) -> None:
        """Type, then wait for what matches each."""
        self.type(text)
        for pattern in patterns:
            self.expect(pattern)

    def expect(self, pattern: str) -> str:
        """Wait for what matches; return what came before it."""
        while (found := re.search(pattern, self._unread)) is None:
            self._read(f"waiting for {pattern!r}: {self._unread!r}")
        self.found = found.group()
        before, self._unread = self._unread[: found.start()], self._unread[found.end() :]
        return before

    def see(self, pattern: str) -> None:
        """Wait until the last row is so."""
        while not re.fullmatch(pattern, self.rows[-1]):
            self._read(f"{self.rows[-1]!r} is not {pattern!r}")

    def command(self, text: str) -> str:
        """Run a command; return its output, all pages of it."""
        self.type(f"{text}\r")
        output = ""
        self.expect(r"\r\n")
        while True:
            output += self.expect(f"{PROMPT}|--more--")
            if self.found == PROMPT:
                return output.replace("\r        \r", "").replace("\r\n", "\n")
            self.type(" ")

    def hears(self, seconds: float) -> bool:
        """Say whether anything comes within that time."""
        return bool(select.select([self._line], [], [], seconds)[0])

    def _read(self, why: str) -> None:
        assert self.hears(WAIT_SECONDS), why
        data = self._line.recv(65536).decode()
        assert data, "the line was cut"
        self._unread += data
        for character in data:
            self._show(character)

    def _show(self, character: str) -> None:
        if character == "\n":
            assert self._cursor == 0, f"a row without its carriage return: {self.rows[-1]!r}"
            self.rows.append("")
        elif character == "\r":
            self._cursor = 0
        elif character == "\b":
            self._cursor = max(0, self._cursor - 1)
        elif character != "\a":
            assert character.isprintable(), f"no dumb terminal knows {character!r}"
            if self._cursor == COLUMNS:
                self.wrapped.append(self.rows[-1])
                self.rows.append("")
                self._cursor = 0
            row = self.rows[-1]
            self.rows[-1] = row[: self._cursor] + character + row[self._cursor + 1 :]
            self._cursor += 1


@pytest.fixture(scope="module")
def machine(start_machine: Callable[..., Machine], kernel: Kernel, pack: PackedLayers) -> Machine:
    """A machine with layers and a shell, and the console at both lines.

    TERM is not on its command line: the terminals are unknown.
    """
    image = build_initramfs(
        InitramfsSpec(kernel=kernel, files=(("bin/busybox", BUSYBOX),)), cache_dir=CACHE_DIR
    )
    assert "virtio_console" in image.kernel_modules  # hvc0 is made by it
    machine = start_machine(
        initrd=image.path,
        cmdline="guestagent.console=/dev/hvc0,/dev/ttyS1 guestagent.console_shell=1",
        pmem=(PmemSpec(path=pack.path),),
        ttys=TTYS,
    )
    with ExitStack() as stack:
        # both lines are open before the boot: output to a closed line is lost
        people = []
        for tty in TTYS:
            person = Person(machine.tty_path(tty))
            stack.callback(person.leave)
            people.append(person)
        for person in people:
            person.expect(ENTER)  # keys typed before it are dropped
    mount_root(machine, pack, connect_seconds=BOOT_SECONDS)
    return machine


@pytest.fixture
def person(machine: Machine, tty: str) -> Iterator[Person]:
    """A person at the prompt. Afterwards the line is at "Press Enter" again."""
    person = Person(machine.tty_path(tty))
    person.ask("\r", PROMPT)
    try:
        yield person
        person.ask("\x03\x15exit\r", ENTER)
    finally:
        person.leave()  # the next has the line only then


pytestmark = pytest.mark.usefixtures("machine")
at_each_line = pytest.mark.parametrize("tty", TTYS)


@at_each_line
def test_a_person_looks_around(person: Person) -> None:
    listed = person.command("help")
    assert {"layers", "status", "poweroff"} <= set(listed.split())
    layers = person.command("layers").splitlines()
    assert [row.split()[0] for row in layers] == ["LAYER", "top", "base"]
    assert person.command("status").startswith("ready\n")
    assert "COMMAND" in person.command("top -n 1")
    person.ask("\x0cuptime\r", "the agent", PROMPT)
    assert person.wrapped == []


@at_each_line
def test_a_line_longer_than_the_screen(person: Person) -> None:
    line = "cat" + " root:/etc/motd" * 12
    person.type(line)
    person.see(f"{PROMPT}.*{line[-40:]} *")
    person.type("\x01")  # to its start
    person.see(f"{PROMPT}{line[:70]}.*")
    person.type("\x05")  # and back
    person.see(f"{PROMPT}.*{line[-40:]} *")
    assert person.wrapped == []
    person.type("\r")
    for _ in range(12):
        person.expect("from the top\r\n")
    person.expect(PROMPT)


@at_each_line
def test_an_interrupt_ends_a_command_and_a_line(person: Person) -> None:
    person.ask("sleep 1000\r", "sleep 1000\r\n")
    person.ask("\x03", r"\^C\r\n" + PROMPT)
    person.ask("poweroff\x03", r"poweroff\^C\r\n" + PROMPT)
    # and it was no signal to the agent
    assert person.command("status").startswith("ready\n")


@at_each_line
def test_cr_lf_and_crlf_are_one_enter_each(person: Person) -> None:
    for enter in ("\r", "\n", "\r\n"):
        person.type(f"sleep 0{enter}sleep 0{enter}")
        for _ in range(2):
            assert person.expect(f"sleep 0\r\n{PROMPT}") == ""
    assert not person.hears(0.2)


@at_each_line
def test_a_session_after_another(person: Person) -> None:
    person.ask("exit\r", f"\r\n{ENTER}\r\n")
    person.type("layers\r")  # all keys but Enter are dropped
    assert person.expect(PROMPT).startswith("guestagent 0.1.0 on Linux")
    assert "base" in person.command("layers")


@at_each_line
def test_serial_line_is_reset_between_sessions(machine: Machine, tty: str) -> None:
    """A line has no hang-up: a session that was begun is there for the next person."""
    first = Person(machine.tty_path(tty))
    first.ask("\r", PROMPT)
    first.ask("half a line", "half a line")
    second = Person(machine.tty_path(tty))  # which is not at the line until the first has left
    first.leave()
    second.ask("\x15layers\r", "base", PROMPT)
    second.ask("exit\r", ENTER)
    second.leave()


@at_each_line
def test_a_shell_has_a_terminal_of_its_own(person: Person) -> None:
    person.ask("sh -c 'busybox tty; echo $TERM; busybox sleep 1000'\r", "/dev/pts/0\r\ndumb\r\n")
    person.ask("\x03", PROMPT)
    assert person.command("status").startswith("ready\n")


def test_two_people_at_two_lines(machine: Machine) -> None:
    first, second = (Person(machine.tty_path(tty)) for tty in TTYS)
    for person in (first, second):
        person.ask("\r", PROMPT)
    first.ask("sleep 1000\r", "sleep 1000\r\n")
    assert "base" in second.command("layers")
    first.ask("\x03", PROMPT)
    for person in (first, second):
        person.ask("exit\r", ENTER)
        person.leave()


def test_poweroff_at_a_line_is_the_last(machine: Machine) -> None:
    """The last test of the machine: it ends it."""
    person = Person(machine.tty_path("ttyS1"))
    person.ask("\r", PROMPT)
    person.ask("poweroff\r", "everything is unmounted; poweroff\r\n")
    with Deadline(WAIT_SECONDS) as deadline:
        assert machine.wait(deadline) == 0
    person.leave()


def test_a_line_is_silent_when_the_console_is_off(start_machine: Callable[..., Machine]) -> None:
    machine = start_machine(ttys=TTYS)
    with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as agent:
        assert agent.hello.boot["console"] == []
        people = [Person(machine.tty_path(tty)) for tty in TTYS]
        for person in people:
            person.type("\r\r\x03\nstatus\r")
        for person in people:
            assert not person.hears(SILENCE_SECONDS)
            person.leave()
        with pytest.raises(ConnectionClosed):
            connect(parse_address(machine.agent_address(CONSOLE_PORT)), SILENCE_SECONDS)
        agent.status()
    with pytest.raises(MachineError, match="no tty 'ttyS2'"):
        machine.tty_path("ttyS2")


def test_a_uart_that_is_not_there_costs_no_session(start_machine: Callable[..., Machine]) -> None:
    """The kernel has a node for it all the same."""
    machine = start_machine(cmdline="guestagent.console=/dev/ttyS1,/dev/hvc0", ttys=("hvc0",))
    person = Person(machine.tty_path("hvc0"))
    person.expect(ENTER)
    person.ask("\r", PROMPT)
    log = person.command("log")
    person.leave()
    assert "listen=serial:///dev/hvc0" in log
    assert "cannot listen" in log
    assert "listen=serial:///dev/ttyS1" not in log
    assert "peer=serial:///dev/ttyS1" not in log
