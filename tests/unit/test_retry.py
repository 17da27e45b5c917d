"""Retrying: only what is temporary, only within the deadline, and a cancel ends the pause."""

import asyncio
import errno
import threading

import pytest

from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.retry import has_errno, retry, retry_async

is_absent = has_errno(errno.ENOENT)
ABSENT = OSError(errno.ENOENT, "absent")


class Attempts:
    """Raises the given errors, one at each call, then returns the number of calls."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls

    async def asked(self) -> int:
        return self()


def test_named_errnos_are_retried_and_nothing_else() -> None:
    with Deadline(60.0) as deadline:
        assert retry(Attempts(ABSENT, ABSENT), deadline, when=is_absent, step="wait") == 3
        for error in (OSError(errno.EACCES, "no"), ValueError("no")):
            attempts = Attempts(error)
            with pytest.raises(type(error), match="no"):
                retry(attempts, deadline, when=is_absent, step="wait")
            assert attempts.calls == 1


def test_the_last_error_is_raised_when_no_time_is_left() -> None:
    attempts = Attempts(*[ABSENT] * 99)
    with Deadline(0.05) as deadline, pytest.raises(OSError, match="absent"):
        retry(attempts, deadline, when=is_absent, step="wait")
    assert 1 < attempts.calls < 10


def test_a_cancel_ends_the_pause() -> None:
    attempts = Attempts(*[ABSENT] * 99)
    with Deadline() as deadline:
        timer = threading.Timer(0.05, deadline.cancel)
        timer.start()
        with pytest.raises(CallError, match="cancelled while: wait"):
            retry(
                attempts,
                deadline,
                when=is_absent,
                step="wait",
                first_seconds=60.0,
                most_seconds=60.0,
            )
        timer.join()
    assert attempts.calls == 1


def test_in_a_task() -> None:
    async def main() -> None:
        with Deadline(60.0) as deadline:
            attempts = Attempts(ABSENT, ABSENT)
            assert await retry_async(attempts.asked, deadline, when=is_absent) == 3
            with pytest.raises(ValueError, match="no"):
                await retry_async(Attempts(ValueError("no")).asked, deadline, when=is_absent)
            deadline.cancel()
            with pytest.raises(OSError, match="absent"):
                await retry_async(Attempts(ABSENT, ABSENT).asked, deadline, when=is_absent)

    asyncio.run(main())
