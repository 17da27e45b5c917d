"""A ring that is read while the device writes it, as the processors of a guest do."""

import mmap
import os
import signal

from vsock.device.memory import GuestMemory, Region, RegionAddress
from vsock.device.virtqueue import RingAddress, Virtqueue

SIZE = 8
#: Below 2**16, so that the index never wraps.
COMPLETIONS = 60_000
#: The device waits when it is this far ahead of the last index that the driver has seen, so the
#: driver sees at least COMPLETIONS / LEAD values of the index, whatever the speed of either.
LEAD = 500
AVAILABLE, USED, SEEN = 0x100, 0x200, 0x300
DEVICE_SECONDS = 60


def complete_all(raw: mmap.mmap) -> None:
    """Be the device, and the part of the driver that makes chains available."""
    view = memoryview(raw)
    where = RegionAddress(guest_address=0, size_bytes=len(raw), user_address=0, file_offset_bytes=0)
    queue = Virtqueue(
        GuestMemory([Region(where=where, view=view)]),
        RingAddress(descriptors=0, available=AVAILABLE, used=USED),
        size=SIZE,
        next_available=0,
    )
    available_index = view[AVAILABLE + 2 : AVAILABLE + 4].cast("H")
    seen_index = view[SEEN : SEEN + 2].cast("H")
    for number in range(1, COMPLETIONS + 1):
        while number > seen_index[0] + LEAD:
            os.sched_yield()
        available_index[0] = number
        queue.peek(1)
        queue.complete((0,))


def test_driver_reads_only_used_indices_that_the_device_has_reached():
    raw = mmap.mmap(-1, 4096)
    used_index = memoryview(raw)[USED + 2 : USED + 4].cast("H")
    seen_index = memoryview(raw)[SEEN : SEEN + 2].cast("H")
    device = os.fork()
    if device == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(DEVICE_SECONDS)  # ends the device if the driver no longer looks
            complete_all(raw)
        finally:
            os._exit(0)
    last, steps = 0, 0
    try:
        while os.waitid(os.P_PID, device, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            for _ in range(1000):
                seen = used_index[0]
                assert last <= seen <= last + LEAD, f"after {last} the index was {seen}"
                steps += seen != last
                seen_index[0] = last = seen
    finally:
        os.kill(device, signal.SIGKILL)
        os.waitpid(device, 0)
    assert used_index[0] == COMPLETIONS
    # The device may end between the last look and waitid, so the last value may not be counted.
    assert steps >= COMPLETIONS // LEAD - 1
