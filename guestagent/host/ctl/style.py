"""How text looks to a person: colours, sizes and times in words, tables that fit the terminal.

Tables are not by rich.table: it cuts cells at their end, and names of dm devices differ there.
"""

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import click

__all__ = (
    "ago",
    "count_of",
    "cut",
    "described",
    "elided",
    "guarded",
    "has_colour",
    "human_bytes",
    "human_seconds",
    "natural_key",
    "paint",
    "plain",
    "spent",
    "table",
    "terminal_columns",
    "tint",
    "width_of",
    "words_of",
)

#: Word for a state -> its colour in every table.
_COLOURS = {
    "ready": "green",
    "mounted": "green",
    "V": "green",
    "degraded": "yellow",
    "warning": "yellow",
    "corrupted": "red",
    "changed": "red",
    "device_lost": "red",
    "C": "red",
    "error": "red",
}
_BAD_ENDINGS = ("_failed", "_corrupted", "_lost")
#: What ``click.style`` writes for the colours and for bold text.
_COLOUR_CODE = re.compile(r"(\x1b\[(?:0|1|3[0-7])m)")
_PARTS = re.compile(r"[0-9]+|[^0-9]+")
_GAP = 2
#: No column is shortened below this width.
_LEAST_COLUMNS = 9
#: The first column is shortened below this width only where one or two columns are left.
_NAME_COLUMNS = 20


def has_colour() -> bool:
    """Return whether the standard output shows colours and NO_COLOR (no-color.org) is not set."""
    if os.environ.get("NO_COLOR"):
        return False
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, colour: str | None, *, bold: bool = False) -> str:
    """Return ``text`` in a colour where the standard output shows colours."""
    if (colour is None and not bold) or not has_colour():
        return text
    return click.style(text, fg=colour, bold=bold or None)


def tint(word: str) -> str | None:
    """Return the colour of a word for a state, None for other words."""
    word = word.strip()
    if word.endswith(_BAD_ENDINGS):
        return "red"
    return _COLOURS.get(word)


def plain(text: str) -> str:
    """Return text for a terminal, with control and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def guarded(text: str) -> str:
    """Return a text of several lines for a terminal: control characters that are no colour of
    ``paint`` are escaped. For all of an output, of which each part should be plain already."""
    return "\n".join(map(_guarded_line, text.split("\n")))


def _guarded_line(line: str) -> str:
    if line.isprintable():
        return line
    parts = _COLOUR_CODE.split(line) if has_colour() else [line]
    return "".join(part if i % 2 else plain(part) for i, part in enumerate(parts))


def words_of(value: object) -> str:
    """Return a plain value in words: yes or no, hexadecimal for bytes, ``-`` for none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, bytes):
        return value.hex() or "-"
    if isinstance(value, Mapping):
        return " ".join(f"{plain(str(key))}={words_of(each)}" for key, each in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return " ".join(map(words_of, value)) or "-"
    return "-" if value in (None, "") else plain(str(value))


def count_of(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def spent(timings_ms: Mapping[str, float]) -> str:
    """Return the milliseconds of each step."""
    return "  ".join(f"{step} {ms:.1f}" for step, ms in timings_ms.items())


def described(
    kind: str, name: str, state: str, facts: Iterable[tuple[str, str]], more: str = ""
) -> str:
    """Return the description of a layer or overlay: its state, and a line for each fact."""
    lines = [f"{kind} {plain(name)}: {paint(plain(state), tint(state))}{more}"]
    return "\n".join((*lines, *(f"  {label:10}  {plain(text)}" for label, text in facts)))


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key by which dm-2 comes before dm-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _PARTS.findall(name)]


def human_bytes(size_bytes: int) -> str:
    """Return a size as 512 B, 12.0 KiB, 1.5 GiB."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1023.95 or unit == "TiB":
            break
    return f"{size:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """Return a duration in its two largest units: 3.2 s, 4 min 10 s, 2 h 5 min, 3 d 4 h."""
    if not math.isfinite(seconds):  # of a peer
        return f"{seconds} s"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def ago(unix_ms: int) -> str:
    """Return how long ago a moment was, by this machine's clock."""
    return human_seconds(max(0.0, time.time() - unix_ms / 1000)) + " ago"


# --- tables


def terminal_columns() -> int | None:
    """Return the width of the terminal, or COLUMNS; None where the output is no terminal."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return None


def width_of(text: str) -> int:
    """Return the width of a text: wide characters take two columns, combining characters none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, columns: int | None = None
) -> str:
    """Return columns as wide as their longest cell, numbers to the right.

    Where that is wider than the terminal (or ``columns``), cells are shortened in the middle, where
    long names differ least, and the last columns are dropped.
    """
    if not rows:
        return "none"
    cells = [list(header), *([plain(cell) for cell in row] for row in rows)]
    limit = columns if columns is not None else terminal_columns()
    widths = _fitting([max(map(width_of, column)) for column in zip(*cells, strict=True)], limit)
    right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        padded = [
            _cell(cell, width, to_the_right=to_the_right, is_head=number == 0)
            for cell, width, to_the_right in zip(
                row, widths, right, strict=False
            )  # dropped columns are at the end
        ]
        lines.append((" " * _GAP).join(padded).rstrip())
    return "\n".join(lines)


def elided(text: str, columns: int) -> str:
    """Return ``text`` in at most ``columns`` columns; a longer text loses its middle."""
    if width_of(text) <= columns:
        return text
    if columns <= 1:
        return "…"[:columns]
    room = columns - 1
    tail = _ending(text, room // 2)
    return _beginning(text, room - width_of(tail)) + "…" + tail


def cut(text: str, columns: int | None) -> str:
    """Return a line in at most ``columns`` columns; a line that is cut loses its colours."""
    bare = click.unstyle(text)
    if columns is None or width_of(bare) <= columns:
        return text
    return _beginning(bare, columns - 1) + "…"


def _fitting(widths: list[int], limit: int | None) -> list[int]:
    """Return widths whose sum fits ``limit``, of fewer columns where not all fit.

    The first column, which names what a row is about, is the last to be shortened.
    """
    if limit is None:
        return widths
    widths = [min(width, limit) for width in widths]
    for count in range(len(widths), 1, -1):
        fitted = _shortened(widths[:count], limit, least_of_first=_NAME_COLUMNS)
        if fitted is not None:
            return fitted
    for count in (min(2, len(widths)), 1):
        fitted = _shortened(widths[:count], limit, least_of_first=_LEAST_COLUMNS)
        if fitted is not None:
            return fitted
    return widths[:1]


def _shortened(widths: list[int], limit: int, *, least_of_first: int) -> list[int] | None:
    """Shorten the widest column repeatedly until the sum fits; None where it cannot."""
    least = [least_of_first, *[_LEAST_COLUMNS] * (len(widths) - 1)]
    for _ in range(sum(widths) + _GAP * (len(widths) - 1) - limit):
        longer = [i for i, width in enumerate(widths) if width > least[i]]
        if not longer:
            return None
        widths[max(longer, key=widths.__getitem__)] -= 1
    return widths


def _cell(text: str, width: int, *, to_the_right: bool, is_head: bool) -> str:
    shown = elided(text, width)
    room = " " * (width - width_of(shown))
    painted = paint(shown, None, bold=True) if is_head else paint(shown, tint(shown))
    return room + painted if to_the_right else painted + room


def _is_number(text: str) -> bool:
    """Return whether a cell is a number, with or without a unit, or the ``-`` for none."""
    head = text.partition(" ")[0]
    return text == "-" or head.replace(".", "", 1).replace("-", "", 1).isdigit()


def _beginning(text: str, columns: int) -> str:
    return text[: _fitting_count(text, columns)]


def _ending(text: str, columns: int) -> str:
    return text[len(text) - _fitting_count(text[::-1], columns) :]


def _fitting_count(text: str, columns: int) -> int:
    """Return how many characters from the start fit: text of a peer may have millions."""
    if text.isascii():
        return min(len(text), max(0, columns))
    for count, character in enumerate(text):
        columns -= width_of(character)
        if columns < 0:
            return count
    return len(text)
