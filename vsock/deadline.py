"""A deadline with a cancel: the one thing that every wait in this project takes.

A ``Deadline`` is made where a request enters and handed down. Code that computes calls ``check()``
between steps; code that blocks calls ``wait()`` with the file descriptors it waits for, and is
woken by data, by the deadline, or by a cancel from another thread.
"""

import os
import select
import threading
import time
from collections.abc import Callable, Iterable

from vsock.closeable import Closeable
from vsock.errors import CallError

__all__ = ("Deadline",)

#: poll(2) counts milliseconds in an int; a longer wait is several polls.
_MAX_POLL_MS = 2**31 - 1


class Deadline(Closeable):
    """A point in monotonic time, and a flag that ends the wait early.

    Usable from several threads. ``close()`` frees the descriptor that a blocked ``wait`` needs;
    without any wait no descriptor is ever opened.
    """

    def __init__(self, seconds: float | None = None) -> None:
        """Expire ``seconds`` from now; None never expires but can still be cancelled."""
        self._at = None if seconds is None else time.monotonic() + seconds
        self._lock = threading.Lock()
        self._cancelled = False
        self._event_fd: int | None = None
        self._whole: Deadline | None = None
        self._parts: list[Deadline] = []
        self._on_cancel: list[Callable[[], object]] = []

    def when_cancelled(self, call: Callable[[], object]) -> None:
        """Call ``call`` with each ``cancel``, on its thread; here and now if there was one. It must
        not wait."""
        with self._lock:
            self._on_cancel.append(call)
            if not self._cancelled:
                return
        call()

    def part(self, seconds: float | None = None) -> "Deadline":
        """Return a deadline for a part of the work, which the caller closes.

        It passes ``seconds`` from now, with this one at the latest, and is cancelled with it.
        """
        part = Deadline(seconds)
        part._whole = self
        with self._lock:
            if self._at is not None:
                part._at = self._at if part._at is None else min(part._at, self._at)
            part._cancelled = self._cancelled
            self._parts.append(part)
        return part

    @property
    def at(self) -> float | None:
        """The monotonic time at which it passes, None for never."""
        return self._at

    def remaining(self) -> float | None:
        """Return the seconds left, 0.0 when past, None when unlimited."""
        return _until(self._at)

    def limit(self, seconds: float) -> None:
        """Expire no later than ``seconds`` from now."""
        at = time.monotonic() + seconds
        self._at = at if self._at is None else min(self._at, at)

    @property
    def expired(self) -> bool:
        return self.remaining() == 0.0

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def over(self) -> bool:
        """True once it has passed or was cancelled."""
        return self._cancelled or self.expired

    def cancel(self) -> None:
        """End every wait on this deadline, now and later. Idempotent."""
        with self._lock:
            self._cancelled = True
            if self._event_fd is not None:
                os.eventfd_write(self._event_fd, 1)
            parts, calls = list(self._parts), list(self._on_cancel)
        for part in parts:
            part.cancel()
        for call in calls:
            call()

    def check(self, step: str, now: float | None = None) -> None:
        """Raise CallError ``cancelled`` or ``timeout``, naming ``step``, if it is over.

        ``now`` is the monotonic time, for a caller that has just read it.
        """
        if self._cancelled:
            raise CallError("cancelled", f"cancelled while: {step}", step=step)
        if self._at is not None and (time.monotonic() if now is None else now) >= self._at:
            raise CallError("timeout", f"deadline passed while: {step}", step=step)

    def wait(
        self,
        readable: Iterable[int],
        step: str,
        *,
        writable: Iterable[int] = (),
        at_most: float | None = None,
    ) -> list[int]:
        """Wait until one of the descriptors is readable, or writable; return those that are.

        A descriptor in error or hung up counts as ready. Returns an empty list only when
        ``at_most`` seconds pass first.

        Raises:
            CallError: ``timeout`` or ``cancelled``, with ``step``.
        """
        poller = select.poll()
        for fd in readable:
            poller.register(fd, select.POLLIN | select.POLLPRI)
        for fd in writable:
            poller.register(fd, select.POLLOUT)
        wake_fd = self._wake_fd()
        poller.register(wake_fd, select.POLLIN)
        ends_at = None if at_most is None else time.monotonic() + at_most
        while True:
            self.check(step)
            bounds = [s for s in (self.remaining(), _until(ends_at)) if s is not None]
            timeout_ms = min(bounds) * 1000 if bounds else None
            if timeout_ms is not None:
                timeout_ms = min(timeout_ms, _MAX_POLL_MS)
            ready = poller.poll(timeout_ms)
            fds = [fd for fd, _ in ready if fd != wake_fd]
            if fds or _until(ends_at) == 0.0:
                break
        if not fds:
            self.check(step)
        return fds

    def close(self) -> None:
        """Free the descriptor, if one was made. Idempotent."""
        if self._whole is not None:
            self._whole._forget(self)
            self._whole = None
        if self._event_fd is not None:
            with self._lock:
                fd, self._event_fd = self._event_fd, None
            if fd is not None:
                os.close(fd)

    def _forget(self, part: "Deadline") -> None:
        with self._lock:
            self._parts.remove(part)

    def _wake_fd(self) -> int:
        with self._lock:
            if self._event_fd is None:
                self._event_fd = os.eventfd(1 if self._cancelled else 0, os.EFD_CLOEXEC)
            return self._event_fd


def _until(at: float | None) -> float | None:
    return None if at is None else max(0.0, at - time.monotonic())
