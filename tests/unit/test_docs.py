"""The documentation is made from the code, so it cannot fall behind it unnoticed."""

import ast
import re
from pathlib import Path

import pytest

from guestagent.api.inspect import ENTRY_TYPES
from scripts.reference import CHOICES, SECTIONS, update

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


def test_every_choice_of_the_contract_is_listed() -> None:
    """Each is a constant with a name, which the table of values has; a new one cannot be missed."""
    used = {"EVENT_KINDS", "ENTRY_TYPES"}  # listed in places of their own
    for path in sorted((PROJECT / "guestagent/api").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_choice":
                assert isinstance(node.args[2], ast.Name), f"{path.name}:{node.lineno}"
                used.add(node.args[2].id)
    assert used - {"EVENT_KINDS", "ENTRY_TYPES"} == set(CHOICES)
    text = (PROJECT / "docs/protocol.md").read_text()
    for letter, kind in ENTRY_TYPES.items():
        assert f"`{letter}` {kind}" in " ".join(text.split())


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
