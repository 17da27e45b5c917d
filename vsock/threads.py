"""Threads that leave signals to the main thread.

The kernel may hand a signal to any thread that does not block it. Python then only notes it, for
the main thread to act on; and one that waits for a lock or a descriptor is not woken, so that a
Ctrl-C or SIGTERM would be lost until something else happens.
"""

# the standard one is made of enums, which cost a guest time and memory
import _signal  # type: ignore[import-not-found]  # which is why it has no stub either
import threading

__all__ = ("block_signals", "start_thread")

#: Those by which a program is interrupted or ended, or told of its terminal.
_SIGNALS = (
    _signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGWINCH,
)  # fmt: skip


def block_signals() -> None:
    """Leave these signals to others for good: for a process that ends with the one it serves."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)


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
