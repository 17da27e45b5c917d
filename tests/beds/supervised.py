"""The agent as in a machine: a child of the PID 1 that starts it again when it dies."""

import os
import signal
import sys
import time
from pathlib import Path

from tests.beds.agentbed import PROJECT, SITE, AgentProcess

__all__ = ("SupervisedAgent",)

_SUPERVISED = """
import signal, sys
sys.path[:0] = {paths!r}
from guestagent import agent
from guestagent.config import read_settings
from guestagent.listeners import HeldSockets
from guestagent.boot.supervisor import SIGNALS, supervise
from guestagent.observe.crashes import note_death
from guestagent.policy.binding.keeper import PolicyKeeper
from vsock.log import fd_sink, log
log.add_sink(fd_sink(2))
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
settings = tuple(tuple(word.split("=", 1)) for word in sys.argv[1:])
config, problems = read_settings(settings)
assert not problems, problems
log.set_level(config.log)

sockets = HeldSockets(config.listen)
policy = PolicyKeeper(config.policy, is_held=True)

def life(restarts, on_ready):
    boot = {{"pid1": True}}
    return agent.run(
        config, boot=boot, restarts=restarts, on_ready=on_ready, sockets=sockets, policy=policy
    )

def on_death(pid, status):
    note_death(config.state_directory, pid, status)
    sockets.open_missing()

print("mode", supervise(life, on_death), flush=True)
"""


class SupervisedAgent(AgentProcess):
    """PID 1 of a PID namespace of its own, with the agent in a child."""

    def command(self, *settings: str) -> list[str]:
        code = _SUPERVISED.format(paths=[str(PROJECT), SITE])
        python = [sys.executable, "-I", "-S", "-c", code]
        inside = [*python, *self.all_settings(settings)]
        return ["unshare", "--pid", "--fork", "--kill-child", *inside]

    def stop_init(self) -> None:
        """Stop PID 1, so that it starts no agent until ``continue_init``."""
        os.kill(self._init(), signal.SIGSTOP)

    def continue_init(self) -> None:
        os.kill(self._init(), signal.SIGCONT)

    def kill_child(self) -> None:
        """Kill the agent, not PID 1."""
        os.kill(self.child(), signal.SIGKILL)

    def child(self) -> int:
        """Return the pid of the agent that lives now, as it is seen from here."""
        return self._child_of(self._init())

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
