"""One peer of the console: its input is kept within bounds, its output goes out at its pace.

Two threads use a channel. The console's thread reads the stream and calls ``take``; the session's
thread waits for input and writes. So an interrupt gets through while a command works, and a peer
that does not read holds up its own session alone, until it is cut off.
"""

import os
import threading

from guestagent.api.console import (
    CONSOLE_VERSIONS,
    MAX_PAYLOAD_BYTES,
    Data,
    Decoder,
    End,
    Errors,
    Exit,
    Frame,
    Hello,
    Refusal,
    Signal,
    Size,
    Welcome,
    encode,
)
from vsock.deadline import Deadline
from vsock.errors import ConnectionClosed, RemoteProtocolError
from vsock.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("EDITING", "INTERRUPT", "RAW", "RUNNING", "STALL_SECONDS", "Channel")

#: A peer that takes nothing for this long is cut off.
STALL_SECONDS = 30.0
#: Input that waits for the session. A shell is fed at its own pace; what is typed while a command
#: runs is kept up to the second bound, and dropped beyond it.
MAX_INPUT_BYTES = 64 * 1024
MAX_TYPED_AHEAD_BYTES = 4096
INTERRUPT = b"\x03"

#: Which part of the session takes the input: the editor; none, but for an interrupt; a program.
EDITING, RUNNING, RAW = "editing", "running", "raw"


class Channel:
    """``hello`` describes the peer. ``life`` is cancelled when the peer has gone."""

    def __init__(self, stream: Stream, *, line_term: str | None = None) -> None:
        """``line_term`` is the terminal of a bare line, which has no frames."""
        self.stream = stream
        self.is_line = line_term is not None
        self.hello = Hello(versions=CONSOLE_VERSIONS)
        if line_term is not None:
            self.hello = self.hello.replace(terminal=True, term=line_term)
        #: Whether the peer has said hello, where it must.
        self.is_open = self.is_line
        self.size = Size()
        self.life = Deadline()
        #: Has the console's thread check ``wants_input``; the console sets it.
        self.wake: Callable[[], None] = lambda: None
        #: Takes a signal from the peer; a program that runs sets it.
        self.on_signal: Callable[[str], None] = self.interrupt_on
        #: Takes a new size of the peer's window; a program that runs sets it.
        self.on_size: Callable[[Size], None] = lambda size: None
        self._decoder = None if self.is_line else Decoder(from_client=True)
        self._lock = threading.Lock()
        self._mode = EDITING
        self._running: Deadline | None = None
        self._input = bytearray()
        self._has_ended = False
        self._size_changed = False
        self._input_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._unsent = bytearray()

    # --- for the console's thread

    def take(self, data: bytes) -> None:
        """Take bytes from the peer.

        Raises:
            RemoteProtocolError: it broke the rules.
        """
        if self._decoder is None:
            self._typed(data)
            return
        self._decoder.feed(data)
        for frame in self._decoder.frames():
            self._take_frame(frame)

    @property
    def wants_input(self) -> bool:
        return len(self._input) < MAX_INPUT_BYTES or self._drops_input

    def refuse(self, refusal: Refusal) -> None:
        """Say why there is no session, as far as that goes without waiting."""
        try:
            self.stream.send(encode(refusal))
        except OSError:
            return

    def hang_up(self) -> None:
        """The peer has gone: end every wait of the session."""
        with self._lock:
            self._has_ended = True
        self.life.cancel()

    def close(self) -> None:
        """Free everything. The session must be over."""
        self.life.close()
        os.close(self._input_fd)
        self.stream.close()

    def interrupt_on(self, name: str) -> None:
        """Interrupt the command that runs, if that is what the signal means."""
        if name in ("INT", "TERM", "HUP", "QUIT", "KILL"):
            with self._lock:
                self._interrupt()

    def _take_frame(self, frame: Frame) -> None:
        if self.is_open == isinstance(frame, Hello):
            text = "Hello comes once" if self.is_open else "Hello comes first"
            raise RemoteProtocolError(f"{text}, not {type(frame).__name__}", fatal=True)
        if isinstance(frame, Hello):
            self.hello = frame
            self.size = frame.size
            self.is_open = True
        elif isinstance(frame, Data):
            self._typed(frame.data)
        elif isinstance(frame, End):
            with self._lock:
                self._has_ended = True
                os.eventfd_write(self._input_fd, 1)
        elif isinstance(frame, Size):
            self.size = frame
            self.on_size(frame)
            with self._lock:
                self._size_changed = True
                if self._mode == EDITING:
                    os.eventfd_write(self._input_fd, 1)
        elif isinstance(frame, Signal):
            self.on_signal(frame.name)

    @property
    def _drops_input(self) -> bool:
        """Whether input beyond a bound is dropped, not held back: a person's interrupt must get
        through; a script's input must be whole."""
        return self._mode == RUNNING and self.hello.terminal

    def _typed(self, data: bytes) -> None:
        with self._lock:
            if self._drops_input:
                if INTERRUPT in data:
                    # what was typed before it is for a command that ends now
                    self._input.clear()
                    data = data[data.rindex(INTERRUPT) + 1 :]
                    self._interrupt()
                if self._drops_input:
                    data = data[: max(0, MAX_TYPED_AHEAD_BYTES - len(self._input))]
            self._input += data
            os.eventfd_write(self._input_fd, 1)

    def _interrupt(self) -> None:
        if self._running is not None:
            self._running.cancel()

    # --- for the session's thread

    def enter(self, mode: str, running: Deadline | None = None) -> None:
        """Say what takes the input from now on; an interrupt cancels ``running``."""
        with self._lock:
            self._mode = mode
            self._running = running
        self.wake()

    @property
    def input_fd(self) -> int:
        """Readable when there is input, an end of it, or a new size."""
        return self._input_fd

    @property
    def has_ended(self) -> bool:
        """Whether no more input is to come."""
        return self._has_ended

    def poll_input(self) -> bytes:
        """Return the input that is there, b"" if none is."""
        try:
            os.eventfd_read(self._input_fd)
        except BlockingIOError:
            return b""
        with self._lock:
            data = bytes(self._input)
            self._input.clear()
        if len(data) >= MAX_INPUT_BYTES:
            self.wake()
        return data

    def take_resize(self) -> bool:
        """Say whether the size has changed since the last time."""
        with self._lock:
            changed, self._size_changed = self._size_changed, False
        return changed

    def write(self, data: bytes, deadline: Deadline) -> None:
        """Send output, waiting while the peer is slow.

        Raises:
            ConnectionClosed: the peer has gone, or took nothing for too long.
            CallError: ``cancelled`` or ``timeout``; the rest goes out with the next output.
        """
        self._send(self._framed(Data, data), deadline)

    def write_error(self, data: bytes, deadline: Deadline) -> None:
        """As ``write``, for a text about an error."""
        self._send(self._framed(Data if self.hello.terminal else Errors, data), deadline)

    def tell(self, frame: Welcome | Exit | Refusal) -> None:
        """Send a frame; a bare line gets none. Raises as ``write``."""
        if not self.is_line:
            self._send(encode(frame), self.life)

    def _framed(self, kind: type[Data] | type[Errors], data: bytes) -> bytes:
        if self.is_line:
            return data
        starts = range(0, len(data), MAX_PAYLOAD_BYTES)
        return b"".join(encode(kind(data=data[at : at + MAX_PAYLOAD_BYTES])) for at in starts)

    def _send(self, data: bytes, deadline: Deadline) -> None:
        self._unsent += data
        try:
            while self._unsent:
                try:
                    del self._unsent[: self.stream.send(bytes(self._unsent))]
                except BlockingIOError:
                    self._wait_for_room(deadline)
        except OSError as error:
            raise ConnectionClosed(f"{self.stream.peer} has gone: {error}") from error

    def _wait_for_room(self, deadline: Deadline) -> None:
        if self.life.cancelled:
            raise ConnectionClosed(f"{self.stream.peer} has gone")
        fds = (self.stream.fileno(),)
        if not deadline.wait((), "write to the console", writable=fds, at_most=STALL_SECONDS):
            self.life.cancel()
            raise ConnectionClosed(f"{self.stream.peer} took nothing for {STALL_SECONDS:.0f} s")
