"""Crash reports: of lives that ended by a fault, a kill, an exception, and of lost threads."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest

from guestagent.api.observe import CrashesReply
from guestagent.observe.crashes import KEPT_REPORTS
from guestagent.observe.recorder import REQUESTS_MAX

_LIFE = """
import os, sys, threading
from guestagent.observe.crashes import CrashReports, note_death
from vsock.log import log
state = {"layers": ("base at /run/layers/base: mounted",)}
with CrashReports(sys.argv[1], restarts=3, left=lambda: state) as crashes:
    crashes.attach(lambda: state)
    with crashes.request("done before"):
        pass
    with crashes.request("layer.mount msgid=3"):
        log.info("the last words", signature=b"sign", secret="hidden")
        exec(sys.argv[2])
"""
_SHOW = "import msgpack; os.write(1, msgpack.packb(crashes.since(0).to_wire()))"


@pytest.fixture
def live(tmp_path: Path):
    """Run a life in the same state directory; return its process."""

    def run(code: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-c", _LIFE, tmp_path, code], capture_output=True, check=False
        )

    return run


def reports(live) -> CrashesReply:
    done = live(_SHOW)
    assert done.returncode == 0, done.stderr
    return CrashesReply.from_wire(msgpack.unpackb(done.stdout))


def test_an_orderly_life_leaves_no_report(live) -> None:
    live("")
    assert reports(live) == CrashesReply(crashes=(), total=0)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_fault(live, name: str) -> None:
    number = getattr(signal, name)
    assert live(f"os.kill(os.getpid(), {number})").returncode == -number
    (report,) = reports(live).crashes
    assert (report.kind, report.signal, report.restarts) == ("death", name, 3)
    assert "most recent call first" in report.traceback
    assert report.requests == ("layer.mount msgid=3",)
    assert report.layers == ("base at /run/layers/base: mounted",)
    assert report.log[-1].text == "the last words"
    assert report.log[-1].fields == {"signature": "[secret]", "secret": "[secret]"}


def test_killed_agent_is_reported_from_its_files(live) -> None:
    live("os.kill(os.getpid(), 9)")
    (report,) = reports(live).crashes
    assert (report.signal, report.traceback) == (None, "")
    assert "killed" in report.reason
    assert report.log[-1].text == "the last words"


def test_crash_report_includes_signal_seen_by_pid1(live) -> None:
    live("note_death(sys.argv[1], os.getpid(), -9); os.kill(os.getpid(), 9)")
    (report,) = reports(live).crashes
    assert (report.signal, report.status) == ("SIGKILL", -9)


def test_the_word_of_another_death_is_not_taken(live) -> None:
    live("note_death(sys.argv[1], 1, -6); os.kill(os.getpid(), 9)")
    assert reports(live).crashes[0].signal is None


def test_an_exception(live) -> None:
    assert live("raise KeyError('boom')").returncode == 1
    (report,) = reports(live).crashes
    assert (report.kind, report.reason) == ("exception", "KeyError: 'boom'")
    assert "KeyError: 'boom'" in report.traceback
    assert report.log[-2].text == "the last words"


def test_a_lost_thread(live) -> None:
    code = (
        "t = threading.Thread(target=lambda: 1 / 0, name='uevents'); t.start(); t.join();"
        "assert 'uevents' in crashes.problems()[0]"
    )
    assert live(code).returncode == 0
    (report,) = reports(live).crashes
    assert (report.kind, report.requests) == ("thread", ("layer.mount msgid=3",))
    assert "ZeroDivisionError" in report.traceback


def test_reports_are_bounded(live) -> None:
    code = "[crashes._report(kind='thread', reason=str(n), traceback='x' * 10**6)"
    live(f"{code} for n in range(20)]")
    found = reports(live)
    assert found.total == 20
    assert [report.reason for report in found.crashes] == [str(n) for n in range(12, 20)]
    assert len(found.crashes) == KEPT_REPORTS
    assert all(len(report.traceback) <= 32 * 1024 for report in found.crashes)


def test_a_damaged_report_is_left_out(live, tmp_path: Path) -> None:
    live("raise ValueError('one')")
    (tmp_path / "crashes/1.crash").write_bytes(b"\xc1junk")
    live("raise ValueError('two')")
    assert [report.reason for report in reports(live).crashes] == ["ValueError: two"]


def test_damage_does_not_stop_a_life(live, tmp_path: Path) -> None:
    live("os.kill(os.getpid(), 9)")
    for name in ("life", "death", "log", "log.old", "fault"):
        (tmp_path / "crashes" / name).write_bytes(os.urandom(600))
    assert live("").returncode == 0


def test_a_state_directory_that_cannot_be_written_is_no_failure(live, tmp_path: Path) -> None:
    (tmp_path / "crashes").write_text("a file is in the way")
    assert reports(live).crashes == ()


def test_more_requests_than_are_noted(live) -> None:
    live(
        "noted = [crashes.request(f'r{n}') for n in range(100)];"
        "[one.__enter__() for one in noted]; os.kill(os.getpid(), 9)"
    )
    (report,) = reports(live).crashes
    assert len(report.requests) == REQUESTS_MAX


def test_a_request_that_takes_long_is_known_after_many_lines(live) -> None:
    live("[log.info('x' * 300) for n in range(2000)]; os.kill(os.getpid(), 9)")
    (report,) = reports(live).crashes
    assert report.requests == ("layer.mount msgid=3",)
    assert len(report.log) == 100


def test_a_request_of_another_agent_is_in_flight_no_more(live) -> None:
    live("os.kill(os.getpid(), 9)")
    live("log.info('another'); os.kill(os.getpid(), 9)")
    assert [report.requests for report in reports(live).crashes] == [("layer.mount msgid=3",)] * 2
