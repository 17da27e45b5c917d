"""Reaching a server that may not be there yet: a guest that boots, an agent that restarts."""

import errno

from vsock.address import Address
from vsock.deadline import Deadline
from vsock.dial import dial
from vsock.errors import CallError, ConnectionClosed
from vsock.stream import Stream

__all__ = ("connect",)

#: What "not there yet" looks like. A silent vsock back-end times out where others refuse.
_ABSENT = frozenset(
    (
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ENOENT,
        errno.ENODEV,
        errno.ENXIO,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ETIMEDOUT,
    )
)
#: One attempt; a back-end may take a connection of a dead guest and never answer.
_ATTEMPT_SECONDS = 5.0


def connect(address: Address, seconds: float, until: Deadline | None = None) -> Stream:
    """Dial until somebody is there, for at most ``seconds``; return a non-blocking stream.

    ``until`` ends that too, when it passes or is cancelled.

    Trying again is safe: nothing has been asked of the peer before this returns.

    Raises:
        ConnectionClosed: nobody was there in time, or the address cannot be reached at all.
    """
    import tenacity

    whole = Deadline(seconds) if until is None else until.part(seconds)

    def attempt() -> Stream:
        with whole.part(_ATTEMPT_SECONDS) as once:
            return dial(address, once)

    def pause(state: tenacity.RetryCallState) -> None:
        try:
            whole.wait((), "wait until somebody is there", at_most=state.upcoming_sleep)
        except CallError as error:
            # on a busy machine: what the last attempt found says more than that time is up
            found = state.outcome.exception() if state.outcome is not None else None
            raise (found if found and error.code == "timeout" else error) from None

    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_absent),
        wait=tenacity.wait_exponential(multiplier=0.01, max=0.5),
        stop=lambda state: state.upcoming_sleep >= (whole.remaining() or 0.0),
        before_sleep=pause,
        sleep=lambda seconds: None,
        reraise=True,
    )
    try:
        with whole:
            stream: Stream = retry(attempt)
    except (OSError, ConnectionClosed, CallError) as error:
        raise ConnectionClosed(
            f"cannot connect to {address} within {seconds:g} s: {error}"
        ) from error
    stream.setblocking(False)
    return stream


def _is_absent(error: BaseException) -> bool:
    if isinstance(error, CallError):
        return error.code == "timeout"
    if isinstance(error, OSError):
        return error.errno in _ABSENT
    return isinstance(error, ConnectionClosed)
