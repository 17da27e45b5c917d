"""Sends the log to the connections that follow it, each from the line that it has come to.

One thread reads the ring for all followers, so that a thread that logs waits for none of them. A
follower that does not keep up gets the rest later; lines that the ring no longer has are counted.
"""

import threading

from guestagent.api.observe import LOG_LEVELS, LOG_LINES_MAX, LogReply
from guestagent.observe.crashes import log_line
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import LEVELS, Line, Log
from vsock.threads import Waker, start_thread

__all__ = ("LogFollowers", "read_log")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vsock.server import Connection

#: A line with long fields is worth many; a batch stays small on the wire.
_BATCH_LINES = 64
_BATCH_BYTES = 64 * 1024
#: When the connection of a follower is full, how long until it is tried again.
_RETRY_SECONDS = 0.2


def read_log(log: Log, since: int, level: str, most: int = LOG_LINES_MAX) -> LogReply:
    """Return lines after ``since``; a negative one counts lines from the end."""
    if since < 0:
        since = max(0, log.number + since)
    elif since > log.number:  # of another machine, or of an earlier boot
        since = 0
    least = LEVELS.index(level)
    kept, dropped = log.since(since)
    taken: list[Line] = []
    size_bytes, place = 0, max(since, kept[0].number - 1 if kept else log.number)
    for line in kept:
        if LEVELS.index(line.level) >= least:
            if len(taken) >= most or size_bytes > _BATCH_BYTES * most // _BATCH_LINES:
                break
            taken.append(line)
            size_bytes += 64 + sum(64 + len(str(value)) for value in line.fields.values())
        place = line.number
    return LogReply(
        lines=tuple(map(log_line, log.shown(taken))),
        dropped=dropped,
        next=place,
        more=bool(kept) and place < kept[-1].number,
    )


class _Follower:
    __slots__ = ("connection", "level", "since")

    def __init__(self, connection: "Connection", since: int, level: str) -> None:
        self.connection = connection
        self.since = since
        self.level = level


class LogFollowers:
    """A thread of its own from the first follower on."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._followers: dict[int, _Follower] = {}
        self._until = Deadline()
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name="log followers", daemon=True)
        self._stop_sink: Callable[[], None] | None = None
        #: Lines that followers did not get.
        self.dropped = 0

    def add(self, connection: "Connection", since: int, level: str) -> None:
        """Send the lines after ``since`` to ``connection`` until it ends."""
        assert level in LOG_LEVELS
        follower = _Follower(connection, since, level)
        with self._lock:
            is_new = connection.id not in self._followers
            self._followers[connection.id] = follower
            if self._stop_sink is None:
                self._stop_sink = self._log.add_sink(self._woken, level="debug")
                start_thread(self._thread)
        if is_new:
            connection.on_close(lambda: self._forget(connection.id))
        self._waker.wake()

    def close(self) -> None:
        """End the thread and wait for it. Idempotent."""
        if self._stop_sink is not None:
            self._stop_sink()
            self._until.cancel()
            self._thread.join()
        self._waker.close()
        self._until.close()

    def _forget(self, number: int) -> None:
        with self._lock:
            self._followers.pop(number, None)

    def _woken(self, _line: Line) -> None:
        if self._followers:
            self._waker.wake()

    def _run(self) -> None:
        slow: list[_Follower] = []
        while True:
            try:
                seconds = _RETRY_SECONDS if slow else None
                self._until.wait([self._waker.fd], "wait for lines", at_most=seconds)
            except CallError:
                return
            self._waker.clear()
            with self._lock:
                followers = list(self._followers.values())
            slow = [follower for follower in followers if not self._send(follower)]

    def _send(self, follower: _Follower) -> bool:
        """Send what there is; return False if the connection does not take all of it now."""
        while True:
            reply = read_log(self._log, follower.since, follower.level, _BATCH_LINES)
            if reply.lines or reply.dropped:
                if not follower.connection.notify("agent.log", reply):
                    return follower.connection.closed
                self.dropped += reply.dropped
            follower.since = max(follower.since, reply.next)
            if not reply.more:
                return True
