"""Waking a thread that waits on descriptors."""

import os
import select
import signal
from collections.abc import Iterator

import pytest

from vsock.threads import Waker


@pytest.fixture
def waker() -> Iterator[Waker]:
    with Waker() as one:
        yield one


def is_awake(waker: Waker) -> bool:
    return select.select([waker.fd], [], [], 0)[0] == [waker.fd]


def test_a_wake_lasts_until_it_is_cleared(waker: Waker) -> None:
    assert not is_awake(waker)
    waker.clear()
    assert waker.wake()
    assert waker.wake()
    assert is_awake(waker)
    waker.clear()
    assert not is_awake(waker)


def test_waking_never_waits(waker: Waker) -> None:
    for _ in range(100_000):  # more than a pipe holds
        assert waker.wake()
    assert is_awake(waker)


def test_byte_of_a_signal_wakes(waker: Waker) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    before_fd = signal.set_wakeup_fd(waker.signal_fd)
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.set_wakeup_fd(before_fd)
        signal.signal(signal.SIGUSR1, before)
    assert is_awake(waker)


def test_a_signal_handler_wakes_in_the_midst_of_a_wake(
    waker: Waker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it would wait for ever for a lock that its own thread holds."""
    write, woken = os.write, []

    def interrupted(fd: int, data: bytes) -> int:
        if not woken:
            woken.append(True)
            signal.raise_signal(signal.SIGUSR1)
        return write(fd, data)

    before = signal.signal(signal.SIGUSR1, lambda *_: woken.append(waker.wake()))
    monkeypatch.setattr(os, "write", interrupted)
    try:
        assert waker.wake()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert woken == [True, True]


def test_closed_waker_has_no_descriptors_and_wakes_nothing(waker: Waker) -> None:
    fds = (waker.fd, waker.signal_fd)
    waker.close()
    waker.close()
    assert (waker.fd, waker.signal_fd) == (-1, -1)
    assert not waker.wake()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
