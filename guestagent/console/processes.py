"""Processes as /proc shows them (proc(5))."""

import os

from vsock.errors import CallError
from vsock.record import Record

__all__ = ("Process", "open_files", "read_processes", "session_members")

_MAX_FILES = 10_000


class Process(Record):
    """One process. ``command`` is its command line, or [name] where it has none."""

    pid: int
    ppid: int
    session: int
    state: str
    threads: int
    rss_bytes: int
    cpu_seconds: float
    command: str
    is_kernel_thread: bool


def read_processes(proc_root: str = "/proc") -> list[Process]:
    """Return every process, by pid, but for those that end meanwhile."""
    pids = sorted(int(name) for name in os.listdir(proc_root) if name.isdigit())
    found = (_read_process(proc_root, pid) for pid in pids)
    return [process for process in found if process is not None]


def session_members(session: int, proc_root: str = "/proc") -> list[int]:
    """Return the pids of a session that have not ended."""
    return [
        process.pid
        for process in read_processes(proc_root)
        if process.session == session and process.state not in "ZX"
    ]


def open_files(pid: int, proc_root: str = "/proc") -> list[tuple[int, str]]:
    """Return (descriptor, what it is open on) of a process.

    Raises:
        CallError: ``not_found``, there is no such process.
    """
    directory = f"{proc_root}/{pid}/fd"
    try:
        numbers = sorted(int(name) for name in os.listdir(directory))
    except FileNotFoundError:
        raise CallError("not_found", f"there is no process {pid}", hint="`ps` lists them") from None
    found = []
    for fd in numbers[:_MAX_FILES]:
        try:
            found.append((fd, os.readlink(f"{directory}/{fd}")))
        except FileNotFoundError:  # closed meanwhile, as that of the listing itself
            continue
    return found


def _read_process(proc_root: str, pid: int) -> Process | None:
    directory = f"{proc_root}/{pid}"
    try:
        with open(f"{directory}/stat", "rb") as stream:
            stat = stream.read()
        with open(f"{directory}/cmdline", "rb") as stream:
            arguments = stream.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the name may hold anything, parentheses too
    name = os.fsdecode(stat[stat.index(b"(") + 1 : stat.rindex(b")")])
    fields = stat[stat.rindex(b")") + 2 :].split()
    ticks = os.sysconf("SC_CLK_TCK")
    command = os.fsdecode(arguments.rstrip(b"\0").replace(b"\0", b" "))
    return Process(
        pid=pid,
        ppid=int(fields[1]),
        session=int(fields[3]),
        state=fields[0].decode("ascii"),
        threads=int(fields[17]),
        rss_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / ticks,
        command=command or f"[{name}]",
        is_kernel_thread=pid == 2 or fields[1] == b"2",
    )
