"""Programs that end with who started them; real machines: tests/vm/test_parent_death.py."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from rootfs.machine.lifetime import ending_with_us
from vsock.device.process import start_device

PROJECT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 30.0
T = TypeVar("T")


def test_the_program_is_the_process_that_was_started() -> None:
    command = ending_with_us([sys.executable, "-c", "import os; print(os.getpid())", "a b"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate(timeout=WAIT_SECONDS)[0] == f"{process.pid}\n"
    assert process.returncode == 0


def test_arguments_arrive_as_they_are() -> None:
    words = ["", "a b", "$HOME", "'", '"', "*", "--", "-c"]
    command = ending_with_us([sys.executable, "-c", "import sys; print(sys.argv[1:])", *words])
    result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert result.stdout == f"{words}\n"


def test_a_parent_that_is_gone_already_has_no_child(tmp_path: Path) -> None:
    """As it would be if we ended before the signal was asked for: then the parent is another."""
    command = ending_with_us(["touch", str(tmp_path / "ran")])
    command[command.index(str(os.getpid()))] = str(os.getppid())
    assert subprocess.run(command, timeout=WAIT_SECONDS).returncode == 1
    assert list(tmp_path.iterdir()) == []


def in_a_thread_of_its_own(function: Callable[[], T]) -> T:
    """Return what the function returns, when the thread that it ran in has ended."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("name", ["KILL", "TERM"])
def test_program_ends_with_the_thread_that_started_it(name: str) -> None:
    """Which is what Linux ties the signal to, and why the docstring warns."""
    command = ending_with_us(["sh", "-c", "echo up; exec sleep 1000"], signal=name)

    def start() -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert process.poll() is None
        return process

    with in_a_thread_of_its_own(start) as process:
        try:
            assert process.wait(WAIT_SECONDS) == -signal.Signals[f"SIG{name}"]
        finally:
            process.kill()


def test_a_device_that_loses_its_parent_tidies_up(tmp_path: Path) -> None:
    device = in_a_thread_of_its_own(lambda: start_device(tmp_path / "s", tmp_path / "u", 3))
    with device:
        assert device.wait(WAIT_SECONDS) == 0
        assert list(tmp_path.iterdir()) == []


def test_a_device_of_another_parent_does_not_start(tmp_path: Path) -> None:
    paths = ["--socket", str(tmp_path / "s"), "--uds", str(tmp_path / "u")]
    result = subprocess.run(
        [sys.executable, "-m", "vsock.device", *paths, "--cid", "3", "--parent", "1"],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        cwd=PROJECT,
    )
    assert (result.returncode, list(tmp_path.iterdir())) == (1, [])
    assert "process 1 is not our parent" in result.stderr
