"""Calls in tests: those that are refused, and those that are made at once."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
