"""What is skipped on a developer's machine is a failure where everything has to run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import _judge

ROOT = Path(__file__).resolve().parents[2]

_TESTS = """
import pytest

def test_that_runs(): pass

@pytest.mark.skipif(True, reason="a tool is not installed")
def test_marked(): pass

def test_in_the_middle(): pytest.skip("no kernel here")

def test_of_this_machine(): pytest.skip("this kernel has no such thing")

@pytest.mark.xfail(strict=True, reason="known")
def test_known(): raise AssertionError
"""


def test_a_run_where_nothing_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(_TESTS)
    (tmp_path / "test_whole.py").write_text("import pytest; pytest.importorskip('no_such_module')")
    tally = tmp_path / "tally"
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", os.devnull]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        env={**os.environ, "CI": "true", "TEST_TALLY": str(tally)},
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    # in the middle; marked, and the module
    assert tally.read_text() == "1 passed, 1 failed, 2 error, 1 skipped, 1 xfailed"


@pytest.mark.parametrize(("ci", "outcome"), [("", "skipped"), ("true", "failed")])
def test_elsewhere_a_skip_is_a_skip(monkeypatch: pytest.MonkeyPatch, ci: str, outcome: str) -> None:
    monkeypatch.setenv("CI", ci)
    reason = ("file", 1, "Skipped: a tool is not installed")
    report = pytest.TestReport("id", ("file", 1, "test"), {}, "skipped", reason, "call")
    _judge(report)
    assert report.outcome == outcome
