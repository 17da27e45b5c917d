import fcntl
import os
import threading
import time

import pytest

from vsock.deadline import Deadline
from vsock.errors import CallError


@pytest.fixture
def deadline():
    made = []

    def make(seconds=None):
        made.append(Deadline(seconds))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def code_of(function, *args, **options):
    with pytest.raises(CallError) as caught:
        function(*args, **options)
    assert caught.value.step == "the step"
    assert "the step" in str(caught.value)
    return caught.value.code


def test_unlimited_never_expires(deadline):
    unlimited = deadline()
    unlimited.check("the step")
    assert unlimited.remaining() is None
    assert not unlimited.expired


def test_passed_deadline_raises_timeout_and_names_the_step(deadline):
    past = deadline(0.0)
    assert past.expired
    assert past.remaining() == 0.0
    assert code_of(past.check, "the step") == "timeout"
    assert code_of(past.wait, (), "the step") == "timeout"


def test_wait_ends_when_time_has_passed(deadline):
    started = time.monotonic()
    assert code_of(deadline(0.02).wait, (), "the step") == "timeout"
    assert time.monotonic() - started >= 0.02


def test_at_most_ends_the_wait_with_nothing(deadline):
    assert deadline(60).wait((), "the step", at_most=0.01) == []
    assert deadline().wait((), "the step", at_most=0.0) == []


def test_data_ends_the_wait(deadline, pipe):
    reader, writer = pipe
    os.write(writer, b"x")
    assert deadline(60).wait((reader,), "the step") == [reader]


def test_room_to_write_ends_the_wait(deadline, pipe):
    reader, writer = pipe
    os.set_blocking(writer, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 65536)
    assert os.write(writer, bytes(65536)) == 65536
    assert deadline().wait((), "the step", writable=(writer,), at_most=0.0) == []
    os.read(reader, 65536)
    assert deadline(60).wait((), "the step", writable=(writer,)) == [writer]


def test_a_hang_up_ends_the_wait(deadline):
    reader, writer = os.pipe()
    os.close(writer)
    assert deadline(60).wait((reader,), "the step") == [reader]
    os.close(reader)


def test_cancel_from_another_thread_ends_a_wait(deadline):
    waited = deadline()
    timer = threading.Timer(0.02, waited.cancel)
    timer.start()
    assert code_of(waited.wait, (), "the step") == "cancelled"
    timer.join()


def test_cancel_holds_for_later_waits_and_beats_the_clock(deadline):
    both = deadline(0.0)
    both.cancel()
    both.cancel()
    assert both.cancelled
    assert code_of(both.check, "the step") == "cancelled"
    assert code_of(both.wait, (), "the step") == "cancelled"


def test_no_descriptor_before_a_wait_and_none_after_close():
    before = os.listdir("/proc/self/fd")
    one = Deadline(60)
    one.check("the step")
    one.cancel()
    assert os.listdir("/proc/self/fd") == before
    code_of(one.wait, (), "the step")
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    one.close()
    one.close()
    one.cancel()
    assert os.listdir("/proc/self/fd") == before


def test_a_wait_longer_than_poll_can_count(deadline, pipe):
    reader, writer = pipe
    os.write(writer, b"x")
    assert deadline(10**9).wait((reader,), "the step") == [reader]


def test_a_part_ends_with_the_whole_and_with_itself(deadline):
    whole = deadline(0.0)
    late = whole.part(60)
    assert code_of(late.check, "the step") == "timeout"
    late.close()
    whole = deadline(60)
    early = whole.part(0.0)
    assert code_of(early.check, "the step") == "timeout"
    whole.check("the step")
    early.close()
    for seconds in (None, 60.0):
        endless = deadline(seconds).part()
        assert endless.remaining() == pytest.approx(seconds, abs=30)
        endless.close()


def test_a_cancel_reaches_the_parts_and_a_parts_cancel_stays_there(deadline):
    whole = deadline(60)
    first, second = whole.part(60), whole.part(60)
    first.cancel()
    assert not whole.cancelled
    whole.cancel()
    assert code_of(second.wait, (), "the step") == "cancelled"
    third = whole.part(60)
    assert code_of(third.check, "the step") == "cancelled"
    for part in (first, second, third):
        part.close()
    assert whole._parts == []
