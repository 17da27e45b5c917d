"""The methods of the contract by name, and which of them an agent loads at its start."""

import subprocess
import sys
from pathlib import Path

import pytest

from guestagent.api import METHODS

PROJECT = Path(__file__).resolve().parents[2]
LATE = ("dev.", "net.", "policy.", "pool.", "share.", "volume.")


def test_an_agent_loads_no_records_of_late_parts() -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(PROJECT)!r}, *{sys.path!r}]; import guestagent.agent;"
        "print(*(name for name in sys.modules if name.startswith('guestagent.')))"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "guestagent.api.layers" in loaded
    for name in ("devtree", "net", "share", "thin"):
        assert f"guestagent.api.{name}" not in loaded
        assert f"guestagent.{name}" not in loaded
    assert "guestagent.api.policy" not in loaded
    policy = {name for name in loaded if name.startswith("guestagent.policy.")}
    assert policy == {
        f"guestagent.policy.{name}" for name in ("binding", "binding.keeper", "decision", "gate")
    }


def test_late_methods_are_found_and_not_quick() -> None:
    """The agent knows the quick methods without loading the late ones."""
    late = set(METHODS) - set(METHODS.early)
    assert late == {method for method in METHODS if method.startswith(LATE)}
    assert len(METHODS) == len(METHODS.early) + len(late)
    assert not any(METHODS[method].quick for method in late)
    assert all(METHODS[method].method == method for method in METHODS)


@pytest.mark.parametrize("method", ["", "pool", "pool.", "pool.none", "none.list", "layer.none"])
def test_unknown_method(method: str) -> None:
    assert METHODS.get(method) is None
    assert method not in METHODS
