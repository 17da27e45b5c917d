"""Split virtqueues, the device's side. Pure over memory: no notification, no descriptor of a file.

The driver is not trusted: indices, descriptors and indirect tables are checked as they are read,
and every chain is walked once only, so that what was checked is what is used.

The driver runs at the same time. What both sides look at without being told, the flags and indices,
is read and written as elements of 16 bits, by one access each: ``struct.pack_into`` clears its
place before it writes there, and the driver would see an index of 0 meanwhile. The byte order of
the rings, little-endian, is taken to be that of this machine.

Source: VIRTIO 1.2, section 2.7; include/uapi/linux/virtio_ring.h.
"""

import struct
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vsock.device.memory import GuestMemory, MemoryFault

__all__ = ("MAX_QUEUE_SIZE", "Chain", "RingAddress", "Virtqueue", "VirtqueueError")

MAX_QUEUE_SIZE = 32768

_DESC_NEXT, _DESC_WRITE, _DESC_INDIRECT = 1, 2, 4
_AVAIL_NO_INTERRUPT = 1
_USED_NO_NOTIFY = 1

_DESC = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_U16 = struct.Struct("<H")
#: The two elements before the ring proper, and what they take in bytes.
_FLAGS, _INDEX, _RING = 0, 1, 4


class VirtqueueError(Exception):
    """The driver broke the rules of the ring: it cannot be used until it is set up again."""


class Chain(NamedTuple):
    """One buffer that the driver made available: what the device may read, and may write."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]
    writable_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RingAddress:
    """The three parts of a ring, as addresses of the front-end's address space."""

    descriptors: int
    available: int
    used: int

    def __post_init__(self) -> None:
        if self.descriptors % 16 or self.available % 2 or self.used % 4:
            raise ValueError(f"ring is not aligned: {self}")


class Virtqueue:
    """A live ring. Chains are taken strictly in order and given back in the same order."""

    def __init__(
        self, memory: GuestMemory, address: RingAddress, *, size: int, next_available: int
    ) -> None:
        """Raise MemoryFault when a part of the ring is outside the guest's memory."""
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise ValueError(f"queue size {size} is not a power of two up to {MAX_QUEUE_SIZE}")
        self.size = size
        self._memory = memory
        self._descriptors = memory.user(address.descriptors, _DESC.size * size)
        self._available = memory.user(address.available, _RING + 2 * size)
        self._used = memory.user(address.used, _RING + _USED.size * size)
        self._available_state = self._available[:_RING].cast("H")
        self._used_state = self._used[:_RING].cast("H")
        #: Index of the first chain that is not given back; what GET_VRING_BASE answers.
        self.next_available = next_available & 0xFFFF
        self._used_index = self._used_state[_INDEX]
        self._peeked: deque[Chain] = deque()
        self._notify_due = False
        self._held = threading.Lock()
        self._held.acquire()

    def pending(self) -> int:
        """Return how many chains wait.

        Raises:
            VirtqueueError: the driver claims more than the ring can hold.
        """
        index = self._available_state[_INDEX]
        count = (index - self.next_available) & 0xFFFF
        if count > self.size:
            raise VirtqueueError(
                f"available index {index} is {count} ahead of {self.next_available},"
                f" the ring holds {self.size}"
            )
        self._fence()
        return count

    def peek(self, limit: int) -> list[Chain]:
        """Return up to ``limit`` waiting chains, oldest first, without taking them.

        Raises:
            VirtqueueError: a chain is malformed or points outside the guest's memory.
        """
        count = min(self.pending(), limit)
        while len(self._peeked) < count:
            position = (self.next_available + len(self._peeked)) % self.size
            self._peeked.append(
                self._walk(_U16.unpack_from(self._available, _RING + 2 * position)[0])
            )
        if count == len(self._peeked):
            return list(self._peeked)
        return [self._peeked[position] for position in range(count)]

    def complete(self, written_bytes: Iterable[int]) -> None:
        """Give the oldest peeked chains back, one for each number of bytes written into it."""
        for written in written_bytes:
            chain = self._peeked.popleft()
            offset = _RING + _USED.size * (self._used_index % self.size)
            _USED.pack_into(self._used, offset, chain.head, written)
            self._used_index = (self._used_index + 1) & 0xFFFF
            self.next_available = (self.next_available + 1) & 0xFFFF
        self._fence()
        self._used_state[_INDEX] = self._used_index
        self._notify_due = True

    def take_notification(self) -> bool:
        """Say whether the driver is to be interrupted for what was given back, once."""
        if not self._notify_due:
            return False
        self._notify_due = False
        self._fence()
        return not self._available_state[_FLAGS] & _AVAIL_NO_INTERRUPT

    def want_kicks(self, wanted: bool) -> None:
        """Tell the driver whether to kick; look at ``pending`` once more after wanting them."""
        self._used_state[_FLAGS] = 0 if wanted else _USED_NO_NOTIFY
        self._fence()

    def _fence(self) -> None:
        """Order all memory accesses before against all after, as the driver's barriers expect.

        Python has no fence. Giving a lock back and taking it again is a release followed by an
        acquire of the same word: a locked instruction on x86, and ordered on ARMv8 as well.
        """
        self._held.release()
        self._held.acquire()

    def _walk(self, head: int) -> Chain:
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        writable_bytes = 0
        table, count, index = self._descriptors, self.size, head
        indirect = False
        for _ in range(self.size):
            if index >= count:
                raise VirtqueueError(f"descriptor {index} is outside its table of {count}")
            address, length, flags, following = _DESC.unpack_from(table, _DESC.size * index)
            if flags & _DESC_INDIRECT:
                if indirect or flags & _DESC_NEXT:
                    raise VirtqueueError(f"indirect descriptor {index} is nested or chained")
                table, count, index, indirect = *self._indirect(address, length), 0, True
                continue
            views = self._views(address, length, flags)
            if flags & _DESC_WRITE:
                writable += views
                writable_bytes += length
            elif writable:
                raise VirtqueueError(f"descriptor {index} to read follows one to write")
            else:
                readable += views
            if not flags & _DESC_NEXT:
                return Chain(head, readable, writable, writable_bytes)
            index = following
        raise VirtqueueError(f"the chain at {head} is a loop or longer than {self.size}")

    def _views(self, address: int, length: int, flags: int) -> list[memoryview]:
        try:
            return self._memory.guest(address, length, write=bool(flags & _DESC_WRITE))
        except MemoryFault as exc:
            raise VirtqueueError(f"descriptor of {length} bytes at {address:#x}: {exc}") from exc

    def _indirect(self, address: int, length: int) -> tuple[memoryview, int]:
        count, rest = divmod(length, _DESC.size)
        if rest or not 0 < count <= self.size:
            raise VirtqueueError(f"indirect table of {length} bytes for a ring of {self.size}")
        # A copy: the table is read entry by entry, and may cross into an adjacent region.
        table = b"".join(self._views(address, length, 0))
        return memoryview(table), count
