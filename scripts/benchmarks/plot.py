"""A chart and a table of one run: how many times as long a row takes as the one beside it.

The chart is of the best samples, which other work on the machine moves least.
"""

from collections.abc import Sequence
from pathlib import Path

from scripts.benchmarks.rows import Row, cell_of

__all__ = ("markdown_table", "write_plot")

_COLOURS = {"uml": "#4477aa", "native": "#228833", "qemu": "#aa3377"}
_OTHER = "#888888"


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Write an SVG with a bar for each row of times that has another to be compared with.

    Raises:
        ValueError: there is none.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["best_ratio"] is not None and row["unit"] == "ms"]
    if not shown:
        raise ValueError("no row is a ratio of times: nothing to plot")
    names = [f"{row['name']}  /  {row['versus']}" for row in shown]
    ratios = [float(str(row["best_ratio"])) for row in shown]
    colours = [_COLOURS.get(str(row["bed"]), _OTHER) for row in shown]
    # text stays text, and two charts of the same rows are the same file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 8}):
        figure = Figure(figsize=(9, 0.9 + 0.19 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(shown))
        widths = [ratio - 1 for ratio in ratios]
        bars = axes.barh(places, widths, left=1, color=colours, height=0.7, tick_label=names)
        axes.bar_label(bars, [f"{ratio:.2g}" for ratio in ratios], padding=2, fontsize=7)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(min(0.25, *ratios) / 1.3, max(2.0, *ratios) * 1.4)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("times as long, best samples of one run (" + _legend(shown) + ")")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _legend(rows: Sequence[Row]) -> str:
    words = {"#4477aa": "blue", "#228833": "green", "#aa3377": "purple", _OTHER: "grey"}
    beds = dict.fromkeys(str(row["bed"]) for row in rows)
    return ", ".join(f"{words[_COLOURS.get(bed, _OTHER)]}: {bed}" for bed in beds)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table of Markdown, without those whose name says no more than what the
    next row is compared with."""
    columns = ("bed", "name", "unit", "best", "median", "n", "best_ratio", "ratio", "versus")
    floors = {f"{row['name']}, {row['versus']}" for row in rows}
    lines = [tuple(column.replace("_", " ") for column in columns), ("---",) * len(columns)]
    lines += [
        tuple(_rounded(row[column]) for column in columns)
        for row in rows
        if row["name"] not in floors
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rounded(value: object) -> str:
    """Return a field with three digits at most; nothing for the least of differences, a number
    below 0, which says what else the machine did."""
    if not isinstance(value, float):
        return cell_of(value)
    return "" if value < 0 else cell_of(float(f"{value:.3g}"))
