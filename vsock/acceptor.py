"""The listeners of a server, and what is to be done when nothing more can be accepted."""

import errno
import select
import time
from collections.abc import Callable

from vsock.stream import Listener, Stream

__all__ = ("Acceptor",)

#: How long accepting rests when it fails, as it does with no descriptor left.
_REST_SECONDS = 0.5


class Acceptor:
    """Listeners registered with an epoll set that belongs to the caller."""

    def __init__(self, epoll: select.epoll, report: Callable[[str], None]) -> None:
        self._epoll = epoll
        self._report = report
        self._listeners: dict[int, Listener] = {}
        #: Monotonic time at which ``resume`` is due, None while accepting goes on.
        self.resume_at: float | None = None

    def add(self, listener: Listener) -> None:
        """Take over ``listener``."""
        self._listeners[listener.fileno()] = listener
        if self.resume_at is None:
            self._epoll.register(listener.fileno(), select.EPOLLIN)

    def accept(self, fd: int) -> Stream | None:
        """Return the next stream of the listener with descriptor ``fd``, None if there is none.

        A listener stays ready while its accept fails, so that watching it would be a busy loop:
        after a failure all of them rest for a moment.
        """
        listener = self._listeners.get(fd)
        if listener is None:
            return None
        try:
            return listener.accept()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ECONNABORTED:
                self._report(f"cannot accept on {listener.address}: {error}")
                self._rest()
            return None

    def resume(self) -> None:
        """Accept again."""
        self.resume_at = None
        for fd in self._listeners:
            self._epoll.register(fd, select.EPOLLIN)

    def close(self) -> None:
        """Close every listener."""
        if self.resume_at is None:
            for fd in self._listeners:
                self._epoll.unregister(fd)
        self.resume_at = None
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()

    def _rest(self) -> None:
        if self.resume_at is None:
            self.resume_at = time.monotonic() + _REST_SECONDS
            for fd in self._listeners:
                self._epoll.unregister(fd)
