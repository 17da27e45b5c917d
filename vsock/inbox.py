"""Notifications that wait for their callback, within bounds."""

import threading
from collections import deque

from vsock.rpc import Notification

__all__ = ("Inbox",)

_MAX_MESSAGES = 4096
_MAX_BYTES = 16 * 1024 * 1024


class Inbox:
    """A queue between two threads; past either bound the oldest are dropped, and counted."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._waiting: deque[Notification] = deque()
        self._waiting_bytes = 0
        self._closed = False
        self._put = 0
        self._handled = 0
        self.dropped = 0

    def put(self, message: Notification) -> None:
        with self._ready:
            self._put += 1
            self._waiting.append(message)
            self._waiting_bytes += message.memory_bytes
            while len(self._waiting) > _MAX_MESSAGES or self._waiting_bytes > _MAX_BYTES:
                self._waiting_bytes -= self._waiting.popleft().memory_bytes
                self.dropped += 1
            self._ready.notify_all()

    def get(self) -> Notification | None:
        """Return the next; None when there is none and will be none.

        Who comes for the next has done with the one before.
        """
        with self._ready:
            self._handled = self._put - len(self._waiting)
            self._ready.notify_all()
            self._ready.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            message = self._waiting.popleft()
            self._waiting_bytes -= message.memory_bytes
            return message

    def wait_handled(self, seconds: float) -> bool:
        """Wait until what is here now has been done with; False if that takes longer."""
        with self._ready:
            last = self._put
            return self._ready.wait_for(lambda: self._handled >= last or self._closed, seconds)

    def close(self) -> None:
        with self._ready:
            self._closed = True
            self._ready.notify_all()
