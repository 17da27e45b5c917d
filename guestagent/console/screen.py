"""What a command prints: made printable, cut to a bound, and shown a page at a time."""

import os
from collections.abc import Iterable, Sequence

from guestagent.console.channel import Channel
from guestagent.console.lineedit import width_of
from vsock.deadline import Deadline
from vsock.errors import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("MAX_OUTPUT_BYTES", "Quit", "Screen", "printable", "show", "size_text")

#: What one command may print, unless it was asked to follow something.
MAX_OUTPUT_BYTES = 16 * 1024 * 1024
_HELD_BYTES = 8 * 1024
#: A line without an end is shown in pieces, so that it can be paged too.
_PIECE_CHARACTERS = 512
_MORE = "--more--"
_GAP = "  "


class Quit(Exception):
    """The person asked for no more output."""


def printable(text: str) -> str:
    r"""Return text with everything but line ends and tabs that is not printable as ``\xNN``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def _escape(c: str) -> str:
    if "\udc80" <= c <= "\udcff":
        return f"\\x{ord(c) - 0xDC00:02x}"
    return "".join(f"\\x{byte:02x}" for byte in c.encode("utf-8", "surrogatepass"))


def show(value: bytes | str) -> str:
    """Return a name or a path for people, in one line."""
    text = os.fsdecode(value)
    return printable(text).replace("\n", "\\x0a").replace("\t", "\\x09")


def size_text(size_bytes: int) -> str:
    """Return a size with the largest binary unit that leaves a number of one digit or more."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            return f"{int(value)} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PiB"


class Screen:
    """One command's output. Not thread-safe.

    ``next_key`` waits for a key of the person's; without it, and without a terminal, nothing is
    paged.
    """

    def __init__(
        self,
        channel: Channel,
        deadline: Deadline,
        *,
        next_key: "Callable[[], str] | None" = None,
    ) -> None:
        self.is_terminal = channel.hello.terminal
        self.term = channel.hello.term
        self._channel = channel
        self._deadline = deadline
        self._next_key = next_key
        self._held = bytearray()
        self._left_bytes = MAX_OUTPUT_BYTES
        self._rows = 0
        self._column = 0

    @property
    def columns(self) -> int:
        return self._channel.size.columns

    @property
    def rows(self) -> int:
        return self._channel.size.rows

    @property
    def clears(self) -> bool:
        """Whether the terminal understands escape sequences."""
        return self.is_terminal and self.term not in ("", "dumb", "unknown")

    def follow(self) -> None:
        """Print without an end and without pages from now on."""
        self._next_key = None
        self._left_bytes = 1 << 62

    def line(self, text: str = "") -> None:
        """Print a line."""
        self.write(text + "\n")

    def lines(self, lines: Iterable[str]) -> None:
        for text in lines:
            self.line(text)

    def write(self, text: str) -> None:
        """Print text, with unprintable characters escaped.

        Raises:
            Quit: the person asked for no more.
            CallError: ``cancelled``; ``resource``, there is more than a command may print.
        """
        for piece in printable(text).splitlines(keepends=True):
            for start in range(0, len(piece), _PIECE_CHARACTERS):
                self._put(piece[start : start + _PIECE_CHARACTERS])

    def raw(self, data: bytes) -> None:
        """Send bytes unchanged."""
        self._hold(data)

    def clear(self) -> None:
        """Begin an empty screen, or at least a new line."""
        self.raw(b"\x1b[H\x1b[2J" if self.clears else b"\r\n" if self.is_terminal else b"\n")

    def error(self, text: str) -> None:
        """Print a line about an error."""
        self.flush()
        self._channel.write_error(self._encode(printable(text) + "\n"), self._deadline)

    def flush(self) -> None:
        """Send what is held back."""
        if self._held:
            data = bytes(self._held)
            self._held.clear()
            self._channel.write(data, self._deadline)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print columns; on a terminal, the widest cells are cut until a row fits."""
        if not rows:
            self.line("none")
            return
        cells = [[show(cell) for cell in row] for row in (header, *rows)]
        widths = [max(width_of(row[i]) for row in cells) for i in range(len(header))]
        if self.is_terminal:
            _narrow(widths, self.columns - 1 - len(_GAP) * (len(header) - 1), header)
        for row in cells:
            padded = (_fit(cell, width) for cell, width in zip(row, widths, strict=True))
            self.line(_GAP.join(padded).rstrip())

    def fields(self, pairs: "Sequence[tuple[str, object]]") -> None:
        """Print names with their values; an empty value is left out."""
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            if value not in (None, "", ()):
                self.line(f"{name:{width}}{_GAP}{show(str(value))}")

    def _put(self, piece: str) -> None:
        ends = piece.endswith("\n")
        if self._next_key is not None and self._rows >= max(1, self.rows - 1):
            self._more(self._next_key)
        self._column += width_of(piece.rstrip("\n").expandtabs())
        if ends:
            self._rows += max(1, -(-self._column // self.columns))
            self._column = 0
        else:
            self._rows += self._column // self.columns
            self._column %= self.columns
        data = self._encode(piece)
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise CallError(
                "resource",
                "there is more than a command may print",
                hint="ask for less: a range, a name, fewer levels",
            )
        self._hold(data)

    def _hold(self, data: bytes) -> None:
        self._held += data
        if len(self._held) >= _HELD_BYTES:
            self.flush()

    def _encode(self, text: str) -> bytes:
        if self.is_terminal:
            text = text.replace("\n", "\r\n")
        return text.encode("utf-8", "backslashreplace")

    def _more(self, next_key: "Callable[[], str]") -> None:
        """Wait for the person: a space for a page, enter for a line, q for no more."""
        self._hold(_MORE.encode())
        self.flush()
        try:
            while True:
                key = next_key()
                if key in ("q", "Q", "^C", "^D"):
                    raise Quit
                if key in (" ", "f", "^F", "pagedown", "tab"):
                    self._rows = 0
                    return
                if key in ("enter", "j", "down"):
                    self._rows -= 1
                    return
                if key in ("G", "end"):
                    self._next_key = None
                    return
        finally:
            blank = len(_MORE)
            self._hold(b"\r" + b" " * blank + b"\r")


def _narrow(widths: list[int], room: int, header: Sequence[str]) -> None:
    """Cut the widest columns until they fit, none below its title."""
    least = [min(width, max(len(title), 4)) for width, title in zip(widths, header, strict=True)]
    while sum(widths) > room:
        slack = [width - low for width, low in zip(widths, least, strict=True)]
        widest = max(range(len(widths)), key=lambda i: (slack[i] > 0, widths[i]))
        if slack[widest] <= 0:
            return
        widths[widest] -= 1


def _fit(cell: str, width: int) -> str:
    excess = width_of(cell) - width
    if excess <= 0:
        return cell + " " * -excess
    head = (width - 2) // 2
    tail = width - 2 - head
    return f"{cell[:head]}..{cell[len(cell) - tail :]}" if width > 4 else cell[:width]
