"""Sends the log to a host that listens, which may come and go: ``guestagent.log_dial``.

What goes over the connection are lines of JSON, one object each: a head
``{"stream": "guestagent.log", "version": 1, "boot_id": ..., "agent": ..., "pid": ...}``, then the
lines of the log (``vsock.log.render_json``), and ``{"dropped": N, "next": NUMBER}`` where lines are
missing because no host was connected for longer than the ring lasts. The host may answer with the
number of the last line it has, as decimal digits and a newline, as often as it likes: the next
connection then goes on behind that number. A host that never answers gets what was not sent before.
"""

import contextlib
import threading
from collections.abc import Callable

from vsock.address import Address, parse_address
from vsock.deadline import Deadline
from vsock.dial import dial
from vsock.errors import CallError, RpcError
from vsock.log import LEVELS, Line, Log, render_json
from vsock.retry import retry
from vsock.stream import Stream
from vsock.threads import Waker, start_thread

__all__ = ("LogShipper",)

_DIAL_SECONDS = 5.0
#: A host that takes nothing for so long is dialled again.
_STALL_SECONDS = 30.0
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.05, 5.0
_BATCH_LINES = 128
_ANSWER_BYTES = 4096


class LogShipper:
    """A thread of its own, from ``start`` to ``close``."""

    def __init__(self, log: Log, address: str, *, level: str, head: str) -> None:
        """``head`` is the JSON object that a connection begins with."""
        self._log = log
        self._address: Address = parse_address(address)
        self._level = level
        self._head = head
        self._until = Deadline()
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name=f"log to {address}", daemon=True)
        self._stop_sink: Callable[[], None] | None = None
        self._closing = False
        self._connected = False
        self._place = 0
        self._acknowledged = 0
        #: The part of an answer that is not a whole line yet.
        self._answer = b""
        #: Lines that the host did not get.
        self.dropped = 0

    def start(self) -> None:
        self._stop_sink = self._log.add_sink(self._woken, level=self._level)
        start_thread(self._thread)

    def close(self, flush_seconds: float = 1.0) -> None:
        """End; a host that listens gets the last lines first. Idempotent."""
        if self._stop_sink is not None:
            self._stop_sink()
        self._closing = True
        self._waker.wake()
        if self._thread.ident is not None:
            self._thread.join(flush_seconds if self._connected else 0.0)
        self._until.cancel()
        if self._thread.ident is not None:
            self._thread.join()
        self._waker.close()
        self._until.close()

    def _woken(self, _line: Line) -> None:
        self._waker.wake()

    def _run(self) -> None:
        try:
            while not self._closing:
                # not logged: the host that would get the lines is not connected
                stream = retry(
                    self._dial,
                    self._until,
                    when=lambda error: isinstance(error, (OSError, RpcError)),
                    step="dial the log's host again",
                    first_seconds=_FIRST_PAUSE_SECONDS,
                    most_seconds=_LAST_PAUSE_SECONDS,
                )
                self._ship_by(stream)
                self._until.wait((), "dial the log's host again", at_most=_FIRST_PAUSE_SECONDS)
        except (CallError, OSError, RpcError):  # closed
            return

    def _dial(self) -> Stream:
        with self._until.part(_DIAL_SECONDS) as deadline:
            stream = dial(self._address, deadline)
        stream.setblocking(False)
        return stream

    def _ship_by(self, stream: Stream) -> None:
        """Send until the connection ends."""
        self._connected = True
        try:
            with stream:
                try:
                    self._ship(stream)
                except (OSError, EOFError):
                    self._go_back(stream)
                except CallError as error:
                    if error.code != "timeout":
                        raise
                    self._go_back(stream)
        finally:
            self._connected = False

    def _ship(self, stream: Stream) -> None:
        """Send what there is and what comes, until the end of the connection or of this."""
        self._acknowledged = 0
        self._answer = b""
        self._put(stream, self._head + "\n")
        while True:
            self._send_new(stream)
            if self._closing:
                return
            ready = self._until.wait([self._waker.fd, stream.fileno()], "wait for lines")
            self._waker.clear()
            if stream.fileno() in ready:
                self._hear(stream)

    def _go_back(self, stream: Stream) -> None:
        """Go on behind what the host has, when it has said so.

        A host may answer and go while a line is on its way to it. Sending that line then fails
        before the answer has been heard, which is still there to read.
        """
        with contextlib.suppress(OSError, EOFError):
            while not self._closing:
                self._hear(stream)
        self._place = self._acknowledged or self._place

    def _send_new(self, stream: Stream) -> None:
        """Send what was not sent."""
        least = LEVELS.index(self._level)
        while True:
            lines, dropped = self._log.since(self._place)
            if dropped:
                self.dropped += dropped
                self._put(stream, f'{{"dropped":{dropped},"next":{lines[0].number}}}\n')
            if not lines:
                return
            batch = lines[:_BATCH_LINES]
            shown = self._log.shown(batch)
            wanted = (line for line in shown if LEVELS.index(line.level) >= least)
            self._put(stream, "".join(render_json(line) + "\n" for line in wanted))
            self._place = batch[-1].number

    def _put(self, stream: Stream, text: str) -> None:
        with self._until.part(_STALL_SECONDS) as deadline:
            stream.sendall(text.encode("ascii"), deadline)

    def _hear(self, stream: Stream) -> None:
        """Take in what the host says it has.

        Raises:
            BlockingIOError: it says nothing.
            OSError, EOFError: the connection has ended.
        """
        data = stream.recv(_ANSWER_BYTES)
        if not data:
            raise EOFError
        *numbers, rest = (self._answer + data).split(b"\n")
        for number in numbers:
            if number.isdigit() and len(number) < 20:
                self._acknowledged = min(int(number), self._place)
        self._answer = rest[-20:]
