"""How an agent ended: written down by itself while it ends, or by the next one from what is left.

In the state directory, which outlives the agent:

- ``life``      which agent runs; an orderly end removes it, so that a next agent that finds it
                knows of a death
- ``fault``     the stacks of all threads, written by the interpreter on SIGSEGV and its kind
- ``death``     what PID 1 saw: pid and exit status
- ``log``       the last lines and the requests in flight (``recorder``)
- ``N.crash``   the reports that are kept

Nothing here can fail the agent: a report that cannot be written is a line of the log.
"""

import os
import signal
import threading
import time
from contextlib import contextmanager

import msgpack

from guestagent import __version__
from guestagent.api.observe import CrashesReply, CrashReport, LogLine
from guestagent.observe.recorder import Recorder, read_recorded
from vsock.errors import CallError
from vsock.log import Line, field_text, log
from vsock.record import wire_fields

__all__ = ("KEPT_REPORTS", "CrashReports", "log_line", "note_death")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType
    from typing import Any, TypeVar

    T = TypeVar("T", bound=tuple[Any, ...])

    State = Callable[[], Mapping[str, tuple[str, ...]]]

KEPT_REPORTS = 8
LOG_LINES = 100
_SUFFIX = ".crash"
_TRACEBACK_BYTES = 32 * 1024
_LIST_ITEMS = 64


def note_death(directory: str, pid: int, status: int) -> None:
    """Note how the agent ended, for the next agent; called by PID 1."""
    try:
        with open(f"{directory}/crashes/death", "wb") as stream:
            stream.write(msgpack.packb([pid, status]))
    except OSError as error:
        log.debug("the agent's exit status cannot be noted", error=str(error))


def log_line(line: Line) -> LogLine:
    """Return a line of the log as the contract has it."""
    return LogLine(
        number=line.number,
        uptime_seconds=line.uptime_seconds,
        unix_ms=line.unix_ms,
        level=line.level,
        text=line.text,
        fields={name: field_text(name, value) for name, value in line.fields.items()},
    )


class CrashReports:
    """One for each agent. A context manager around all that it does."""

    def __init__(self, directory: str, *, restarts: int, left: "State") -> None:
        """Report how the agent before this one ended, if that was not in order.

        ``left`` says what that agent had live and unfinished, before that is recovered.
        """
        self._directory = f"{directory}/crashes"
        self._restarts = restarts
        self._lock = threading.Lock()
        self._fault_fd = -1
        self._recorder: Recorder | None = None
        self._stop_recording: Callable[[], None] | None = None
        self._former_hook = threading.excepthook
        self._state: State = dict
        self._threads_died: list[str] = []
        self.total = 0
        try:
            self._begin(left)
        except OSError as error:
            log.warning("crash reports cannot be kept", error=str(error))

    def _begin(self, left: "State") -> None:
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        numbers = self._numbers()
        self.total = numbers[-1] if numbers else 0
        lines, requests = read_recorded(f"{self._directory}/log")
        log.restore(lines)
        self._report_death(lines, requests, left)
        self._recorder = Recorder(f"{self._directory}/log")
        self._stop_recording = log.add_sink(self._recorder, replay=True, level="debug")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fault_fd = os.open(f"{self._directory}/fault", flags, 0o600)
        self._write("life", msgpack.packb([os.getpid(), self._restarts, __version__]))
        self._watch()

    def _watch(self) -> None:
        import faulthandler

        faulthandler.enable(self._fault_fd, all_threads=True)
        threading.excepthook = self._thread_died

    def __enter__(self) -> "CrashReports":
        return self

    def __exit__(
        self,
        _type: object,
        error: BaseException | None,
        trace: "TracebackType | None",
    ) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self._report(
                kind="exception",
                reason=f"{type(error).__name__}: {error}",
                traceback=_formatted(error),
            )
        self.close()

    def attach(self, state: "State") -> None:
        """``state`` says what is live and unfinished from now on."""
        self._state = state

    def close(self) -> None:
        """The agent ends in order. Idempotent."""
        import faulthandler

        if self._fault_fd >= 0:
            faulthandler.disable()
        threading.excepthook = self._former_hook
        if self._recorder is not None and self._stop_recording is not None:
            self._stop_recording()
            self._recorder.close()
        for name in ("life", "death"):
            self._unlink(name)
        if self._fault_fd >= 0:
            os.close(self._fault_fd)
            self._fault_fd = -1

    @contextmanager
    def request(self, text: str) -> "Iterator[None]":
        """Note a request for as long as it is being worked on."""
        if self._recorder is None:
            yield
            return
        number = self._recorder.begin(text)
        try:
            yield
        finally:
            self._recorder.end(number)

    # --- reports

    def since(self, number: int) -> CrashesReply:
        """Return the reports after ``number`` that are kept and can be read."""
        reports = []
        for kept in self._numbers():
            if kept <= number:
                continue
            try:
                with open(f"{self._directory}/{kept}{_SUFFIX}", "rb") as stream:
                    reports.append(CrashReport.from_wire(msgpack.unpackb(stream.read())))
            except (OSError, ValueError, CallError, msgpack.UnpackException) as error:
                log.warning("a crash report cannot be read", number=kept, error=str(error))
        return CrashesReply(crashes=tuple(reports), total=self.total)

    def problems(self) -> tuple[str, ...]:
        """Return what the status has to say: threads that the agent goes on without."""
        return tuple(self._threads_died)

    def _thread_died(self, args: "threading.ExceptHookArgs") -> None:
        error = args.exc_value
        if error is None or isinstance(error, SystemExit):
            return
        name = args.thread.name if args.thread is not None else "?"
        reason = f"thread {name!r} ended by {type(error).__name__}: {error}"
        # a worker is replaced by the next one, any other thread is not
        if name != "rpc-worker":
            self._threads_died.append(f"{reason} (see the crash reports)")
        self._report(kind="thread", reason=reason, traceback=_formatted(error))

    def _report_death(
        self, lines: tuple[Line, ...], requests: tuple[str, ...], left: "State"
    ) -> None:
        pid, restarts, version = self._read("life", (0, 0, ""))
        if not pid:
            return
        dead_pid, status = self._read("death", (0, 0))
        self._unlink("death")
        trace = self._fault_text()
        known = status if dead_pid == pid else None
        name = _signal_name(known, trace)
        self._report(
            kind="death",
            reason=_reason(known, name),
            traceback=trace,
            state=left,
            agent=version,
            pid=pid,
            restarts=restarts,
            signal=name,
            status=known,
            log=lines,
            requests=requests,
        )

    def _report(
        self,
        *,
        kind: str,
        reason: str,
        traceback: str,
        state: "State | None" = None,
        **told: "Any",
    ) -> None:
        """Keep a report: of this agent, but for what ``told`` names as fields of a CrashReport."""
        log.error("crash", kind=kind, reason=reason)
        with self._lock:
            self.total += 1
            number = self.total
        fields = {
            "agent": __version__,
            "pid": os.getpid(),
            "restarts": self._restarts,
            "log": log.tail(LOG_LINES),
            "requests": () if self._recorder is None else self._recorder.requests(),
            **_bounded(state or self._state),
            **told,
        }
        fields["log"] = tuple(map(log_line, fields["log"][-LOG_LINES:]))
        try:
            report = CrashReport(
                number=number,
                kind=kind,
                reason=reason[:1024],
                unix_ms=time.time_ns() // 1_000_000,
                traceback=traceback[-_TRACEBACK_BYTES:],
                **fields,
            )
            self._keep(report)
        except (OSError, ValueError) as problem:
            log.warning("a crash report cannot be kept", error=str(problem))

    def _keep(self, report: CrashReport) -> None:
        packed = msgpack.packb(report, default=wire_fields, unicode_errors="backslashreplace")
        self._write(f"{report.number}{_SUFFIX}", packed)
        for number in self._numbers()[:-KEPT_REPORTS]:
            self._unlink(f"{number}{_SUFFIX}")

    def _numbers(self) -> list[int]:
        try:
            files = os.listdir(self._directory)
        except OSError:
            return []
        stems = (file[: -len(_SUFFIX)] for file in files if file.endswith(_SUFFIX))
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _fault_text(self) -> str:
        try:
            with open(f"{self._directory}/fault", "rb") as stream:
                return stream.read(_TRACEBACK_BYTES).decode(errors="replace")
        except OSError:
            return ""

    def _read(self, name: str, none: "T") -> "T":
        """Return the values of a file, if they are of the types of ``none``, which is none."""
        value: Any
        try:
            with open(f"{self._directory}/{name}", "rb") as stream:
                value = tuple(msgpack.unpackb(stream.read()))
        except (OSError, ValueError, TypeError, msgpack.UnpackException):
            return none
        return value if tuple(map(type, value)) == tuple(map(type, none)) else none

    def _write(self, name: str, content: bytes) -> None:
        path = f"{self._directory}/{name}"
        with open(f"{path}.new", "wb") as stream:
            stream.write(content)
        os.rename(f"{path}.new", path)

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(f"{self._directory}/{name}")
        except OSError:
            return


def _bounded(state: "State") -> dict[str, tuple[str, ...]]:
    try:
        found = dict(state())
    except (OSError, CallError) as error:
        return {"problems": (f"the state cannot be told: {error}",)}
    return {name: items[:_LIST_ITEMS] for name, items in found.items()}


def _formatted(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def _reason(status: int | None, name: str | None) -> str:
    if name is not None:
        return f"killed by {name}"
    if status is not None:
        return f"ended with status {status}"
    return "ended without an exit status that is known: killed, or out of memory"


def _signal_name(status: int | None, trace: str) -> str | None:
    if status is not None:
        return _name_of(-status) if status < 0 else None
    faults = {
        "Segmentation fault": "SIGSEGV",
        "Aborted": "SIGABRT",
        "Bus error": "SIGBUS",
        "Floating point exception": "SIGFPE",
        "Illegal instruction": "SIGILL",
    }
    head = trace.partition("\n")[0].rpartition(": ")[2]
    return faults.get(head)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
