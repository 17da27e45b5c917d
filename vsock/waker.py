"""Waking a thread that waits on descriptors, from any other thread and from a signal."""

import contextlib
import os
import threading

from vsock.owner import Owner

__all__ = ("Waker",)


class Waker(Owner):
    """A pipe. ``fd`` is for the thread to wait on, with whatever else it waits for.

    A pipe and no eventfd, which does not take the single byte that the interpreter writes for a
    signal. Others may still wake who has closed this; they are told that nobody is there.
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
