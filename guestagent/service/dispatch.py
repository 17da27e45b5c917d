"""From a decoded call to a reply: the only place where an exception becomes an error reply.

A call goes: known method? -> hello said? -> typed request (``api``) -> engine -> reply record ->
plain map. What the engine refuses leaves as its own error; what nobody foresaw is logged with its
traceback here in the guest and leaves as ``internal`` without it.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from guestagent import __version__
from guestagent.api import (
    METHODS,
    PROTOCOL_VERSIONS,
    CancelReply,
    CancelRequest,
    DmListReply,
    DmName,
    DmStatusReply,
    DmTableReply,
    Empty,
    EventsReply,
    EventsRequest,
    HelloReply,
    HelloRequest,
    LayerId,
    LayerListReply,
    LayerReport,
    LayersMountReply,
    LayersMountRequest,
    LayerSpec,
    LayersUnmountReply,
    LayersUnmountRequest,
    LayerUnmountRequest,
    OverlayListReply,
    OverlayReport,
    OverlaySpec,
    OverlayUnmountRequest,
    ShutdownRequest,
    StatusReply,
    SubscribeReply,
    UnmountReply,
    VerifyReply,
    VerifyRequest,
)
from guestagent.config import Problem
from guestagent.engine.engine import Engine
from guestagent.engine.locks import KeyLocks
from guestagent.engine.subscribers import Subscribers
from guestagent.engine.transaction import Operation
from guestagent.observe.collector import Sample, one
from guestagent.observe.observers import OBSERVE_METHODS, Observers
from vsock.errors import CallError
from vsock.log import log
from vsock.record import Record
from vsock.server import Call, Outcome, Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestagent.service.streams import InspectService

__all__ = ("QUICK_METHODS", "Service")

#: Methods that never wait; the server may answer them without handing over to a worker.
QUICK_METHODS = frozenset(name for name, method in METHODS.items() if method.quick)

Function = Callable[[Record, Call], Record]
#: A longer name is none, and has no place in the log.
_NAME_MAX = 64


class Service:
    """One for each agent. ``handle`` is called from many threads at once.

    ``on_shutdown`` is called with the mode once everything is unmounted; it must not wait.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        boot: dict[str, object],
        problems: tuple[Problem, ...] = (),
        restarts: int = 0,
        deadline_seconds: float,
        on_shutdown: Callable[[str], None],
        observers: Observers | None = None,
    ) -> None:
        self._engine = engine
        self._boot = boot
        self._problems = tuple(problem.text for problem in problems)
        self._restarts = restarts
        self._deadline_seconds = deadline_seconds
        self._on_shutdown = on_shutdown
        self._started = time.monotonic()
        self._server: Server | None = None
        self._subscribers = Subscribers(engine.events)
        self._loading = threading.Lock()
        self._lists = KeyLocks()
        self._inspect: InspectService | None = None
        self._observers = observers or Observers()
        self._observers.collector.add(self._samples)
        self._functions = self._function_table()

    def attach(self, server: Server) -> None:
        """Let the status tell of the server's connections and requests."""
        self._server = server

    def handle(self, call: Call) -> Outcome:
        """Answer one call; never raises."""
        begin = time.perf_counter()
        outcome = self._outcome(call)
        self._observers.answered(call.method, outcome.error, time.perf_counter() - begin)
        return outcome

    def _outcome(self, call: Call) -> Outcome:
        try:
            return Outcome(error=None, result=self._answer(call))
        except CallError as error:
            log.info(
                "request refused",
                method=call.method,
                code=error.code,
                step=error.step,
                error=error.message,
                **_trace(call),
            )
            return Outcome(error=error.to_wire(), result=None)
        except Exception as error:  # the one catch-all: a bug must not end the agent
            import traceback

            log.error("bug", method=call.method, traceback=traceback.format_exc(), **_trace(call))
            text = f"the agent failed in {call.method}: {type(error).__name__}"
            hint = "this is a bug of the agent; its log has the details"
            return Outcome(error=CallError("internal", text, hint=hint).to_wire(), result=None)

    def _answer(self, call: Call) -> Record:
        method = METHODS.get(call.method)
        if method is None:
            raise CallError(
                "unsupported",
                f"unknown method {call.method!r}",
                object=call.method,
                hint=f"methods: {', '.join(METHODS)}",
            )
        if not call.connection.said_hello and call.method != "agent.hello":
            raise CallError(
                "denied",
                f"{call.method} before agent.hello",
                object=call.method,
                hint="call agent.hello first, on every connection",
            )
        request = method.request.from_wire(call.params)
        if call.deadline.remaining() is None:
            call.deadline.limit(self._deadline_seconds)
        if method.quick:
            return self._functions[call.method](request, call)
        begin = time.perf_counter()
        with self._observers.request(call):
            reply = self._functions[call.method](request, call)
        spent_ms = (time.perf_counter() - begin) * 1000
        # what changes nothing is no news: somebody may be looking every second
        write = log.info if call.method.endswith("mount") else log.debug
        write("request done", method=call.method, ms=spent_ms, **_trace(call))
        return reply

    def _operation(self, call: Call) -> Operation:
        return self._engine.operation(call.deadline, traceparent=call.traceparent)

    def _function_table(self) -> dict[str, Function]:
        """Return the function of each method; a test holds it against the contract."""
        table: dict[str, Function] = {}
        for name in METHODS:
            is_look = name.startswith("fs.") or name == "agent.more"
            if name in OBSERVE_METHODS:
                table[name] = self._observers.functions[name]
            else:
                table[name] = self._look if is_look else getattr(self, "_" + name.replace(".", "_"))
        return table

    def _look(self, request: Record, call: Call) -> Record:
        """Look into something; the first such call loads what all of them need."""
        with self._loading:
            if self._inspect is None:
                from guestagent.service.streams import InspectService

                self._inspect = InspectService(self._engine)
        return self._inspect.functions[call.method](request, call)

    # --- agent

    def _agent_hello(self, request: HelloRequest, call: Call) -> HelloReply:
        version = next((v for v in PROTOCOL_VERSIONS if v in request.versions), None)
        if version is None:
            raise CallError(
                "unsupported",
                f"no common version: client speaks {list(request.versions)}",
                object="params.versions",
                hint=f"this agent speaks {list(PROTOCOL_VERSIONS)}",
            )
        call.connection.said_hello = True
        return HelloReply(
            version=version,
            agent=__version__,
            kernel=os.uname().release,
            features=self._engine.features(),
            limits=self._server.limits() if self._server else {},
            boot=self._boot,
        )

    def _agent_status(self, _request: Empty, _call: Call) -> StatusReply:
        return self.status()

    def status(self) -> StatusReply:
        """Say how the agent is."""
        problems = (*self._problems, *self._engine.problems(), *self._observers.problems())
        counts = self._engine.counts()
        server = self._server
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
        )

    def _agent_cancel(self, request: CancelRequest, call: Call) -> CancelReply:
        return CancelReply(cancelled=call.connection.cancel(request.msgid))

    def _agent_shutdown(self, request: ShutdownRequest, call: Call) -> Empty:
        self._engine.unmount_everything(self._operation(call), force=request.force)
        self._on_shutdown(request.mode)
        return Empty()

    def _agent_subscribe(self, _request: Empty, call: Call) -> SubscribeReply:
        self._subscribers.add(call.connection)
        return SubscribeReply(sequence=self._engine.events.sequence)

    def _agent_events(self, request: EventsRequest, _call: Call) -> EventsReply:
        events, dropped = self._engine.events.since(request.since)
        return EventsReply(
            events=events[-1000:],
            dropped=dropped + max(0, len(events) - 1000),
            sequence=self._engine.events.sequence,
        )

    # --- layers

    def _layer_mount(self, request: LayerSpec, call: Call) -> LayerReport:
        return self._engine.layers.mount(request, self._operation(call))

    def _layer_unmount(self, request: LayerUnmountRequest, call: Call) -> UnmountReply:
        operation = self._operation(call)
        return self._engine.layers.unmount(request.layer_id, operation, force=request.force)

    def _layer_list(self, _request: Empty, call: Call) -> LayerListReply:
        # one after the other: with a thousand layers each holds megabytes while it is made
        with self._lists.hold([("list", "layers")], call.deadline):
            return LayerListReply(layers=self._engine.layers.list())

    def _layer_get(self, request: LayerId, _call: Call) -> LayerReport:
        return self._engine.layers.get(request.layer_id)

    def _layer_verify(self, request: VerifyRequest, call: Call) -> VerifyReply:
        def progress(done_bytes: int, total_bytes: int) -> None:
            place = {"msgid": call.msgid, "done_bytes": done_bytes, "total_bytes": total_bytes}
            call.connection.notify("agent.progress", place)

        return self._engine.layers.verify(request.layer_id, self._operation(call), progress)

    def _layers_mount(self, request: LayersMountRequest, call: Call) -> LayersMountReply:
        return self._engine.batches.mount(request, self._operation(call))

    def _layers_unmount(self, request: LayersUnmountRequest, call: Call) -> LayersUnmountReply:
        return self._engine.batches.unmount(request, self._operation(call))

    # --- overlays

    def _overlay_mount(self, request: OverlaySpec, call: Call) -> OverlayReport:
        return self._engine.overlays.mount(request, self._operation(call))

    def _overlay_unmount(self, request: OverlayUnmountRequest, call: Call) -> UnmountReply:
        operation = self._operation(call)
        return self._engine.overlays.unmount(request.overlay_id, operation, force=request.force)

    def _overlay_list(self, _request: Empty, _call: Call) -> OverlayListReply:
        return OverlayListReply(overlays=self._engine.overlays.list())

    # --- device-mapper

    def _dm_list(self, _request: Empty, _call: Call) -> DmListReply:
        return DmListReply(devices=self._engine.dm.list())

    def _dm_table(self, request: DmName, _call: Call) -> DmTableReply:
        return DmTableReply(name=request.name, lines=self._engine.dm.table(request.name))

    def _dm_status(self, request: DmName, _call: Call) -> DmStatusReply:
        device, lines = self._engine.dm.status(request.name)
        return DmStatusReply(name=request.name, device=device, lines=lines)

    # --- metrics

    def _samples(self) -> "Mapping[str, Iterable[Sample]]":
        server = self._server
        return {
            "guestagent_restarts_total": one(self._restarts),
            "guestagent_requests_in_flight": one(server.requests_in_flight if server else 0),
            "guestagent_connections": one(server.connection_count if server else 0),
            "guestagent_events_dropped_total": one(self._subscribers.dropped),
        }


def _trace(call: Call) -> dict[str, str]:
    """Return what a line of the log says of a call: what it is about, and its trace."""
    fields = {}
    for name in ("layer_id", "overlay_id"):
        value = call.params.get(name)
        if isinstance(value, str) and len(value) <= _NAME_MAX:
            fields[name.removesuffix("_id")] = value
    if call.traceparent:
        fields["traceparent"] = call.traceparent
    return fields


def _rss_bytes() -> int:
    """Return the resident memory of this process (/proc/self/statm, second field, in pages)."""
    with open("/proc/self/statm", "rb") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
