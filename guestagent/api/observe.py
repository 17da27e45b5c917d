"""Seeing into a running agent: its log, its metrics, and its crash reports."""

from collections.abc import Mapping

from guestagent.api.checks import check_choice, check_range
from guestagent.api.request import Request
from vsock.record import Record

LOG_LEVELS = ("debug", "info", "warning", "error")
#: Lines in one reply or notification; there may be more, which the next request gets.
LOG_LINES_MAX = 500
CRASH_KINDS = ("death", "exception", "thread")


class LogLine(Record):
    """A line of the agent's log. ``number`` grows by one with each line, also across a restart of
    the agent; ``uptime_seconds`` is the machine's; ``fields`` are texts."""

    number: int
    uptime_seconds: float
    unix_ms: int
    level: str
    text: str
    fields: Mapping[str, str]


class LogReply(Record):
    """``next`` is what to ask for as ``since`` to go on; ``more`` says that there are lines right
    now. ``dropped`` counts lines after ``since``, of any level, that are no longer kept."""

    lines: tuple[LogLine, ...]
    dropped: int
    next: int
    more: bool


class AgentLog(Request[LogReply], method="agent.log", quick=True):
    """List lines of the log after a number, of ``level`` and above, and follow it.

    A negative ``since`` counts from the end. With ``follow`` later lines come as notifications
    ``agent.log`` (a `LogReply` each) on this connection, at the pace of its reader, until the
    connection ends or ``follow`` is asked for again, which changes the level.
    """

    since: int = 0
    level: str = "info"
    follow: bool = False

    def check(self) -> None:
        check_choice("level", self.level, LOG_LEVELS)
        check_range("since", self.since, -(1 << 62), 1 << 62)


class MetricsReply(Record):
    """Prometheus text exposition format, version 0.0.4."""

    text: str


class AgentMetrics(Request[MetricsReply], method="agent.metrics"):
    """Tell the metrics in Prometheus text."""


class CrashReport(Record):
    """How an agent process, or a thread of it, ended.

    ``kind``: death (by signal or exit, found by the next agent process), exception (ended the
    agent) or thread (an exception ended the thread, the agent went on). ``signal`` and ``status``
    are set where PID 1 or the ending agent knew them. ``requests`` were in flight; ``layers`` and
    ``overlays`` were live, ``unfinished`` half made or half removed. ``log`` has the last lines.
    """

    number: int
    kind: str
    reason: str
    unix_ms: int
    agent: str
    pid: int
    restarts: int
    signal: str | None = None
    status: int | None = None
    traceback: str = ""
    log: tuple[LogLine, ...] = ()
    requests: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    overlays: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def check(self) -> None:
        check_choice("kind", self.kind, CRASH_KINDS)


class CrashesReply(Record):
    """The reports that are kept, oldest first; ``total`` counts all there ever were."""

    crashes: tuple[CrashReport, ...]
    total: int


class AgentCrashes(Request[CrashesReply], method="agent.crashes"):
    """List the kept reports of crashes whose number is over ``since``."""

    since: int = 0
