"""The log: its ring, its forms, what it never tells, and the ways it goes."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.api.observe import LOG_LEVELS
from guestagent.observe.following import read_log
from guestagent.observe.recorder import LINES_MAX, Recorder, read_recorded
from guestagent.observe.shipping import LogShipper
from guestagent.observe.sinks import KernelLogSink
from vsock.log import LEVELS, SECRETS, Line, Log, fd_sink, json_object, render, render_json

WAIT_SECONDS = 60.0


def line(text: str = "text", number: int = 1, **fields: object) -> Line:
    return Line(
        number=number, uptime_seconds=1.5, unix_ms=7, level="info", text=text, fields=fields
    )


def test_the_contract_has_the_levels_of_the_log() -> None:
    assert LOG_LEVELS == LEVELS


# --- the ring


def test_a_sink_gets_its_level_and_above() -> None:
    log, usual, all_of_it = Log(level="warning"), [], []
    log.add_sink(usual.append)
    stop = log.add_sink(all_of_it.append, level="debug")
    log.debug("one")
    log.error("two")
    stop()
    log.error("three")
    assert [entry.text for entry in usual] == ["two", "three"]
    assert [entry.text for entry in all_of_it] == ["one", "two"]
    assert log.counts == {"debug": 1, "info": 0, "warning": 0, "error": 2}


def test_replay_heeds_the_level() -> None:
    log, seen = Log(level="info"), []
    log.debug("one")
    log.info("two")
    log.add_sink(seen.append, replay=True)
    assert [entry.text for entry in seen] == ["two"]


def test_since_counts_lines_that_are_no_longer_kept() -> None:
    log = Log(capacity=3)
    for number in range(1, 6):
        log.info(str(number))
    kept, dropped = log.since(1)
    assert ([entry.text for entry in kept], dropped) == (["3", "4", "5"], 1)
    assert log.since(5) == ((), 0)
    assert log.since(4)[0][0].number == 5


def test_an_earlier_life_is_restored_once() -> None:
    first = Log()
    first.info("by init")
    inherited = first.tail(1)
    first.info("by the first life")
    second = Log()
    second.restore(inherited)  # as a fork would have it
    second.info("the first life ended")
    second.restore(first.tail(10))
    texts = ["by init", "by the first life", "the first life ended"]
    assert [entry.text for entry in second.tail(10)] == texts
    assert [entry.number for entry in second.tail(10)] == [1, 2, 3]
    second.info("next")
    assert second.number == 4


def test_the_ring_is_bounded_in_bytes() -> None:
    log = Log()
    for _ in range(600):
        log.info("x" * 5_000_000, error="\U0001f600" * 1_000_000)
    lines = log.tail(2000)
    texts = [text for line in lines for text in (line.text, line.fields["error"])]
    assert sum(len(str(text).encode()) for text in texts) <= 1 << 20
    assert len(lines) > 50


def test_a_long_text_keeps_its_ends() -> None:
    log = Log()
    log.error("bug", traceback="first " + "x" * 100_000 + " last")
    [line] = log.tail(1)
    shown = str(line.fields["traceback"])
    assert shown.startswith("first xx")
    assert shown.endswith("xx last")
    assert "characters]" in shown
    assert len(shown) < 3000


def test_line_keeps_short_texts_of_its_field_values() -> None:
    log = Log()
    log.info("x", many=["a" * 10_000] * 1000, number=1 << 20_000, data=b"ab", token="t")
    [line] = log.tail(1)
    assert line.fields["data"] == "[2 bytes]"
    assert line.fields["token"] == "[secret]"
    assert all(isinstance(value, str) and len(value) < 3000 for value in line.fields.values())


# --- slow sinks


class Blocked:
    """A sink that waits for the test at its first line."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __call__(self, line: Line) -> None:
        self.entered.set()
        assert self.go_on.wait(WAIT_SECONDS)
        self.texts.append(line.text)


def test_slow_sink_blocks_no_writer_and_counts_missed_lines() -> None:
    log, sink = Log(), Blocked()
    log.add_sink(sink, is_slow=True)
    with log.in_background():
        log.info("first")
        assert sink.entered.wait(WAIT_SECONDS)
        for number in range(2000):
            log.info(str(number))
        sink.go_on.set()
    written = len(sink.texts) - 1
    assert sink.texts[:3] == ["first", "0", "1"]
    assert sink.texts[-1] == "lines were not printed: a sink is slow"
    assert log.tail(1)[0].fields["count"] == 2001 - written
    log.info("after")
    assert sink.texts[-1] == "after"  # by the caller again


def test_leaving_waits_for_the_lines_that_are_queued() -> None:
    log = Log()
    read_fd, write_fd = os.pipe()
    log.add_sink(fd_sink(write_fd), is_slow=True)
    with log.in_background():
        for number in range(100):
            log.info(str(number))
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as stream:
        assert len(stream.read().splitlines()) == 100


def test_a_forked_child_writes_by_itself() -> None:
    log, sink = Log(), Blocked()
    log.add_sink(sink, is_slow=True)
    with log.in_background():
        log.info("by the parent")
        assert sink.entered.wait(WAIT_SECONDS)
        log.after_fork()
        sink.go_on.set()
        log.info("by the child")
        assert "by the child" in sink.texts


# --- forms


def test_text_quotes_where_needed() -> None:
    shown = render(line("done", ms=1.23456, path="/a b", ok=True))
    assert shown == "[    1.500000] info: done ms=1.235 path='/a b' ok=True"


@given(
    st.text(),
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name not in SECRETS),
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
        max_size=4,
    ),
)
def test_json_is_json(text: str, fields: dict[str, object]) -> None:
    shown = render_json(line(text).replace(fields=fields))
    assert shown.isascii()
    assert "\n" not in shown
    parsed = json.loads(shown)
    assert parsed["text"] == text
    assert set(parsed["fields"]) == set(fields)
    for name, value in fields.items():
        if isinstance(value, float) and abs(value) < 1e300:
            assert parsed["fields"][name] == pytest.approx(value, rel=1e-5)
        elif not isinstance(value, float):
            assert parsed["fields"][name] == value


def test_infinite_and_nan_fields_are_null_in_json() -> None:
    assert json_object({"a": float("nan"), "b": float("inf")}) == '{"a":null,"b":null}'


@pytest.mark.parametrize("form", [render, render_json])
def test_secrets_are_not_told(form: object) -> None:
    shown = form(line("x", signature="ABBA", key_id=b"\xab\xba", token=1234))  # type: ignore[operator]
    for trace in ("ABBA", "abba", "\\xab", "1234"):
        assert trace not in shown
    assert "[2 bytes]" in shown


# --- the recorder


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all examples, each of which begins anew."""
    return tmp_path_factory.mktemp("recording") / "log"


def test_the_recorder_keeps_the_last_lines(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    recorder = Recorder(path)
    for number in range(1, LINES_MAX + 11):
        recorder(line(f"line {number}", number, ms=1.5))
    recorder.close()
    lines, requests = read_recorded(path)
    assert requests == ()
    assert [entry.number for entry in lines] == list(range(11, LINES_MAX + 11))
    assert (lines[-1].text, lines[-1].fields) == (f"line {LINES_MAX + 10}", {"ms": "1.500"})


@given(
    st.text(max_size=2000),
    st.dictionaries(st.text(max_size=300), st.text(max_size=3000), max_size=20),
)
def test_every_line_is_recorded(recording: Path, text, fields) -> None:
    recording.unlink(missing_ok=True)
    path = str(recording)
    recorder = Recorder(path)
    recorder(line(text, 1).replace(fields=fields))
    recorder(line("the next", 2))
    recorder.close()
    assert [entry.number for entry in read_recorded(path)[0]] == [1, 2]


@given(st.binary(max_size=4096))
def test_a_damaged_recording_is_no_failure(recording: Path, data: bytes) -> None:
    recording.write_bytes(data)
    read_recorded(str(recording))


def test_no_recording(tmp_path: Path) -> None:
    assert read_recorded(str(tmp_path / "missing")) == ((), ())


# --- reading it by RPC


def test_read_log_continues_after_the_last_line() -> None:
    log = Log()
    for number in range(10):
        log.info(str(number))
        log.debug("noise")
    first = read_log(log, 0, "info", most=4)
    assert ([entry.text for entry in first.lines], first.more) == (["0", "1", "2", "3"], True)
    rest = read_log(log, first.next, "info")
    assert [entry.text for entry in rest.lines] == ["4", "5", "6", "7", "8", "9"]
    assert not rest.more
    assert read_log(log, rest.next, "info").lines == ()


def test_read_log_from_the_end_and_from_another_machine() -> None:
    log = Log()
    for number in range(10):
        log.info(str(number))
    assert [entry.text for entry in read_log(log, -2, "info").lines] == ["8", "9"]
    assert len(read_log(log, 5000, "info").lines) == 10


def test_read_log_of_an_empty_log() -> None:
    reply = read_log(Log(), 0, "info")
    assert (reply.lines, reply.dropped, reply.next, reply.more) == ((), 0, 0, False)


# --- the kernel's log


def _kmsg(tmp_path: Path, mode: str, *, may_set: bool = False) -> tuple[KernelLogSink, Path]:
    device, setting = tmp_path / "kmsg", tmp_path / "printk_devkmsg"
    device.write_bytes(b"")
    setting.write_text(mode)
    return KernelLogSink(str(device), setting=str(setting), may_set=may_set), device


def test_kmsg_lines_have_the_kernels_priorities(tmp_path: Path) -> None:
    sink, device = _kmsg(tmp_path, "on\n")
    sink(line("hello\nworld", ms=1))
    sink.close()
    assert device.read_bytes() == b"<6>guestagent: hello world ms=1"


def test_no_field_forges_another_or_reaches_a_terminal(tmp_path: Path) -> None:
    sink, device = _kmsg(tmp_path, "on\n")
    sink(line("hello", name="a level=error", other="\x1b[2J"))
    sink.close()
    assert device.read_bytes() == b"<6>guestagent: hello name='a level=error' other='\\x1b[2J'"


def test_kmsg_keeps_below_the_kernels_rate(tmp_path: Path) -> None:
    sink, _ = _kmsg(tmp_path, "ratelimit\n")
    for number in range(30):
        sink(line(str(number)))
    sink.close()
    assert 20 <= sink.dropped <= 21  # but for a refill on a slow machine


def test_kmsg_is_unlimited_where_that_may_be_set(tmp_path: Path) -> None:
    sink, _ = _kmsg(tmp_path, "ratelimit\n", may_set=True)
    for number in range(30):
        sink(line(str(number)))
    sink.close()
    assert sink.dropped == 0
    assert (tmp_path / "printk_devkmsg").read_text() == "on"


def test_a_long_line_is_cut_for_the_kernel(tmp_path: Path) -> None:
    sink, device = _kmsg(tmp_path, "on")
    sink(line("x" * 5000))
    sink.close()
    assert len(device.read_bytes()) < 1000


# --- to a host that comes and goes


class Host:
    """Listens on a Unix socket and reads lines."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix://{path}"
        self._path = path
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(WAIT_SECONDS)
        self._listener.bind(str(self._path))
        self._listener.listen()

    def accept(self) -> "tuple[socket.socket, Generator[dict[str, object]]]":
        assert self._listener is not None
        sock, _ = self._listener.accept()
        sock.settimeout(WAIT_SECONDS)
        return sock, self._lines(sock)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._path.unlink(missing_ok=True)

    @staticmethod
    def _lines(sock: socket.socket) -> "Generator[dict[str, object]]":
        with sock.makefile("rb") as stream:
            for text in stream:
                yield json.loads(text)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    one = Host(tmp_path / "host")
    yield one
    one.close()


def ship(log: Log, host: Host) -> LogShipper:
    shipper = LogShipper(log, host.address, level="info", head='{"stream":"guestagent.log"}')
    shipper.start()
    return shipper


def test_late_host_gets_the_lines_logged_before_it_connected(host: Host) -> None:
    log = Log()
    log.info("first", n=1)
    log.debug("noise")
    shipper = ship(log, host)
    host.listen()
    sock, lines = host.accept()
    with sock:
        assert next(lines) == {"stream": "guestagent.log"}
        assert next(lines)["text"] == "first"
        log.info("second")
        assert next(lines)["text"] == "second"
    shipper.close()


def test_log_resends_lines_after_the_last_line_of_the_host(host: Host) -> None:
    log = Log()
    host.listen()
    shipper = ship(log, host)
    sock, lines = host.accept()
    for number in range(1, 4):
        log.info(str(number))
    next(lines)
    assert [next(lines)["text"] for _ in range(3)] == ["1", "2", "3"]
    sock.sendall(b"junk\n1\n")
    log.info("4")
    assert next(lines)["text"] == "4"
    lines.close()
    sock.close()
    log.info("5")
    again, lines = host.accept()
    with again:
        assert next(lines) == {"stream": "guestagent.log"}
        assert [next(lines)["text"] for _ in range(4)] == ["2", "3", "4", "5"]
    shipper.close()


class HeldLog(Log):
    """Keeps back the line "held" from who fetches it, until ``let_go`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_fetched = threading.Event()
        self.let_go = threading.Event()

    def since(self, number: int) -> tuple[tuple[Line, ...], int]:
        lines, dropped = super().since(number)
        if lines and lines[-1].text == "held":
            self.is_fetched.set()
            assert self.let_go.wait(WAIT_SECONDS)
        return lines, dropped


def test_an_answer_is_heard_of_a_host_that_went_before_the_next_line(host: Host) -> None:
    log = HeldLog()
    host.listen()
    shipper = ship(log, host)
    sock, lines = host.accept()
    log.info("1")
    log.info("2")
    assert [next(lines).get("text") for _ in range(3)] == [None, "1", "2"]
    log.info("held")
    assert log.is_fetched.wait(WAIT_SECONDS)
    sock.sendall(b"1\n")
    lines.close()
    sock.close()
    log.let_go.set()
    again, lines = host.accept()
    with again:
        assert [next(lines).get("text") for _ in range(3)] == [None, "2", "held"]
    shipper.close()


def test_lines_that_are_lost_are_counted(host: Host) -> None:
    log = Log(capacity=5)
    shipper = ship(log, host)
    for number in range(20):
        log.info(str(number))
    host.listen()
    sock, lines = host.accept()
    with sock:
        next(lines)
        assert next(lines) == {"dropped": 15, "next": 16}
        assert next(lines)["text"] == "15"
    assert shipper.dropped == 15
    shipper.close()


def test_the_last_lines_reach_a_host_that_listens(host: Host) -> None:
    log = Log()
    host.listen()
    shipper = ship(log, host)
    sock, lines = host.accept()
    with sock:
        next(lines)
        log.info("the last words")
        shipper.close()
        assert [entry["text"] for entry in lines] == ["the last words"]


def test_shipper_closes_in_time_without_a_host(host: Host) -> None:
    shipper = ship(Log(), host)
    closing = threading.Thread(target=shipper.close)
    closing.start()
    closing.join(2.0)
    assert not closing.is_alive()


def test_nothing_is_left_open(host: Host) -> None:
    before = len(os.listdir("/proc/self/fd"))
    shipper = ship(Log(), host)
    shipper.close()
    assert len(os.listdir("/proc/self/fd")) == before


_STUCK_CONSOLE = """
import os, sys
from guestagent.config import Config
from guestagent.observe.sinks import open_sinks
from vsock.log import log
reader, writer = os.pipe()
os.set_blocking(writer, False)
try:
    while os.write(writer, bytes(4096)):
        pass
except BlockingIOError:
    os.set_blocking(writer, True)
os.dup2(writer, 2)
open_sinks(Config(log_to=("console",)), is_machine=False)
with log.in_background():
    for number in range(1000):
        log.warning("x", number=number)
    print("went on", flush=True)
    os._exit(0)
"""


def test_the_console_of_an_agent_keeps_no_thread_waiting() -> None:
    """Whoever logs goes on, though the console takes nothing."""
    done = subprocess.run(
        [sys.executable, "-c", _STUCK_CONSOLE], stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert done.stdout == "went on\n"
