"""The documentation is made from the code, so it cannot fall behind it unnoticed."""

import re
from pathlib import Path

import pytest

from scripts.reference import SECTIONS, update

PROJECT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted((PROJECT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_generated_tables_are_current(path: Path) -> None:
    text = path.read_text()
    assert update(text) == text, "run scripts/docs"


def test_every_table_has_its_place() -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    for name in SECTIONS:
        assert f"<!-- begin {name} -->" in text


def test_a_stale_table_is_noticed() -> None:
    stale = "<!-- begin error-codes -->\nold\n<!-- end error-codes -->"
    assert update(stale) != stale
    assert update(update(stale)) == update(stale)


@pytest.mark.parametrize(
    "path",
    [*DOCUMENTS, *sorted(PROJECT.glob("*.md"))],
    ids=lambda path: path.name,
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
