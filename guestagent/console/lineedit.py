r"""A line editor as a state machine: a key in, what to print out. Pure.

The line stays in one row and scrolls sideways when it is longer. What is printed are characters,
backspaces and spaces, never an escape sequence, so that any terminal will do, a dumb one too; only
``^L`` clears a screen, where the terminal is known to have one.
"""

from collections.abc import Callable

from guestagent.console import words

__all__ = ("MAX_KEY_BYTES", "History", "LineEditor", "decode_key", "width_of")

BELL = "\a"
MAX_LINE_CHARACTERS = 4000
_MAX_HISTORY_LINES = 200
_MIN_FIELD_COLUMNS = 8
_MAX_LISTED = 100
_CLEAR = "\x1b[H\x1b[2J"
#: Characters of two columns: East Asian wide and full-width, pictographs (Unicode, TR 11).
_WIDE = (
    (0x1100, 0x115F), (0x2E80, 0xA4CF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFE30, 0xFE6F),
    (0xFF00, 0xFF60), (0xFFE0, 0xFFE6), (0x1F300, 0x1FAFF), (0x20000, 0x3FFFD),
)  # fmt: skip

_ESC = 0x1B
#: A longer escape sequence is no key's.
MAX_KEY_BYTES = 24
_CONTROLS = {0x08: "backspace", 0x09: "tab", 0x0A: "enter", 0x0D: "enter", 0x7F: "backspace"}
_FINAL = dict(zip("ABCDFH", ("up", "down", "right", "left", "end", "home"), strict=True))
_TILDE = dict(
    zip(
        "12345678",
        ("home", "insert", "delete", "end", "pageup", "pagedown", "home", "end"),
        strict=True,
    )
)

#: Words that could stand where the unfinished one does.
Completer = Callable[[words.Partial], "list[str]"]


def decode_key(data: bytes | bytearray) -> tuple[str, int] | None:
    """Return the first key in ``data`` and its length in bytes, None when it is not complete.

    A key is the character itself, or a name: ``enter tab backspace delete insert left right up down
    home end pageup pagedown``, ``^A`` to ``^_`` for the other control characters, ``alt-X``. Bytes
    that stand for no key give the empty text.
    """
    if not data:
        return None
    first = data[0]
    if first == _ESC:
        return _decode_escape(data)
    if first < 0x20 or first == 0x7F:
        return _CONTROLS.get(first, f"^{chr(first + 0x40)}"), 1
    if first < 0x80:
        return chr(first), 1
    return _decode_utf8(data)


def _decode_utf8(data: bytes | bytearray) -> tuple[str, int] | None:
    head = bytes(data[:4])
    try:
        character = head.decode()[0]
    except UnicodeDecodeError as error:
        if not error.start:
            return None if error.reason == "unexpected end of data" else ("", 1)
        character = head[: error.start].decode()[0]
    return (character if character.isprintable() else ""), len(character.encode())


def _decode_escape(data: bytes | bytearray) -> tuple[str, int] | None:
    if len(data) < 2:
        return None
    second = data[1]
    if second == ord("["):
        return _decode_sequence(data)
    if second == ord("O"):  # a keypad in application mode
        return (_FINAL.get(chr(data[2]), ""), 3) if len(data) > 2 else None
    if second == _ESC:
        return "", 1
    if second == 0x7F:
        return "alt-backspace", 2
    if 0x20 <= second < 0x7F:
        return f"alt-{chr(second)}", 2
    return "", 1


def _decode_sequence(data: bytes | bytearray) -> tuple[str, int] | None:
    """Read ESC [ PARAMETERS FINAL (ECMA-48, section 5.4)."""
    for end in range(2, min(len(data), MAX_KEY_BYTES)):
        byte = data[end]
        if 0x40 <= byte < 0x7F:
            parameters = bytes(data[2:end]).decode("ascii")
            number = parameters.partition(";")[0]
            final = chr(byte)
            name = _TILDE.get(number, "") if final == "~" else _FINAL.get(final, "")
            return name, end + 1
        if not 0x20 <= byte < 0x40:  # cut short by something else
            return "", end
    return ("", MAX_KEY_BYTES) if len(data) >= MAX_KEY_BYTES else None


def width_of(text: str) -> int:
    """Return how many columns printable characters take."""
    if text.isascii():
        return len(text)
    return sum(2 if any(a <= ord(c) <= b for a, b in _WIDE) else 1 for c in text)


class History:
    """The lines that were entered, oldest first; bounded."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        if line.strip() and self.lines[-1:] != [line]:
            self.lines.append(line)
            del self.lines[:-_MAX_HISTORY_LINES]


class LineEditor:
    """Edits one line. ``outcome`` is None, then one of ``line``, ``interrupt`` and ``end``."""

    def __init__(
        self,
        prompt: str,
        *,
        columns: int,
        history: History,
        complete: Completer,
        clears: bool = False,
    ) -> None:
        self.text = ""
        self.cursor = 0
        self.outcome: str | None = None
        self._prompt = prompt
        self._columns = columns
        self._history = history
        self._complete = complete
        self._clears = clears
        self._is_full = False
        self._killed = ""
        self._key = ""
        self._last_key = ""
        self._recall_at: int | None = None
        self._recall_prefix = ""
        self._before_recall = ""
        # what is on the screen behind the prompt: the characters, and where the cursor is in them
        self._shown = ""
        self._shown_cursor = 0
        self._first = 0

    def start(self) -> str:
        """Return what to print first."""
        return self._prompt

    def resize(self, columns: int) -> str:
        """Take note of another width; return the line anew."""
        self._columns = columns
        return "\r" + self._anew()

    def press(self, key: str) -> str:
        """Take a key; return what to print. Not to be called once there is an outcome."""
        self._last_key, self._key = self._key, key
        if key not in ("up", "down", "^P", "^N"):
            self._recall_at = None
        action = _ACTIONS.get(key)
        if action is not None:
            return action(self)
        if len(key) == 1:
            return self._insert(key)
        return ""

    # --- what is printed

    def _field_columns(self) -> int:
        return max(_MIN_FIELD_COLUMNS, self._columns - width_of(self._prompt) - 1)

    def _visible(self) -> tuple[str, int]:
        """Return the part of the line that is to be seen, and the cursor in it."""
        room = self._field_columns()
        if self.cursor < self._first:
            self._first = max(0, self.cursor - room // 4)
        while width_of(self.text[self._first : self.cursor]) > room:
            self._first += max(1, room // 4)
        # a line that has become shorter comes back, by steps as it went: each costs a whole row
        if width_of(self.text) <= room:
            self._first = 0
        elif width_of(self.text[self._first :]) <= room // 2:
            while width_of(self.text[self._first - 1 :]) <= room - room // 4:
                self._first -= 1
        end = self._first
        while end < len(self.text) and width_of(self.text[self._first : end + 1]) <= room:
            end += 1
        return self.text[self._first : end], self.cursor - self._first

    def _refresh(self) -> str:
        """Return the output that brings the screen up to date."""
        wanted, cursor = self._visible()
        shown, at = self._shown, self._shown_cursor
        same = 0
        while same < min(len(wanted), len(shown)) and wanted[same] == shown[same]:
            same += 1
        out = ""
        if wanted != shown:
            out += _move(shown, at, min(same, len(shown)))
            rest = wanted[same:]
            blank = max(0, width_of(shown[same:]) - width_of(rest))
            out += rest + " " * blank + "\b" * blank
            at = len(wanted)
        out += _move(wanted, at, cursor)
        self._shown, self._shown_cursor = wanted, cursor
        return out

    def _anew(self) -> str:
        self._shown, self._shown_cursor = "", 0
        return self._prompt + self._refresh()

    # --- keys

    def _insert(self, text: str) -> str:
        if len(self.text) + len(text) > MAX_LINE_CHARACTERS:
            # ring the bell once per overflow, not once per byte
            was_full, self._is_full = self._is_full, True
            return "" if was_full else BELL
        self._is_full = False
        self.text = self.text[: self.cursor] + text + self.text[self.cursor :]
        self.cursor += len(text)
        return self._refresh()

    def _remove(self, start: int, end: int, *, keep: bool = False) -> str:
        if start == end:
            return BELL
        if keep:
            self._killed = self.text[start:end]
        self.text = self.text[:start] + self.text[end:]
        self.cursor = start
        return self._refresh()

    def _go(self, position: int) -> str:
        if not 0 <= position <= len(self.text):
            return BELL
        self.cursor = position
        return self._refresh()

    def _enter(self) -> str:
        self.outcome = "line"
        self._history.add(self.text)
        return self._go(len(self.text)) + "\n"

    def _interrupt(self) -> str:
        self.outcome = "interrupt"
        out = self._go(len(self.text))
        room = self._columns - width_of(self._prompt + self._shown)
        return out + ("^C\n" if room > len("^C") else "\n")

    def _end_or_delete(self) -> str:
        if self.text:
            return self._remove(self.cursor, min(self.cursor + 1, len(self.text)))
        self.outcome = "end"
        return "\n"

    def _word_start(self) -> int:
        at = self.cursor
        while at and self.text[at - 1] == " ":
            at -= 1
        while at and self.text[at - 1] != " ":
            at -= 1
        return at

    def _word_end(self) -> int:
        at = self.cursor
        while at < len(self.text) and self.text[at] == " ":
            at += 1
        while at < len(self.text) and self.text[at] != " ":
            at += 1
        return at

    def _recall(self, step: int) -> str:
        """Go to the next line of the history, in one direction, that begins as this one did."""
        lines = self._history.lines
        if self._recall_at is None:
            self._recall_at = len(lines)
            self._recall_prefix = self.text[: self.cursor]
            self._before_recall = self.text
        at = self._recall_at + step
        while 0 <= at < len(lines):
            line = lines[at]
            if line.startswith(self._recall_prefix) and line != self.text:
                return self._show_recalled(at, line)
            at += step
        if step > 0 and self._recall_at < len(lines):
            return self._show_recalled(len(lines), self._before_recall)
        return BELL

    def _show_recalled(self, at: int, line: str) -> str:
        self._recall_at = at
        self.text = line
        self.cursor = len(line)
        return self._refresh()

    def _clear(self) -> str:
        return (_CLEAR if self._clears else "\n") + self._anew()

    def _tab(self) -> str:
        partial = words.unfinished(self.text[: self.cursor])
        candidates = sorted(set(self._complete(partial)))
        if not candidates:
            return BELL
        common = candidates[0]
        for candidate in candidates[1:]:
            while not candidate.startswith(common):
                common = common[:-1]
        if len(candidates) == 1:
            typed = words.quote(common) + ("" if common.endswith(("/", ":", "=")) else " ")
            return self._replace(partial.start, typed)
        if len(common) > len(partial.word):
            return self._replace(partial.start, words.quote(common))
        return self._list(candidates) if self._last_key == "tab" else BELL

    def _replace(self, start: int, typed: str) -> str:
        if len(self.text) + len(typed) > MAX_LINE_CHARACTERS:
            return BELL
        self.text = self.text[:start] + typed + self.text[self.cursor :]
        self.cursor = start + len(typed)
        return self._refresh()

    def _list(self, candidates: list[str]) -> str:
        names = [words.quote(_tail(name)) for name in candidates[:_MAX_LISTED]]
        column = min(max(width_of(name) for name in names) + 2, self._columns)
        across = max(1, (self._columns - 1) // column)
        rows = [names[at : at + across] for at in range(0, len(names), across)]
        out = "".join(
            "".join(name + " " * max(1, column - width_of(name)) for name in row).rstrip() + "\n"
            for row in rows
        )
        if len(candidates) > _MAX_LISTED:
            out += f"and {len(candidates) - _MAX_LISTED} more\n"
        return "\n" + out + self._anew()


def _tail(name: str) -> str:
    """Return the last part of a path: the rest is what was typed."""
    head, separator, _ = name.rstrip("/").rpartition("/")
    return name[len(head) + 1 :] if separator else name


def _move(text: str, start: int, end: int) -> str:
    """Return what moves the cursor within characters that are on the screen."""
    if end >= start:
        return text[start:end]
    return "\b" * width_of(text[end:start])


_ACTIONS: dict[str, Callable[[LineEditor], str]] = {
    "enter": LineEditor._enter,
    "tab": LineEditor._tab,
    "^C": LineEditor._interrupt,
    "^D": LineEditor._end_or_delete,
    "^L": LineEditor._clear,
    "backspace": lambda e: e._remove(max(0, e.cursor - 1), e.cursor),
    "delete": lambda e: e._remove(e.cursor, min(e.cursor + 1, len(e.text))),
    "left": lambda e: e._go(e.cursor - 1),
    "right": lambda e: e._go(e.cursor + 1),
    "^B": lambda e: e._go(e.cursor - 1),
    "^F": lambda e: e._go(e.cursor + 1),
    "home": lambda e: e._go(0),
    "end": lambda e: e._go(len(e.text)),
    "^A": lambda e: e._go(0),
    "^E": lambda e: e._go(len(e.text)),
    "alt-b": lambda e: e._go(e._word_start()),
    "alt-f": lambda e: e._go(e._word_end()),
    "^K": lambda e: e._remove(e.cursor, len(e.text), keep=True),
    "^U": lambda e: e._remove(0, e.cursor, keep=True),
    "^W": lambda e: e._remove(e._word_start(), e.cursor, keep=True),
    "alt-backspace": lambda e: e._remove(e._word_start(), e.cursor, keep=True),
    "^Y": lambda e: e._insert(e._killed),
    "up": lambda e: e._recall(-1),
    "^P": lambda e: e._recall(-1),
    "down": lambda e: e._recall(1),
    "^N": lambda e: e._recall(1),
}
