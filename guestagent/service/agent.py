"""The agent itself: hello, status, cancel, shutdown, events, and what the observers have seen."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from guestagent import __version__
from guestagent.api.agent import (
    FEATURES,
    PROTOCOL_VERSIONS,
    AgentCancel,
    AgentEvents,
    AgentFeatures,
    AgentHello,
    AgentShutdown,
    AgentStatus,
    AgentSubscribe,
    CancelReply,
    EventsReply,
    FeatureReport,
    FeaturesReply,
    HelloReply,
    StatusReply,
    SubscribeReply,
)
from guestagent.api.observe import (
    AgentCrashes,
    AgentLog,
    AgentMetrics,
    CrashesReply,
    LogReply,
    MetricsReply,
)
from guestagent.api.request import Empty, handles
from guestagent.engine.engine import Engine
from guestagent.engine.events import Subscribers
from guestagent.observe.metrics import Sample, one
from guestagent.observe.observers import Observers
from guestagent.service.context import Context
from vsock.errors import CallError
from vsock.server import Server

__all__ = ("AgentHandlers",)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestagent.policy.binding.keeper import PolicyKeeper

_MAX_EVENTS = 1000


class AgentHandlers:
    """``on_shutdown`` is called with the mode once everything is unmounted; it must not wait."""

    def __init__(
        self,
        engine: Engine,
        observers: Observers,
        *,
        boot: dict[str, object],
        problems: tuple[str, ...],
        restarts: int,
        on_shutdown: Callable[[str], None],
        policy: "PolicyKeeper | None",
    ) -> None:
        self._policy = policy
        self._engine = engine
        self._observers = observers
        self._boot = boot
        self._problems = problems
        self._restarts = restarts
        self._on_shutdown = on_shutdown
        self._started = time.monotonic()
        self._subscribers = Subscribers(engine.events, engine.state.gate)
        #: The server whose connections and requests the status tells of.
        self.server: Server | None = None
        observers.collector.add(self._samples)

    @handles(AgentHello)
    def hello(self, request: AgentHello, call: Context) -> HelloReply:
        """Agree on a version; the connection may call other methods from now on."""
        version = next((v for v in PROTOCOL_VERSIONS if v in request.versions), None)
        if version is None:
            raise CallError(
                "unsupported",
                f"no common version: client speaks {list(request.versions)}",
                object="params.versions",
                hint=f"this agent speaks {list(PROTOCOL_VERSIONS)}",
            )
        if call.call is not None:
            call.connection.said_hello = True
        return HelloReply(
            version=version,
            agent=__version__,
            kernel=os.uname().release,
            features=self._engine.features(),
            limits=self.server.limits() if self.server else {},
            boot=self._boot,
        )

    @handles(AgentFeatures)
    def features(self, _request: AgentFeatures, _call: Context) -> FeaturesReply:
        """List what there is and what is missing."""
        missing = self._engine.missing_features()
        return FeaturesReply(
            features=tuple(
                FeatureReport(
                    name=name,
                    meaning=meaning,
                    is_there=name not in missing,
                    why_not=missing.get(name, ""),
                )
                for name, meaning in FEATURES.items()
            )
        )

    @handles(AgentStatus)
    def status(self, _request: AgentStatus, _call: Context) -> StatusReply:
        """Say how the agent is."""
        problems = (*self._problems, *self._engine.problems(), *self._observers.problems())
        counts = self._engine.counts()
        server = self.server
        return StatusReply(
            state="degraded" if problems else "ready",
            problems=problems,
            uptime_seconds=round(time.monotonic() - self._started, 3),
            pid=os.getpid(),
            restarts=self._restarts,
            layers=counts["layers"],
            overlays=counts["overlays"],
            dm_devices=counts["dm_devices"],
            requests_in_flight=server.requests_in_flight if server else 0,
            connections=server.connection_count if server else 0,
            rss_bytes=_rss_bytes(),
            threads=threading.active_count(),
            event_sequence=self._engine.events.sequence,
            events_dropped=self._subscribers.dropped,
            policy="none" if self._policy is None else self._policy.state,
            policy_digest="" if self._policy is None else self._policy.digest(),
        )

    @handles(AgentCancel)
    def cancel(self, request: AgentCancel, call: Context) -> CancelReply:
        """Cancel a request of the same connection."""
        return CancelReply(cancelled=call.connection.cancel(request.msgid))

    @handles(AgentShutdown)
    def shutdown(self, request: AgentShutdown, call: Context) -> Empty:
        """Unmount everything, then end."""
        operation = call.begin(self._engine)
        self._engine.unmount_everything(operation, force=request.force)
        self._on_shutdown(request.mode)
        return Empty()

    @handles(AgentSubscribe)
    def subscribe(self, _request: AgentSubscribe, call: Context) -> SubscribeReply:
        """Send events to the connection until it ends."""
        self._subscribers.add(call.connection)
        return SubscribeReply(sequence=self._engine.events.sequence)

    @handles(AgentEvents)
    def events(self, request: AgentEvents, _call: Context) -> EventsReply:
        """Return the oldest kept events after a number."""
        log = self._engine.events
        events, dropped = log.since(request.since, at_most=_MAX_EVENTS)
        sequence = log.sequence
        return EventsReply(
            events=events,
            dropped=dropped,
            sequence=sequence,
            more=bool(events) and events[-1].sequence < sequence,
            boot_id=log.boot_id,
        )

    @handles(AgentLog)
    def log(self, request: AgentLog, call: Context) -> LogReply:
        """Return lines of the log; ``follow`` sends later lines to the connection."""
        return self._observers.read_log(request, call.connection if request.follow else None)

    @handles(AgentMetrics)
    def metrics(self, _request: AgentMetrics, _call: Context) -> MetricsReply:
        """Return the metrics as text."""
        return MetricsReply(text=self._observers.collector.text())

    @handles(AgentCrashes)
    def crashes(self, request: AgentCrashes, _call: Context) -> CrashesReply:
        """Return the kept crash reports."""
        return self._observers.read_crashes(request.since)

    def _samples(self) -> "Mapping[str, Iterable[Sample]]":
        server = self.server
        return {
            "guestagent_restarts_total": one(self._restarts),
            "guestagent_requests_in_flight": one(server.requests_in_flight if server else 0),
            "guestagent_connections": one(server.connection_count if server else 0),
            "guestagent_events_dropped_total": one(self._subscribers.dropped),
        }


def _rss_bytes() -> int:
    """Return the resident memory of this process (/proc/self/statm, second field, in pages)."""
    with open("/proc/self/statm", "rb") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
