"""What a handler knows of a call beside its request, and how handlers are found."""

from collections.abc import Callable, Mapping

from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record
from vsock.server import Call, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guestagent.engine.engine import Engine
    from guestagent.engine.transaction import Transaction

__all__ = ("Context", "Handler", "Notify", "handlers_of", "late_handlers_of")

#: Gets the method and the parameters of a notification.
Notify = Callable[[str, Mapping[str, object]], None]
#: Answers one request.
Handler = Callable[["Any", "Context"], Record]
#: Answers one request of a part that stands on the engine.
Action = Callable[["Any", "Transaction"], Record]


class Context:
    """One call on its way through its handler.

    A call over the wire has a ``connection``. A call from this process has none, and its
    notifications go to ``notify``.
    """

    __slots__ = ("_notify", "call", "deadline", "method", "msgid", "params", "traceparent")

    def __init__(
        self,
        method: str,
        params: Mapping[str, object],
        deadline: Deadline,
        *,
        call: Call | None = None,
        notify: Notify | None = None,
    ) -> None:
        self.method = method
        self.params = params
        self.deadline = deadline
        self.call = call
        self.msgid = 0 if call is None else call.msgid
        self.traceparent = None if call is None else call.traceparent
        self._notify = notify

    @property
    def waited_seconds(self) -> float:
        """Return how long the call has waited between earlier runs of its handler and this one."""
        return 0.0 if self.call is None else self.call.waited_seconds

    @property
    def connection(self) -> Connection:
        """The connection of the caller.

        Raises:
            CallError: ``unsupported``; the call comes from this process.
        """
        if self.call is None:
            text = f"{self.method} acts on a connection, and this call has none"
            raise CallError("unsupported", text, object=self.method)
        return self.call.connection

    def begin(self, engine: "Engine") -> "Transaction":
        """Begin the request in the engine."""
        return engine.operation(self.deadline, traceparent=self.traceparent)

    def notify(self, method: str, params: Mapping[str, object]) -> None:
        """Send a notification; it is dropped where the peer does not keep up. Never waits."""
        if self.call is not None:
            self.call.connection.notify(method, params)
        elif self._notify is not None:
            self._notify(method, params)

    def notify_wait(self, method: str, params: Mapping[str, object]) -> None:
        """Send a notification as soon as the peer has room for it.

        Raises:
            CallError: ``timeout`` or ``cancelled``, also when the connection has ended.
        """
        if self.call is not None:
            self.call.connection.notify_wait(method, params, self.deadline)
            return
        self.deadline.check(f"hand on {method}")
        if self._notify is not None:
            self._notify(method, params)


def handlers_of(part: object) -> "dict[str, Any]":
    """Return the handlers of a part by the method that they answer."""
    return {
        function.handles.method: getattr(part, name)
        for name, function in vars(type(part)).items()
        if hasattr(function, "handles")
    }


def late_handlers_of(engine: "Engine", *parts: object) -> dict[str, Handler]:
    """Return the handlers of parts that stand on the engine, and so take a transaction."""
    return {
        method: _beginning(engine, action)
        for part in parts
        for method, action in handlers_of(part).items()
    }


def _beginning(engine: "Engine", action: Action) -> Handler:
    return lambda request, call: action(request, call.begin(engine))
