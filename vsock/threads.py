"""Threads that leave signals to the main thread, and waking a thread that waits.

The kernel may hand a signal to any thread that does not block it. Python then only notes it, for
the main thread to act on. A main thread that waits for a lock or a descriptor is not woken, so a
Ctrl-C or SIGTERM would have no effect until the wait ends.
"""

# the standard one is made of enums, which cost a guest time and memory
import _signal  # type: ignore[import-not-found]  # which is why it has no stub either
import contextlib
import os
import threading

from vsock.closeable import Closeable

__all__ = ("Waker", "start_thread")

#: Signals that interrupt or end a program, or tell it of its terminal.
_SIGNALS = (
    _signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGWINCH,
)  # fmt: skip


def start_thread(thread: threading.Thread) -> None:
    """Start ``thread``, and whatever it starts, with these signals blocked.

    A program that it runs must have its signal mask emptied (``posix_spawn``'s ``setsigmask``).

    Raises:
        RuntimeError: no thread can be started.
    """
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)
    try:
        thread.start()
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)


class Waker(Closeable):
    """A pipe. ``fd`` is for the thread to wait on, with whatever else it waits for.

    A pipe and no eventfd, which does not take the single byte that the interpreter writes for a
    signal. Other threads may call ``wake`` after ``close``; it then returns False.
    """

    def __init__(self) -> None:
        #: Readable once the thread has been woken, until ``clear``; -1 when closed.
        self.fd = -1
        #: For ``signal.set_wakeup_fd``; -1 when closed.
        self.signal_fd = -1
        # reentrant, because a signal handler may wake on top of any call
        self._lock = threading.RLock()
        self.fd, self.signal_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def wake(self) -> bool:
        """Have ``fd`` readable; False when this has been closed."""
        with self._lock:
            if self.signal_fd >= 0:
                with contextlib.suppress(BlockingIOError):  # full: it is being woken as it is
                    os.write(self.signal_fd, b"\0")
            return self.signal_fd >= 0

    def clear(self) -> None:
        """Take what has come, before looking at what it came for. By the thread that waits."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def close(self) -> None:
        """Free the descriptors. Idempotent."""
        with self._lock:
            reader, writer = self.fd, self.signal_fd
            self.fd = self.signal_fd = -1
            for fd in (reader, writer):
                if fd >= 0:
                    os.close(fd)
