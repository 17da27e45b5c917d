"""What is skipped on a developer's machine is a failure where everything has to run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def outcomes(directory: Path, tests: dict[str, str], ci: str) -> str:
    for name, text in tests.items():
        (directory / name).write_text(text)
    tally = directory / "tally"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-q", "-c", os.devnull,
         "-p", "no:cacheprovider", "--rootdir", directory, *(directory / name for name in tests)],
        env={**os.environ, "CI": ci, "TEST_TALLY": str(tally)},
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    return tally.read_text()


@pytest.mark.parametrize(
    ("ci", "expected"),
    [
        ("true", "1 passed, 1 failed, 1 error, 1 skipped, 1 xfailed"),
        ("", "1 passed, 3 skipped, 1 xfailed"),
    ],
)
def test_tests(tmp_path: Path, ci: str, expected: str) -> None:
    assert outcomes(tmp_path, {"test_some.py": _TESTS}, ci) == expected


def test_a_module_that_is_skipped_whole(tmp_path: Path) -> None:
    whole = {"test_whole.py": "import pytest\npytest.importorskip('no_such_module')\n"}
    assert outcomes(tmp_path, whole, "true") == "1 error"
