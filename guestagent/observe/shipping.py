"""Sends the log to a host that listens, which may come and go: ``guestagent.log_dial``.

What goes over the connection are lines of JSON, one object each: a head
``{"stream": "guestagent.log", "version": 1, "boot_id": ..., "agent": ..., "pid": ...}``, then the
lines of the log (``vsock.log.render_json``), and ``{"dropped": N, "next": NUMBER}`` where lines are
missing because nobody listened for longer than the ring lasts. The host may answer with the number
of the last line it has, as decimal digits and a newline, as often as it likes: the next connection
then goes on behind that number. A host that never answers gets what was not sent before.
"""

import contextlib
import os
import threading
from collections.abc import Callable

from vsock.address import Address, parse_address
from vsock.deadline import Deadline
from vsock.dial import dial
from vsock.errors import CallError, RpcError
from vsock.log import LEVELS, Line, Log, render_json
from vsock.stream import Stream
from vsock.threads import start_thread

__all__ = ("LogShipper",)

_DIAL_SECONDS = 5.0
#: A host that takes nothing for so long is dialled again.
_STALL_SECONDS = 30.0
_PAUSES_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
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
        self._lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
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
        self._stop_sink = self._log.add_sink(self._wake, level=self._level)
        start_thread(self._thread)

    def close(self, flush_seconds: float = 1.0) -> None:
        """End; a host that listens gets the last lines first. Idempotent."""
        if self._stop_sink is not None:
            self._stop_sink()
        self._closing = True
        self._wake(None)
        if self._thread.ident is not None:
            self._thread.join(flush_seconds if self._connected else 0.0)
        self._until.cancel()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._wake_fd = -1
        self._until.close()

    def _wake(self, _line: Line | None) -> None:
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        attempt = 0
        try:
            while not self._closing:
                if self._ship_once():
                    attempt = 0
                pause = _PAUSES_SECONDS[min(attempt, len(_PAUSES_SECONDS) - 1)]
                attempt += 1
                self._until.wait([], "dial the log's host again", at_most=pause)
        except CallError:
            return

    def _ship_once(self) -> bool:
        """Dial and send until the connection ends; return whether there was one."""
        with self._until.part(_DIAL_SECONDS) as deadline:
            try:
                stream = dial(self._address, deadline)
            except (OSError, RpcError):
                # not a word of it in the log, whose lines would go where nobody listens
                return False
        with stream:
            stream.setblocking(False)
            self._connected = True
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
        return True

    def _ship(self, stream: Stream) -> None:
        """Send what there is and what comes, until the end of the connection or of this."""
        self._acknowledged = 0
        self._answer = b""
        self._put(stream, self._head + "\n")
        while True:
            self._send_new(stream)
            if self._closing:
                return
            ready = self._until.wait([self._wake_fd, stream.fileno()], "wait for lines")
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
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
            wanted = (line for line in batch if LEVELS.index(line.level) >= least)
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
