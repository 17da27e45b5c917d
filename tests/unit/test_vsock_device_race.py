"""A ring that is read while the device writes it, as the processors of a guest do."""

import mmap
import os
import signal

from vsock.device.memory import GuestMemory, Region, RegionAddress
from vsock.device.virtqueue import RingAddress, Virtqueue

SIZE = 8
#: Below 2**16, so that the index never wraps.
COMPLETIONS = 60_000
AVAILABLE, USED = 0x100, 0x200


def complete_all(raw: mmap.mmap) -> None:
    """Be the device, and of the driver what makes chains available."""
    view = memoryview(raw)
    where = RegionAddress(guest_address=0, size_bytes=len(raw), user_address=0, file_offset_bytes=0)
    queue = Virtqueue(
        GuestMemory([Region(where=where, view=view)]),
        RingAddress(descriptors=0, available=AVAILABLE, used=USED),
        size=SIZE,
        next_available=0,
    )
    available_index = view[AVAILABLE + 2 : AVAILABLE + 4].cast("H")
    for number in range(1, COMPLETIONS + 1):
        available_index[0] = number
        queue.peek(1)
        queue.complete((0,))


def test_a_driver_sees_no_used_index_but_those_that_were_reached():
    raw = mmap.mmap(-1, 4096)
    used_index = memoryview(raw)[USED + 2 : USED + 4].cast("H")
    device = os.fork()
    if device == 0:
        try:
            complete_all(raw)
        finally:
            os._exit(0)
    last, steps = 0, 0
    try:
        while os.waitid(os.P_PID, device, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            for _ in range(1000):
                seen = used_index[0]
                assert seen >= last, f"after {last} the index was {seen}"
                steps += seen != last
                last = seen
    finally:
        os.kill(device, signal.SIGKILL)
        os.waitpid(device, 0)
    assert used_index[0] == COMPLETIONS
    assert steps > 100  # it was looked at while it moved
