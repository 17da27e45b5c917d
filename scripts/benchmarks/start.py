"""From exec of the agent to its first reply, beside an interpreter that only imports msgpack."""

import subprocess
import sys
import time

from scripts.benchmarks.rows import Row, row, timed
from tests.beds.agentbed import SITE, AgentProcess

__all__ = ("start_rows",)

NATIVE = "native"
_INTERPRETER = "an interpreter with msgpack"
_BARE = "import sys; sys.path.append({site!r}); import msgpack"
_LOOK_SECONDS = 0.001


def start_rows(bed: str = NATIVE, rounds: int = 20) -> list[Row]:
    """Measure; needs root. The agent starts without layers, so no device-mapper is needed."""
    bare: list[float] = []
    replies: list[float] = []
    for _ in range(rounds):  # in turn, so that other load meets both
        with timed(bare):
            code = _BARE.format(site=SITE)
            subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
        with AgentProcess("log=error") as agent:
            agent.stop()
            with timed(replies):
                agent.start()
                while not agent.is_listening():
                    time.sleep(_LOOK_SECONDS)
                guest = agent.client()
            guest.close()
    return [
        row(bed, _INTERPRETER, "ms", bare),
        row(bed, "exec to first reply", "ms", replies, versus=_INTERPRETER, floor=bare),
    ]
