"""guestctl as a person and a script meet it: output, JSON, errors, exit status, pages, profiles."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from click.testing import CliRunner, Result

from guestagent.api.observe import CrashReport, LogLine
from guestagent.host.ctl import completion, log, main
from guestagent.host.ctl.main import collect
from guestagent.host.ctl.man import pages
from tests.beds.handlebed import WAIT_SECONDS, Agent
from tests.beds.terminal import ended, spawn
from vsock.errors import CallError
from vsock.server import Call

#: Runs guestctl on the agent of the test.
Ctl = Callable[..., Result]
#: Starts guestctl, which goes on.
Following = Callable[..., subprocess.Popen[str]]
#: ``guestctl log --listen``, and what connects to it as a guest.
Receiver = tuple[subprocess.Popen[bytes], Callable[[], socket.socket]]

GUESTCTL = Path(sys.executable).parent / "guestctl"
COMMAND = [sys.executable, "-c", "from guestagent.host.ctl import main; main()"]
METRICS = """# HELP guestagent_step_duration_seconds time
# TYPE guestagent_step_duration_seconds histogram
guestagent_step_duration_seconds_bucket{step="verity",le="0.01"} 3
guestagent_step_duration_seconds_bucket{step="verity",le="+Inf"} 3
guestagent_step_duration_seconds_sum{step="verity"} 0.015
guestagent_step_duration_seconds_count{step="verity"} 3
"""


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("GUESTCTL_CONNECT", "TRACEPARENT", "COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    one = Agent(tmp_path / "agent")
    one.metrics = METRICS
    yield one
    one.stop()


@pytest.fixture
def ctl(agent: Agent) -> Ctl:
    def run(*words: str) -> Result:
        return CliRunner().invoke(collect(), ["--connect", agent.address, *words])

    return run


def test_the_entry_point_is_there() -> None:
    assert main is not None
    assert GUESTCTL.exists()


def on_terminal(agent: Agent, *words: str) -> pexpect.spawn:
    return spawn(
        *("--connect", agent.address, *words),
        timeout_seconds=WAIT_SECONDS,
        environment={"TERM": "xterm-256color"},
        encoding="utf-8",
    )


# --- status


def fill(agent: Agent, layers: int) -> None:
    agent.layers = {f"layer{number}": "mounted" for number in range(layers)}
    agent.overlays = {"root": tuple(agent.layers)}
    for _ in range(6):
        agent.publish("layer_mounted")


def test_hello_has_words_and_no_python(
    agent: Agent, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = {"pid1": True, "console": [], "log": ["a", "b"], "more": {"x": None}, "ms": 1.5}
    reply = {"version": 1, "agent": "0", "kernel": "6", "features": ["f"], "limits": {"n": 4}}
    monkeypatch.setattr(
        agent, "agent_hello", lambda call: said_hello(call, {**reply, "boot": boot})
    )
    rows = dict(line.split(maxsplit=1) for line in ctl("hello").stdout.splitlines()[1:])
    assert rows == {
        "features": "f",
        "pid1": "yes",
        "console": "-",
        "log": "a b",
        "more": "x=-",
        "ms": "1.5",
        "n": "4",
    }


def said_hello(call: Call, reply: object) -> object:
    call.connection.said_hello = True
    return reply


def test_status_says_it_all(agent: Agent, ctl: Ctl) -> None:
    fill(agent, 3)
    done = ctl("status")
    assert done.exit_code == 0
    assert done.stdout.startswith("ready  agent 0 on Linux 6, up 1 h 2 min\n")
    for text in ("3 layers, 1 overlay, 6 dm devices", "13.0 MiB", "layer2", "53.0 MiB", "root"):
        assert text in done.stdout
    assert "problem" not in done.stdout


def test_status_of_a_sick_agent(agent: Agent, ctl: Ctl) -> None:
    agent.problems = ["the thread 'uevents' is gone"]
    agent.layers = {"a": "mounted", "b": "corrupted"}
    done = ctl("status", "--check")
    assert done.exit_code == 1
    assert done.stdout.startswith("degraded")
    assert "the thread 'uevents' is gone" in done.stdout
    rows = [line.split()[:2] for line in done.stdout.splitlines() if " /run/layers/" in line]
    assert rows == [["b", "corrupted"], ["a", "mounted"]]
    assert ctl("status").exit_code == 0


@pytest.mark.parametrize("layers", [3, 100])
def test_status_fits_one_screen(agent: Agent, layers: int) -> None:
    fill(agent, layers)
    terminal = on_terminal(agent, "status")
    shown = terminal.read().replace("\r\n", "\n")
    terminal.close()
    assert terminal.exitstatus == 0
    assert "\x1b[32m" in shown  # in colour: somebody looks
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).rstrip("\n").split("\n")
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert ("more: guestctl layer list" in shown) == (layers == 100)


# --- top


def test_top_without_a_terminal_looks_once(agent: Agent, ctl: Ctl) -> None:
    fill(agent, 3)
    done = ctl("top")
    assert done.exit_code == 0
    for text in ("LAYER", "OVERLAY", "DEVICE", "STEP", "EVENTS", "verity"):
        assert text in done.stdout
    timings = json.loads(ctl("--json", "top").stdout)["timings"]
    assert timings[0]["count"] == 3
    assert timings[0]["mean_ms"] == 5.0


@pytest.mark.parametrize("number", ["+Inf", "-Inf", "NaN", "1e300", "-7"])
@pytest.mark.parametrize("bound", ["x", "NaN", "-Inf", ""])
def test_top_shows_whatever_numbers_a_guest_sends(
    agent: Agent, ctl: Callable[..., Result], number: str, bound: str
) -> None:
    step = "guestagent_step_duration_seconds"
    lines = [f'{step}_bucket{{step="a",le="{each}"}} {number}' for each in (bound, "1", "+Inf")]
    lines += [f'{step}_{what}{{step="a"}} {number}' for what in ("count", "sum")]
    lines += [f'guestagent_step_failures_total{{step="a"}} {number}']
    lines += [
        f'guestagent_requests_total{{code="x"}} {number}',
        f"process_cpu_seconds_total {number}",
    ]
    agent.metrics = "\n".join([*lines, ""])
    for words in (("top",), ("--json", "top"), ("metrics",), ("--json", "metrics")):
        done = ctl(*words)
        assert (done.exit_code, done.exception) == (0, None), done.exception


def test_top_on_a_terminal_is_alive(agent: Agent) -> None:
    fill(agent, 2)
    terminal = on_terminal(agent, "top", "--interval", "0.2")
    terminal.expect("layer1")
    agent.layers["appears"] = "mounted"
    terminal.expect("appears")
    agent.stop()
    terminal.expect("no connection")
    agent.start()
    agent.layers["again"] = "mounted"
    terminal.expect("again")
    terminal.sendintr()
    assert ended(terminal) == 0


# --- events and log


@pytest.fixture
def following(agent: Agent) -> Iterator[Following]:
    processes = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [*COMMAND, "--connect", agent.address, *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait(WAIT_SECONDS)
        if process.stdout is not None:
            process.stdout.close()


def interrupted(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGINT)
    return process.wait(WAIT_SECONDS)


def test_events_are_listed(agent: Agent, ctl: Ctl) -> None:
    agent.publish("layer_mounted")
    agent.publish("layer_failed")
    assert [line.split()[1:3] for line in ctl("events").stdout.splitlines()] == [
        ["1", "layer_mounted"],
        ["2", "layer_failed"],
    ]
    assert ctl("events", "--since", "2").stdout == "none\n"
    chosen = json.loads(ctl("events", "--kind", "layer_failed", "--json").stdout)
    assert [event["sequence"] for event in chosen["events"]] == [2]


def test_events_of_all_pages_are_listed(
    agent: Agent, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        agent.publish("layer_mounted")
    whole = agent.agent_events

    def page(call: Call) -> object:
        reply = whole(call)
        assert isinstance(reply, dict)
        return {**reply, "events": reply["events"][:2], "more": len(reply["events"]) > 2}

    monkeypatch.setattr(agent, "agent_events", page)
    listed = json.loads(ctl("events", "--json").stdout)
    assert [event["sequence"] for event in listed["events"]] == [1, 2, 3, 4, 5]
    assert listed["more"] is False


def test_events_are_followed_over_a_restart(agent: Agent, following: Following) -> None:
    agent.publish("agent_started")
    process = following("events", "--follow", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["sequence"] == 1
    agent.publish("layer_mounted")
    assert json.loads(process.stdout.readline())["sequence"] == 2
    agent.stop()
    agent.publish("layer_failed")
    agent.start()
    assert json.loads(process.stdout.readline())["sequence"] == 3
    assert interrupted(process) == 0


def test_the_log_is_followed_over_a_restart(agent: Agent, following: Following) -> None:
    agent.log()
    agent.log()
    process = following("log", "-f", "-n", "1")
    assert process.stdout is not None
    assert "line 2" in process.stdout.readline()
    agent.stop()
    agent.log()
    agent.start()
    assert "line 3" in process.stdout.readline()
    assert interrupted(process) == 0


def test_the_log_is_printed(agent: Agent, ctl: Ctl) -> None:
    for _ in range(5):
        agent.log()
    assert ctl("log").stdout.count("\n") == 5
    assert [line["number"] for line in json.loads(ctl("log", "-n", "2", "--json").stdout)] == [4, 5]
    assert ctl("log", "-n", "0").stdout == ""
    assert ctl("log", "-n", "1", "--since", "1").exit_code == 2


@pytest.mark.parametrize("words", [("log",), ("log", "-n", "5")])
def test_a_log_without_an_end_is_read_to_a_bound(
    agent: Agent, ctl: Ctl, words: tuple[str, ...]
) -> None:
    """An agent keeps a mebibyte; another may say for ever that there is more."""
    agent.log()
    agent.more_fields = {"more": True, "next": 1}
    done = ctl(*words)
    assert (done.exit_code, done.exception) == (0, None)
    assert "line 1" in done.stdout
    agent.more_fields = {"more": True, "next": 0}
    assert ctl(*words).exit_code == 0


def test_crashes(agent: Agent, ctl: Ctl) -> None:
    assert ctl("crashes").stdout == "none\n"
    line = LogLine(
        number=1, uptime_seconds=1.0, unix_ms=1, level="error", text="the end", fields={"a": "b c"}
    )
    agent.crashes.append(
        CrashReport(
            number=3,
            kind="death",
            reason="killed by SIGSEGV",
            unix_ms=1,
            agent="0",
            pid=7,
            restarts=0,
            signal="SIGSEGV",
            traceback="Fatal\x1b[31m",
            log=(line,),
            requests=("layer.mount msgid=1",),
        )
    )
    assert "SIGSEGV" in ctl("crashes").stdout
    told = ctl("crashes", "3").stdout
    for text in ("killed by SIGSEGV", "layer.mount msgid=1", "Fatal\\x1b", "the end a='b c'"):
        assert text in told
    assert ctl("crashes", "4").exit_code == 1


def test_a_log_line_cannot_drive_the_terminal(
    agent: Agent, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {
        "number": 1,
        "uptime_seconds": 1.0,
        "unix_ms": 1,
        "level": "\x1b[31minfo",
        "text": "\x1b]0;text\x07",
        "fields": {"\x1b]0;name\x07": "\x1b[2J", "a b=c": "d"},
    }
    reply = {"lines": [line], "dropped": 0, "next": 1, "more": False}
    monkeypatch.setattr(agent, "_log_reply", lambda since: reply)
    done = ctl("log")
    assert done.exit_code == 0, done.stderr
    assert "name" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout


# --- log --listen


@pytest.fixture
def receiver(
    tmp_path: Path,
) -> Iterator[Receiver]:
    """``guestctl log --listen``, and a function that connects to it as a guest."""
    path = tmp_path / "log"
    command = [*COMMAND, "log", "--listen", f"unix://{path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    sockets = []

    def dial() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sockets.append(sock)
        sock.settimeout(WAIT_SECONDS)
        sock.connect(str(path))
        return sock

    with process:
        try:
            assert b"waiting" in process.stderr.readline()
            yield process, dial
        finally:
            for sock in sockets:
                sock.close()
            process.kill()


def sent_line(number: int, text: str = "words", **fields: object) -> bytes:
    line = {"number": number, "uptime_seconds": 1, "level": "info", "text": text, "fields": fields}
    return json.dumps(line).encode() + b"\n"


HEAD = b'{"stream": "guestagent.log", "boot_id": "0123456789abcdef"}\n'


@pytest.mark.parametrize(
    "line",
    [
        b'{"number":1e999}',
        b'{"dropped":1e999}',
        b'"stream"',
        b'["stream"]',
        b"[" * 100_000,
        b'{"number":5,"uptime_seconds":1,"level":"info","text":"x","fields":[[1,2]]}',
        b'{"number":5,"uptime_seconds":1,"level":"info","text":"x","fields":{"a":%s%s}}'
        % (b"[" * 900, b"]" * 900),
        b'{"number":5,"uptime_seconds":1e999,"level":"info","text":"x","fields":{}}',
        b"\xff\xfe",
    ],
    ids=range(9),
)
def test_no_line_of_a_guest_ends_the_receiver(receiver: Receiver, line: bytes) -> None:
    process, dial = receiver
    dial().sendall(HEAD + line + b"\n")
    dial().sendall(HEAD + sent_line(7, "another guest"))
    assert process.stdout is not None
    shown = process.stdout.readline()
    while b"another guest" not in shown:
        assert shown, "the receiver ended"
        shown = process.stdout.readline()


def test_a_received_line_cannot_drive_the_terminal(
    receiver: Receiver,
) -> None:
    process, dial = receiver
    fields = {"\x1b]0;name\x07": {"\x1b[1m": "\x1b[2J"}}
    dial().sendall(HEAD + sent_line(1, "words", **fields).replace(b'"info"', b'"\\u001b[31m"'))
    assert process.stdout is not None
    shown = process.stdout.readline()
    assert b"words" in shown
    assert b"\x1b" not in shown
    assert b"\x07" not in shown


def test_the_receiver_remembers_a_bounded_number_of_boots() -> None:
    seen = log.SeenLines(limit=3)
    assert seen.is_new("a", 1)
    for number in range(100):
        assert seen.is_new(f"boot{number}", 1)
        assert not seen.is_new("a", 1)  # in use: not the one that is forgotten
    assert len(seen) <= 3


# --- errors


def test_an_error_says_what_to_do_next(ctl: Ctl) -> None:
    done = ctl("layer", "get", "x")
    assert done.exit_code == 1
    assert "guestctl: not_found: no such layer" in done.stderr
    assert "errno: ENOENT" in done.stderr
    assert "hint: list" in done.stderr


def test_error_fields_from_guest_are_printed_without_control_characters(
    agent: Agent, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(call: object) -> object:
        raise CallError(
            "busy", "\x1b]0;owned\x07", object="\x1b[2J", hint="\x1b[8m", kernel_log=("\x1bc",)
        )

    monkeypatch.setattr(agent, "layer_get", refuse)
    done = ctl("layer", "get", "x")
    assert done.exit_code == 1
    assert "owned" in done.stderr
    assert "\x1b" not in done.stderr


def test_status_without_agent_fails_with_hint(tmp_path: Path) -> None:
    where = f"unix://{tmp_path}/missing"
    done = CliRunner().invoke(collect(), ["--connect", where, "--wait", "0", "status"])
    assert done.exit_code == 1
    assert "is the machine running?" in done.stderr
    done = CliRunner().invoke(collect(), ["--json", "--connect", where, "--wait", "0", "status"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["code"] == "device"


def test_an_agent_that_does_not_come_in_time_is_told_in_the_time_that_was_asked_for(
    tmp_path: Path,
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:  # takes connections, and hangs up
        path = tmp_path / "vm"
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(WAIT_SECONDS)
        ending = threading.Event()

        def hang_up() -> None:
            while not ending.is_set():
                listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        words = ["--connect", f"hybrid://{path}:1024", "--wait", "0.75", "status"]
        done = CliRunner().invoke(collect(), words)
        ending.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(path))
            thread.join(WAIT_SECONDS)
    assert done.exit_code == 1
    assert "within 0.75 s: no listener on guest port 1024" in done.stderr
    done = CliRunner().invoke(
        collect(), ["--connect", f"unix://{tmp_path}/missing", "--wait", "0.25", "status"]
    )
    assert "within 0.25 s: No such file or directory\n" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["no-such-command"],
        ["events", "--kind", "nothing"],
        ["metrics", "--guest", "a=b"],
        ["metrics", "--serve", "127.0.0.1"],
        ["--connect", "nonsense://x", "status"],
    ],
)
def test_wrong_usage_exits_with_two(words: list[str]) -> None:
    done = CliRunner().invoke(collect(), words)
    assert done.exit_code == 2, done.stderr


def test_options_may_stand_behind_the_command(agent: Agent) -> None:
    done = CliRunner().invoke(collect(), ["status", "--json", "--connect", agent.address])
    assert json.loads(done.stdout)["state"] == "ready"


def test_a_trace_goes_with_the_request(agent: Agent, ctl: Ctl) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert ctl("--traceparent", trace, "status").exit_code == 0
    assert agent.traces[-1] == trace
    assert ctl("--traceparent", "junk", "status").exit_code == 1


def test_every_command_speaks_json(tmp_path: Path) -> None:
    """--json before any command is heeded: by the session, or by the command's own option."""
    image = tmp_path / "image"
    image.write_bytes(bytes(8192))
    done = CliRunner().invoke(collect(), ["--json", "layer", "format", str(image)])
    assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)["root_digest"]) == 64


# --- metrics


def test_metrics_are_printed(agent: Agent, ctl: Ctl) -> None:
    assert ctl("metrics").stdout == METRICS
    first = json.loads(ctl("metrics", "--json").stdout)[0]
    assert first == {
        "name": "guestagent_step_duration_seconds_bucket",
        "labels": {"step": "verity", "le": "0.01"},
        "value": 3,
    }


def test_an_error_is_bounded_on_the_terminal(agent: Agent, ctl: Callable[..., Result]) -> None:
    agent.more_fields = dict.fromkeys(("message", "object", "hint", "step"), "n" * 200000)
    agent.more_fields["kernel_log"] = ["k" * 2000] * 1000
    done = ctl("layer", "get", "missing")
    assert done.exit_code == 1
    assert len(done.stderr) < 80_000
    assert len(max(done.stderr.splitlines(), key=len)) < 5000


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1e300])
def test_a_duration_that_no_clock_has_is_shown(
    agent: Agent, ctl: Callable[..., Result], seconds: float
) -> None:
    agent.more_fields = {"uptime_seconds": seconds}
    done = ctl("status")
    assert (done.exit_code, done.exception) == (0, None)


# --- profiles


def test_profiles(agent: Agent, tmp_path: Path) -> None:
    def run(*words: str) -> Result:
        return CliRunner().invoke(collect(), words)

    assert run("connect").stdout == "none\n"
    assert run("connect", "vm", agent.address).exit_code == 0
    assert run("status").stdout.startswith("ready")
    assert run("connect", "other", "unix:///run/other", "--no-check").exit_code == 0
    assert run("--connect", "vm", "status").stdout.startswith("ready")
    listed = json.loads(run("connect", "--json").stdout)
    assert listed == {
        "default": "other",
        "profiles": {"vm": agent.address, "other": "unix:///run/other"},
    }
    assert run("connect", "vm").exit_code == 0
    assert run("status").stdout.startswith("ready")
    assert run("connect", "--delete", "vm").exit_code == 0
    assert run("status").exit_code == 2
    missing = run("--connect", "vm", "status")
    assert missing.exit_code == 2
    assert "guestctl connect vm ADDRESS" in missing.stderr
    assert not list((tmp_path / "config/guestctl").glob("*.part"))


def test_connect_without_agent_saves_no_profile(tmp_path: Path) -> None:
    words = ["--wait", "0", "connect", "vm", f"unix://{tmp_path}/missing"]
    assert CliRunner().invoke(collect(), words).exit_code == 1
    assert CliRunner().invoke(collect(), ["connect"]).stdout == "none\n"


@pytest.mark.parametrize(
    "text", ["junk", "[]", '{"version": 2, "profiles": {}}', '{"profiles": 1}']
)
def test_damaged_profiles_stop_only_commands_that_need_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config/guestctl/profiles.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    done = CliRunner().invoke(collect(), ["status"])
    assert done.exit_code == 1
    assert str(path) in done.stderr
    done = CliRunner().invoke(collect(), ["--connect", "unix:///x", "--wait", "0", "status"])
    assert "profiles" not in done.stderr
    done = CliRunner().invoke(collect(), ["completion", "bash"])  # connects to no agent
    assert (done.exit_code, done.stderr) == (0, "")


# --- manual pages and completion


def test_manual_pages_are_clean(tmp_path: Path) -> None:
    done = CliRunner().invoke(collect(), ["man", "--output", str(tmp_path / "man")])
    assert done.exit_code == 0
    made = sorted((tmp_path / "man").iterdir())
    assert len(made) > 15
    judged = subprocess.run(
        ["mandoc", "-Tlint", *made], capture_output=True, text=True, check=False
    )
    assert (judged.stdout, judged.stderr) == ("", "")


def test_a_page_says_what_help_says(tmp_path: Path) -> None:
    root = collect()
    text = "".join(pages(root).values())
    for name, command in root.commands.items():
        assert f"guestctl\\-{name}".replace("-", "\\-").replace("\\\\-", "\\-") in text
        assert command.help, name
    shown = subprocess.run(
        ["mandoc", "-Tascii"],
        input=pages(root)["guestctl-layer.1"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    plain = re.sub(r".\x08", "", shown)
    for words in ("layer mount", "--root-digest HEX", "Verify against this digest."):
        assert words in plain


def test_the_date_of_pages_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert "1970-01-01" in pages(collect())["guestctl.1"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_take_the_completion(tmp_path: Path, shell: str) -> None:
    done = CliRunner().invoke(collect(), ["completion", shell], prog_name="guestctl")
    script = tmp_path / "script"
    script.write_text(done.stdout)
    judged = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (judged.returncode, judged.stderr) == (0, "")


def test_bash_completes_commands_layers_and_profiles(agent: Agent, tmp_path: Path) -> None:
    agent.layers = {"alpha": "mounted", "beta": "mounted"}

    def completed(*lines: str) -> list[list[str]]:
        """Let bash ask as it does when Tab is pressed behind the last word of each line."""
        script = f"""
            PATH={GUESTCTL.parent}:$PATH
            eval "$(guestctl completion bash)"
            for COMP_LINE; do
                COMP_POINT=${{#COMP_LINE}}
                compopt() {{ [[ $2 == default ]] && COMPREPLY+=("(file)"); }}
                _guestctl_completion guestctl
                echo "${{COMPREPLY[@]}}"
            done
        """
        command = ["bash", "-c", script, "bash", *lines]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [line.split() for line in done.stdout.splitlines()]

    commands, found, every, kinds, places, *files = completed(
        "guestctl sta",
        f"guestctl --connect {agent.address} layer get a",
        f"guestctl --connect {agent.address} layer get ",
        "guestctl events --kind layer_c",
        f"guestctl --connect {agent.address} fs ls layer:a",
        "guestctl run ",
        "guestctl layer build ",
        "guestctl pack build ",
    )
    assert "status" in commands
    assert found == ["alpha"]
    assert every == ["alpha", "beta"]
    assert kinds == ["layer_corrupted"]
    assert places == ["alpha"]  # bash replaces what is behind the colon
    assert [words[0] for words in files] == ["(file)"] * 3


@pytest.mark.parametrize("name", ["$(touch pwned)", "a;b", "a b", "x\nplain,--force", "a\x1b[2J"])
def test_no_name_of_a_guest_is_completed_into_a_command(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """bash puts a completed name into the line as it is."""
    agent.layers = {"alpha": "mounted", name: "mounted"}
    for line in ("layer get ", "fs ls "):
        words = f"guestctl --connect {agent.address} {line}"
        asked = {"_GUESTCTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "5"}
        done = CliRunner().invoke(collect(), [], prog_name="guestctl", env=asked)
        assert len(done.stdout.split()) == 1
        assert done.stdout.strip().endswith("alpha")


def test_completion_without_agent_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completion._SECONDS <= 1.0  # a person waits
    monkeypatch.setattr(completion, "_SECONDS", 0.1)
    begin = time.monotonic()
    words = f"guestctl --connect unix://{tmp_path}/missing layer get "
    asked = {"_GUESTCTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "5"}
    done = CliRunner().invoke(collect(), [], prog_name="guestctl", env=asked)
    assert (done.stdout.strip(), done.stderr) == ("", "")
    assert time.monotonic() - begin < 10
