"""Who follows the events: each on its connection, none of them waited for."""

import threading
from collections.abc import Callable

from guestagent.api import Event
from guestagent.engine.events import EventLog

__all__ = ("Subscribers",)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vsock.server import Connection


class Subscribers:
    """Sends every event to every connection that asked. One that does not read loses events, and
    learns how many with the next that it gets; its queue is bounded by the connection's own."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._lock = threading.Lock()
        self._connections: set[int] = set()
        #: Events that did not reach a subscriber, all of them together.
        self.dropped = 0

    def add(self, connection: "Connection") -> None:
        """Send events to ``connection`` until it ends. Idempotent."""
        with self._lock:
            if connection.id in self._connections:
                return
            self._connections.add(connection.id)
        stop = self._events.listen(self._sender(connection))

        def ended() -> None:
            stop()
            with self._lock:
                self._connections.discard(connection.id)

        connection.on_close(ended)

    def _sender(self, connection: "Connection") -> Callable[[Event], None]:
        missed = 0

        def send(event: Event) -> None:
            # the log calls its listeners one at a time, so that the counts need no lock
            nonlocal missed
            told = event.replace(dropped=missed) if missed else event
            if connection.notify("agent.event", told):
                missed = 0
            else:
                missed += 1
                self.dropped += 1

        return send
