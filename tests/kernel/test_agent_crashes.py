"""The agent is killed at random moments while clients load it: the next life tells the truth."""

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.beds.agentbed import PROJECT, SITE, AgentProcess, Pack, attached_pack
from tests.beds.soak import Soak, answered_within
from tests.beds.supervised import SupervisedAgent

#: On top of what bringing up the interpreter takes at that time: others may load the machine.
MEDIAN_SECONDS = 1.0
_YARDSTICKS = 10
_IMPORT = "import sys; sys.path[:0] = {paths!r}; import guestagent.__main__"
KILLS = int(os.environ.get("KILLS", "200"))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    with attached_pack(tmp_path_factory.mktemp("pack"), 24) as pack:
        yield pack


def run_kills(
    soak: Soak, kills: int, kill_and_start: Callable[[], None]
) -> tuple[list[float], float]:
    """Kill at random moments; return how long each next life took to answer, in seconds, and how
    long an interpreter took meanwhile to come up with the agent's modules (the median)."""
    chance = random.Random(1)
    seconds, starts = [], []
    with soak:
        for number in range(kills):
            time.sleep(chance.uniform(0.0, 0.06))  # the moment is the point: nothing to wait for
            kill_and_start()
            soak.tally.kills += 1
            with soak.gate.closed():
                seconds.append(answered_within(soak.address))
                soak.look_closely()
                if number % max(1, kills // _YARDSTICKS) == 0:
                    starts.append(_start_seconds())
            assert soak.tally.wrong == []
    return seconds, statistics.median(starts)


def _start_seconds() -> float:
    begin = time.monotonic()
    code = _IMPORT.format(paths=[str(PROJECT), SITE])
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
    return time.monotonic() - begin


def report(name: str, soak: Soak, seconds: list[float], start: float) -> None:
    median, worst = statistics.median(seconds), max(seconds)
    sys.stdout.write(
        f"{name}: {soak.tally.kills} kills, {soak.tally.operations} operations; "
        f"answers after {median * 1000:.0f} ms (median), {worst * 1000:.0f} ms (worst); "
        f"an interpreter takes {start * 1000:.0f} ms\n"
    )


@pytest.mark.timeout(300)
def test_killed_under_supervision(pack: Pack) -> None:
    with SupervisedAgent("log=error") as agent:
        answered_within(agent.address)
        soak = Soak(pack, agent.address)
        seconds, start = run_kills(soak, KILLS, agent.kill_child)
        assert soak.leaks() == []
        report("supervised", soak, seconds, start)
        assert statistics.median(seconds) < MEDIAN_SECONDS + start
        assert soak.tally.operations > KILLS
        with agent.client() as guest:
            assert guest.status().restarts == KILLS
            guest.layer_mount(pack.spec(0))
        agent.end()
        assert agent.wait() == 0
        assert "mode poweroff" in agent.log.read_text()


def test_killed_without_supervision(pack: Pack) -> None:
    with AgentProcess("log=error") as agent:
        answered_within(agent.address)
        soak = Soak(pack, agent.address)

        def kill_and_start() -> None:
            agent.kill()
            agent.start()

        seconds, start = run_kills(soak, 10, kill_and_start)
        assert soak.leaks() == []
        report("unsupervised", soak, seconds, start)
        # one start is its own
        assert statistics.median(seconds) < MEDIAN_SECONDS + 2 * start


def test_an_agent_that_cannot_start_is_not_started_in_a_rush() -> None:
    """PID 1 leaves growing pauses before an agent that never comes to serve."""
    with SupervisedAgent("state=/proc/no/such/directory", "log=error") as agent:
        until = time.monotonic() + 60
        pauses: list[float] = []
        while len(pauses) < 4:
            assert time.monotonic() < until, agent.log.read_text()
            time.sleep(0.05)  # it prints, and tells nobody else
            words = agent.log.read_text().split()
            found = [word.partition("=")[2] for word in words if word.startswith("pause_seconds=")]
            pauses = [float(pause) for pause in found]
        assert pauses == sorted(pauses), pauses
        assert pauses[3] > pauses[0], pauses
        agent.stop()


def test_the_supervisor_reaps_orphans(pack: Pack) -> None:
    code = "import os\nif os.fork() == 0:\n    if os.fork() == 0:\n        os._exit(7)\nos._exit(0)"
    program = (
        "import os, signal, subprocess, sys\n"
        f"sys.path[:0] = [{str(PROJECT)!r}, {SITE!r}]\n"
        "from guestagent.boot.supervisor import SIGNALS, supervise\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)\n"
        "def life(restarts, on_ready):\n"
        f"    subprocess.run([sys.executable, '-S', '-c', {code!r}], check=True)\n"
        "    while any(s.split()[2] == 'Z' for s in stats()): pass\n"
        "    return 80\n"
        "def stats():\n"
        "    for name in os.listdir('/proc'):\n"
        "        if name.isdigit() and os.path.exists(f'/proc/{name}/stat'):\n"
        "            try: yield open(f'/proc/{name}/stat').read()\n"
        "            except OSError: pass\n"
        "print(supervise(life))\n"
    )
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "poweroff"), done.stderr
