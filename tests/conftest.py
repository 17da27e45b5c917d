"""What every tier shares: which tier a test is of, what may be skipped, and the tally that
scripts/test prints.
"""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

_HERE = Path(__file__).parent
_OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed")

# a slow machine is no defect of the code under test
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

# readline, which pytest loads, leaves the size of a terminal in the environment; it would outweigh
# that of the terminals that tests make
for _name in ("LINES", "COLUMNS"):
    os.environ.pop(_name, None)

# a job in the background of a script is started with Ctrl-C ignored, and programs that a test
# starts and interrupts would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(_HERE).parts[0] if item.path.is_relative_to(_HERE) else ""
        if tier in ("kernel", "vm"):
            item.add_marker(tier)


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over the thousands of tests, which live to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    outcome = yield
    _judge(outcome.get_result())  # type: ignore[attr-defined]  # pluggy's result, which has no type


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    outcome = yield
    _judge(outcome.get_result())  # type: ignore[attr-defined]  # as above


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Let no test be skipped for want of what scripts/setup brings, where everything has to run.

    A reason that begins with "this" tells what no set-up can change: this kernel, this file system,
    this user.
    """
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return
    assert isinstance(report.longrepr, tuple)
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not reason.startswith("this "):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be missing (CI=true): {reason}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Leave the counts for scripts/test, in the file that it named."""
    path = os.environ.get("TEST_TALLY")
    if path:
        stats = terminalreporter.stats
        counts = [(len(stats.get(outcome, ())), outcome) for outcome in _OUTCOMES]
        text = ", ".join(f"{count} {outcome}" for count, outcome in counts if count)
        Path(path).write_text(text or "no tests")
