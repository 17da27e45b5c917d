"""Which thread serves a loop: that of the server, or a worker that has nothing else to do.

A worker that reads requests itself runs the next one without a hand-over to another thread. While
it runs one, the thread of the server watches: whatever comes for the loop meanwhile, at a
descriptor or by a timer, has it take the lead. So nothing waits for a call that takes long, and a
call that hangs in the kernel costs no more than a worker.
"""

import select
import threading
import time
from collections.abc import Callable

from vsock.closeable import Closeable
from vsock.loop import Loop
from vsock.threads import Waker

__all__ = ("Lead",)

_NEVER = float("inf")
#: A worker that was woken leaves the loop within this.
_LEAVE_SECONDS = 5.0


class Lead(Closeable):
    """``lend``, ``keep`` and ``close`` are for the thread of the server, the others for workers.

    The thread that has the lead is the only one to touch the loop and what its handlers touch.
    """

    def __init__(self, loop: Loop, waker: Waker, is_over: Callable[[], bool]) -> None:
        """``waker`` ends a wait in ``loop``; once ``is_over`` a worker gives the lead back."""
        self._loop = loop
        self._waker = waker
        self._is_over = is_over
        self._changed = threading.Condition()
        self._asker: int | None = None  # the worker that waits for the lead
        self._holder: int | None = None  # the worker that has it
        self._is_working = False  # and runs a call
        self._due_at = _NEVER  # when the thread of the server has to look at the timers
        self._is_kept = False
        self._closed = False
        #: What the thread of the server waits for while a worker has the lead.
        self._watched = select.epoll()
        self._loop_fd = loop.fileno()
        self._watched.register(self._loop_fd, select.EPOLLONESHOT)  # for no event yet
        self._poke = Waker()
        self._watched.register(self._poke.fd, select.EPOLLIN)

    def lend(self) -> None:
        """Give the lead to a worker that waits for it; return when it is back."""
        with self._changed:
            if self._asker is None or self._is_kept:
                return
            self._asker, self._holder = None, self._asker
            self._due_at = _NEVER
            self._changed.notify_all()
        while True:
            at = self._due_at
            seconds = None if at == _NEVER else max(0.0, at - time.monotonic())
            ready = [fd for fd, _ in self._watched.poll(seconds)]
            if self._poke.fd in ready:
                self._poke.clear()
            with self._changed:
                if self._holder is None:
                    return
                is_due = self._due_at != _NEVER and time.monotonic() >= self._due_at
                if self._is_working and (is_due or self._loop_fd in ready):
                    self._holder, self._is_working = None, False
                    self._watched.modify(self._loop_fd, select.EPOLLONESHOT)
                    return
                if is_due:  # the worker sees to the timers itself
                    self._due_at = _NEVER

    def ask(self) -> bool:
        """Wait for the lead; False if it is not to be had."""
        with self._changed:
            if self._is_kept or self._asker is not None or self._holder is not None:
                return False
            own = self._asker = threading.get_ident()
            self._waker.wake()
            self._changed.wait_for(lambda: self._asker != own or self._is_kept)
            return self._holder == own

    def is_held_here(self) -> bool:
        """Say whether the calling thread is a worker with the lead."""
        return self._holder == threading.get_ident()

    def is_asked_for(self) -> bool:
        """Say whether a worker is about to get the lead."""
        return self._asker is not None and not self._is_kept

    def serve(self) -> bool:
        """Serve what comes; False if the lead is given back. By the worker that has it."""
        if self._is_over() or self._closed:
            self.give_back()
            return False
        self._loop.poll(block=True)
        return True

    def begin(self) -> None:
        """Let the thread of the server watch while the worker that has the lead runs a call."""
        with self._changed:
            self._is_working = True
            if self._closed:
                return
            due_at = self._loop.due_at()
            if due_at is not None and due_at < self._due_at:
                self._due_at = due_at
                self._poke.wake()
            self._watched.modify(self._loop_fd, select.EPOLLIN | select.EPOLLONESHOT)

    def end(self) -> None:
        """Have the lead stay with the calling thread, if it still has it: the work is done.

        To be called before the answer is sent, because the next request may follow at once.
        """
        with self._changed:
            if self._holder == threading.get_ident():
                self._is_working = False
                if not self._closed:
                    self._watched.modify(self._loop_fd, select.EPOLLONESHOT)

    def give_back(self) -> None:
        """Give the lead back if the calling thread has it."""
        with self._changed:
            if self._holder == threading.get_ident():
                self._holder, self._is_working = None, False
                self._poke.wake()
                self._changed.notify_all()

    def keep(self) -> None:
        """Lend the lead no more."""
        with self._changed:
            self._is_kept = True
            self._changed.notify_all()

    def close(self) -> None:
        """Have workers leave the loop alone, for good. Idempotent."""
        self.keep()
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._waker.wake()
            self._changed.wait_for(self._is_left_alone, _LEAVE_SECONDS)
            self._watched.close()
            self._poke.close()

    def _is_left_alone(self) -> bool:
        return self._holder is None or self._is_working
