"""The host's side of a console session: this terminal, or these pipes, on the other end."""

import contextlib
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator

from guestagent.api.console import (
    CONSOLE_VERSIONS,
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
    encode,
)
from guestagent.host.ctl.terminal import LEAVE, Escapes, raw_terminal
from vsock.errors import CallError, ConnectionClosed, RemoteProtocolError
from vsock.stream import Stream

__all__ = ("ConsoleClient", "LineClient")

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_READ_BYTES = 16 * 1024
#: Input is not read beyond what the guest takes.
_MAX_PENDING_BYTES = 256 * 1024
#: How long a lost console is looked for, and how often the user is listened to meanwhile.
_RECONNECT_SECONDS = 120.0
_RECONNECT_SLICE_SECONDS = 1.0
_LEFT, _INTERRUPTED = 0, 130


def _say(text: str) -> None:
    os.write(_STDERR, f"\r\n[{text}]\r\n".encode())


def _window() -> Size:
    """Return the size that the terminal itself knows, for a shell may have exported COLUMNS and
    LINES when its window had another one. They count where no terminal knows."""
    columns, rows = 0, 0
    for fd in (_STDIN, _STDOUT):
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(fd)
        if columns and rows:
            break
    else:
        columns, rows = shutil.get_terminal_size((80, 24))
    return Size(rows=max(1, min(rows, 1000)), columns=max(1, min(columns, 1000)))


class _Signals:
    """Signals as bytes to read: a context manager that puts everything back."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)

    def __enter__(self) -> "_Signals":
        self._before = {number: signal.signal(number, lambda *_: None) for number in self._numbers}
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._read.close()
        self._write.close()

    def fileno(self) -> int:
        return self._read.fileno()

    def take(self) -> set[int]:
        with contextlib.suppress(BlockingIOError):
            return set(self._read.recv(4096))
        return set()


class _Pump:
    """Carries bytes between the standard streams and a connection until one side is done."""

    def __init__(self, stream: Stream, signals: _Signals, escapes: Escapes | None) -> None:
        self._stream = stream
        self._signals = signals
        self._escapes = escapes
        self._pending = bytearray()
        self._reads_input = True
        self.status: int | None = None
        self._interrupts = 0

    def run(self) -> int:
        """Return the exit status.

        Raises:
            ConnectionClosed: the guest hung up, and did not say how it ended.
            CallError: it said why there is no session.
            OSError: the connection broke.
        """
        while self.status is None:
            self._turn()
        self._flush_last()
        return self.status

    def _turn(self) -> None:
        poller = select.poll()
        poller.register(
            self._stream.fileno(), select.POLLIN | (select.POLLOUT if self._pending else 0)
        )
        poller.register(self._signals.fileno(), select.POLLIN)
        if self._reads_input and len(self._pending) < _MAX_PENDING_BYTES:
            poller.register(_STDIN, select.POLLIN)
        ready = {fd for fd, _ in poller.poll()}
        if self._signals.fileno() in ready:
            self._take_signals()
        if _STDIN in ready:
            self._take_input()
        if self._stream.fileno() in ready:
            self._flush()
            self._receive()

    def _take_signals(self) -> None:
        for number in self._signals.take():
            if number == signal.SIGWINCH:
                self.resized(_window())
            elif number == signal.SIGINT:
                self._interrupts += 1
                if self._interrupts > 1:
                    self.status = _INTERRUPTED
                self.interrupted()
            else:
                self.status = 128 + number

    def _take_input(self) -> None:
        try:
            data = os.read(_STDIN, _READ_BYTES)
        except OSError:  # a terminal that was hung up
            data = b""
        if not data:
            self._reads_input = False
            self.input_ended()
            return
        if self._escapes is not None:
            data, action = self._escapes.feed(data)
            if action == LEAVE:
                self.status = _LEFT
            elif action is not None:
                os.write(_STDERR, action.encode())
        if data:
            self._pending += self.wrap(data)
            self._flush()

    def _flush(self) -> None:
        try:
            while self._pending:
                del self._pending[: self._stream.send(bytes(self._pending))]
        except BlockingIOError:
            return
        except OSError:
            # what the guest said before it hung up is still to be read
            self._pending.clear()

    def _flush_last(self) -> None:
        """What is to be said at the end goes out if it can; nobody waits for it."""
        self._flush()

    def _receive(self) -> None:
        try:
            data = self._stream.recv(_READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionClosed("the guest hung up")
        self.received(data)

    # --- what a kind of connection makes of it

    def wrap(self, data: bytes) -> bytes:
        return data

    def received(self, data: bytes) -> None:
        _write_all(_STDOUT, data)

    def input_ended(self) -> None:
        self.status = _LEFT

    def resized(self, size: Size) -> None:
        """The window has another size."""

    def interrupted(self) -> None:
        """The user pressed an interrupt where there is no raw terminal."""
        self.status = _INTERRUPTED


class _FramePump(_Pump):
    """For a console that speaks the protocol."""

    def __init__(
        self, stream: Stream, signals: _Signals, escapes: Escapes | None, hello: Hello
    ) -> None:
        super().__init__(stream, signals, escapes)
        self._decoder = Decoder(from_client=False)
        self._pending += encode(hello)
        self._flush()

    def wrap(self, data: bytes) -> bytes:
        return encode(Data(data=data))

    def received(self, data: bytes) -> None:
        self._decoder.feed(data)
        try:
            for frame in self._decoder.frames():
                self._take(frame)
        except RemoteProtocolError as error:
            raise CallError(
                "internal",
                f"this is no console: {error}",
                hint="a serial line without the protocol needs --line",
            ) from error

    def _take(self, frame: Frame) -> None:
        if isinstance(frame, Data):
            _write_all(_STDOUT, frame.data)
        elif isinstance(frame, Errors):
            _write_all(_STDERR, frame.data)
        elif isinstance(frame, Exit):
            self.status = frame.status
        elif isinstance(frame, Refusal):
            raise frame.error()

    def input_ended(self) -> None:
        self._pending += encode(End())
        self._flush()

    def resized(self, size: Size) -> None:
        self._pending += encode(size)
        self._flush()

    def interrupted(self) -> None:
        self._pending += encode(Signal(name="INT"))
        self._flush()


class ConsoleClient:
    """One use of a console. ``run`` returns the exit status.

    A session at a terminal that is lost, as when the agent is started again, is followed by a new
    one; a script's is an error.
    """

    def __init__(
        self,
        dial: Callable[[float | None], Stream],
        *,
        command: str | None,
        is_terminal: bool,
    ) -> None:
        self._dial = dial
        self._command = command
        self._is_terminal = is_terminal

    def run(self) -> int:
        """Raises: CallError, ConnectionClosed, OSError: there is no console, or it was lost."""
        stream = self._dial(None)
        with _signals(self._is_terminal) as signals, _raw(self._is_terminal):
            escapes = Escapes() if self._is_terminal else None
            while True:
                try:
                    with stream:
                        return self._pump(stream, signals, escapes)
                except (ConnectionClosed, ConnectionResetError, BrokenPipeError) as error:
                    if not self._is_terminal or self._command is not None:
                        raise ConnectionClosed(f"the console was lost: {error}") from error
                again = self._connect_again(signals)
                if again is None:
                    return _LEFT
                stream = again

    def _pump(self, stream: Stream, signals: _Signals, escapes: Escapes | None) -> int:
        hello = Hello(
            versions=CONSOLE_VERSIONS,
            terminal=self._is_terminal,
            term=os.environ.get("TERM", "dumb")[:64] if self._is_terminal else "dumb",
            size=_window(),
            command=self._command,
        )
        return _FramePump(stream, signals, escapes, hello).run()

    def _connect_again(self, signals: _Signals) -> Stream | None:
        """Look for the console, while listening to the user; None when the user gives up."""
        _say("the console was lost; connecting again, ~. or ^C to give up")
        escapes = Escapes()
        until = time.monotonic() + _RECONNECT_SECONDS
        while True:
            try:
                stream = self._dial(_RECONNECT_SLICE_SECONDS)
            except (ConnectionClosed, OSError) as error:
                if time.monotonic() > until:
                    raise ConnectionClosed(
                        f"no console again within {_RECONNECT_SECONDS:.0f} s: {error}"
                    ) from error
            else:
                _say("connected again: this is a new session")
                return stream
            if _gives_up(escapes, signals):
                return None


class LineClient:
    """This terminal on a bare line: bytes as they are, ``~.`` to leave."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def run(self) -> int:
        is_terminal = os.isatty(_STDIN)
        with self._stream, _signals(is_terminal) as signals, _raw(is_terminal):
            return _Pump(self._stream, signals, Escapes() if is_terminal else None).run()


def _signals(is_terminal: bool) -> _Signals:
    return _Signals(signal.SIGTERM, signal.SIGWINCH if is_terminal else signal.SIGINT)


@contextlib.contextmanager
def _raw(is_terminal: bool) -> Iterator[None]:
    if not is_terminal:
        yield
        return
    with raw_terminal(_STDIN):
        yield


def _gives_up(escapes: Escapes, signals: _Signals) -> bool:
    """Say whether the user, who is asked without waiting, wants no more."""
    if signals.take() - {signal.SIGWINCH}:
        return True
    poller = select.poll()
    poller.register(_STDIN, select.POLLIN)
    if not poller.poll(0):
        return False
    data = os.read(_STDIN, _READ_BYTES)
    return not data or b"\x03" in data or escapes.feed(data)[1] == LEAVE


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
