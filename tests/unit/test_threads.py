"""Signals are the main thread's: any other that took one would leave it asleep."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestagent.host.client import GuestAgent
from guestagent.host.ctl.session import wait_for_interrupt
from tests.beds.handlebed import WAIT_SECONDS, Agent
from vsock.threads import start_thread

OURS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH}

#: Interrupted while its main thread waits for good, and while the other is the one that runs.
PROGRAM = """
import signal, threading
from vsock.threads import start_thread

def run():
    print("ready", flush=True)
    while True:
        pass

try:
    start_thread(threading.Thread(target=run, daemon=True))
    threading.Event().wait()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    one = Agent(tmp_path / "agent")
    yield one
    one.stop()


def blocked(tid: int | str) -> set[int]:
    status = Path(f"/proc/self/task/{tid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigBlk:"))
    bits = int(mask.split()[1], 16)
    return {number for number in range(1, 65) if bits >> (number - 1) & 1}


def test_a_thread_blocks_signals_and_the_main_one_does_not() -> None:
    seen: list[set[int]] = []
    before = blocked(os.getpid())
    thread = threading.Thread(target=lambda: seen.append(blocked(threading.get_native_id())))
    start_thread(thread)
    thread.join(WAIT_SECONDS)
    assert seen[0] >= OURS
    assert blocked(os.getpid()) == before
    assert not before & OURS


def test_the_mask_is_put_back_when_there_is_no_thread() -> None:
    thread = threading.Thread(target=int)
    start_thread(thread)
    thread.join(WAIT_SECONDS)
    with pytest.raises(RuntimeError):
        start_thread(thread)
    assert not blocked(os.getpid()) & OURS


def test_no_thread_of_a_handle_takes_signals(agent: Agent) -> None:
    before = set(os.listdir("/proc/self/task"))
    with GuestAgent(agent.address, reconnect=True) as guest:
        guest.set_event_callback(lambda event: None)
        threads = set(os.listdir("/proc/self/task")) - before
        client = [name for name in threads if blocked(name) >= OURS]
        names = {thread.name: str(thread.native_id) for thread in threading.enumerate()}
    for name in ("reconnect", "rpc-reader", "rpc-events"):
        assert names[name] in client


def interrupt_when_ready(program: str, *, times: int = 1) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(times):
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
    assert process.returncode == 0


def test_an_interrupt_reaches_a_main_thread_that_waits() -> None:
    for _ in range(10):
        interrupt_when_ready(PROGRAM)


def test_a_signal_just_before_the_wait_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = select.select, []

    def late(*arguments: Any) -> Any:
        """The first call comes after a signal that the interpreter has dealt with already."""
        calls.append(arguments)
        signal.raise_signal(signal.SIGUSR1 if len(calls) == 1 else signal.SIGINT)
        ready = real(*arguments, WAIT_SECONDS)
        assert ready[0], "it slept"
        return ready

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    monkeypatch.setattr("guestagent.host.ctl.session.select.select", late)
    try:
        wait_for_interrupt()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(calls) == 2
    assert signal.set_wakeup_fd(-1) == -1


def test_an_interrupt_on_a_busy_machine() -> None:
    program = (
        "from guestagent.host.ctl.session import wait_for_interrupt\n"
        "for _ in range(20):\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        wait_for_interrupt()\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "    print('interrupted', flush=True)\n"
    )
    interrupt_when_ready(program, times=20)
