"""Reaching a server that may not be there yet: a guest that boots, an agent that restarts."""

import errno

from vsock.address import Address
from vsock.deadline import Deadline
from vsock.errors import CallError, ConnectionClosed
from vsock.stream import Stream, dial

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


def connect(address: Address, seconds: float) -> Stream:
    """Dial until somebody is there, for at most ``seconds``; return a non-blocking stream.

    Trying again is safe: nothing has been asked of the peer before this returns.

    Raises:
        ConnectionClosed: nobody was there in time, or the address cannot be reached at all.
    """
    import tenacity

    whole = Deadline(seconds)

    def attempt() -> Stream:
        remaining = whole.remaining()
        assert remaining is not None
        once = Deadline(min(remaining, _ATTEMPT_SECONDS))
        try:
            return dial(address, once)
        finally:
            once.close()

    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_absent),
        wait=tenacity.wait_exponential(multiplier=0.01, max=0.5),
        stop=tenacity.stop_before_delay(seconds),
        reraise=True,
    )
    try:
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
