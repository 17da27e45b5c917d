"""Trying again what failed for a reason that may pass, with growing pauses, within a deadline.

This is the one back-off of the project. ``tenacity`` is imported by the first failure, because its
import takes longer than most attempts.
"""

from collections.abc import Awaitable, Callable

from vsock.deadline import Deadline
from vsock.errors import CallError

TYPE_CHECKING = False  # as typing's, without its import
if TYPE_CHECKING:
    from typing import Any, TypeVar

    import tenacity

    T = TypeVar("T")

__all__ = ("has_errno", "retry", "retry_async")

#: Says of an exception whether the same attempt may succeed later.
IsTemporary = Callable[[BaseException], bool]


def has_errno(*errnos: int) -> IsTemporary:
    """Return the test for an OSError with one of ``errnos``."""
    return lambda error: isinstance(error, OSError) and error.errno in errnos


def retry(
    attempt: "Callable[[], T]",
    deadline: Deadline,
    *,
    when: IsTemporary,
    step: str,
    first_seconds: float = 0.01,
    most_seconds: float = 0.5,
) -> "T":
    """Return what ``attempt`` returns; call it again while ``when`` says its error is temporary.

    The pauses between attempts double from ``first_seconds`` to ``most_seconds``. ``step`` says
    what the pauses are for. An attempt should observe ``deadline`` by itself.

    Raises:
        CallError: ``cancelled``, when the deadline is cancelled during a pause.
        BaseException: what the last attempt raised, when that is not temporary or the deadline
            leaves no time for another attempt.
    """

    def pause(state: "tenacity.RetryCallState") -> None:
        try:
            deadline.wait((), step, at_most=state.upcoming_sleep)
        except CallError as error:
            # the last attempt's error says more than that the time is up
            failure = state.outcome.exception() if state.outcome is not None else None
            raise (failure if failure and error.code == "timeout" else error) from None

    try:
        return attempt()
    except Exception as error:
        if not when(error):
            raise
        failed = [error]

    import tenacity

    def again() -> "T":
        if failed:
            raise failed.pop()  # the first attempt, for the retrying to begin with
        return attempt()

    options = _options(deadline, when, first_seconds, most_seconds)
    # the pause has waited before the sleep, so that a cancel could end the wait
    retrying = tenacity.Retrying(before_sleep=pause, sleep=lambda _: None, **options)
    return retrying(again)


async def retry_async(
    attempt: "Callable[[], Awaitable[T]]",
    deadline: Deadline,
    *,
    when: IsTemporary,
    first_seconds: float = 0.01,
    most_seconds: float = 0.5,
) -> "T":
    """Do what ``retry`` does in a task, whose cancellation ends the pauses.

    Raises:
        BaseException: what the last attempt raised.
    """
    try:
        return await attempt()
    except Exception as error:
        if not when(error):
            raise
        failed = [error]

    import tenacity

    async def again() -> "T":
        if failed:
            raise failed.pop()
        return await attempt()

    retrying = tenacity.AsyncRetrying(**_options(deadline, when, first_seconds, most_seconds))
    return await retrying(again)


def _options(
    deadline: Deadline, when: IsTemporary, first_seconds: float, most_seconds: float
) -> "dict[str, Any]":
    import tenacity

    def is_too_late(state: tenacity.RetryCallState) -> bool:
        left_seconds = deadline.remaining()
        return deadline.cancelled or (
            left_seconds is not None and state.upcoming_sleep >= left_seconds
        )

    return {
        "retry": tenacity.retry_if_exception(when),
        "wait": tenacity.wait_exponential(multiplier=first_seconds, max=most_seconds),
        "stop": is_too_late,
        "reraise": True,
    }
