"""Everything that watches the agent, as one thing that the agent opens and the service asks.

Modules that most agents never need (following the log, sending it to a host) are loaded at first
use.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from guestagent import __version__
from guestagent.api import METHODS, Event
from guestagent.api.observe import AgentLog, CrashesReply, LogReply
from guestagent.observe.metrics import Collector, Metrics, Sample, one
from vsock.log import json_object, log
from vsock.server import Call

__all__ = ("Observers",)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestagent.engine.engine import Engine
    from guestagent.observe.crashes import CrashReports
    from guestagent.observe.following import LogFollowers
    from guestagent.observe.shipping import LogShipper
    from vsock.server import Connection


class Observers:
    """One for each agent. ``crashes`` stays the caller's."""

    def __init__(self, crashes: "CrashReports | None" = None) -> None:
        self._crashes = crashes
        self.metrics = Metrics()
        self.collector = Collector(self.metrics)
        self.collector.add(self._own)
        self._lock = threading.Lock()
        self._followers: LogFollowers | None = None
        self._problems: list[Callable[[], tuple[str, ...]]] = []
        self._shippers: list[LogShipper] = []
        self._stops: list[Callable[[], None]] = []

    def watch(self, engine: "Engine") -> None:
        """Count the engine's steps and events, and tell its numbers."""
        engine.on_step = self.metrics.step
        self._stops.append(engine.events.listen(self._event))
        self.collector.add(lambda: _of_engine(engine))
        if self._crashes is not None:
            self._crashes.attach(engine.live)

    def add_problems(self, source: Callable[[], tuple[str, ...]]) -> None:
        """Have the status name what ``source`` returns, too."""
        self._problems.append(source)

    def ship_log(self, addresses: tuple[str, ...], *, level: str, boot_id: str) -> None:
        """Send the log to hosts that listen, from its first kept line on."""
        if not addresses:
            return
        from guestagent.observe.shipping import LogShipper

        head = json_object(
            {
                "stream": "guestagent.log",
                "version": 1,
                "boot_id": boot_id,
                "agent": __version__,
                "pid": os.getpid(),
            }
        )
        for address in addresses:
            shipper = LogShipper(log, address, level=level, head=head)
            self._shippers.append(shipper)
            shipper.start()

    def close(self) -> None:
        """Idempotent."""
        for stop in self._stops:
            stop()
        if self._followers is not None:
            self._followers.close()
        for shipper in self._shippers:
            shipper.close()

    # --- for the service

    @contextmanager
    def request(
        self, call: Call | None, method: str, params: Mapping[str, object]
    ) -> Iterator[None]:
        """Keep a request in mind while it is worked on, for the crash report if it is the last.

        ``call`` is None for a request from this process.
        """
        if self._crashes is None:
            yield
            return
        text = method
        if call is not None:
            text += f" msgid={call.msgid} connection={call.connection.id}"
        for name in ("layer_id", "overlay_id"):
            if params.get(name) is not None:
                text += f" {name}={str(params[name])[:64]}"
        if call is not None and call.traceparent:
            text += f" traceparent={call.traceparent}"
        with self._crashes.request(f"{text} since={time.clock_gettime(time.CLOCK_BOOTTIME):.3f}"):
            yield

    def answered(self, method: str, code: str, seconds: float) -> None:
        """Count an answer; ``code`` is ok or that of an error."""
        known = METHODS.get(method)
        self.metrics.count("guestagent_requests_total", method if known else "unknown", code)
        if known is not None and not known.quick:
            self.metrics.observe("guestagent_request_duration_seconds", seconds, method)

    def problems(self) -> tuple[str, ...]:
        """Return the problems that the status tells."""
        own = () if self._crashes is None else self._crashes.problems()
        return (*own, *(text for source in self._problems for text in source()))

    def read_log(self, request: AgentLog, follower: "Connection | None") -> LogReply:
        """Return lines of the log; ``follower`` is sent the later ones until it ends."""
        from guestagent.observe.following import read_log

        reply = read_log(log, request.since, request.level)
        if follower is None:
            return reply
        self._following().add(follower, reply.next, request.level)
        return reply.replace(more=False)

    def read_crashes(self, since: int) -> CrashesReply:
        """Return the kept crash reports whose number is over ``since``."""
        if self._crashes is None:
            return CrashesReply(crashes=(), total=0)
        return self._crashes.since(since)

    def _following(self) -> "LogFollowers":
        from guestagent.observe.following import LogFollowers

        with self._lock:
            if self._followers is None:
                self._followers = LogFollowers(log)
            return self._followers

    # --- for the metrics

    def _event(self, event: Event) -> None:
        self.metrics.count("guestagent_events_total", event.kind)
        if event.kind == "layer_corrupted":
            self.metrics.count("guestagent_corruptions_total")

    def _own(self) -> Mapping[str, Iterable[Sample]]:
        dropped: list[Sample] = []
        if self._followers is not None:
            dropped.append((("followers",), self._followers.dropped))
        if self._shippers:
            dropped.append((("host",), sum(shipper.dropped for shipper in self._shippers)))
        return {
            "guestagent_log_lines_total": [((name,), n) for name, n in log.counts.items()],
            "guestagent_log_dropped_total": dropped,
            "guestagent_crash_reports_total": one(self._crashes.total if self._crashes else 0),
        }


def _of_engine(engine: "Engine") -> Mapping[str, Iterable[Sample]]:
    counts = engine.counts()
    states = {"mounted": 0, **engine.layer_states()}
    return {
        "guestagent_problems": one(len(engine.problems())),
        "guestagent_layers": [((state,), number) for state, number in states.items()],
        "guestagent_overlays": one(counts["overlays"]),
        "guestagent_dm_devices": one(counts["dm_devices"]),
    }
