"""The same work for many items: in order, to the first error, with as many threads as there are."""

import threading

import pytest

from guestagent.engine.parallel import for_each
from vsock.errors import CallError


@pytest.mark.parametrize("threads", [1, 3, 9])
def test_results_come_in_the_order_of_items(threads):
    assert for_each("abcde", lambda n, item: f"{n}{item}", threads=threads) == [
        "0a",
        "1b",
        "2c",
        "3d",
        "4e",
    ]


def test_nothing_is_no_work():
    assert for_each([], lambda n, item: item, threads=3) == []


def test_the_error_of_the_first_item_is_raised_and_nothing_new_begun():
    both, begun = threading.Barrier(2), []

    def work(number, _item):
        begun.append(number)
        both.wait(10)
        raise CallError("device", f"item {number}")

    with pytest.raises(CallError, match="item 0"):
        for_each(range(9), work, threads=2)
    assert sorted(begun) == [0, 1]


@pytest.mark.parametrize("broken", [0, 1])
def test_exception_of_a_thread_is_raised(broken):
    both = threading.Barrier(2)

    def work(number, _item):
        both.wait(10)
        if number == broken:
            raise ZeroDivisionError(f"item {number}")

    with pytest.raises(ZeroDivisionError, match=f"item {broken}"):
        for_each(range(2), work, threads=2)


@pytest.mark.parametrize("possible", [0, 1])
def test_the_caller_does_what_no_thread_can_be_had_for(monkeypatch, possible):
    started = []

    def start(thread):
        if len(started) == possible:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        thread.start()

    monkeypatch.setattr("guestagent.engine.parallel.start_thread", start)
    assert for_each(range(20), lambda n, item: item, threads=4) == list(range(20))
    assert len(started) == possible
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("code", ["timeout", "cancelled"])
def test_a_cause_is_raised_before_what_the_deadline_stopped(code):
    both = threading.Barrier(2)

    def work(number, _item):
        both.wait(10)
        raise CallError("device" if number == 1 else code, f"item {number}")

    with pytest.raises(CallError, match="item 1"):
        for_each(range(2), work, threads=2)
