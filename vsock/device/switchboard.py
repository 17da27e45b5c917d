"""Joins guest ports to Unix sockets: packets in, packets out, and the life of each connection.

Data is never queued on its way to the guest: it is read from the Unix socket straight into the
buffers that the guest posted, when there are buffers and credit, a burst at a time and each
connection in turn. Data from the guest goes straight from its memory to the Unix socket; what does
not fit is copied, bounded by the credit that we gave.
"""

import functools
import logging
import select
import socket

from vsock.device.connections import ConnectionTable, State
from vsock.device.hybrid import HostStream, dial
from vsock.device.line import Limits, Line
from vsock.device.outbox import Outbox
from vsock.device.packet import (
    CID_HOST,
    HEADER_BYTES,
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Header,
    drop,
    take,
)
from vsock.device.virtqueue import Virtqueue
from vsock.loop import Loop, Timer

__all__ = ("Switchboard",)

_log = logging.getLogger(__name__)

_EDGES = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_GONE = select.EPOLLHUP | select.EPOLLERR
_TX_BUDGET = 64
#: How long to wait before a listener with a full queue is dialled again, at first and at most.
_FIRST_REDIAL_SECONDS, _LAST_REDIAL_SECONDS = 0.01, 0.64


class Switchboard:
    """All connections of one guest. The owner calls ``serve_tx`` and ``serve_rx`` after events."""

    def __init__(self, loop: Loop, *, cid: int, uds_path: str, limits: Limits) -> None:
        self._loop = loop
        self._cid = cid
        self._uds_path = uds_path
        self._limits = limits
        self._table: ConnectionTable[Line] = ConnectionTable()
        self._callers: dict[HostStream, Timer] = {}
        self._lingering: set[HostStream] = set()
        self._outbox = Outbox(cid=cid, on_host_end=self._on_host_end)

    def __len__(self) -> int:
        """Return how many sockets of host peers are in use, in whatever state."""
        return len(self._table) + len(self._callers) + len(self._lingering)

    def guest_restarted(self) -> None:
        """The guest knows no connection any more. Dials that it has not seen yet stay."""
        for line in self._table:
            if line.state is not State.REQUESTED or line.request_sent:
                self._hang_up(line)
        self._outbox.forget_resets()

    def close(self) -> None:
        for line in self._table:
            self._hang_up(line)
        for stream in (*self._callers, *self._lingering):
            self._drop_stream(stream)

    # -- from the host

    def take_call(self, sock: socket.socket) -> None:
        """Serve a host peer that has just connected; the socket is owned from now on."""
        if len(self) >= self._limits.connections:
            _log.warning("host peer refused: %d connections", len(self))
            sock.close()
            return
        stream = HostStream(sock)
        self._callers[stream] = self._loop.call_later(
            self._limits.handshake_seconds, functools.partial(self._drop_stream, stream)
        )
        self._loop.add(stream.fileno(), _EDGES, functools.partial(self._on_caller, stream))

    def _on_caller(self, stream: HostStream, _events: int) -> None:
        try:
            port = stream.read_connect_line()
        except (ValueError, ConnectionError) as exc:
            _log.info("host peer dropped: %s", exc)
            self._drop_stream(stream)
            return
        if port is None:
            return
        self._callers.pop(stream).cancel()
        self._loop.remove(stream.fileno())
        line = self._new_line(self._table.choose_host_port(port), port, State.REQUESTED)
        self._set_deadline(line, self._limits.answer_seconds, "the guest did not answer")
        self._attach(line, stream)
        self._outbox.say(line, OP_REQUEST)

    def _on_host(self, line: Line, events: int) -> None:
        stream = line.stream
        assert stream is not None
        if events & _GONE:
            stream.hung_up = True
        if line.state is State.REQUESTED:
            stream.readable = True
            if stream.hung_up:
                self._abort(line, "the host peer went away before the guest answered")
            return
        if events & (select.EPOLLOUT | _GONE) and stream.backlog_bytes:
            self._forwarded(line, stream.flush())
        if stream.eof:
            if stream.hung_up:
                self._end(line, SHUTDOWN_BOTH)
        else:
            stream.readable = True
            self._outbox.offer(line)

    def _drop_stream(self, stream: HostStream) -> None:
        """Close a host peer that has no connection (not yet, or not any more)."""
        timer = self._callers.pop(stream, None)
        if timer is not None:
            timer.cancel()
        self._lingering.discard(stream)
        self._loop.remove(stream.fileno())
        stream.close()

    # -- from the guest

    def serve_tx(self, queue: Virtqueue) -> bool:
        """Take packets of the guest; True when more may wait.

        While many answers wait for the guest to post buffers, its packets stay in the ring.

        Raises:
            VirtqueueError: the ring is broken.
        """
        queue.want_kicks(False)
        for _ in range(_TX_BUDGET):
            if self._outbox.is_full:
                queue.want_kicks(True)
                return False
            if not (chains := queue.peek(1)):
                queue.want_kicks(True)
                return queue.pending() > 0
            self._on_packet(chains[0].readable)
            queue.complete((0,))
        return True

    def serve_rx(self, queue: Virtqueue) -> bool:
        """Give the guest what waits for it; True when more could be given at once.

        Raises:
            VirtqueueError: the ring is broken.
        """
        was_full = self._outbox.is_full
        has_more = self._outbox.serve(queue)
        return has_more or (was_full and not self._outbox.is_full)  # packets may be read again

    def _on_packet(self, views: list[memoryview]) -> None:
        header = Header.parse(views)
        if header is None or header.src_cid != self._cid:
            _log.debug("packet dropped: %s", header)
            return
        line = self._table.get(header.dst_port, header.src_port)
        if header.dst_cid != CID_HOST or header.type != TYPE_STREAM:
            self._outbox.refuse(header)
        elif header.op == OP_REQUEST:
            if line is not None:
                # The guest would not reuse its port if it still knew that connection.
                self._hang_up(line)
            self._on_request(header)
        elif line is None:
            self._outbox.refuse(header)
        else:
            if line.learn(header):
                self._outbox.offer(line)
            self._on_known(line, header, views)

    def _on_known(self, line: Line, header: Header, views: list[memoryview]) -> None:
        op, state = header.op, line.state
        if op == OP_RW and state in (State.ESTABLISHED, State.CLOSING):
            self._on_data(line, header.length, views)
        elif op == OP_RST:
            self._hang_up(line)
        elif op == OP_RESPONSE and state is State.REQUESTED:
            self._on_response(line)
        elif op == OP_SHUTDOWN and state is not State.REQUESTED:
            self._on_shutdown(line, header.flags)
        elif op == OP_CREDIT_REQUEST:
            self._outbox.say(line, OP_CREDIT_UPDATE)
        elif op != OP_CREDIT_UPDATE:
            self._abort(line, f"operation {op} in state {state.name}")

    def _on_request(self, header: Header) -> None:
        if len(self) >= self._limits.connections:
            _log.info("guest refused: %d connections", len(self))
            self._outbox.refuse(header)
            return
        line = self._new_line(header.dst_port, header.src_port, State.DIALLING)
        line.learn(header)
        self._set_deadline(line, self._limits.answer_seconds, "the host's listener is busy")
        self._dial(line)

    def _dial(self, line: Line, retry_seconds: float = _FIRST_REDIAL_SECONDS) -> None:
        path = f"{self._uds_path}_{line.host_port}"
        try:
            sock = dial(path)
        except OSError as exc:
            self._abort(line, f"cannot connect to {path!r}: {exc.strerror}")
            return
        if sock is None:
            # A full queue raises no event; the deadline of the line bounds these attempts.
            longer = min(2 * retry_seconds, _LAST_REDIAL_SECONDS)
            again = functools.partial(self._dial, line, longer)
            line.redial = self._loop.call_later(retry_seconds, again)
            return
        self._establish(line)
        self._attach(line, HostStream(sock))
        self._outbox.say(line, OP_RESPONSE)

    def _on_response(self, line: Line) -> None:
        stream = line.stream
        assert stream is not None
        self._establish(line)
        answer = memoryview(b"OK %d\n" % line.host_port)
        if stream.send((answer,), len(answer)) != len(answer) or stream.gone:
            self._abort(line, "the host peer does not take the answer")
            return
        self._outbox.offer(line)

    def _on_data(self, line: Line, length: int, views: list[memoryview]) -> None:
        payload = take(drop(views, HEADER_BYTES), length)
        if sum(map(len, payload)) != length or not line.window.receive(length):
            self._abort(line, f"{length} bytes that are not there or exceed the credit")
            return
        if line.guest_shutdown & SHUTDOWN_SEND:
            self._abort(line, "data after the end of data")
            return
        stream = line.stream
        assert stream is not None
        self._forwarded(line, stream.send(payload, length))

    def _forwarded(self, line: Line, length: int) -> None:
        line.window.forward(length)
        stream = line.stream
        assert stream is not None
        if stream.gone and not line.shutdown & SHUTDOWN_RECEIVE:
            self._end(line, SHUTDOWN_RECEIVE)
        elif line.window.update_due():
            self._outbox.say(line, OP_CREDIT_UPDATE)

    def _on_shutdown(self, line: Line, flags: int) -> None:
        line.guest_shutdown |= flags & SHUTDOWN_BOTH
        stream = line.stream
        if line.guest_shutdown == SHUTDOWN_BOTH or stream is None:
            self._reset(line)
            return
        if line.guest_shutdown & SHUTDOWN_SEND:
            stream.finish_writing()
        if line.guest_shutdown & SHUTDOWN_RECEIVE:
            stream.stop_reading()
            if stream.hung_up:
                self._end(line, SHUTDOWN_BOTH)

    def _on_host_end(self, line: Line) -> None:
        stream = line.stream
        assert stream is not None
        self._end(line, SHUTDOWN_BOTH if stream.hung_up else SHUTDOWN_SEND)

    def _end(self, line: Line, directions: int) -> None:
        """Tell the guest which directions the host peer has ended; with both, wait for its RST."""
        if line.shutdown | directions == line.shutdown:
            return
        line.shutdown |= directions
        self._outbox.say(line, OP_SHUTDOWN)
        if line.shutdown == SHUTDOWN_BOTH:
            line.state = State.CLOSING
            self._set_deadline(line, self._limits.close_seconds, "the guest did not close")

    # -- lives

    def _new_line(self, host_port: int, guest_port: int, state: State) -> Line:
        line = Line(
            host_port=host_port,
            guest_port=guest_port,
            state=state,
            buffer_bytes=self._limits.buffer_bytes,
        )
        self._table.add(line)
        return line

    def _attach(self, line: Line, stream: HostStream) -> None:
        line.stream = stream
        self._loop.add(stream.fileno(), _EDGES, functools.partial(self._on_host, line))

    def _establish(self, line: Line) -> None:
        line.state = State.ESTABLISHED
        self._cancel_timers(line)

    def _set_deadline(self, line: Line, seconds: float, reason: str) -> None:
        self._cancel_timers(line)
        line.deadline = self._loop.call_later(seconds, functools.partial(self._abort, line, reason))

    def _cancel_timers(self, line: Line) -> None:
        for timer in (line.deadline, line.redial):
            if timer is not None:
                timer.cancel()
        line.deadline = line.redial = None

    def _abort(self, line: Line, reason: str) -> None:
        """End a connection with RST, for the reason given."""
        _log.info("reset host_port=%d guest_port=%d: %s", *line.key, reason)
        self._reset(line)

    def _reset(self, line: Line) -> None:
        if line.state is not State.REQUESTED or line.request_sent:
            self._outbox.reset(line)
        self._hang_up(line)

    def _hang_up(self, line: Line) -> None:
        """Forget a connection; the host peer still gets what the guest had sent to it."""
        self._table.remove(line)
        self._outbox.forget(line)
        self._cancel_timers(line)
        line.state = State.CLOSED
        stream, line.stream = line.stream, None
        if stream is None:
            return
        self._loop.remove(stream.fileno())
        if not stream.backlog_bytes or stream.gone:
            stream.close()
            return
        stream.stop_reading()
        self._lingering.add(stream)
        self._loop.add(stream.fileno(), _EDGES, functools.partial(self._on_lingering, stream))

    def _on_lingering(self, stream: HostStream, events: int) -> None:
        stream.flush()
        if not stream.backlog_bytes or stream.gone or events & _GONE:
            self._drop_stream(stream)
