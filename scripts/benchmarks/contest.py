"""Several ways to do one thing, timed side by side on this machine.

Every round runs each contender once, so that what else the machine does hits all alike; a run that
others disturbed is made again, up to two times. All is counted per second, so that ``ratio`` says
how many times faster than ``versus`` a contender is.
"""

import os
import time
from collections.abc import Callable, Mapping

from scripts.benchmarks.rows import Row, row

__all__ = ("BED", "Contender", "contest")

BED = "host"
Contender = Callable[[], object]

_ATTEMPTS = 3
_MIN_ROUNDS = 3
_MAX_ROUNDS = 9
_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


def contest(
    task: str,
    contenders: Mapping[str, Contender],
    *,
    amount: float,
    unit: str,
    budget_seconds: float = 8.0,
) -> list[Row]:
    """Return a row for each contender; the first is what the others are compared with.

    ``amount`` is how much of ``unit``, without its ``/s``, each run does. After ``budget_seconds``
    no round begins, but there are three at least.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.monotonic() + budget_seconds
    for number in range(_MAX_ROUNDS):
        if number >= _MIN_ROUNDS and time.monotonic() > end:
            break
        for name, contender in contenders.items():
            attempts = _ATTEMPTS if time.monotonic() < end else 1
            rates[name].append(amount / _quiet_seconds(contender, attempts))
    peer, *others = rates
    rows = [row(BED, f"{task}: {peer}", f"{unit}/s", rates[peer])]
    for name in others:
        line = f"{task}: {name}"
        rows.append(row(BED, line, f"{unit}/s", rates[name], versus=peer, floor=rates[peer]))
    return rows


def _quiet_seconds(contender: Contender, attempts: int) -> float:
    """Time it; again, a few times, while others take more than a tenth of a core from it."""
    seconds = 0.0
    for _ in range(attempts):
        busy, own, begin = _busy_seconds(), _own_seconds(), time.perf_counter()
        contender()
        seconds = time.perf_counter() - begin
        others = _busy_seconds() - busy - (_own_seconds() - own)
        if others < 0.1 * seconds + 2 * _TICK_SECONDS:
            break
    return seconds


def _busy_seconds() -> float:
    """Return the seconds that all cores have worked since boot."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICK_SECONDS


def _own_seconds() -> float:
    """Return the seconds of this process and of its finished children."""
    return sum(os.times()[:4])
