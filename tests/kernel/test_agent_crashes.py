"""The agent is killed at random moments while clients load it: the next life tells the truth."""

import os
import subprocess
import sys
import time

import pytest

from tests.beds.agentbed import PROJECT, SITE, AgentProcess, Pack
from tests.beds.soak import Soak, answered_within
from tests.beds.supervised import SupervisedAgent

PACK_LAYERS = 24
KILLS = int(os.environ.get("KILLS", "200"))


@pytest.mark.timeout(600)
def test_killed_under_supervision(pack: Pack) -> None:
    """Every next agent has all that was mounted; how soon it answers is in ``scripts/bench``."""
    with SupervisedAgent("log=error") as agent:
        answered_within(agent.address)
        with Soak(pack, agent.address) as soak:
            soak.kill(KILLS, agent.kill_child)
        assert soak.leaks() == []
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

        def kill_and_start() -> None:
            agent.kill()
            agent.start()

        with Soak(pack, agent.address) as soak:
            soak.kill(10, kill_and_start)
        assert soak.leaks() == []


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
