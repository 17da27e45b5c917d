"""From a call to a reply: the only place where an exception becomes an error reply.

A call goes: known method? -> hello said? -> typed request (``api``) -> handler -> reply record. A
call from this process enters with its typed request. What a handler refuses leaves as its own
error; an unforeseen exception is logged with its traceback here in the guest and leaves as
``internal`` without it.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping

from guestagent.api import METHODS
from guestagent.api.agent import AgentStatus, StatusReply
from guestagent.config import Problem
from guestagent.engine.arrivals import DeviceAbsentError
from guestagent.engine.engine import Engine
from guestagent.observe.observers import Observers
from guestagent.service.agent import AgentHandlers
from guestagent.service.context import Context, Handler, Notify, handlers_of
from guestagent.service.devices import DeviceHandlers
from guestagent.service.late import late_handlers
from guestagent.service.layers import LayerHandlers
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log
from vsock.record import Record
from vsock.server import Call, Later, Outcome, Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from guestagent.api.inspect import StreamRequest
    from guestagent.api.request import Request
    from guestagent.policy.binding.keeper import PolicyKeeper

    R = TypeVar("R", bound=Record)
    Item = TypeVar("Item")

__all__ = ("QUICK_METHODS", "URGENT_METHODS", "Service")

#: Methods that never wait; the server may answer them without handing over to a worker.
QUICK_METHODS = frozenset(name for name, request in METHODS.early.items() if request.quick)

#: Methods for which the server keeps threads: they tell what is there, free it, and end the agent.
URGENT_METHODS = frozenset(
    (
        *("agent.metrics", "agent.shutdown", "dm.list", "layer.list", "layer.unmount"),
        *("layers.unmount", "overlay.list", "overlay.unmount", "pool.list", "volume.unmount"),
    )
)

#: A longer id is not valid, and not logged.
_ID_MAX = 64


class Service:
    """Answers the calls of an agent, from its connections and from its own process.

    Every method may be called from many threads at once. ``on_shutdown`` is called with the mode
    once everything is unmounted; it must not wait.
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
        policy: "PolicyKeeper | None" = None,
    ) -> None:
        """``policy`` is what holds the policy of the engine's gate; without it none can be set."""
        self._engine = engine
        self._gate = engine.state.gate
        self._policy = policy
        self._deadline_seconds = deadline_seconds
        self._observers = observers or Observers()
        self._agent = AgentHandlers(
            engine,
            self._observers,
            boot=boot,
            problems=tuple(problem.text for problem in problems),
            restarts=restarts,
            on_shutdown=on_shutdown,
            policy=policy,
        )
        self._handlers: dict[str, Handler] = handlers_of(self._agent)
        for part in (LayerHandlers(engine), DeviceHandlers(engine)):
            self._handlers.update(handlers_of(part))
        self._loading = threading.Lock()

    def adopt(self, parts: Collection[str]) -> None:
        """Load the parts that an earlier agent has left entries of."""
        methods = {"devtree": "dev.list", "pool": "pool.list", "share": "share.list"}
        for part, method in methods.items():
            if part in parts:
                self._late_handler(method)

    def attach(self, server: Server) -> None:
        """Let the status tell of the server's connections and requests."""
        self._agent.server = server

    def handle(self, call: Call) -> Outcome | Later:
        """Answer a call from a connection, or leave it until its device is there; never raises."""
        context = Context(call.method, call.params, call.deadline, call=call)
        try:
            return Outcome(error=None, result=self._answer(context, None))
        except CallError as error:
            return Outcome(error=error.to_wire(), result=None)
        except DeviceAbsentError as absent:
            return self._leave(context, absent)

    def _leave(self, context: Context, absent: DeviceAbsentError) -> Outcome | Later:
        later = Later()
        try:
            self._engine.arrivals.when_there(
                absent.device, context.deadline, later.resume, later.finish
            )
        except CallError as error:
            return Outcome(error=self._gate.shown_error(error).to_wire(), result=None)
        return later

    def call(
        self,
        request: "Request[R]",
        *,
        deadline: Deadline,
        notify: Notify | None = None,
    ) -> "R":
        """Answer a request from this process as one from a connection: same checks, log, metrics.

        ``notify`` gets the method and the parameters of each notification on this thread, before
        the call returns: ``agent.progress``, and ``agent.chunk`` of a request whose answer comes in
        chunks (see ``stream``). While ``notify`` works, nothing is read ahead. An exception that it
        raises ends the call: a CallError as it is, any other as ``internal``.

        Raises:
            CallError: the error that a peer would be answered; ``unsupported`` for what acts on a
                connection: ``agent.cancel`` (cancel ``deadline`` instead), ``agent.subscribe`` and
                ``follow`` of ``agent.log``.
        """
        context = Context(request.method, request.as_dict(), deadline, notify=notify)
        return self._answer(context, request)  # type: ignore[return-value]  # its handler's reply

    def stream(
        self,
        request: "StreamRequest[R, Item]",
        take: "Callable[[Item], object]",
        *,
        deadline: Deadline,
    ) -> "R":
        """Answer a request whose answer comes in chunks: ``take`` gets each item on this thread.

        Items are bytes, names or entry records, as ``request.items`` has them. To end the answer
        early, cancel ``deadline`` or raise a CallError from ``take``.

        Raises:
            CallError: as of ``call``, or raised by ``take``.
        """

        def notify(method: str, params: Mapping[str, object]) -> None:
            if method == "agent.chunk":
                for item in request.items(params):
                    take(item)

        return self.call(request, deadline=deadline, notify=notify)

    def status(self) -> StatusReply:
        """Say how the agent is."""
        with Deadline(self._deadline_seconds) as deadline:
            return self.call(AgentStatus(), deadline=deadline)

    def _answer(self, context: Context, request: "Request[Record] | None") -> Record:
        begin = time.perf_counter() - context.waited_seconds
        spent_seconds: float | None = None
        code: str | None = "ok"
        try:
            if request is None:
                request = _request_of(context)
            self._gate.request(request.method, request)
            reply = self._gate.shown_reply(self._run(request, context))
            spent_seconds = time.perf_counter() - begin
            if not request.quick:
                # a method that changes nothing may be called every second
                write = log.info if context.method.endswith("mount") else log.debug
                ms = spent_seconds * 1000
                write("request done", method=context.method, ms=ms, **_trace(context))
            return reply
        except CallError as error:
            code = error.code
            log.info(
                "request refused",
                method=context.method,
                code=code,
                step=error.step,
                error=error.message,
                **_trace(context),
            )
            raise self._gate.shown_error(error) from None
        except DeviceAbsentError:
            code = None  # it is not answered yet
            raise
        except Exception as error:  # the one catch-all: a bug must not end the agent
            import traceback

            code = "internal"
            text = traceback.format_exc()
            log.error("bug", method=context.method, traceback=text, **_trace(context))
            text = f"the agent failed in {context.method}: {type(error).__name__}"
            hint = "this is a bug of the agent; its log has the details"
            raise self._gate.shown_error(CallError("internal", text, hint=hint)) from None
        finally:
            if code is not None:
                if spent_seconds is None:
                    spent_seconds = time.perf_counter() - begin
                self._observers.answered(context.method, code, spent_seconds)

    def _run(self, request: "Request[Record]", context: Context) -> Record:
        handler = self._handlers.get(request.method) or self._late_handler(request.method)
        if context.deadline.at is None:
            context.deadline.limit(self._deadline_seconds)
        most_seconds = self._gate.max_deadline_seconds
        if most_seconds is not None:
            context.deadline.limit(most_seconds)
        if request.quick:
            return handler(request, context)
        with self._observers.request(context.call, context.method, context.params):
            return handler(request, context)

    def _late_handler(self, method: str) -> Handler:
        """Load the part that a method belongs to, which most agents are never asked for."""
        with self._loading:
            if method not in self._handlers:
                late = late_handlers(method, self._engine, self._policy)
                self._handlers = {**self._handlers, **late}
            return self._handlers[method]


def _request_of(context: Context) -> "Request[Record]":
    """Return the typed request of a call from a connection."""
    kind = METHODS.get(context.method)
    if kind is None:
        raise CallError(
            "unsupported",
            f"unknown method {context.method!r}",
            object=context.method,
            hint=f"methods: {', '.join(METHODS)}",
        )
    if not context.connection.said_hello and context.method != "agent.hello":
        raise CallError(
            "denied",
            f"{context.method} before agent.hello",
            object=context.method,
            hint="call agent.hello first, on every connection",
        )
    return kind.from_wire(context.params)


def _trace(context: Context) -> dict[str, str]:
    """Return what a line of the log says of a call: what it is about, and its trace."""
    fields = {}
    for name in ("layer_id", "overlay_id", "tree_id", "pool_id", "volume_id", "share_id"):
        value = context.params.get(name)
        if isinstance(value, str) and len(value) <= _ID_MAX:
            fields[name.removesuffix("_id")] = value
    if context.traceparent:
        fields["traceparent"] = context.traceparent
    return fields
