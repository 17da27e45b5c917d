"""Plain tables that fit the terminal.

Not by rich.table: it cuts cells at their end, and names of dm devices differ there.
"""

import os
import shutil
import sys
from collections.abc import Sequence

from guestagent.host.ctl.style import paint, plain, tint

__all__ = ("elided", "table", "terminal_columns", "width_of")

_GAP = 2
#: A column is not made narrower than this; what is wider in all is cut at the edge.
_LEAST_COLUMNS = 8


def terminal_columns() -> int | None:
    """Return the width to fit into: the terminal's or COLUMNS; None where nobody looks."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return None


def width_of(text: str) -> int:
    """Return how many columns a text takes: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, columns: int | None = None
) -> str:
    """Return columns as wide as their longest cell, numbers to the right.

    What is wider than the terminal (or ``columns``) has its widest columns shortened in the middle,
    where long names differ least.
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
            for cell, width, to_the_right in zip(row, widths, right, strict=True)
        ]
        lines.append((" " * _GAP).join(padded).rstrip())
    return "\n".join(lines)


def elided(text: str, columns: int) -> str:
    """Return ``text`` in at most so many columns, without its middle where it is longer."""
    if width_of(text) <= columns:
        return text
    if columns <= 1:
        return "…"[:columns]
    room = columns - 1
    tail = _ending(text, room // 2)
    return _beginning(text, room - width_of(tail)) + "…" + tail


def _fitting(widths: list[int], limit: int | None) -> list[int]:
    """Take from the widest column again and again until all fit."""
    if limit is None:
        return widths
    excess = sum(widths) + _GAP * (len(widths) - 1) - limit
    while excess > 0 and max(widths) > _LEAST_COLUMNS:
        widest = max(range(len(widths)), key=widths.__getitem__)
        others = [width for i, width in enumerate(widths) if i != widest]
        floor = max([_LEAST_COLUMNS, *(width for width in others if width < widths[widest])])
        step = min(excess, max(1, widths[widest] - floor))
        widths[widest] -= step
        excess -= step
    return widths


def _cell(text: str, width: int, *, to_the_right: bool, is_head: bool) -> str:
    shown = elided(text, width)
    room = " " * (width - width_of(shown))
    painted = paint(shown, None, bold=True) if is_head else paint(shown, tint(shown))
    return room + painted if to_the_right else painted + room


def _is_number(text: str) -> bool:
    """Say whether a cell is a number, perhaps with a unit, or stands for one that is not there."""
    head = text.partition(" ")[0]
    return text == "-" or head.replace(".", "", 1).replace("-", "", 1).isdigit()


def _beginning(text: str, columns: int) -> str:
    end = len(text)
    while width_of(text[:end]) > columns:
        end -= 1
    return text[:end]


def _ending(text: str, columns: int) -> str:
    begin = 0
    while width_of(text[begin:]) > columns:
        begin += 1
    return text[begin:]
