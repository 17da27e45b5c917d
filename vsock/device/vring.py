"""One ring of the device: its configuration, its notifications, and the live queue.

The life of a ring, as vhost-user has it: configured by messages; started when the kick descriptor
comes; worked while it is also enabled; stopped by GET_VRING_BASE. A ring whose driver breaks the
rules is broken until it is started again, and no other ring suffers.
"""

import logging
import os
import select
import struct

from vsock.device.memory import GuestMemory, MemoryFault
from vsock.device.virtqueue import RingAddress, Virtqueue
from vsock.loop import Loop

__all__ = ("Vring",)

_log = logging.getLogger(__name__)

# Eight bytes do for an eventfd and for a pipe, which is what User Mode Linux passes.
_NOTIFICATION = struct.pack("<Q", 1)


class Vring:
    """Owns the kick, call and error descriptors. Setters take ownership of what they are given."""

    def __init__(self, index: int, loop: Loop) -> None:
        self.index = index
        self.enabled = False
        self.base = 0
        self.size = 0
        self.address: RingAddress | None = None
        self._loop = loop
        self._queue: Virtqueue | None = None
        self._broken = False
        self._kick_fd: int | None = None
        self._call_fd: int | None = None
        self._error_fd: int | None = None

    @property
    def started(self) -> bool:
        return self._queue is not None

    @property
    def live(self) -> Virtqueue | None:
        """The queue to work on now, or None."""
        return self._queue if self.enabled and not self._broken else None

    def start(self, memory: GuestMemory, kick_fd: int) -> None:
        """Begin at ``base``.

        Raises:
            ValueError, MemoryFault, OSError: the configuration is missing or wrong; the ring stays
                stopped.
        """
        self._drop_kick()
        try:
            os.set_blocking(kick_fd, False)
            self._loop.add(kick_fd, select.EPOLLIN, self._on_kick)
        except OSError:
            os.close(kick_fd)
            raise
        self._kick_fd = kick_fd
        self._open(memory, self.base)

    def remap(self, memory: GuestMemory) -> None:
        """Go on in a changed memory table; a ring that is not in it any more is broken."""
        if self._queue is None:
            return
        try:
            self._open(memory, self._queue.next_available)
        except (ValueError, MemoryFault) as exc:
            self.fail(exc)

    def stop(self) -> int:
        """Stop and return the index to go on from."""
        if self._queue is not None:
            self.base = self._queue.next_available
        self._queue = None
        self._drop_kick()
        self.set_call(None)
        return self.base

    def fail(self, error: Exception) -> None:
        """Stop working on a ring whose driver broke it, and notify the error descriptor."""
        self._broken = True
        _log.warning("ring broken index=%d reason=%s", self.index, error)
        _notify(self._error_fd)

    def set_call(self, fd: int | None) -> None:
        if self._call_fd is not None:
            os.close(self._call_fd)
        self._call_fd = fd
        if fd is not None:
            os.set_blocking(fd, False)
            # What was given back while there was no descriptor is not to be missed; one
            # notification too many does no harm.
            _notify(fd)

    def set_error(self, fd: int | None) -> None:
        if self._error_fd is not None:
            os.close(self._error_fd)
        self._error_fd = fd
        if fd is not None:
            os.set_blocking(fd, False)

    def interrupt(self) -> None:
        """Interrupt the driver if something was given back to it and it wants to know."""
        if self._queue is not None and self._queue.take_notification():
            _notify(self._call_fd)

    def close(self) -> None:
        self.stop()
        self.set_error(None)

    def _open(self, memory: GuestMemory, base: int) -> None:
        self._queue = None
        if self.address is None:
            raise ValueError(f"ring {self.index} is started before it has an address")
        self._queue = Virtqueue(memory, self.address, size=self.size, next_available=base)
        self._broken = False

    def _on_kick(self, _events: int) -> None:
        assert self._kick_fd is not None
        try:
            if not os.read(self._kick_fd, 8):
                self._drop_kick()
        except BlockingIOError:
            pass  # another wake-up has read it; the ring is looked at in any case

    def _drop_kick(self) -> None:
        if self._kick_fd is not None:
            self._loop.remove(self._kick_fd)
            os.close(self._kick_fd)
            self._kick_fd = None


def _notify(fd: int | None) -> None:
    if fd is None:
        return
    try:
        os.write(fd, _NOTIFICATION)
    except BlockingIOError:
        pass  # full: an unread notification says the same
    except OSError as exc:
        _log.warning("notification failed: %s", exc)
