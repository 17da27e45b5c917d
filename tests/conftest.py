"""What every tier shares: which tier a test is of, and the tally that scripts/test prints."""

import os
from pathlib import Path

import hypothesis
import pytest

_HERE = Path(__file__).parent
_OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed")

# a slow machine is no defect of the code under test
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(_HERE).parts[0]
        if tier in ("kernel", "vm"):
            item.add_marker(tier)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Leave the counts for scripts/test, in the file that it named."""
    path = os.environ.get("TEST_TALLY")
    if path:
        stats = terminalreporter.stats
        counts = [(len(stats.get(outcome, ())), outcome) for outcome in _OUTCOMES]
        text = ", ".join(f"{count} {outcome}" for count, outcome in counts if count)
        Path(path).write_text(text or "no tests")
