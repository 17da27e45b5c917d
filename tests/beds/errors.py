"""What tests expect of a request that is refused."""

import contextlib
from collections.abc import Iterator

import pytest

from vsock.errors import CallError


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
