"""``guestctl console`` in a real pseudo-terminal and on pipes, against a console on a socket."""

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from guestagent.api.console import Size
from guestagent.host.ctl import console_client
from guestagent.host.ctl.console import console_address
from guestagent.host.ctl.main import collect
from guestagent.host.ctl.terminal import HELP, LEAVE, Escapes
from tests.beds.consolebed import Bed, serving, wait_until
from tests.beds.ctlbed import GUESTCTL
from tests.beds.inspectbed import serving as agent_serving
from tests.beds.terminal import ask, ended, spawn
from vsock.address import parse_address

PROJECT = Path(__file__).resolve().parents[2]
LOOK_AGAIN = "_RECONNECT_SLICE_SECONDS"


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    root = tmp_path / "layer"
    root.mkdir()
    (root / "motd").write_text("hello\n")
    return root


@pytest.fixture
def bed(tmp_path: Path, layer: Path) -> Iterator[Bed]:
    with serving(tmp_path / "console", {"base": layer}, shell=True) as bed:
        yield bed


def invoke(*arguments: str) -> Result:
    """Run it in this process, for what ends before there is a session, or says nothing in it."""
    return CliRunner().invoke(collect(), arguments)


def guestctl(*arguments: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [*GUESTCTL, *arguments], input=stdin, capture_output=True, timeout=50, cwd=PROJECT
    )


@pytest.fixture
def terminal(bed: Bed) -> Iterator[pexpect.spawn]:
    # as of a shell that exports the size its window had once
    environment = {"TERM": "xterm", "COLUMNS": "70", "LINES": "10"}
    child = spawn("console", f"unix://{bed.path}", timeout_seconds=20, environment=environment)
    child.expect_exact("guest> ")
    yield child
    child.close(force=True)


def test_a_terminal(terminal: pexpect.spawn) -> None:
    ask(terminal, "layers ba\t\r", "mounted", "guest> ")
    ask(terminal, "cat base:/mo\t\r", "hello\r\n", "guest> ")
    terminal.send("\x04")
    assert ended(terminal) == 0


def test_the_size_follows_the_window(terminal: pexpect.spawn) -> None:
    ask(terminal, "sh\r", "guest# ")
    ask(terminal, "stty size\r", "24 80")
    terminal.setwinsize(33, 111)
    terminal.expect_exact("guest# ")
    ask(terminal, "while ! stty size | grep '33 111'; do sleep 0.05; done\r", "\n33 111")
    ask(terminal, "exit 6\r", "guest> ")
    terminal.send("exit\r")
    assert ended(terminal) == 6


def test_columns_and_lines_count_where_the_terminal_has_no_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leader, follower = pty.openpty()
    try:
        for name in ("_STDIN", "_STDOUT"):
            monkeypatch.setattr(console_client, name, follower)
        monkeypatch.setenv("COLUMNS", "70")
        monkeypatch.setenv("LINES", "10")
        assert console_client._window() == Size(rows=10, columns=70)
        termios.tcsetwinsize(follower, (33, 111))
        assert console_client._window() == Size(rows=33, columns=111)
    finally:
        os.close(leader)
        os.close(follower)


def test_tilde_dot_leaves(terminal: pexpect.spawn) -> None:
    ask(terminal, "\r~?", "send one ~")
    terminal.send("~~\x15\r~.")
    assert ended(terminal) == 0


def test_the_terminal_s_modes_are_restored(bed: Bed) -> None:
    shell = pexpect.spawn("/bin/sh", timeout=20, cwd=str(PROJECT), env={**os.environ, "PS1": "% "})
    shell.expect_exact("% ")
    program = " ".join([sys.executable, "-c", "'from guestagent.host.ctl import main; main()'"])
    shell.sendline(f"stty -a | md5sum; {program} console unix://{bed.path}; stty -a | md5sum")
    shell.expect(r"([0-9a-f]{32})")
    before = shell.match.group(1)
    shell.expect_exact("guest> ")
    shell.send("~.")
    shell.expect(r"([0-9a-f]{32})")
    assert shell.match.group(1) == before
    shell.close(force=True)


def test_a_lost_console_is_connected_again(tmp_path: Path, layer: Path) -> None:
    assert hasattr(console_client, LOOK_AGAIN)
    path = tmp_path / "console"
    with serving(path, {"base": layer}):
        # the same, but it does not take a second to look again
        program = f"from guestagent.host.ctl import console_client as c; c.{LOOK_AGAIN} = 0.05; "
        child = pexpect.spawn(
            GUESTCTL[0],
            ["-c", program + GUESTCTL[2], "console", f"unix://{path}"],
            timeout=30,
            cwd=str(PROJECT),
        )
        child.expect_exact("guest> ")
    child.expect_exact("the console was lost")
    with serving(path, {"base": layer}):
        child.expect_exact("connected again: this is a new session")
        child.expect_exact("guest> ")
        ask(child, "plan base\r", "mount erofs")
    child.expect_exact("the console was lost")
    child.send("~.")
    assert ended(child) == 0


def test_a_command_and_its_status(bed: Bed) -> None:
    address = f"unix://{bed.path}"
    done = guestctl("console", address, "-c", "plan base")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"mount erofs on /run/layers/base\n" in done.stdout
    failed = guestctl("console", address, "-c", "layers nonesuch")
    assert (failed.returncode, failed.stdout) == (1, b"")
    assert b"there is no layer 'nonesuch'" in failed.stderr
    assert invoke("console", address, "-c", "sh -c 'exit 42'").exit_code == 42


def test_pipes(bed: Bed) -> None:
    address = f"unix://{bed.path}"
    data = bytes(range(256)) * 1000
    done = guestctl("console", address, "-c", "sh -c 'cat; echo end >&2'", stdin=data)
    assert (done.returncode, done.stderr) == (0, b"end\n")
    assert done.stdout == data
    script = guestctl("console", address, stdin=b"plan base\nuptime\n")
    assert script.returncode == 0
    assert b"mount erofs" in script.stdout
    assert b"the agent" in script.stdout


def test_a_terminal_for_one_command(bed: Bed) -> None:
    child = pexpect.spawn(
        GUESTCTL[0],
        [*GUESTCTL[1:], "console", f"unix://{bed.path}", "-t", "-c", "sh -c 'tty; exit 4'"],
        timeout=20,
        cwd=str(PROJECT),
    )
    child.expect_exact("/dev/pts/")
    assert ended(child) == 4


def test_an_interrupt_of_a_script(bed: Bed) -> None:
    child = subprocess.Popen(
        [*GUESTCTL, "console", f"unix://{bed.path}", "-c", "sh -c 'exec cat'"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=PROJECT,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        # a shell that is about to start a program may swallow a signal; cat has started
        child.stdin.write(b"up\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"up\n"
        child.send_signal(2)
        assert child.wait(20) == 130
    wait_until(lambda: bed.console.session_count == 0, "the session lives on")


def test_a_console_that_is_off(tmp_path: Path, layer: Path) -> None:
    with agent_serving(tmp_path / "agent", {"base": layer}):
        done = invoke("--connect", f"unix://{tmp_path}/agent", "console", "-c", "layers")
    assert done.exit_code == 1
    assert "denied: console is disabled: guestagent.console=" in done.stderr
    assert "boot the guest with guestagent.console=vsock:1022" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["console"], "which guest?"),
        (["console", "nonsense://1"], "address 'nonsense://1'"),
        (["console", "--line", "unix:///x", "-c", "ls"], "takes no -c"),
    ],
)
def test_wrong_usage(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # without a default profile
    monkeypatch.delenv("GUESTCTL_CONNECT", raising=False)
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert text in done.stderr


def test_an_address_where_nothing_listens(tmp_path: Path) -> None:
    done = invoke("--wait", "0.2", "console", f"unix://{tmp_path}/none", "-c", "ls")
    assert done.exit_code == 1
    assert "cannot connect" in done.stderr


def test_an_agent_s_socket_is_no_console(tmp_path: Path, layer: Path) -> None:
    with agent_serving(tmp_path / "agent", {"base": layer}):
        done = invoke("console", f"unix://{tmp_path}/agent", "-c", "layers")
    assert done.exit_code == 1
    assert "this is no console" in done.stderr


@pytest.mark.parametrize(
    ("agent", "console"),
    [
        ("vsock://3:1023", "vsock://3:1022"),
        ("hybrid:///run/vm:1023", "hybrid:///run/vm:1022"),
    ],
)
def test_addresses(agent: str, console: str) -> None:
    assert str(console_address(parse_address(agent))) == console


@pytest.mark.parametrize(
    ("typed", "sent", "action"),
    [
        (b"~.", b"", LEAVE),
        (b"a~.", b"a~.", None),
        (b"a\r~.rest", b"a\r", LEAVE),
        (b"~~.", b"~.", None),
        (b"~x", b"~x", None),
        (b"~\r~.", b"~\r", LEAVE),
        (b"~?", b"", HELP),
        (b"~?~.", b"", LEAVE),
        (b"\x03~.", b"\x03", LEAVE),
    ],
)
def test_escapes(typed: bytes, sent: bytes, action: str | None) -> None:
    assert Escapes().feed(typed) == (sent, action)
    escapes, pieces, actions = Escapes(), b"", []
    for byte in typed:
        piece, found = escapes.feed(bytes([byte]))
        pieces += piece
        actions.append(found)
        if found == LEAVE:
            break
    assert (pieces, actions[-1] if action == LEAVE else action) == (sent, action)


@given(st.binary(max_size=50))
def test_nothing_but_escapes_is_lost(data: bytes) -> None:
    sent, action = Escapes().feed(data + b"\n")
    if action is None and b"~" not in data:
        assert sent == data + b"\n"
    assert len(sent) <= len(data) + 1
