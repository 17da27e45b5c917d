"""Calls in tests: those that are refused, those that are made at once, and those of programs."""

import contextlib
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from vsock.errors import CallError

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@contextlib.contextmanager
def call_error(
    code: str, *, match: str | None = None, **fields: object
) -> Iterator[pytest.ExceptionInfo[CallError]]:
    """Expect a CallError of this code in the block.

    ``match`` is a regular expression found in its text, ``fields`` are further attributes of it,
    such as ``step`` and ``object``.
    """
    with pytest.raises(CallError, match=match) as caught:
        yield caught
    expected = {"code": code, **fields}
    assert {name: getattr(caught.value, name) for name in expected} == expected, caught.value


def at_once(function: Callable[[Argument], Result], arguments: Iterable[Argument]) -> list[Result]:
    """Call the function by threads, one for each argument; return what it returned, in order.

    What it raises first is raised.
    """
    given = list(arguments)
    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(function, given))


def run(*command: object, **options: Any) -> str:
    """Run a program and return what it printed, other bytes than UTF-8 as ``\\xff``.

    If it fails, the error has all of that.
    """
    words = [str(word) for word in command]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        words, capture_output=True, text=True, errors="backslashreplace", check=False, **options
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout
