"""On which processors the processes of a batch work, and what one that fails leaves to others."""

import os
import threading
from types import SimpleNamespace

import pytest

from guestagent.engine.making import _cpus_for, _Job, _on_cpu, _Worker
from guestagent.engine.operation import Operation
from guestagent.engine.tickets import Tickets
from vsock.deadline import Deadline
from vsock.errors import CallError


@pytest.fixture
def allowed():
    """The processors of this thread, which are its own again afterwards."""
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def test_a_thread_stays_on_one_processor_for_as_long_as_it_works(allowed):
    cpu = max(allowed)
    with _on_cpu(cpu):
        assert os.sched_getaffinity(0) == {cpu}
    assert os.sched_getaffinity(0) == allowed


def test_other_threads_are_left_alone(allowed):
    begun, done, seen = threading.Event(), threading.Event(), []

    def look():
        begun.set()
        done.wait(10)
        seen.append(os.sched_getaffinity(0))

    other = threading.Thread(target=look)
    other.start()
    assert begun.wait(10)
    with _on_cpu(max(allowed)):
        done.set()
        other.join()
    assert seen == [allowed]


def test_it_may_go_anywhere_again_after_a_failure(allowed):
    with pytest.raises(OSError, match="broken"), _on_cpu(min(allowed)):
        raise OSError("broken")
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize("cpu", [None, 4095])
def test_a_processor_that_is_not_to_be_had_is_none(allowed, cpu):
    with _on_cpu(cpu):
        assert os.sched_getaffinity(0) == allowed


def test_each_process_has_a_processor_where_there_are_enough(allowed):
    assert list(_cpus_for(len(allowed))) == sorted(allowed)
    assert list(_cpus_for(1)) == [min(allowed)]
    assert list(_cpus_for(len(allowed) + 1)) == [None] * (len(allowed) + 1)


def test_none_but_those_that_this_process_may_use(allowed):
    os.sched_setaffinity(0, {max(allowed)})
    assert list(_cpus_for(1)) == [max(allowed)]


class BrokenAt:
    """Layers of which one cannot be made."""

    def __init__(self, claim):
        self.claim = claim

    def make(self, claim, _op, _held):
        if claim == self.claim:
            raise CallError("device", "broken")
        return claim

    def write(self, _live, _begun, _op):
        pass


@pytest.mark.parametrize("broken", [1, 4])
def test_one_that_fails_leaves_nothing_for_others_to_begin(broken):
    claims = {n: SimpleNamespace(spec=SimpleNamespace(layer_id=f"layer{n}")) for n in range(8)}
    with Deadline(10) as deadline, Tickets.of(range(4, 8)) as tickets:
        worker = _Worker(None, BrokenAt(claims[broken]))
        share = worker.do_share(_Job("begun", claims, range(4), None), tickets, Operation(deadline))
        assert list(tickets) == []
    assert (share.at, share.error.message, share.made) == (broken, "broken", {})
