"""Commands about the guest as a machine: its processes, kernel, log and settings."""

import errno
import os
import time
from collections.abc import Callable

from guestagent.api.agent import AgentEvents, AgentStatus, Event
from guestagent.api.observe import AgentLog, AgentMetrics
from guestagent.console.command import Group, Run, number
from guestagent.console.processes import Process, open_files, read_processes
from guestagent.console.screen import size_text
from vsock.log import Line, log, render
from vsock.threads import Waker

__all__ = ("SYSTEM",)

SYSTEM = Group("The guest")
_TOP_SECONDS = 2.0
_KMSG_RECORD_BYTES = 8 * 1024
_LEVELS = ("emerg", "alert", "crit", "err", "warn", "notice", "info", "debug")
_SECRETS = ("PASSWORD", "SECRET", "TOKEN", "PASSPHRASE", "PRIVATE")


@SYSTEM.command("status", "say how the agent is")
def _status(run: Run) -> None:
    status = run.ask(AgentStatus)
    run.screen.line(status.state)
    for problem in status.problems:
        run.screen.line(f"  problem: {problem}")
    shown = {**status.to_wire(), "rss_bytes": size_text(status.rss_bytes)}
    del shown["state"], shown["problems"]
    run.screen.fields([(name.removesuffix("_bytes"), value) for name, value in shown.items()])


# --- events and logs


def _event_text(event: Event) -> str:
    seconds, ms = divmod(event.unix_ms, 1000)
    clock = time.strftime("%H:%M:%S", time.gmtime(seconds))
    about = (
        ("layer", event.layer_id),
        ("overlay", event.overlay_id),
        ("device", event.device),
        ("block", event.block),
    )
    named = " ".join(f"{name}={value}" for name, value in about if value is not None)
    return f"{event.sequence:6} {clock}.{ms:03} {event.kind} {named} {event.detail}".rstrip()


def _follow(
    run: Run,
    listen: Callable[[Callable[[object], None]], Callable[[], None]],
    tell: Callable[[], None],
) -> None:
    """Call ``tell`` now, and with ``-f`` whenever a listener is called, until an interrupt."""
    with Waker() as waker:

        def wake(_: object) -> None:
            waker.wake()

        stop = listen(wake)
        try:
            if "f" in run.options:
                run.screen.follow()
            tell()
            while "f" in run.options:
                run.screen.flush()
                run.deadline.wait((waker.fd,), "wait for more")
                waker.clear()
                tell()
        finally:
            stop()


@SYSTEM.command("events [-f] [-n COUNT]", "list what has happened; -f goes on")
def _events(run: Run) -> None:
    count = run.number("n", 20 if "f" in run.options else 1000)
    since = max(0, run.ask(AgentStatus).event_sequence - count)

    def tell() -> None:
        nonlocal since
        more = True
        while more:
            reply = run.ask(AgentEvents, since=since)
            _tell_dropped(run, reply.dropped)
            for event in reply.events:
                run.screen.line(_event_text(event))
                since = event.sequence
            more = reply.more

    _follow(run, run.guest.debug.listen, tell)


@SYSTEM.command("log [-f] [-n COUNT]", "print the agent's log; -f goes on")
def _log(run: Run) -> None:
    since = -run.number("n", 20 if "f" in run.options else 2000, high=2000)

    def tell() -> None:
        nonlocal since
        more = True
        while more:
            reply = run.ask(AgentLog, since=since, level="debug")
            _tell_dropped(run, reply.dropped)
            for line in reply.lines:
                run.screen.line(render(Line(**line.as_dict())))  # type: ignore[arg-type]
            since, more = reply.next, reply.more

    _follow(run, lambda wake: log.add_sink(wake, level="debug"), tell)


def _tell_dropped(run: Run, dropped: int) -> None:
    if dropped:
        run.screen.line(f"... {dropped} more are no longer kept")


@SYSTEM.command("dmesg [-f]", "print the kernel's log; -f goes on")
def _dmesg(run: Run) -> None:
    """Print the kernel's log (Documentation/ABI/testing/dev-kmsg)."""
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        is_followed = "f" in run.options
        if is_followed:
            run.screen.follow()
        while True:
            try:
                record = os.read(fd, _KMSG_RECORD_BYTES)
            except BlockingIOError:
                if not is_followed:
                    return
                run.screen.flush()
                run.deadline.wait((fd,), "wait for the kernel's log")
                continue
            except OSError as error:
                if error.errno == errno.EPIPE:  # overwritten before it was read
                    continue
                raise
            if not record:
                return
            run.deadline.check("print the kernel's log")
            run.screen.line(_kernel_line(record))
    finally:
        os.close(fd)


def _kernel_line(record: bytes) -> str:
    head, _, rest = record.partition(b";")
    fields = head.split(b",")
    text = rest.split(b"\n", 1)[0].decode("utf-8", "backslashreplace")
    if len(fields) < 3 or not fields[0].isdigit() or not fields[2].isdigit():
        return text
    level = _LEVELS[int(fields[0]) & 7]
    mark = f"{level}: " if level in _LEVELS[:5] else ""
    return f"[{int(fields[2]) / 1e6:12.6f}] {mark}{text}"


# --- processes


@SYSTEM.command("ps [-a]", "list the processes; -a the kernel's too")
def _ps(run: Run) -> None:
    rows = [
        (str(p.pid), str(p.ppid), p.state, str(p.threads), size_text(p.rss_bytes), p.command)
        for p in read_processes()
        if "a" in run.options or not p.is_kernel_thread
    ]
    run.screen.table(("PID", "PPID", "S", "THR", "RSS", "COMMAND"), rows)


@SYSTEM.command("top [-n COUNT]", "show the busiest processes, every two seconds", is_paged=False)
def _top(run: Run) -> None:
    count = run.number("n", 1 if not run.screen.is_terminal else 1 << 30)
    screen = run.screen
    screen.follow()
    before, then = {p.pid: p for p in read_processes()}, time.monotonic()
    while count:
        count -= 1
        run.deadline.wait((), "wait for the next look", at_most=_TOP_SECONDS)
        now, processes = time.monotonic(), read_processes()
        if count or screen.clears:
            screen.clear()
        _show_top(run, processes, before, now - then)
        screen.flush()
        before, then = {p.pid: p for p in processes}, now


def _show_top(
    run: Run, processes: list[Process], before: dict[int, Process], seconds: float
) -> None:
    memory = _memory()
    run.screen.line(
        f"up {_duration(time.clock_gettime(time.CLOCK_BOOTTIME))}, "
        f"load {' '.join(f'{value:.2f}' for value in os.getloadavg())}, "
        f"memory {size_text(memory.get('MemAvailable', 0))} available of "
        f"{size_text(memory.get('MemTotal', 0))}"
    )
    used = []
    for process in processes:
        old = before.get(process.pid)
        spent = process.cpu_seconds - (old.cpu_seconds if old else 0.0)
        used.append((100 * max(0.0, spent) / seconds, process))
    # a script gets those that do something, or hold memory
    used = [(share, p) for share, p in used if share or not p.is_kernel_thread]
    used.sort(key=lambda item: (-item[0], -item[1].rss_bytes, item[1].pid))
    room = max(3, run.screen.rows - 4) if run.screen.is_terminal else len(used)
    rows = [
        (str(p.pid), f"{share:.1f}", size_text(p.rss_bytes), str(p.threads), p.command)
        for share, p in used[:room]
    ]
    run.screen.table(("PID", "CPU%", "RSS", "THR", "COMMAND"), rows)


def _memory() -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    with open("/proc/meminfo", encoding="ascii") as stream:
        pairs = (line.split(":") for line in stream)
        return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours:02}:{minutes:02}:{rest:02}"
    return f"{days} d {text}" if days else text


@SYSTEM.command("fds [PID]", "list the open files of the agent, or of a process")
def _fds(run: Run) -> None:
    pid = number(run.words[0], "PID", low=1) if run.words else os.getpid()
    rows = [(str(fd), target) for fd, target in open_files(pid)]
    run.screen.table(("FD", "FILE"), rows)


# --- settings


@SYSTEM.command("env", "print the agent's environment")
def _env(run: Run) -> None:
    for name, value in sorted(os.environ.items()):
        hidden = any(word in name.upper() for word in _SECRETS)
        run.screen.line(f"{name}={'(hidden)' if hidden else value}")


@SYSTEM.command("cmdline", "print the kernel's command line")
def _cmdline(run: Run) -> None:
    with open("/proc/cmdline", encoding="utf-8", errors="surrogateescape") as stream:
        run.screen.line(stream.read().strip())


@SYSTEM.command("modules", "list the kernel's modules")
def _modules(run: Run) -> None:
    try:
        with open("/proc/modules", encoding="ascii", errors="replace") as stream:
            words = [line.split() for line in stream]
    except FileNotFoundError:
        run.screen.line("this kernel has everything built in")
        return
    rows = [
        (name, size_text(int(size)), uses, used_by.strip("-,").replace(",", " "))
        for name, size, uses, used_by, *_ in sorted(words)
    ]
    run.screen.table(("MODULE", "SIZE", "USES", "USED BY"), rows)


@SYSTEM.command("uptime", "say how long guest and agent have been up")
def _uptime(run: Run) -> None:
    up = time.clock_gettime(time.CLOCK_BOOTTIME)
    agent = run.ask(AgentStatus).uptime_seconds
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    run.screen.line(f"up {_duration(up)}, the agent {_duration(agent)}, load {load}")


@SYSTEM.command("metrics", "print the agent's metrics")
def _metrics(run: Run) -> None:
    run.screen.write(run.ask(AgentMetrics).text)
