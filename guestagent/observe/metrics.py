"""What the agent counts, and how it tells it: the Prometheus text format.

``FAMILIES`` is the one table of metrics; the documentation is made from it. Counting takes a lock
for the length of an addition. Labels are bounded: step, method, code and kind come from the code,
and what a peer makes up counts as "other".

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

import bisect
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from guestagent import __version__
from vsock.record import Record

__all__ = ("BUCKETS_SECONDS", "FAMILIES", "Collector", "Family", "Metrics", "Sample", "one")

#: From a round trip without work to a device that never comes.
BUCKETS_SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
_MAX_SERIES = 256
_MAX_OBSERVED = 256


class Family(Record):
    """One metric: ``kind`` is counter, gauge or histogram."""

    name: str
    kind: str
    labels: tuple[str, ...]
    summary: str


#: Label values, in the order of the family's labels, and the number.
Sample = tuple[tuple[str, ...], float]

_ROWS = (
    ("guestagent_build_info", "gauge", ("version", "kernel"), "versions; always 1"),
    ("guestagent_uptime_seconds", "gauge", (), "since this agent started"),
    ("guestagent_restarts_total", "counter", (), "agents before this one in this boot"),
    ("guestagent_crash_reports_total", "counter", (), "crash reports ever written"),
    ("guestagent_problems", "gauge", (), "problems in the status; 0 when all is well"),
    ("guestagent_layers", "gauge", ("state",), "layers by state"),
    ("guestagent_overlays", "gauge", (), "live overlays"),
    ("guestagent_dm_devices", "gauge", (), "device-mapper devices of the guest, all of them"),
    ("guestagent_corruptions_total", "counter", (), "blocks that did not verify when read"),
    ("guestagent_step_duration_seconds", "histogram", ("step",), "time that a step took"),
    ("guestagent_step_failures_total", "counter", ("step",), "steps that failed"),
    (
        "guestagent_request_duration_seconds",
        "histogram",
        ("method",),
        "time that a request took, of methods that may wait",
    ),
    ("guestagent_requests_total", "counter", ("method", "code"), "answers by error code, or ok"),
    ("guestagent_requests_in_flight", "gauge", (), "requests being worked on"),
    ("guestagent_connections", "gauge", (), "open connections"),
    ("guestagent_events_total", "counter", ("kind",), "events published"),
    (
        "guestagent_events_dropped_total",
        "counter",
        (),
        "events that subscribers did not get because they did not keep up",
    ),
    ("guestagent_log_lines_total", "counter", ("level",), "lines of the log, printed or not"),
    (
        "guestagent_log_dropped_total",
        "counter",
        ("sink",),
        "lines that a sink did not get because it did not keep up",
    ),
    ("process_cpu_seconds_total", "counter", (), "processor time, user and system"),
    ("process_start_time_seconds", "gauge", (), "start of this agent, Unix time"),
    ("process_resident_memory_bytes", "gauge", (), "resident memory"),
    ("process_virtual_memory_bytes", "gauge", (), "virtual memory"),
    ("process_open_fds", "gauge", (), "open file descriptors"),
    ("process_threads", "gauge", (), "threads"),
)

#: Every metric by name, in the order in which they are told.
FAMILIES: dict[str, Family] = {
    name: Family(name=name, kind=kind, labels=labels, summary=summary)
    for name, kind, labels, summary in _ROWS
}


class _Histogram:
    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_SECONDS) + 1)
        self.sum = 0.0


class Metrics:
    """Thread-safe. Counters and histograms are counted here; gauges are given when told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: To be sorted in: an append takes no lock, and each step of each request makes one.
        self._observed: deque[tuple[str, float, tuple[str, ...]]] = deque()
        self._counters: dict[str, dict[tuple[str, ...], int]] = {}
        self._histograms: dict[str, dict[tuple[str, ...], _Histogram]] = {}

    def count(self, name: str, *labels: str) -> None:
        """Add one to a counter."""
        with self._lock:
            series = self._counters.setdefault(name, {})
            key = _bounded(series, labels)
            series[key] = series.get(key, 0) + 1

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        """Add one observation to a histogram."""
        self._observed.append((name, seconds, labels))
        if len(self._observed) >= _MAX_OBSERVED:
            with self._lock:
                self._sort_in()

    def _sort_in(self) -> None:
        """Add to the histograms what was observed; the caller holds the lock."""
        while self._observed:
            name, seconds, labels = self._observed.popleft()
            series = self._histograms.setdefault(name, {})
            histogram = series.get(labels)
            if histogram is None:
                histogram = series.setdefault(_bounded(series, labels), _Histogram())
            # the first that holds it, or the rest
            histogram.counts[bisect.bisect_left(BUCKETS_SECONDS, seconds)] += 1
            histogram.sum += seconds

    def step(self, step: str, seconds: float, failed: bool) -> None:
        """Count a step of an operation."""
        self.observe("guestagent_step_duration_seconds", seconds, step)
        if failed:
            self.count("guestagent_step_failures_total", step)

    def render(self, given: Mapping[str, Iterable[Sample]]) -> str:
        """Return the text; ``given`` are the samples of what is not counted here, by name."""
        counters, histograms = self._copy()
        lines: list[str] = []
        for family in FAMILIES.values():
            samples = [*given.get(family.name, ()), *counters.get(family.name, {}).items()]
            own = histograms.get(family.name, {})
            if not samples and not own and family.labels:
                continue
            lines.append(f"# HELP {family.name} {family.summary}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            if not samples and not own:
                samples = [((), 0)]
            lines += [_line(family.name, family.labels, *sample) for sample in samples]
            for labels, (counts, total) in own.items():
                lines += _histogram_lines(family, labels, counts, total)
        return "\n".join(lines) + "\n"

    def _copy(
        self,
    ) -> tuple[
        dict[str, dict[tuple[str, ...], int]],
        dict[str, dict[tuple[str, ...], tuple[list[int], float]]],
    ]:
        with self._lock:
            self._sort_in()
            return (
                {name: dict(series) for name, series in self._counters.items()},
                {
                    name: {key: (list(one.counts), one.sum) for key, one in series.items()}
                    for name, series in self._histograms.items()
                },
            )


#: Returns samples by the name of their family.
Source = Callable[[], Mapping[str, Iterable[Sample]]]


class Collector:
    """Tells the metrics: what is counted, and what its sources read when they are asked."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._sources: list[Source] = [self._process]
        self._started = time.monotonic()
        self._start_time = time.time()

    def add(self, source: Source) -> None:
        """Ask ``source`` too, from now on."""
        self._sources.append(source)

    def text(self) -> str:
        """Return everything in the Prometheus text format."""
        given: dict[str, list[Sample]] = {}
        for source in self._sources:
            for name, samples in source().items():
                given.setdefault(name, []).extend(samples)
        return self._metrics.render(given)

    def _process(self) -> Mapping[str, Iterable[Sample]]:
        times = os.times()
        with open("/proc/self/statm", "rb") as stream:
            virtual_pages, resident_pages = map(int, stream.read().split()[:2])
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        return {
            "guestagent_build_info": (((__version__, os.uname().release), 1),),
            "guestagent_uptime_seconds": one(round(time.monotonic() - self._started, 3)),
            "process_start_time_seconds": one(round(self._start_time, 3)),
            "process_cpu_seconds_total": one(round(times.user + times.system, 3)),
            "process_resident_memory_bytes": one(resident_pages * page_bytes),
            "process_virtual_memory_bytes": one(virtual_pages * page_bytes),
            # one of them is the directory that is being read
            "process_open_fds": one(len(os.listdir("/proc/self/fd")) - 1),
            "process_threads": one(len(os.listdir("/proc/self/task"))),
        }


def one(value: float) -> tuple[Sample, ...]:
    """Return the samples of a family without labels."""
    return (((), value),)


def _bounded(series: Mapping[tuple[str, ...], object], labels: tuple[str, ...]) -> tuple[str, ...]:
    if labels in series or len(series) < _MAX_SERIES:
        return labels
    return ("other",) * len(labels)


def _histogram_lines(
    family: Family, labels: tuple[str, ...], counts: list[int], total: float
) -> list[str]:
    names = (*family.labels, "le")
    lines, below = [], 0
    for le, count in zip((*map(_number, BUCKETS_SECONDS), "+Inf"), counts, strict=True):
        below += count
        lines.append(_line(f"{family.name}_bucket", names, (*labels, le), below))
    lines.append(_line(f"{family.name}_sum", family.labels, labels, total))
    lines.append(_line(f"{family.name}_count", family.labels, labels, below))
    return lines


def _line(name: str, labels: tuple[str, ...], values: tuple[str, ...], number: float) -> str:
    pairs = ",".join(
        f'{label}="{_escaped(value)}"' for label, value in zip(labels, values, strict=True)
    )
    return f"{name}{{{pairs}}} {_number(number)}" if pairs else f"{name} {_number(number)}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.12g}"
