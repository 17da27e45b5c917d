"""Rows of a benchmark: made from samples, printed as a table, written as JSON."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ("Row", "cell_of", "milliseconds", "print_rows", "row", "timed", "write_rows")

Row = dict[str, object]


def row(
    bed: str,
    name: str,
    unit: str,
    samples: Sequence[float],
    *,
    versus: str | None = None,
    floor: Sequence[float] | None = None,
) -> Row:
    """Make a row from samples; ``ratio`` is the median over that of ``floor``, if there is one.

    ``p99`` is towards the bad end: high, but low for what is counted per second. ``best`` is the
    best sample, which other work on the machine moves least, and ``best_ratio`` that over the best
    of ``floor``.
    """
    median = statistics.median(samples)
    ratio = None if floor is None else round(median / statistics.median(floor), 3)
    pick = max if unit.endswith("/s") else min
    best_ratio = None if floor is None else round(pick(samples) / pick(floor), 3)
    return {
        "bed": bed,
        "name": name,
        "unit": unit,
        "median": round(median, 3),
        "p99": round(_percentile(samples, 99, falling=unit.endswith("/s")), 3),
        "n": len(samples),
        "versus": versus,
        "ratio": ratio,
        "best": round(pick(samples), 3),
        "best_ratio": best_ratio,
    }


def _percentile(samples: Sequence[float], percent: int, *, falling: bool) -> float:
    ordered = sorted(samples, reverse=falling)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


@contextmanager
def timed(samples: list[float]) -> Iterator[None]:
    """Add the milliseconds that the block took to ``samples``."""
    begin = time.perf_counter()
    yield
    samples.append((time.perf_counter() - begin) * 1000)


def milliseconds(work: Callable[[], object], count: int) -> list[float]:
    """Do ``work`` ``count`` times; return what each took."""
    samples: list[float] = []
    for _ in range(count):
        with timed(samples):
            work()
    return samples


def print_rows(rows: Sequence[Row]) -> None:
    """Print rows for a person."""
    header = ("bed", "name", "median", "p99", "unit", "n", "ratio", "versus")
    cells = [header, *(tuple(cell_of(one[name]) for name in header) for one in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    for line in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def cell_of(value: object) -> str:
    """Return a field of a row as text."""
    if value is None:
        return ""
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    path.write_text(json.dumps(list(rows), indent=1) + "\n")
