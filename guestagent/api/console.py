"""The protocol of the debug console: frames on a connected byte stream. No socket, no thread.

A frame is a type (1 byte), the length of its payload (3 bytes, big-endian), and the payload, of at
most ``MAX_PAYLOAD_BYTES``. ``Data`` and ``Errors`` carry bytes as they are, ``End`` nothing, all
others one MessagePack map with the fields of their record. docs/console.md has the rules.

The client speaks first, with ``Hello``; the agent answers ``Welcome`` or ``Refusal``. ``Exit`` and
``Refusal`` are the last frames of a connection.
"""

from collections.abc import Iterator

import msgpack

from guestagent.api.checks import check_range
from vsock.errors import CallError, RemoteProtocolError
from vsock.record import Record, wire_fields

__all__ = (
    "CONSOLE_PORT",
    "CONSOLE_VERSIONS",
    "DISABLED",
    "FRAME_TYPES",
    "FROM_AGENT",
    "FROM_CLIENT",
    "MAX_PAYLOAD_BYTES",
    "SIGNALS",
    "Data",
    "Decoder",
    "End",
    "Errors",
    "Exit",
    "Frame",
    "Hello",
    "Refusal",
    "Signal",
    "Size",
    "Welcome",
    "encode",
)

#: The vsock port of the console unless configured otherwise; one for privileged processes.
CONSOLE_PORT = 1022
#: Versions of this protocol, newest first.
CONSOLE_VERSIONS = (1,)
#: The error message for a console that is off.
DISABLED = "console is disabled: guestagent.console="
#: With its header a frame fits into one write of 32 KiB.
MAX_PAYLOAD_BYTES = 32 * 1024 - 4
MAX_COMMAND_BYTES = 4096
#: The signals that a client may send.
SIGNALS = ("INT", "TERM", "HUP", "QUIT", "KILL", "CONT", "TSTP", "USR1", "USR2")
_HEADER_BYTES = 4
_MAX_SIDE = 1000


class Size(Record):
    """The window of the client's terminal, in characters."""

    rows: int = 24
    columns: int = 80

    def check(self) -> None:
        check_range("rows", self.rows, 1, _MAX_SIDE)
        check_range("columns", self.columns, 1, _MAX_SIDE)


class Hello(Record):
    """Opens a session. ``command`` is run instead of reading commands. With ``terminal`` the client
    is a terminal in raw mode: lines end in CR LF, there are prompts, an editor and paging; without,
    output is unchanged and error texts come in ``Errors``. ``term`` is the client's TERM."""

    versions: tuple[int, ...]
    terminal: bool = False
    term: str = "dumb"
    size: Size = Size()
    command: str | None = None

    def check(self) -> None:
        if not self.versions:
            raise ValueError("versions is empty")
        check_range("term length", len(self.term), 0, 64)
        if not self.term.isascii() or not self.term.isprintable():
            raise ValueError(f"term {self.term!r} is no name of a terminal")
        check_range("command length", len((self.command or "").encode()), 0, MAX_COMMAND_BYTES)


class Welcome(Record):
    """The version that holds, the agent's own, and whether ``sh`` is permitted."""

    version: int
    agent: str
    session: int
    shell: bool


class Data(Record):
    """Input from the client; output from the agent."""

    data: bytes


class Errors(Record):
    """Text about errors, where the client is no terminal."""

    data: bytes


class End(Record):
    """The client has no more input. The output goes on."""


class Signal(Record):
    """INT interrupts a command of the console; a program of the shell gets any signal."""

    name: str

    def check(self) -> None:
        if self.name not in SIGNALS:
            raise ValueError(f"signal {self.name!r} is none of {', '.join(SIGNALS)}")


class Exit(Record):
    """The session is over. ``status`` is that of the last command, 128 and the number of the signal
    where one ended it; ``signal`` has its name then."""

    status: int
    signal: str | None = None

    def check(self) -> None:
        check_range("status", self.status, 0, 255)


class Refusal(Record):
    """The session is over, or never was, for this reason; the fields are those of an RPC error."""

    code: str
    message: str
    hint: str | None = None

    def error(self) -> CallError:
        """Return it as what a failed call raises."""
        return CallError.from_wire(self.to_wire())

    @classmethod
    def of(cls, error: CallError) -> "Refusal":
        return cls(code=error.code, message=error.message, hint=error.hint)


Frame = Hello | Welcome | Data | Errors | End | Size | Signal | Exit | Refusal

#: Number -> frame, and which frames each side may send.
FRAME_TYPES: dict[int, type[Frame]] = {
    0x01: Hello,
    0x02: Welcome,
    0x03: Data,
    0x04: Errors,
    0x05: End,
    0x06: Size,
    0x07: Signal,
    0x08: Exit,
    0x09: Refusal,
}
_NUMBERS = {frame: number for number, frame in FRAME_TYPES.items()}
FROM_CLIENT = frozenset((Hello, Data, End, Size, Signal))
FROM_AGENT = frozenset((Welcome, Data, Errors, Exit, Refusal))


def encode(frame: Frame) -> bytes:
    """Return a frame's bytes.

    Raises:
        ValueError: the payload is longer than a frame may be.
    """
    payload = _payload(frame)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a payload of {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES}")
    return bytes((_NUMBERS[type(frame)],)) + len(payload).to_bytes(3, "big") + payload


def _payload(frame: Frame) -> bytes:
    if isinstance(frame, (Data, Errors)):
        return frame.data
    if isinstance(frame, End):
        return b""
    packed: bytes = msgpack.packb(frame, default=wire_fields)
    return packed


class Decoder:
    """From the peer's bytes to frames: ``feed`` it, then take what ``frames`` yields.

    After an error it stays broken: framing is lost. What it keeps is at most one frame and what was
    fed with it.
    """

    def __init__(self, *, from_client: bool) -> None:
        """``from_client``: the peer is a client, not an agent, and may send a client's frames."""
        self._allowed = FROM_CLIENT if from_client else FROM_AGENT
        self._buffer = bytearray()
        self._error: RemoteProtocolError | None = None

    @property
    def kept_bytes(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        if self._error is None:
            self._buffer += data

    def frames(self) -> Iterator[Frame]:
        """Yield every frame that is complete.

        Raises:
            RemoteProtocolError: the peer broke the rules; always fatal.
        """
        while True:
            if self._error is not None:
                raise self._error
            frame = self._next()
            if frame is None:
                return
            yield frame

    def _next(self) -> Frame | None:
        if not self._buffer:
            return None
        kind = FRAME_TYPES.get(self._buffer[0])
        # told from the first byte, so that a peer of another protocol is answered at once
        if kind is None:
            raise self._broken(f"frame type {self._buffer[0]:#04x} is unknown: no console client?")
        if kind not in self._allowed:
            raise self._broken(f"{kind.__name__} is not for this side to send")
        if len(self._buffer) < _HEADER_BYTES:
            return None
        size_bytes = int.from_bytes(self._buffer[1:_HEADER_BYTES], "big")
        if size_bytes > MAX_PAYLOAD_BYTES:
            raise self._broken(
                f"{kind.__name__} of {size_bytes} bytes, at most {MAX_PAYLOAD_BYTES}"
            )
        end = _HEADER_BYTES + size_bytes
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_HEADER_BYTES:end])
        del self._buffer[:end]
        return self._read(kind, payload)

    def _read(self, kind: type[Frame], payload: bytes) -> Frame:
        if kind is Data or kind is Errors:
            return kind(data=payload)
        if kind is End:
            if payload:
                raise self._broken(f"End with {len(payload)} bytes of payload")
            return End()
        try:
            value = msgpack.unpackb(payload, raw=False)
            return kind.from_wire(value, kind.__name__)
        except CallError as error:
            raise self._broken(error.message) from None
        except (ValueError, msgpack.UnpackException) as error:
            raise self._broken(f"{kind.__name__} is no MessagePack: {error}") from None

    def _broken(self, text: str) -> RemoteProtocolError:
        self._error = RemoteProtocolError(text, fatal=True)
        self._buffer.clear()
        return self._error
