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

__all__ = ("ConsoleClient", "attach_line")

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_READ_BYTES = 16 * 1024
#: Input is not read beyond what the guest takes.
_MAX_PENDING_BYTES = 256 * 1024
#: How long a lost console is looked for, and how often the user's keys are read meanwhile.
_RECONNECT_SECONDS = 120.0
_RECONNECT_SLICE_SECONDS = 1.0
_LEFT, _INTERRUPTED = 0, 130


class ConsoleClient:
    """One use of a console.

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
        """``dial`` connects, trying for the given seconds or its own default."""
        self._dial = dial
        self._command = command
        self._is_terminal = is_terminal

    def run(self) -> int:
        """Return the exit status.

        Raises:
            CallError: the guest says why there is no session.
            ConnectionClosed, OSError: there is no console, or it was lost.
        """
        stream = self._dial(None)
        with _standard_streams(self._is_terminal) as signals:
            while True:
                try:
                    with stream:
                        return _Pump(stream, signals, self._is_terminal, self._hello()).run()
                except (ConnectionClosed, ConnectionResetError, BrokenPipeError) as error:
                    if not self._is_terminal or self._command is not None:
                        raise ConnectionClosed(f"the console was lost: {error}") from error
                again = self._connect_again(signals)
                if again is None:
                    return _LEFT
                stream = again

    def _hello(self) -> Hello:
        return Hello(
            versions=CONSOLE_VERSIONS,
            terminal=self._is_terminal,
            term=os.environ.get("TERM", "dumb")[:64] if self._is_terminal else "dumb",
            size=_window(),
            command=self._command,
        )

    def _connect_again(self, signals: socket.socket) -> Stream | None:
        """Look for the console until the user gives up: then return None."""
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


def attach_line(stream: Stream) -> int:
    """Put this terminal on a bare line, bytes as they are; return the exit status.

    Raises:
        ConnectionClosed, OSError: the line ended.
    """
    is_terminal = os.isatty(_STDIN)
    with stream, _standard_streams(is_terminal) as signals:
        return _Pump(stream, signals, is_terminal, None).run()


class _Pump:
    """Carries bytes between the standard streams and a connection until one side is done."""

    def __init__(
        self, stream: Stream, signals: socket.socket, is_terminal: bool, hello: Hello | None
    ) -> None:
        """Without ``hello`` the connection is a bare line, which has no frames."""
        self._stream = stream
        self._signals = signals
        self._escapes = Escapes() if is_terminal else None
        self._decoder = Decoder(from_client=False) if hello is not None else None
        self._pending = bytearray()
        self._reads_input = True
        self._interrupts = 0
        self._status: int | None = None
        if hello is not None:
            self._send(hello)

    def run(self) -> int:
        """Return the exit status.

        Raises:
            ConnectionClosed: the guest hung up, and did not say how it ended.
            CallError: it said why there is no session.
            OSError: the connection broke.
        """
        while self._status is None:
            self._turn()
        self._flush()  # the last bytes go out if they can
        return self._status

    def _turn(self) -> None:
        wanted = select.POLLIN | (select.POLLOUT if self._pending else 0)
        poller = select.poll()
        poller.register(self._stream.fileno(), wanted)
        poller.register(self._signals, select.POLLIN)
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
        for number in set(self._signals.recv(4096)):
            if number == signal.SIGWINCH:
                self._send(_window())
            elif number == signal.SIGINT:
                self._send(Signal(name="INT"))
                self._interrupts += 1
                if self._interrupts > 1 or self._decoder is None:
                    self._status = _INTERRUPTED
            else:
                self._status = 128 + number

    def _take_input(self) -> None:
        try:
            data = os.read(_STDIN, _READ_BYTES)
        except OSError:  # a terminal that was hung up
            data = b""
        if not data:
            self._reads_input = False
            self._send(End())
            if self._decoder is None:
                self._status = _LEFT
            return
        if self._escapes is not None:
            data, action = self._escapes.feed(data)
            if action == LEAVE:
                self._status = _LEFT
            elif action is not None:
                os.write(_STDERR, action.encode())
        if data:
            self._send(Data(data=data))

    def _send(self, frame: Frame) -> None:
        """Send a frame; of it, a bare line gets the input alone."""
        if self._decoder is not None:
            self._pending += encode(frame)
        elif isinstance(frame, Data):
            self._pending += frame.data
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

    def _receive(self) -> None:
        try:
            data = self._stream.recv(_READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionClosed("the guest hung up")
        if self._decoder is None:
            _write_all(_STDOUT, data)
            return
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
        if isinstance(frame, Data | Errors):
            _write_all(_STDOUT if isinstance(frame, Data) else _STDERR, frame.data)
        elif isinstance(frame, Exit):
            self._status = frame.status
        elif isinstance(frame, Refusal):
            raise frame.error()


def _window() -> Size:
    """Return the terminal's size as the terminal itself knows it.

    COLUMNS and LINES count where no terminal knows: a shell may have exported them when its window
    had another size.
    """
    columns, rows = 0, 0
    for fd in (_STDIN, _STDOUT):
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(fd)
        if columns and rows:
            break
    else:
        columns, rows = shutil.get_terminal_size((80, 24))
    return Size(rows=max(1, min(rows, 1000)), columns=max(1, min(columns, 1000)))


@contextlib.contextmanager
def _standard_streams(is_terminal: bool) -> Iterator[socket.socket]:
    """Yield a socket from which signals are read as bytes; with a terminal, keys pass unchanged."""
    reader, writer = socket.socketpair()
    with reader, writer, contextlib.ExitStack() as stack:
        writer.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGWINCH if is_terminal else signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        stack.callback(signal.set_wakeup_fd, before)
        if is_terminal:
            stack.enter_context(raw_terminal(_STDIN))
        yield reader


def _gives_up(escapes: Escapes, signals: socket.socket) -> bool:
    """Say whether the user has asked, by key or signal, to stop looking; never waits."""
    poller = select.poll()
    poller.register(_STDIN, select.POLLIN)
    poller.register(signals, select.POLLIN)
    ready = {fd for fd, _ in poller.poll(0)}
    if signals.fileno() in ready and set(signals.recv(4096)) - {signal.SIGWINCH}:
        return True
    if _STDIN not in ready:
        return False
    data = os.read(_STDIN, _READ_BYTES)
    return not data or b"\x03" in data or escapes.feed(data)[1] == LEAVE


def _say(text: str) -> None:
    os.write(_STDERR, f"\r\n[{text}]\r\n".encode())


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
