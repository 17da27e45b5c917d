"""Who follows the events: each on its connection, none of them waited for."""

import threading

from guestagent.api import Event
from guestagent.engine.events import EventLog
from vsock.rpc import encode_notification

__all__ = ("Subscribers",)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vsock.server import Connection


class Subscribers:
    """Sends every event to every connection that asked. One that does not read loses events, and
    learns how many with the next that it gets; its queue is bounded by the connection's own."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._starting = threading.Lock()
        self._is_listening = False
        self._lock = threading.Lock()
        self._followers: dict[int, _Follower] = {}
        #: Events that did not reach a subscriber, all of them together.
        self.dropped = 0

    def add(self, connection: "Connection") -> None:
        """Send events to ``connection`` until it ends. Idempotent."""
        with self._starting:  # not the lock that is taken below that of the log
            if not self._is_listening:
                self._events.listen(self._send)
                self._is_listening = True
        with self._lock:
            if connection.id in self._followers:
                return
            self._followers[connection.id] = _Follower(connection)

        def ended() -> None:
            with self._lock:
                self._followers.pop(connection.id, None)

        connection.on_close(ended)

    def _send(self, event: Event) -> None:
        # the log calls its listeners one event at a time, so that the counts need no lock
        with self._lock:
            followers = tuple(self._followers.values())
        if not followers:
            return
        # once for all of them: a host may follow on dozens of connections
        data = encode_notification("agent.event", event)
        for follower in followers:
            told = data
            if follower.missed:
                told = encode_notification("agent.event", event.replace(dropped=follower.missed))
            if follower.connection.send_notification(told):
                follower.missed = 0
            else:
                follower.missed += 1
                self.dropped += 1


class _Follower:
    """A connection, and how many events it has missed since the last that it got."""

    __slots__ = ("connection", "missed")

    def __init__(self, connection: "Connection") -> None:
        self.connection = connection
        self.missed = 0
