"""How things look to a person: colours where a terminal shows them, sizes and times in words."""

import os
import sys
import time

import click

__all__ = ("ago", "has_colour", "human_bytes", "human_seconds", "paint", "plain", "tint")

#: Words that say how something is -> their colour, wherever a table shows them.
_COLOURS = {
    "ready": "green",
    "mounted": "green",
    "V": "green",
    "degraded": "yellow",
    "warning": "yellow",
    "corrupted": "red",
    "device_lost": "red",
    "C": "red",
    "error": "red",
}
_BAD_ENDINGS = ("_failed", "_corrupted", "_lost")


def has_colour() -> bool:
    """Say whether the standard output shows colours and its user wants them (no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, colour: str | None, *, bold: bool = False) -> str:
    """Return ``text`` in a colour where that can be seen."""
    if (colour is None and not bold) or not has_colour():
        return text
    return click.style(text, fg=colour, bold=bold or None)


def tint(word: str) -> str | None:
    """Return the colour of a word that says how something is, None for other words."""
    word = word.strip()
    if word.endswith(_BAD_ENDINGS):
        return "red"
    return _COLOURS.get(word)


def plain(text: str) -> str:
    """Return text for a terminal: what could move its cursor or change its state is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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
    """Return how long a moment is past, by this machine's clock."""
    return human_seconds(max(0.0, time.time() - unix_ms / 1000)) + " ago"
