"""The agent is killed at random moments while clients load it: the next life tells the truth."""

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.agentbed import PROJECT, SITE, AgentProcess, Pack, attached_pack
from tests.kernel.soak import Soak, answered_within

#: The goal is 1 s on a machine of one's own, which the printed line shows; a busy one is slower.
MEDIAN_SECONDS = 4.0
KILLS = int(os.environ.get("KILLS", "200"))
_SUPERVISED = """
import signal, sys
sys.path[:0] = {paths!r}
from guestagent import agent
from guestagent.config import read_settings
from guestagent.supervisor import SIGNALS, supervise
from vsock.log import fd_sink, log
log.add_sink(fd_sink(2))
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
settings = tuple(tuple(word.split("=", 1)) for word in sys.argv[1:])
config, problems = read_settings(settings)
assert not problems, problems
log.set_level(config.log)

def life(restarts, on_ready):
    return agent.run(config, boot={{"pid1": True}}, restarts=restarts, on_ready=on_ready)

print("mode", supervise(life), flush=True)
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    with attached_pack(tmp_path_factory.mktemp("pack"), 24) as pack:
        yield pack


class SupervisedAgent(AgentProcess):
    """PID 1 of a PID namespace of its own, with the agent in a child."""

    def command(self, *settings: str) -> list[str]:
        code = _SUPERVISED.format(paths=[str(PROJECT), SITE])
        python = [sys.executable, "-I", "-S", "-c", code]
        listen = [f"listen={self.address}", f"state={self.state}"]
        inside = [*python, *listen, *self.settings, *settings]
        return ["unshare", "--pid", "--fork", "--kill-child", *inside]

    def kill_child(self) -> None:
        """Kill the agent, not PID 1."""
        pid = self._child_of(self._init())
        os.kill(pid, signal.SIGKILL)

    def _init(self) -> int:
        assert self.process is not None
        return self._child_of(self.process.pid)

    def end(self) -> None:
        """Tell PID 1 to end the machine."""
        os.kill(self._init(), signal.SIGTERM)

    @staticmethod
    def _child_of(parent: int) -> int:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            for stat in Path("/proc").glob("[0-9]*/stat"):
                try:
                    fields = stat.read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if int(fields[1]) == parent and fields[0] != "Z":
                    return int(stat.parent.name)
        raise AssertionError(f"process {parent} has no child")


def run_kills(soak: Soak, kills: int, kill_and_start: Callable[[], None]) -> list[float]:
    """Kill at random moments; return how long each next life took to answer, in seconds."""
    chance = random.Random(1)
    seconds = []
    with soak:
        for _ in range(kills):
            time.sleep(chance.uniform(0.0, 0.06))  # the moment is the point: nothing to wait for
            kill_and_start()
            soak.tally.kills += 1
            with soak.gate.closed():
                seconds.append(answered_within(soak.address))
                soak.look_closely()
            assert soak.tally.wrong == []
    return seconds


def report(name: str, soak: Soak, seconds: list[float]) -> None:
    median, worst = statistics.median(seconds), max(seconds)
    sys.stdout.write(
        f"{name}: {soak.tally.kills} kills, {soak.tally.operations} operations; "
        f"answers after {median * 1000:.0f} ms (median), {worst * 1000:.0f} ms (worst)\n"
    )


@pytest.mark.timeout(300)
def test_killed_under_supervision(pack: Pack) -> None:
    with SupervisedAgent("log=error") as agent:
        answered_within(agent.address)
        soak = Soak(pack, agent.address)
        seconds = run_kills(soak, KILLS, agent.kill_child)
        assert soak.leaks() == []
        report("supervised", soak, seconds)
        assert statistics.median(seconds) < MEDIAN_SECONDS
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

        seconds = run_kills(soak, 10, kill_and_start)
        assert soak.leaks() == []
        report("unsupervised", soak, seconds)
        assert statistics.median(seconds) < MEDIAN_SECONDS


def test_an_agent_that_cannot_start_is_not_started_in_a_rush() -> None:
    """PID 1 leaves growing pauses before an agent that never comes to serve."""
    with SupervisedAgent("listen=unix:///no/such/directory/socket", "log=error") as agent:
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
        "from guestagent.supervisor import SIGNALS, supervise\n"
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
