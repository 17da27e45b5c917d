"""Ttys as lines of the console: no UART behind the node, unknown terminals, no control."""

import errno
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from guestagent.console.lineedit import History, LineEditor
from guestagent.console.service import line_term
from tests.beds.consolebed import serving
from tests.unit.test_console_line import Line
from vsock.serial import find_device

PROMPT = "guest> "
WAIT_SECONDS = 60.0


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


def test_a_key_prints_few_characters_in_a_long_line() -> None:
    """At 9600 baud a row is 0.08 s: to print one for each key would be slower than typing."""
    editor = LineEditor(PROMPT, columns=80, history=History(), complete=lambda _: [])
    printed = sum(len(editor.press(f"{number % 10}")) for number in range(400))
    assert printed < 400 * 12
    printed = sum(len(editor.press("backspace")) for _ in range(400))
    assert printed < 400 * 16
    assert editor.text == ""


_OPENS_A_LINE = """
import os, sys
from types import SimpleNamespace
from guestagent.console.service import Console

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
        line.type("\r")
        line.expect(PROMPT)
        line.type("sleep 1000\r" + "forgotten\x03" + "uptime\r")
        line.expect("sleep 1000\r\n^C\r\n" + PROMPT)
        assert "forgotten" not in line.expect("the agent")
    os.close(line.fd)
