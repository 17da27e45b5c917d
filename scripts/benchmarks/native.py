"""The agent on the kernel of this machine, beside the bare calls that it cannot do without.

A plain EROFS layer on a loop device needs no device-mapper, so that any new kernel will do. Mounts
are made in a mount namespace of the benchmark's own, where /run is a tmpfs as in a guest. It needs
root.
"""

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from guestagent.api import LayerSpec, PathDevice
from guestagent.host.client import GuestAgent
from guestagent.storage import syscalls
from guestagent.storage.mount import mount_filesystem, unmount
from scripts.benchmarks.rows import Row, milliseconds, print_rows, row, timed, write_rows
from scripts.benchmarks.start import start_rows
from tests.beds.agentbed import PROJECT, SITE, AgentProcess, attached_pack

__all__ = ("native_rows",)

BED = "native"
BARE = "bare system calls"
#: Rounds of a run in which system calls or clock reads are counted.
_COUNTED = 50
_CLOCKS = (
    *("monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "time", "time_ns"),
    *("clock_gettime", "clock_gettime_ns"),
)
#: An agent that counts its reads of clocks in a file of eight bytes.
_COUNTING = """\
import ctypes, mmap, os, sys, time
with open({path!r}, "r+b") as file:
    count = ctypes.c_uint64.from_buffer(mmap.mmap(file.fileno(), 8))
def counted(read):
    def clock(*arguments):
        count.value += 1
        return read(*arguments)
    return clock
for name in {clocks!r}:
    setattr(time, name, counted(getattr(time, name)))
sys.path[:0] = {paths!r}
from guestagent.__main__ import main
main()
"""


def native_rows(*, short: bool = False) -> list[Row]:
    """Measure in a mount namespace of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=PROJECT / ".cache") as directory:
        result = Path(directory, "rows.json")
        command = [sys.executable, "-m", "scripts.benchmarks.native", "--json", str(result)]
        command += ["--rounds", "100"] if short else []
        subprocess.run(command, check=True, stdout=sys.stderr)
        rows: list[Row] = json.loads(result.read_text())
        return rows


def measured_rows(rounds: int) -> list[Row]:
    """Measure here; what is mounted meanwhile is unmounted."""
    with tempfile.TemporaryDirectory() as name, attached_pack(Path(name, "pack"), 1) as pack:
        spec = pack.spec(0, mapping=None, verity=None)
        with AgentProcess("log=error") as agent, agent.client() as guest:
            rows = [
                row(BED, "round trip, no work", "ms", milliseconds(lambda: guest.cancel(0), rounds))
            ]
            rows += _mounts(guest, spec, rounds)
        rows += _counts(spec)
        rows += start_rows(BED)
        return rows


def _mounts(guest: GuestAgent, spec: LayerSpec, rounds: int) -> Iterator[Row]:
    assert isinstance(spec.device, PathDevice)
    node, target = spec.device.path, f"/run/bare-{os.getpid()}"
    bare_ms: tuple[list[float], list[float]] = ([], [])
    agent_ms: tuple[list[float], list[float]] = ([], [])
    pid = guest.status().pid
    os.mkdir(target)
    try:
        cpu_ms, waits = _cpu_ms(pid), _waits(pid)
        for _ in range(rounds):  # in turn, so that what else goes on meets both
            with timed(bare_ms[0]):
                mount_filesystem(source=node, target=target, filesystem="erofs")
            with timed(bare_ms[1]):
                unmount(target)
            with timed(agent_ms[0]):
                guest.layer_mount(spec)
            with timed(agent_ms[1]):
                guest.layer_unmount(spec.layer_id)
        cpu_ms = (_cpu_ms(pid) - cpu_ms) / (2 * rounds)
        waits = _waits(pid) - waits
    finally:
        os.rmdir(target)
    for what, own, floor in zip(("mount", "unmount"), agent_ms, bare_ms, strict=True):
        yield row(BED, f"{what} plain, {BARE}", "ms", floor)
        yield row(BED, f"{what} plain", "ms", own, versus=BARE, floor=floor)
        share = [with_agent - bare for with_agent, bare in zip(own, floor, strict=True)]
        yield row(BED, f"{what} plain, the agent's share", "ms", share)
    yield row(BED, "agent's CPU time of a mount or an unmount", "ms", [cpu_ms])
    yield row(BED, "waits of the agent's threads for a mount and an unmount", "", [waits / rounds])


def _cpu_ms(pid: int) -> float:
    """Return the time that the threads of a process have run (proc(5), schedstat)."""
    spent_ns = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):
            spent_ns += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return spent_ns / 1e6


def _waits(pid: int) -> int:
    """Return how often the threads of a process have given up the processor to wait: at least once
    for each request, and once more for each hand-over to another thread."""
    waits = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):
            status = Path(f"/proc/{pid}/task/{task}/status").read_text()
            waits += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return waits


# --- what is counted, in runs of their own


def _counts(spec: LayerSpec) -> Iterator[Row]:
    calls, futexes = _system_calls(spec)
    yield row(BED, "system calls of a mount and an unmount", "", [calls])
    # threads make more of them where other programs run
    line = "system calls of a mount and an unmount without futexes"
    yield row(BED, line, "", [calls - futexes])
    yield row(BED, "clock reads of a mount and an unmount", "", [_clock_reads(spec)])


def _mount_and_unmount(guest: GuestAgent, spec: LayerSpec) -> Callable[[], None]:
    def both() -> None:
        guest.layer_mount(spec)
        guest.layer_unmount(spec.layer_id)

    return both


def _system_calls(spec: LayerSpec) -> tuple[float, float]:
    """Return how many system calls a mount and an unmount take, and how many are futexes."""
    with AgentProcess("log=error") as agent, agent.client() as guest:
        both = _mount_and_unmount(guest, spec)
        both()
        with tempfile.NamedTemporaryFile() as summary:
            command = ["strace", "-f", "-c", "-o", summary.name, "-p", str(guest.status().pid)]
            strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert strace.stderr is not None
            strace.stderr.readline()  # it says that it is attached
            for _ in range(_COUNTED):
                both()
            strace.terminate()
            strace.communicate()
            # % time, seconds, usecs/call, calls, errors, syscall
            lines = [line.split() for line in Path(summary.name).read_text().splitlines()]
            counts = {line[-1]: int(line[3]) / _COUNTED for line in lines if line[3].isdigit()}
            return counts["total"], counts.get("futex", 0.0)


def _clock_reads(spec: LayerSpec) -> float:
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8))
        file.flush()
        count = ctypes.c_uint64.from_buffer(mmap.mmap(file.fileno(), 8))
        with _CountingAgent(file.name) as agent, agent.client() as guest:
            both = _mount_and_unmount(guest, spec)
            both()
            before = count.value
            for _ in range(_COUNTED):
                both()
            return (count.value - before) / _COUNTED


class _CountingAgent(AgentProcess):
    def __init__(self, path: str) -> None:
        super().__init__("log=error")
        self._path = path

    def command(self, *settings: str) -> list[str]:
        code = _COUNTING.format(path=self._path, clocks=_CLOCKS, paths=[str(PROJECT), SITE])
        return [sys.executable, "-I", "-S", "-c", code, *self.all_settings(settings)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmarks.native")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args()
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
    rows = measured_rows(arguments.rounds)
    print_rows(rows)
    if arguments.json:
        write_rows(rows, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
