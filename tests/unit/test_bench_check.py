"""Bounds of benchmarks: on ratios, counts and sizes, never on times. And their chart."""

import json
from pathlib import Path

import pytest

from scripts.benchmarks.__main__ import SHORT, SUITES
from scripts.benchmarks.check import Bound, misses, read_bounds
from scripts.benchmarks.plot import markdown_table, write_plot
from scripts.benchmarks.rows import Row, row

ROWS: list[Row] = [
    row("bed", "bare", "ms", [2.0]),
    row("bed", "mount", "ms", [5.0], versus="bare", floor=[2.0]),
    row("bed", "image", "ms", [7.5]),
    row("bed", "calls", "", [87.0]),
    row("bed", "memory", "MiB", [11.5]),
]


@pytest.mark.parametrize(
    ("bound", "problem"),
    [
        (Bound(row="mount", at_most=2.5), None),
        (Bound(row="mount", at_most=2.4), "mount: 2.5 times bare, at most 2.4"),
        (Bound(row="image", over="mount", at_most=1.5), None),
        (Bound(row="image", over="mount", at_most=1.4), "image: 1.5 times mount, at most 1.4"),
        (Bound(row="calls", at_most=87), None),
        (Bound(row="calls", at_most=86), "calls: 87, at most 86"),
        (Bound(row="memory", at_most=11), "memory: 11.5 MiB, at most 11"),
        (Bound(row="image", at_most=100), "image: a time is not bounded"),
        (Bound(row="unmount", at_most=1), "unmount: no such row"),
        (Bound(row="image", over="x", at_most=1), "image: no such row to be compared with: x"),
    ],
)
def test_a_row_is_held_to_its_bound(bound: Bound, problem: str | None) -> None:
    found = misses(ROWS, [bound])
    assert found == [] if problem is None else found[0].startswith(problem)


def test_short_run_is_checked_on_the_rows_it_has() -> None:
    bounds = [Bound(row="calls", at_most=1), Bound(row="restart", at_most=1, short=False)]
    assert len(misses(ROWS, bounds)) == 2
    assert len(misses(ROWS, bounds, short=True)) == 1


@pytest.mark.parametrize(
    "document", ["[]", '{"s": [{"row": "a"}]}', '{"s": [{"row": "a", "at_most": 1, "atmost": 2}]}']
)
def test_a_malformed_file_is_refused(tmp_path: Path, document: str) -> None:
    path = tmp_path / "bounds.json"
    path.write_text(document)
    with pytest.raises(ValueError, match=r"bounds\.json"):
        read_bounds(path)


def test_the_bounds_of_the_repository_are_of_suites_there_are(tmp_path: Path) -> None:
    bounds = read_bounds()
    assert set(bounds) <= set(SUITES)
    assert set(SHORT) <= set(bounds)
    assert all(any(bound.short for bound in bounds[name]) for name in SHORT)
    path = tmp_path / "bounds.json"
    path.write_text(
        json.dumps({name: [b._asdict() for b in each] for name, each in bounds.items()})
    )
    assert read_bounds(path) == bounds


def test_a_chart_has_a_bar_for_each_ratio_of_times(tmp_path: Path) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for path in (first, second):
        write_plot(ROWS, path)
    text = first.read_text()
    assert "mount  /  bare" in text
    assert ">2.5<" in text
    assert "image  /" not in text
    assert second.read_text() == text
    with pytest.raises(ValueError, match="nothing to plot"):
        write_plot(ROWS[:1], first)


def test_the_table_of_a_page_has_a_line_for_each_row() -> None:
    lines = markdown_table(ROWS).splitlines()
    assert len(lines) == len(ROWS) + 2
    assert "| bed | mount | ms | 5 | 5 | 1 | 2.5 | 2.5 | bare |" in lines
