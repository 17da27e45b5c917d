"""Tables fit the terminal, whatever is in them; colours are for terminals only."""

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.host.ctl import style
from guestagent.host.ctl.style import (
    elided,
    guarded,
    human_bytes,
    human_seconds,
    paint,
    table,
    tint,
    width_of,
)

CELLS = st.text(st.characters(blacklist_categories=("Cc", "Cs")), max_size=60)


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    text = table(("NAME", "SIZE"), [("a", "1"), ("longer", "12345")], columns=80)
    assert text.splitlines() == ["NAME     SIZE", "a           1", "longer  12345"]


def test_nothing_to_show() -> None:
    assert table(("NAME",), []) == "none"


def test_the_widest_column_gives_way_in_the_middle() -> None:
    name = "dm-verity-pmem0-" + "0123456789abcdef" * 4
    text = table(("NAME", "DEV", "STATUS"), [(name, "254:1", "V")], columns=50)
    row = text.splitlines()[1]
    assert len(row) <= 50
    assert row.startswith("dm-verity-pmem0-")
    assert "…" in row
    assert row.split()[0].endswith("cdef")
    assert row.split()[1:] == ["254:1", "V"]


@pytest.mark.parametrize("columns", [80, 60, 50, 40, 30, 12])
def test_a_narrow_terminal_keeps_the_first_column(columns: int) -> None:
    row = ("layer-of-the-image", "mounted", "erofs", "53.0 MiB", "V", "root", "/run/layers/image")
    header = ("LAYER", "STATE", "FS", "SIZE", "VERITY", "USED BY", "TARGET")
    shown = table(header, [row], columns=columns)
    assert all(width_of(line) <= columns for line in shown.splitlines())
    assert shown.startswith("LAYER")
    if columns >= 30:
        assert "layer-of-the-image" in shown
        assert "mounted" in shown


@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5),
    st.integers(min_value=30, max_value=120),
)
def test_every_line_fits(rows: list[tuple[str, str, str]], columns: int) -> None:
    text = table(("A", "B", "C"), rows, columns=columns)
    assert len(text.split("\n")) == len(rows) + 1
    assert all(width_of(line) <= columns for line in text.split("\n"))


@given(CELLS, st.integers(min_value=0, max_value=70))
def test_elided_text_fits(text: str, columns: int) -> None:
    assert width_of(elided(text, columns)) <= columns
    if width_of(text) <= columns:
        assert elided(text, columns) == text


def test_wide_characters_take_two_columns() -> None:
    text = table(("NAME", "STATE"), [("層" * 4, "ok"), ("abcd", "ok")], columns=80)
    first, second = text.splitlines()[1:]
    assert width_of(first) == width_of(second) == 8 + 2 + 2


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in table(("NAME",), [("\x1b[2J evil\n",)], columns=80)


def test_without_a_terminal_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert "x" * 500 in table(("NAME",), [("x" * 500,)])


def test_colours_only_where_they_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paint("mounted", "green") == "mounted"
    monkeypatch.setattr(style.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert paint("mounted", "green") == click.style("mounted", fg="green")
    shown = table(("STATE", "NAME"), [("corrupted", "x")], columns=40)
    assert click.style("corrupted", fg="red") in shown
    assert click.unstyle(shown).splitlines()[1] == "corrupted  x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("mounted", "green") == "mounted"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert paint("mounted", "green") == "mounted"


def test_bad_news_is_red() -> None:
    assert {tint(kind) for kind in ("layer_corrupted", "layer_device_lost", "C")} == {"red"}
    assert tint("layer_mounted") is None


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1 << 50, "1024.0 TiB"),
    ],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert human_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59, "59 s"), (61, "1 min 1 s"), (3723, "1 h 2 min"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_a_cell_of_any_length_is_cut_at_once() -> None:
    """By work in proportion to its length: a guest names its layers itself."""
    for character in ("x", "\N{GRINNING FACE}", "\N{LATIN SMALL LETTER E WITH ACUTE}"):
        lines = table(("A", "B"), [("a", character * 100_000)], columns=40).splitlines()
        assert [width_of(line) <= 40 for line in lines] == [True, True]


def test_guarded_text_keeps_own_colours_and_escapes_other_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(style, "has_colour", lambda: True)
    ours = f"{paint('ready', 'green', bold=True)}\n{paint('x', 'red')}"
    assert guarded(ours) == ours
    assert guarded("\x1b[8mhidden\x1b[0m\r\x1b]0;x\x07") == "\\x1b[8mhidden\x1b[0m\\r\\x1b]0;x\\x07"
    monkeypatch.setattr(style, "has_colour", lambda: False)
    assert guarded(ours) == "\\x1b[32m\\x1b[1mready\\x1b[0m\n\\x1b[31mx\\x1b[0m"
