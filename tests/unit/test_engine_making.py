"""On which processors the processes of a batch work, and what one that fails leaves to others."""

import os
import threading
from types import SimpleNamespace

import pytest

from guestagent.engine.making import _cpus_for, _Job, _on_cpu, _Worker
from guestagent.engine.tickets import Tickets
from guestagent.engine.transaction import Operation
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


def test_each_process_has_a_processor_where_there_are_enough(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {7, 3, 5})
    assert list(_cpus_for(2)) == [3, 5]
    assert list(_cpus_for(3)) == [3, 5, 7]
    assert list(_cpus_for(4)) == [None] * 4


def test_a_process_that_is_alone_has_all_processors(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5})
    assert list(_cpus_for(1)) == [None]


class FakeLayers:
    """Makes nothing; ``make`` is told of each claim, and may raise."""

    def __init__(self, make):
        self._make = make
        self.undone = []

    def make(self, claim, op, _held):
        op.undo_by(claim.spec.layer_id, lambda: self.undone.append(claim.spec.layer_id))
        self._make(claim.spec.layer_id)
        return claim

    def write(self, _lives, _begun, _op):
        raise CallError("resource", "not written")


def share_of(layers, op, tickets, *, threads):
    claims = {n: SimpleNamespace(spec=SimpleNamespace(layer_id=f"layer{n}")) for n in range(8)}
    job = _Job("begun", claims, range(4), cpu=None, threads=threads)
    return _Worker(None, layers).do_share(job, tickets, op)


def break_at(*numbers):
    def make(layer_id):
        if layer_id in {f"layer{number}" for number in numbers}:
            raise CallError("device", f"{layer_id} is broken")

    return make


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("broken", [1, 4])
def test_one_that_fails_leaves_nothing_for_others_to_begin(broken, threads):
    with Deadline(10) as deadline, Tickets.of(range(4, 8)) as tickets:
        op = Operation(deadline)
        share = share_of(FakeLayers(break_at(broken)), op, tickets, threads=threads)
        assert list(tickets) == []
    assert (share.at, share.error.message) == (broken, f"layer{broken} is broken")
    assert share.made == {}


def test_two_threads_make_layers_beside_each_other():
    both = threading.Barrier(2)

    def make(layer_id):
        if layer_id in ("layer0", "layer1"):
            both.wait(10)

    layers = FakeLayers(make)
    with Deadline(10) as deadline, Tickets.of(range(4, 8)) as tickets:
        op = Operation(deadline)
        share = share_of(layers, op, tickets, threads=2)
    # all were made, and what is about all of them is about none
    assert (share.at, share.error.message) == (None, "not written")
    op.roll_back()
    assert layers.undone == [f"layer{number}" for number in reversed(range(8))]


def test_the_first_of_two_threads_failures_counts():
    both = threading.Barrier(2)

    def make(layer_id):
        both.wait(10)
        raise CallError("device", f"{layer_id} is broken")

    layers = FakeLayers(make)
    with Deadline(10) as deadline, Tickets.of(range(4, 8)) as tickets:
        op = Operation(deadline)
        share = share_of(layers, op, tickets, threads=2)
    assert (share.at, share.error.message) == (0, "layer0 is broken")
    op.roll_back()
    assert layers.undone == ["layer1", "layer0"]


class ToldTickets(Tickets):
    """Tells when what is left of them is void."""

    def __init__(self, fd):
        super().__init__(fd)
        self.are_void = threading.Event()

    def void(self):
        super().void()
        self.are_void.set()


def test_others_begin_nothing_more_while_a_thread_still_works():
    both, seen = threading.Barrier(2), []

    def make(layer_id):
        both.wait(10)
        if layer_id == "layer0":
            raise CallError("device", "layer0 is broken")
        seen.append(tickets.are_void.wait(10))

    with Deadline(10) as deadline, ToldTickets.of(range(4, 8)) as tickets:
        share = share_of(FakeLayers(make), Operation(deadline), tickets, threads=2)
    assert seen == [True]
    assert share.at == 0


@pytest.mark.parametrize("code", ["timeout", "cancelled"])
def test_a_cause_is_told_before_what_it_stopped(code):
    both = threading.Barrier(2)

    def make(layer_id):
        both.wait(10)
        raise CallError("device" if layer_id == "layer1" else code, f"{layer_id} failed")

    with Deadline(10) as deadline, Tickets.of(range(4, 8)) as tickets:
        share = share_of(FakeLayers(make), Operation(deadline), tickets, threads=2)
    assert (share.at, share.error.message) == (1, "layer1 failed")
