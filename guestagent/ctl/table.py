"""Plain tables that fit the terminal."""

import shutil
from collections.abc import Sequence

__all__ = ("table",)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns as wide as their longest cell; the last one is cut at the terminal's edge."""
    if not rows:
        return "none"
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    edge = shutil.get_terminal_size(fallback=(160, 24)).columns
    lines = []
    for row in (header, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip()[:edge])
    return "\n".join(lines)
