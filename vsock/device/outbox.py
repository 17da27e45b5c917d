"""What waits to be put into the guest's buffers, and the putting.

Three queues, in order of urgency: resets that belong to no connection any more, connections with
something to say, connections whose host peer has sent data. Data itself is never queued here: it
stays in the Unix socket until there are buffers and credit for it.
"""

from collections import deque
from collections.abc import Callable

from vsock.device.connections import State
from vsock.device.line import Line
from vsock.device.packet import (
    CID_HOST,
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    OP_CREDIT_REQUEST,
    OP_RST,
    OP_RW,
    Header,
    drop,
    take,
)
from vsock.device.virtqueue import Chain, Virtqueue, VirtqueueError

__all__ = ("Outbox",)

#: Buffers of the guest filled by one read: 64 KiB with the 4 KiB buffers that Linux posts.
_BURST_CHAINS = 16
_TURNS = 64
#: With so many resets that wait for the guest to post buffers, its packets are left unread.
_MAX_RESETS = 1024


class Outbox:
    """Packets to one guest."""

    def __init__(self, *, cid: int, on_host_end: Callable[[Line], None]) -> None:
        """``on_host_end`` is called when all that a host peer sent is delivered and it sends no
        more."""
        self._cid = cid
        self._on_host_end = on_host_end
        self._resets: deque[Header] = deque()
        # in the order of arrival; a connection that ends is taken out
        self._controls: dict[Line, None] = {}
        self._ready: dict[Line, None] = {}

    @property
    def is_full(self) -> bool:
        """True when no more packets of the guest should be taken: each may need a reset."""
        return len(self._resets) >= _MAX_RESETS

    def refuse(self, header: Header) -> None:
        """Answer a packet that belongs to no connection."""
        if header.op != OP_RST:
            self._resets.append(header.reset())

    def reset(self, line: Line) -> None:
        """Tell the guest that a connection is no more; the line may be forgotten at once."""
        self._resets.append(line.header(OP_RST, cid=self._cid, host_cid=CID_HOST))

    def say(self, line: Line, op: int) -> None:
        """Send a packet without data."""
        line.say(op)
        self._controls[line] = None

    def offer(self, line: Line) -> None:
        """Read from the host peer in its turn, if there is anything to read."""
        stream = line.stream
        if stream is not None and stream.readable and not line.stalled:
            self._ready[line] = None

    def forget(self, line: Line) -> None:
        """Say nothing more of a connection, but for a reset."""
        self._controls.pop(line, None)
        self._ready.pop(line, None)

    def forget_resets(self) -> None:
        """Drop answers that only a guest before this one would understand."""
        self._resets.clear()

    def serve(self, queue: Virtqueue) -> bool:
        """Fill buffers of the guest; True when there are more buffers and more to put in them.

        Raises:
            VirtqueueError: the ring is broken.
        """
        queue.want_kicks(False)
        for _ in range(_TURNS):
            if not self._has_work:
                return False
            if not queue.pending():
                queue.want_kicks(True)
                return queue.pending() > 0
            self._serve_next(queue)
        return True

    def _serve_next(self, queue: Virtqueue) -> None:
        if self._resets:
            self._put(queue, self._resets.popleft())
        elif self._controls:
            line = _pop_first(self._controls)
            if line.has_unsaid:
                op = line.next_unsaid()
                self._put(queue, line.header(op, cid=self._cid, host_cid=CID_HOST))
                if line.has_unsaid:
                    self._controls[line] = None
        else:
            line = _pop_first(self._ready)
            if line.state is State.ESTABLISHED:
                self._move(queue, line)

    def _put(self, queue: Virtqueue, header: Header) -> None:
        chain = queue.peek(1)[0]
        _check_buffer(chain)
        header.pack_into(chain.writable)
        queue.complete((HEADER_BYTES,))

    def _move(self, queue: Virtqueue, line: Line) -> None:
        """Read a burst of the host peer's data into the guest's buffers."""
        stream = line.stream
        assert stream is not None
        if not stream.readable:
            return
        credit = line.window.sendable()
        if not credit:
            line.stalled = True
            self.say(line, OP_CREDIT_REQUEST)
            return
        rooms, views = _rooms(queue.peek(_BURST_CHAINS), credit)
        count = stream.receive_into(views)
        if count is None:
            return
        if not count:
            self._on_host_end(line)
            return
        written = []
        for chain, room in rooms:
            length = min(room, count)
            line.window.send(length)
            line.header(OP_RW, cid=self._cid, host_cid=CID_HOST, length=length).pack_into(
                chain.writable
            )
            written.append(HEADER_BYTES + length)
            count -= length
            if not count:
                break
        queue.complete(written)
        self.offer(line)

    @property
    def _has_work(self) -> bool:
        return bool(self._resets or self._controls or self._ready)


def _pop_first(queue: dict[Line, None]) -> Line:
    line = next(iter(queue))
    del queue[line]
    return line


def _check_buffer(chain: Chain) -> None:
    if chain.writable_bytes <= HEADER_BYTES:
        raise VirtqueueError(f"a receive buffer of {chain.writable_bytes} bytes")


def _rooms(chains: list[Chain], credit: int) -> tuple[list[tuple[Chain, int]], list[memoryview]]:
    """Return the payload bytes to put into each chain, within the credit, and views of them all."""
    rooms, views = [], []
    for chain in chains:
        _check_buffer(chain)
        room = min(chain.writable_bytes - HEADER_BYTES, MAX_PAYLOAD_BYTES, credit)
        if not room:
            break
        rooms.append((chain, room))
        views += take(drop(chain.writable, HEADER_BYTES), room)
        credit -= room
    return rooms, views
