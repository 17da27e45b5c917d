"""One thread waits for the devices of all requests; it ends with the last of them."""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestagent.api import LabelDevice, PathDevice
from guestagent.engine.arrivals import Arrivals, DeviceAbsentError, find_device
from guestagent.engine.transaction import Transaction
from tests.beds.calls import call_error
from vsock.deadline import Deadline

SECONDS = 20.0
NEVER = LabelDevice(label="never")


@pytest.fixture
def arrivals() -> Iterator[Arrivals]:
    arrivals = Arrivals()
    yield arrivals
    arrivals.close()


def waiting_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "device-waits"]


def wait_for(
    arrivals: Arrivals, device: LabelDevice | PathDevice, deadline: Deadline
) -> Callable[[], str]:
    """Wait; return what returns "resume" or "finish", whichever was called, and only that."""
    called: queue.SimpleQueue[str] = queue.SimpleQueue()
    arrivals.when_there(
        device, deadline, lambda: called.put("resume"), lambda: called.put("finish")
    )

    def first() -> str:
        answer = called.get(timeout=SECONDS)
        assert called.empty()
        return answer

    return first


def test_the_end_of_a_deadline_and_a_cancel_end_the_wait(arrivals: Arrivals) -> None:
    with Deadline(0.05) as short, Deadline(SECONDS) as long, Deadline(SECONDS) as other:
        first = [wait_for(arrivals, NEVER, deadline) for deadline in (short, long, other)]
        assert first[0]() == "finish"
        (thread,) = waiting_threads()
        long.cancel()
        assert first[1]() == "finish"
        assert waiting_threads() == [thread]
        other.cancel()
        assert first[2]() == "finish"
        thread.join(SECONDS)
        assert not thread.is_alive()
        # the next wait has a thread again
        again = wait_for(arrivals, NEVER, short)
        assert again() == "finish"


def test_a_deadline_that_is_cancelled_already_ends_the_wait(arrivals: Arrivals) -> None:
    with Deadline(SECONDS) as deadline:
        deadline.cancel()
        assert wait_for(arrivals, NEVER, deadline)() == "finish"


def test_a_device_that_can_never_be_one_is_for_the_request_to_tell(
    arrivals: Arrivals, tmp_path: Path
) -> None:
    with Deadline(SECONDS) as deadline:
        assert wait_for(arrivals, PathDevice(path="/dev/null"), deadline)() == "resume"


def test_a_closed_one_calls_nothing_and_takes_no_more(arrivals: Arrivals) -> None:
    with Deadline(SECONDS) as deadline:
        calls: list[str] = []
        arrivals.when_there(NEVER, deadline, lambda: calls.append("r"), lambda: calls.append("f"))
        arrivals.close()
        assert waiting_threads() == []
        assert calls == []
        with call_error("cancelled"):
            wait_for(arrivals, NEVER, deadline)


def test_no_descriptor_for_the_wait_is_told(
    arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr("guestagent.engine.arrivals.UeventSocket", fail)
    with Deadline(SECONDS) as deadline:
        with call_error("resource", match="nothing can wait for"):
            wait_for(arrivals, NEVER, deadline)
        monkeypatch.undo()
        deadline.cancel()
        assert wait_for(arrivals, NEVER, deadline)() == "finish"


def test_so_many_may_wait_and_no_more(arrivals: Arrivals) -> None:
    with Deadline(SECONDS) as deadline:
        ends: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(512):
            arrivals.when_there(NEVER, deadline, lambda: None, lambda: ends.put(None))
        with call_error("resource", match="512 requests wait for devices"):
            wait_for(arrivals, NEVER, deadline)
        deadline.cancel()
        for _ in range(512):
            ends.get(timeout=SECONDS)


def test_absent_device_leaves_only_a_request_that_may_be_left() -> None:
    with Deadline(SECONDS) as deadline, Transaction(deadline, may_be_left=True) as op:
        with pytest.raises(DeviceAbsentError):
            find_device(NEVER, op)
        deadline.cancel()
        with call_error("cancelled", match="'never' is not there; block devices seen"):
            find_device(NEVER, op)
    with (
        Deadline(0.05) as deadline,
        Transaction(deadline) as op,
        call_error("timeout", match="'never' is not there"),
    ):
        find_device(NEVER, op)
