"""Rows held to the bounds that are kept in ``bounds.json``.

A bound is on a ratio of two rows of one run, each by its best sample, or on what does not depend on
the machine: a count or a size. A bound on a time would say more of the machine than of the code,
and is refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.benchmarks.rows import Row

__all__ = ("Bound", "misses", "read_bounds")

BOUNDS = Path(__file__).with_name("bounds.json")
#: Units of what is counted or weighed, not timed; a count has none.
_STEADY_UNITS = ("", "MiB")
_KEYS = frozenset(("row", "over", "at_most", "short"))


class Bound(NamedTuple):
    """``row`` may be ``at_most`` so many times as much as the row ``over``, or as the row that it
    is measured beside; with neither, ``at_most`` so much.

    ``short`` says whether the short run of its suite has the row.
    """

    row: str
    at_most: float
    over: str | None = None
    short: bool = True

    def problem(self, rows: Sequence[Row]) -> str | None:
        """Return how the row misses the bound, None if it keeps it."""
        found = _row_of(rows, self.row)
        if found is None:
            return f"{self.row}: no such row"
        best, ratio = found["best"], found["best_ratio"]
        assert isinstance(best, int | float)
        if self.over is not None:
            other = _row_of(rows, self.over)
            if other is None:
                return f"{self.row}: no such row to be compared with: {self.over}"
            floor = other["best"]
            assert isinstance(floor, int | float)
            value = round(best / floor, 3)
            what = f"times {self.over}"
        elif ratio is not None:
            assert isinstance(ratio, int | float)
            value, what = ratio, f"times {found['versus']}"
        elif found["unit"] in _STEADY_UNITS:
            value, what = best, str(found["unit"])
        else:
            return f"{self.row}: a time is not bounded, only its ratio to another row"
        if value <= self.at_most:
            return None
        return f"{self.row}: {value:g} {what}".rstrip() + f", at most {self.at_most:g}"


def _row_of(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row["name"] == name), None)


def read_bounds(path: Path = BOUNDS) -> dict[str, tuple[Bound, ...]]:
    """Return the bounds by suite.

    Raises:
        ValueError: the file is malformed; the text says where.
    """
    document = json.loads(path.read_text())
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected an object of suites")
    found: dict[str, tuple[Bound, ...]] = {}
    for suite, entries in document.items():
        bounds = []
        for number, entry in enumerate(entries):
            unknown = set(entry) - _KEYS
            if unknown or not {"row", "at_most"} <= set(entry):
                raise ValueError(f"{path}: {suite}[{number}]: needs row and at_most: {entry}")
            bounds.append(Bound(**entry))
        found[suite] = tuple(bounds)
    return found


def misses(rows: Sequence[Row], bounds: Sequence[Bound], *, short: bool = False) -> list[str]:
    """Return each miss of the rows of one suite; of a ``short`` run those that it has."""
    wanted = (bound for bound in bounds if bound.short or not short)
    return [problem for bound in wanted if (problem := bound.problem(rows)) is not None]
