"""Waiting for Ctrl-C, whenever it comes."""

import select
import signal
import socket

__all__ = ("wait_for_interrupt",)


def wait_for_interrupt(seconds: float | None = None) -> bool:
    """Wait for Ctrl-C in the main thread; return False when ``seconds`` pass first.

    The wait of a lock would miss one that comes after the interpreter has looked and before it
    sleeps; on a busy machine that is no rarity, because it lets others run just there. Here a
    signal leaves a byte to wake up to.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            while select.select([reader], [], [], seconds)[0]:
                reader.recv(4096)  # another signal, which somebody has a handler for
            return False
        except KeyboardInterrupt:
            return True
        finally:
            signal.set_wakeup_fd(before)
