"""Sessions on a real socket: a person who types, scripts, and hostile peers."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.console import channel as channel_module
from guestagent.console import commands_system as commands_system_module
from guestagent.console import service as service_module
from guestagent.console import shell as shell_module
from guestagent.console.command import Group
from guestagent.console.commands import COMMANDS
from guestagent.console.service import MAX_SESSIONS
from tests.beds.consolebed import (
    DATA,
    END,
    HELLO,
    SIGNAL,
    SIZE,
    Bed,
    Client,
    Terminal,
    fd_count,
    frame,
    rss_bytes,
    serving,
    thread_count,
    wait_until,
)
from vsock.log import log

PERSON = {"terminal": True, "term": "xterm"}


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layer")
    (root / "etc").mkdir()
    (root / "etc/motd").write_text("hello from the layer\n")
    (root / "bytes").write_bytes(bytes(range(256)))
    (root / b"odd\xff name".decode("utf-8", "surrogateescape")).write_text("odd\n")
    (root / "escape").symlink_to("../../../../../../etc/passwd")
    os.mkfifo(root / "fifo")
    with (root / "huge").open("wb") as stream:
        stream.truncate(100 << 30)
    return root


@pytest.fixture
def bed(tmp_path: Path, layer: Path) -> Iterator[Bed]:
    with serving(tmp_path / "console", {"base": layer, "basement": layer}, shell=True) as bed:
        yield bed


@pytest.fixture
def person(bed: Bed) -> Iterator[Client]:
    with bed.client(**PERSON) as client:
        client.expect("help lists the commands\r\n")
        client.expect("guest> ")
        yield client


# --- a person


def test_a_person_types_a_command(person: Client) -> None:
    person.type("layers\r")
    assert "base" in person.expect("guest> ")
    person.type("\x04")
    assert person.finish()[0] == 0
    assert person.welcome is not None
    assert person.welcome["version"] == 1
    assert person.welcome["shell"] is True


def test_the_exit_status_is_that_of_the_last_command(person: Client) -> None:
    person.type("layers nonesuch\r")
    assert "there is no layer 'nonesuch'" in person.expect("guest> ")
    person.type("exit\r")
    assert person.finish()[0] == 1


def test_the_echo_is_all_that_the_editor_prints(person: Client) -> None:
    person.ask("upti", "upti")
    person.type("me\x01\x05\r")
    assert person.expect("\r\n") == "me\b\b\b\b\b\buptime"
    assert "the agent" in person.expect("guest> ")


def test_crlf_is_one_enter(person: Client) -> None:
    person.ask("uptime\r\nuptime\r\nexit\r\n", "the agent")
    assert person.expect("the agent").count("guest> ") == 1
    person.finish()
    assert person.output.count(b"guest> ") == 3


def test_completion_of_commands_layers_and_paths(person: Client) -> None:
    person.ask("hol\t", "holders ")
    person.ask("basem\t", "basement ")
    person.ask("\x15cat base:/e\t", "cat base:/")
    person.ask("\x15cat base:/etc/m\t", "motd ")
    person.ask("\r", "hello from the layer")
    person.ask("cat base:/odd\t", "\\xff\\ name ")
    person.ask("\r", "\r\nodd\r\n")


def test_history(person: Client) -> None:
    person.ask("plan base\r", "guest> ")
    person.ask("uptime\r", "guest> ")
    person.ask("pl\x1b[A\r", "plan base\r\n", "mount erofs")


def test_paging(bed: Bed) -> None:
    with bed.client(**PERSON, size={"rows": 10, "columns": 120}) as person:
        person.expect("guest> ")
        person.type("help\r")
        page = person.expect("--more--")
        assert page.count("\r\n") == 10  # the echo's, and nine lines
        person.type("\r")
        assert person.expect("--more--").count("\r\n") == 1
        person.type(" ")
        assert person.expect("--more--").count("\r\n") == 9
        person.ask("q", "guest> ")
        person.ask("help\r", "--more--")
        person.type("G")
        # the only one left is in the text of the help
        assert person.expect("guest> ").count("--more--") == 1


def test_an_interrupt_ends_a_command(person: Client) -> None:
    began = time.monotonic()
    person.ask("sleep 1000\r", "sleep 1000\r\n")
    person.ask("\x03", "^C\r\n", "guest> ")
    assert time.monotonic() - began < 10
    person.ask("uptime\r", "the agent")


def test_an_interrupt_ends_the_reading_of_a_huge_file(person: Client) -> None:
    person.ask("checksum base:/huge\r", "\r\n")
    person.ask("\x03", "^C\r\n")


def test_typed_ahead_lines_run_later(person: Client) -> None:
    person.type("sleep 0\ruptime\rexit\r")
    status, output = person.finish()
    assert status == 0
    assert "the agent" in output


def test_following_events(bed: Bed, person: Client) -> None:
    person.ask("events -f\r", "layer_mounted layer=base")
    events = bed.engine.event_log
    events.publish("device_appeared", device="pmem1")
    person.expect("device_appeared device=pmem1")
    for number in range(4, 3000):
        events.publish("device_appeared", detail=f"event {number}")
    person.expect("event 2999")
    person.ask("\x03", "guest> ")
    assert events._listeners == {}


def test_events_beyond_one_reply_are_printed_too(bed: Bed) -> None:
    for number in range(3, 2501):
        bed.engine.event_log.publish("device_appeared", detail=f"event {number}")
    status, output = bed.run("events -n 2400")
    sequences = [int(row.split()[0]) for row in output.splitlines()]
    assert (status, sequences) == (0, list(range(101, 2501)))


def test_following_the_log(person: Client) -> None:
    person.ask("log -f\r", "console session")
    log.info("something for the log", tag="4711")
    person.expect("tag=4711")
    person.ask("\x03", "guest> ")


def test_another_size(bed: Bed, person: Client) -> None:
    person.send(SIZE, {"rows": 5, "columns": 40})
    person.expect("\rguest> ")
    person.type("help\r")
    assert person.expect("--more--").count("\r\n") <= 5
    person.type("q")


def test_tables_fit_the_window(bed: Bed) -> None:
    with bed.client(**PERSON, size={"rows": 24, "columns": 60}) as person:
        person.expect("guest> ")
        person.ask("layers\r", "\r\n")
        rows = person.expect("guest> ").split("\r\n")
        assert max(map(len, rows)) <= 60
        assert ".." in "".join(rows)


def test_a_dumb_terminal_gets_no_escape_codes(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_system_module, "_TOP_SECONDS", 0.1)
    with bed.client(terminal=True, term="dumb") as person:
        person.expect("guest> ")
        person.ask("lay\t bas\t\t\x1b[D\x0c\x05\x15help\r", "--more--")
        person.ask("q", "guest> ")
        person.ask("top -n 1\r", "COMMAND", "guest> ")
        person.type("exit\r")
        person.finish()
        assert b"\x1b" not in person.output


# --- scripts


def test_commands_from_standard_input(bed: Bed) -> None:
    with bed.client() as script:
        script.type("plan base\nnonsense\n# a comment\nuptime")
        script.send(END)
        status, output = script.finish()
    assert status == 0
    assert b"mount erofs" in script.output
    assert b"the agent" in script.output
    assert b"there is no command 'nonsense'" in script.errors
    assert "guest>" not in output
    assert b"\r" not in script.output


@pytest.mark.parametrize(
    ("command", "status", "text"),
    [
        ("layers", 0, "erofs"),
        ("layers base", 0, "state       mounted"),
        ("layers nonesuch", 1, "there is no layer 'nonesuch'"),
        ("overlays root", 0, "1 base  /run/layers/base"),
        ("overlays nonesuch", 1, "there is no overlay"),
        ("tables", 0, "none"),
        ("tables nonesuch", 1, "there is no dm device"),
        ("plan base", 0, "mount erofs on /run/layers/base"),
        ("plan nonesuch", 1, "DEVICE,root=HEX"),
        ("plan pmem:x,root=00", 2, "usage: plan LAYER..."),
        ("plan", 2, "something is missing; usage: plan LAYER..."),
        ("holders nonesuch", 1, "there is no device"),
        ("holders", 2, "something is missing"),
        ("status", 0, "ready"),
        ("events -n 1", 0, "layer_mounted"),
        ("events -n x", 2, "takes a number"),
        ("events -n", 2, "needs a value"),
        ("events --all", 2, "there is no option --all"),
        ("uptime now", 2, "'now' is too much"),
        ("timings", 0, "modules"),
        ("timings base", 0, "layer base: 1.750 ms"),
        ("metrics", 0, "process_open_fds"),
        ("mounts", 0, "/proc"),
        ("devices", 0, ""),
        ("env", 0, "PATH="),
        ("cmdline", 0, "\n"),
        ("modules", 0, ""),
        ("ps", 0, "COMMAND"),
        ("fds", 0, "eventfd"),
        ("fds 999999999", 1, "there is no process"),
        ("ls", 0, "etc/"),
        ("ls base:/", 0, "etc/\nfifo|\nhuge\nodd\\xff name\n"),
        ("ls -l base:/etc", 0, "-rw-r--r--"),
        ("ls base:/nonesuch", 1, "No such file"),
        ("ls nonesuch:/", 1, "there is no layer or overlay 'nonesuch'"),
        ("ls nonesuch", 2, "is no path"),
        ("cat base:/etc/motd", 0, "hello from the layer\n"),
        ("cat base:etc/motd", 0, "hello from the layer\n"),
        ("cat layer:base:/etc/motd", 0, "hello from the layer\n"),
        ("cat base:/escape", 1, "No such file"),
        ("cat base:/../../etc/passwd", 1, "No such file"),
        ("cat base:/fifo", 1, "not a regular file"),
        ("cat base:/etc", 1, "Is a directory"),
        ("cat base:/bytes", 0, "\\x00\\x01"),
        ("cat -n 5 base:/etc/motd", 0, "hello\n... cut after 5 bytes"),
        ("cat base:/odd\\xff\\ name", 0, "odd\n"),
        ("cat /proc/self/comm", 0, "\n"),
        ("hexdump base:/etc/motd 6 4", 0, "00000006  66 72 6f 6d "),
        ("hexdump base:/huge 0x1900000000", 0, ""),
        ("hexdump base:/etc/motd -1", 2, "OFFSET must be in"),
        ("stat base:/escape", 0, "target    ../../"),
        ("stat base:/fifo", 0, "FIFO"),
        ("checksum base:/etc/motd", 0, "base:/etc/motd"),
        ("checksum -a md5 base:/etc/motd", 2, "-a takes one of"),
        ("find base:/ motd", 0, "base:/etc/motd\n"),
        ("find --type d base:/", 0, "base:/etc/\n"),
        ("find --type q base:/", 2, "kind"),
        ("find --depth 1 base:/ motd", 0, ""),
        ("df base:/", 0, "USE%"),
        ("df", 0, "USE%"),
        ("reconcile", 0, "agree"),
        ("help", 0, "reconcile"),
        ("help plan", 0, "plan LAYER..."),
        ("help nonesuch", 2, "there is no command"),
        ("term", 0, "dumb 80x24"),
        ("nonsense", 127, "there is no command 'nonsense'"),
        ("lay", 127, "did you mean layers"),
        ("'open", 2, "not closed"),
        ("", 0, ""),
        ("exit", 0, ""),
    ],
)
def test_commands(bed: Bed, command: str, status: int, text: str) -> None:
    got, output = bed.run(command)
    assert got == status, output
    assert text in output
    assert "Traceback" not in output


def test_a_checksum_is_the_right_one(bed: Bed) -> None:
    import hashlib

    expected = hashlib.sha512(bytes(range(256))).hexdigest()
    assert bed.run("checksum -a sha512 base:/bytes")[1] == f"{expected}  base:/bytes\n"


def test_output_is_bounded(bed: Bed) -> None:
    with bed.client(command="cat base:/huge") as script:
        assert script.finish()[0] == 0
    assert len(script.output) < 5 << 20
    assert b"cut after 1048576 bytes" in script.output


@pytest.mark.parametrize(
    ("usage", "options", "least", "most"),
    [
        ("devices", (), 0, 0),
        ("ls [-l] [PATH...]", ("l",), 0, 500),
        ("cat [-n BYTES] PATH...", ("n=",), 1, 500),
        ("hexdump PATH [OFFSET [LENGTH]]", (), 1, 3),
        ("find [--type LETTER] [--dry-run] PATH [PATTERN]", ("type=", "dry-run"), 1, 2),
    ],
)
def test_wrong_usage_prints_the_usage_of_the_command(
    usage: str, options: tuple[str, ...], least: int, most: int
) -> None:
    group = Group("test", {"PATH": lambda access, word: ()})
    group.command(usage, "summary")(lambda run: None)
    (command,) = group.commands.values()
    assert (command.options, command.least, command.most) == (options, least, most)
    assert (command.complete is not None) == ("PATH" in usage)


def test_every_command_is_there_and_its_help_fits_the_screen() -> None:
    wanted = (
        "help layers overlays devices tables status mounts plan events log dmesg ps top env "
        "cmdline modules uptime fds holders timings metrics ls stat cat hexdump checksum find df "
        "reconcile sh reboot poweroff"
    )
    assert set(wanted.split()) <= set(COMMANDS)
    for command in COMMANDS.values():
        assert command.summary
        assert len(f"  {command.name:10} {command.summary}") < 80


def test_reconcile_tells_and_undoes(bed: Bed) -> None:
    problem = "dm device dm-orphan belongs to no layer"
    bed.engine.debug.findings = [(problem, "remove it", False)]
    status, output = bed.run("reconcile --dry-run")
    assert (status, bed.engine.debug.settled) == (0, [])
    assert output == "dm device dm-orphan belongs to no layer\n  would remove it\n"
    assert bed.run("reconcile") == (0, f"{problem}\n  remove it: undone\n")
    assert bed.engine.debug.settled == [problem]
    bed.engine.debug.findings = [(problem, "remove it", True), (problem, "remove it", False)]
    assert bed.run("reconcile")[0] == 1


def test_poweroff_unmounts_first_and_tells(bed: Bed) -> None:
    status, output = bed.run("poweroff --force")
    assert (status, output) == (0, "everything is unmounted; poweroff\n")
    assert (bed.engine.unmounted, bed.modes) == ([True], ["poweroff"])
    bed.run("reboot")
    assert (bed.engine.unmounted, bed.modes) == ([True, False], ["poweroff", "reboot"])


def test_poweroff_is_confirmed_though_the_agent_stops_at_once(bed: Bed) -> None:
    bed.on_shutdown = lambda: [peer.channel.hang_up() for peer in bed.console._peers].clear()
    assert bed.run("poweroff") == (0, "everything is unmounted; poweroff\n")


def test_a_session_is_lost_without_a_word_when_the_agent_stops(person: Client, bed: Bed) -> None:
    """So that its client looks for the next agent."""
    person.ask("sleep 1000\r", "sleep 1000\r\n")
    bed.console.close()
    wait_until(lambda: not person._receive(time.monotonic() + 5), "still open")
    assert (person.status, person.refusal) == (None, None)


def test_poweroff_is_refused_where_the_agent_is_not_init(tmp_path: Path, layer: Path) -> None:
    with serving(tmp_path / "c", {"base": layer}, pid1=False) as bed:
        assert "not the init" in bed.run("poweroff")[1]
        assert (bed.engine.unmounted, bed.modes) == ([], [])


# --- the shell


def test_shell_without_permission_is_denied(tmp_path: Path, layer: Path) -> None:
    with serving(tmp_path / "c", {"base": layer}, shell=False) as bed:
        status, output = bed.run("sh -c true")
        assert status == 1
        assert "the shell is disabled: guestagent.console_shell=" in output


def test_the_shell_s_exit_status_and_both_its_outputs(bed: Bed) -> None:
    with bed.client(command="sh -c 'echo out; echo err >&2; exit 7'") as script:
        assert script.finish()[0] == 7
    assert (script.output, script.errors) == (b"out\n", b"err\n")
    with bed.client(command="sh -c 'kill -9 $$'") as script:
        assert script.finish()[0] == 128 + signal.SIGKILL
    assert script.signal == "KILL"
    with bed.client(command="sh -c 'exit 137'") as script:
        assert script.finish()[0] == 137
    assert script.signal is None


def test_a_script_s_bytes_go_through_unchanged(bed: Bed) -> None:
    data = bytes(range(256)) * 4096
    with bed.client(command="sh -c cat") as script:
        feeder = threading.Thread(target=lambda: [
            script.type(data[at : at + 30_000]) for at in range(0, len(data), 30_000)
        ] and script.send(END))  # fmt: skip
        feeder.start()
        status, _ = script.finish()
        feeder.join()
    assert status == 0
    assert script.output == data


def test_a_shell_on_a_terminal(person: Client) -> None:
    person.ask("sh\r", "guest# ")
    person.ask("stty size; tty; echo $TERM\r", "24 80\r\n/dev/pts/", "xterm")
    person.send(SIZE, {"rows": 50, "columns": 132})
    person.ask("stty size\r", "50 132", "guest# ")
    person.type("cat\r")
    person.ask("ping\r", "ping\r\nping\r\n")
    person.ask("\x03", "guest# ")
    person.ask("exit 5\r", "guest> ")
    person.type("exit\r")
    assert person.finish()[0] == 5


def test_signals_reach_the_shell(bed: Bed) -> None:
    command = "trap 'exit 9' USR1; echo ready; while :; do sleep 0.05; done"
    with bed.client(command=f'sh -c "{command}"') as script:
        script.expect("ready")
        script.send(SIGNAL, {"name": "USR1"})
        assert script.finish()[0] == 9


def test_an_interrupt_by_signal_ends_a_command(bed: Bed) -> None:
    with bed.client(command="sleep 1000") as script:
        wait_until(lambda: script.welcome or script._receive(time.monotonic() + 5), "no welcome")
        wait_until(lambda: bed.console.session_count == 1, "no session")
        script.send(SIGNAL, {"name": "INT"})
        wait_until(lambda: _interrupted(script), "not interrupted")
        assert script.status == 130


def _interrupted(script: Client) -> bool:
    """Signal again: the first may have come before the command did."""
    if script.status is None:
        script.sock.settimeout(0.2)
        try:
            script._receive(time.monotonic() + 1)
        except TimeoutError:
            script.send(SIGNAL, {"name": "INT"})
    return script.status is not None


def test_the_shell_s_whole_session_ends_with_its_peer(bed: Bed, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = (
        f"echo $$ >{pids}; sleep 1000 & echo $! >>{pids}; "
        f"(trap '' HUP TERM; sleep 1000) & echo $! >>{pids}; echo up; wait"
    )
    with bed.client(**PERSON, command=f'sh -c "{script}"') as client:
        client.expect("up")
        running = [int(pid) for pid in pids.read_text().split()]
        assert len(running) == 3
        assert all(_runs(pid) for pid in running)
    wait_until(lambda: not any(_runs(pid) for pid in running), "it lives on")
    wait_until(lambda: bed.console.session_count == 0, "the session lives on")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- bad input


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x94\x00\x01\x02", "unknown"),
        (b"hello?\r\n", "unknown"),
        (b"\xff" * 100_000, "unknown"),
        (frame(DATA, b"x"), "Hello comes first"),
        (frame(HELLO, {"versions": [99]}), "no common version"),
        (frame(HELLO, {"versions": [1], "size": {"rows": 0}}), "rows"),
        (b"\x03\xff\xff\xff", "16777215"),
    ],
)
def test_a_peer_of_another_protocol_is_refused_with_a_reason(
    bed: Bed, data: bytes, text: str
) -> None:
    with bed.client(hello=False) as stranger:
        stranger.sock.sendall(data)
        wait_until(lambda: not stranger._receive(time.monotonic() + 5), "still open")
        assert stranger.refusal is not None
        assert text in str(stranger.refusal["message"])


def test_second_hello_ends_the_session(bed: Bed, person: Client) -> None:
    person.send(HELLO, {"versions": [1]})
    wait_until(lambda: bed.console.session_count == 0, "the session lives on")


def test_endless_lines_and_junk_at_the_editor(person: Client) -> None:
    for _ in range(6):  # nearly three times what is held for a session
        person.type(b"x" * 30_000)
    person.type(bytes(range(0x0B, 0x100)) * 8)
    person.ask("\x03", "\r\nguest> ")
    person.ask("\r\x15uptime\r", "the agent")


def test_an_endless_line_of_a_script(bed: Bed) -> None:
    with bed.client() as script:
        script.type(b"x" * 30_000)
        wait_until(lambda: not script._receive(time.monotonic() + 5), "still open")
        assert script.refusal is not None
        assert "a line of over" in str(script.refusal["message"])


def test_program_receives_input_sent_with_end_of_input(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both come after the input was looked at, and before its end is."""
    real, written = shell_module._Program._write_some, threading.Event()

    def late(child: shell_module._Program) -> None:
        real(child)
        written.set()
        wait_until(lambda: child._channel.has_ended, "no end of the input")

    monkeypatch.setattr(shell_module._Program, "_write_some", late)
    with bed.client(command="sh -c cat") as script:
        script.type("one\n")
        assert written.wait(60)
        script.type("two\n")
        script.send(END)
        assert script.finish() == (0, "one\ntwo\n")


def test_a_slow_peer_gets_everything_a_program_wrote_before_its_end(bed: Bed) -> None:
    """The pipe takes all of the output, so that the program ends; the socket takes little."""
    with bed.client(command="sh -c 'read line; head -c 60000 /dev/zero'") as script:
        wait_until(lambda: bed.console.session_count == 1, "no session")
        (peer,) = bed.console._peers
        peer.channel.stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
        script.type("\n")
        while len(script._buffer) < 36_000:
            script._buffer += script.sock.recv(4096)
        shells = [line for line in log.tail(100) if line.text == "shell"]
        pid = int(str(shells[-1].fields["pid"]))
        wait_until(lambda: not _runs(pid), "the program runs on")
        assert script.finish()[0] == 0
    assert len(script.output) == 60_000


def storm_of_sizes(person: Client) -> None:
    """Send 20,000 sizes of the window; the last one is 49 rows of 119 columns."""
    for number in range(20_000):
        person.send(SIZE, {"rows": 10 + number % 40, "columns": 40 + number % 80})
        if number % 100 == 0:
            person.take_output()


def test_screen_after_20_000_sizes_is_the_line(bed: Bed, person: Client) -> None:
    """The line fits into the last window only. It is redrawn in place, and can be edited."""
    text = "plan " + "x" * 100
    person.type(text)
    threads, fds, rss = thread_count(), fd_count(), rss_bytes()
    rows = person.output.count(b"\n") + 1
    storm_of_sizes(person)
    person.ask("#", "#")
    terminal = Terminal(119)
    terminal.show(person.output.decode())
    assert (len(terminal.rows), terminal.bells) == (rows, 0)
    assert (terminal.row, terminal.at) == (f"guest> {text}#", len(f"guest> {text}#"))
    assert (thread_count(), fd_count(), bed.console.session_count) == (threads, fds, 1)
    assert rss_bytes() - rss < 8 << 20
    person.ask("\x15term\r", "xterm 119x49\r\n")


#: Says how many lines and columns its terminal has when a line has come, and whether it was told.
TELL_SIZE = """
import os, signal, sys
told = []
signal.signal(signal.SIGWINCH, lambda *_: told.append(1))
print("begun", flush=True)
sys.stdin.readline()
print("size", *reversed(os.get_terminal_size()), bool(told))
"""


def test_program_after_20_000_sizes_has_the_last(bed: Bed, person: Client, tmp_path: Path) -> None:
    (tmp_path / "tell").write_text(TELL_SIZE)
    person.ask(f"sh -c '{sys.executable} {tmp_path}/tell'\r", "begun")
    threads, fds = thread_count(), fd_count()
    storm_of_sizes(person)
    assert (thread_count(), fd_count(), bed.console.session_count) == (threads, fds, 1)
    person.ask("\n", "size 49 119 True\r\n")
    person.expect("guest> ")
    assert bed.run("plan base")[0] == 0


def test_a_peer_that_never_reads_is_cut_off_and_delays_no_other(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "STALL_SECONDS", 0.5)
    with bed.client(command="sh -c 'cat /dev/zero'") as sleeper:
        wait_until(lambda: bed.console.session_count == 1, "no session")
        assert bed.run("plan base")[0] == 0
        wait_until(lambda: bed.console.session_count == 0, "not cut off")
        assert sleeper.status is None


def test_the_ninth_session_is_refused(bed: Bed) -> None:
    clients = [bed.client(**PERSON) for _ in range(MAX_SESSIONS)]
    for client in clients:
        client.expect("guest> ")
    with bed.client(**PERSON) as one_more:
        wait_until(lambda: not one_more._receive(time.monotonic() + 5), "still open")
        assert one_more.refusal is not None
        assert one_more.refusal["code"] == "resource"
        assert "8 console sessions are open" in str(one_more.refusal["message"])
    clients.pop().sock.close()
    wait_until(lambda: bed.console.session_count == MAX_SESSIONS - 1, "not let go")
    assert bed.run("plan base")[0] == 0
    for client in clients:
        client.sock.close()


def test_a_peer_without_hello_is_refused_after_the_time_limit(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_HELLO_SECONDS", 0.2)
    with bed.client(hello=False) as silent:
        wait_until(lambda: not silent._receive(time.monotonic() + 5), "still open")
        assert silent.refusal is not None
        assert silent.refusal["code"] == "timeout"


def test_2000_connections_leave_no_thread_descriptor_or_memory(bed: Bed) -> None:
    bed.run("plan base")
    wait_until(lambda: not bed.console._peers, "peers stay")
    threads, fds, rss = thread_count(), fd_count(), rss_bytes()
    greeting = frame(HELLO, {"versions": [1], "terminal": True})
    for number in range(2000):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(bed.path)
            if number % 4 == 1:
                sock.sendall(greeting)
            elif number % 4 == 2:
                sock.sendall(greeting[: number % 20])
            elif number % 4 == 3:
                sock.sendall(b"\xff junk")
    wait_until(lambda: not bed.console._peers, "peers stay")
    # fewer they may be, where an earlier test has left some that end
    wait_until(lambda: thread_count() <= threads, "threads stay")
    assert fd_count() <= fds
    assert rss_bytes() - rss < 8 << 20
    assert bed.run("plan base")[0] == 0


def test_a_bug_ends_one_session_with_an_internal_error(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: caught.append(args.exc_value))
    monkeypatch.setattr(bed.engine.debug, "plan_of", lambda layer_id: 1 // 0)
    with bed.client(command="plan base") as script:
        wait_until(lambda: not script._receive(time.monotonic() + 5), "still open")
        assert script.refusal is not None
        assert script.refusal["code"] == "internal"
    wait_until(lambda: bed.console.session_count == 0, "the session lives on")
    assert isinstance(caught.pop(), ZeroDivisionError)
    assert bed.run("uptime")[0] == 0


def test_closing_ends_every_session(tmp_path: Path, layer: Path) -> None:
    threads, fds = thread_count(), fd_count()
    with serving(tmp_path / "c", {"base": layer}, shell=True) as bed:
        idle, busy = bed.client(**PERSON), bed.client(**PERSON)
        idle.expect("guest> ")
        busy.expect("guest> ")
        busy.ask("sh\r", "guest# ")
    assert not busy._receive(time.monotonic() + 5) or busy.status is None
    idle.sock.close()
    busy.sock.close()
    assert (thread_count(), fd_count()) == (threads, fds)
    assert not os.path.exists(bed.path)
