"""Waiting for Ctrl-C, whenever it comes."""

import select
import signal

from vsock.threads import Waker

__all__ = ("wait_for_interrupt",)


def wait_for_interrupt() -> None:
    """Wait for Ctrl-C in the main thread.

    The wait of a lock would miss one that comes after the interpreter has looked and before it
    sleeps; on a busy machine that is no rarity, because it lets others run just there. Here a
    signal leaves a byte to wake up to.
    """
    with Waker() as waker:
        before = signal.set_wakeup_fd(waker.signal_fd, warn_on_full_buffer=False)
        try:
            while True:
                select.select([waker.fd], [], [])
                waker.clear()  # another signal, which somebody has a handler for
        except KeyboardInterrupt:
            return
        finally:
            signal.set_wakeup_fd(before)
