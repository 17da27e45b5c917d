"""The numbers that are not counted as they happen but read when somebody asks."""

import os
import time

from guestagent import __version__
from guestagent.observe.metrics import Metrics, Sample

__all__ = ("Collector", "Sample", "one")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    #: Returns samples by the name of their family.
    Source = Callable[[], Mapping[str, Iterable[Sample]]]


class Collector:
    """Asks its sources in turn. One for each agent."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._sources: list[Source] = [self._process]
        self._started = time.monotonic()
        self._start_time = time.time()

    def add(self, source: "Source") -> None:
        """Ask ``source`` too, from now on."""
        self._sources.append(source)

    def text(self) -> str:
        """Return everything in the Prometheus text format."""
        given: dict[str, list[Sample]] = {}
        for source in self._sources:
            for name, samples in source().items():
                given.setdefault(name, []).extend(samples)
        return self._metrics.render(given)

    def _process(self) -> "Mapping[str, Iterable[Sample]]":
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


def one(value: float) -> "tuple[Sample, ...]":
    """Return the samples of a family without labels."""
    return (((), value),)
