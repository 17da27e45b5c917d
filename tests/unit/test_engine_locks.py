"""Locks by key: exclusive where keys are shared, free where not, in order, and left in time."""

import os
import threading

import pytest

from guestagent.engine.locks import KeyLocks
from vsock.deadline import Deadline
from vsock.errors import CallError

WAIT_SECONDS = 60.0
A, B, C = ("layer", "a"), ("layer", "b"), ("layer", "c")


class Holder(threading.Thread):
    """Takes keys, says so, and holds them until it is told to let go."""

    def __init__(self, locks: KeyLocks, *keys, deadline=None):
        super().__init__(daemon=True)
        self.locks, self.keys = locks, keys
        self.deadline = deadline or Deadline(WAIT_SECONDS)
        self.has, self.release = threading.Event(), threading.Event()
        self.error = None
        self.start()

    def run(self):
        try:
            with self.locks.hold(self.keys, self.deadline):
                self.has.set()
                self.release.wait(WAIT_SECONDS)
        except CallError as error:
            self.error = error
        finally:
            self.deadline.close()

    def end(self):
        self.release.set()
        self.join(WAIT_SECONDS)
        assert not self.is_alive()


@pytest.fixture
def locks():
    locks = KeyLocks()
    yield locks
    assert locks._held == set()
    assert locks._waiting == []


def waits(locks, count):
    """Wait until ``count`` are queued."""
    while len(locks._waiting) < count:
        threading.Event().wait(0.001)


def test_free_keys_are_taken_at_once_and_side_by_side(locks):
    first, second = Holder(locks, A), Holder(locks, B)
    assert first.has.wait(WAIT_SECONDS)
    assert second.has.wait(WAIT_SECONDS)
    first.end()
    second.end()


def test_a_shared_key_excludes(locks):
    first = Holder(locks, A, B)
    assert first.has.wait(WAIT_SECONDS)
    second = Holder(locks, B, C)
    waits(locks, 1)
    assert not second.has.is_set()
    first.end()
    assert second.has.wait(WAIT_SECONDS)
    second.end()


def test_waiters_are_served_in_order_and_do_not_starve(locks):
    """C is free, but who wants A and C came first: a later one for C alone must wait behind it."""
    first = Holder(locks, A)
    assert first.has.wait(WAIT_SECONDS)
    second = Holder(locks, A, C)
    waits(locks, 1)
    third = Holder(locks, C)
    waits(locks, 2)
    fourth = Holder(locks, B)
    assert fourth.has.wait(WAIT_SECONDS), "its key is free and nobody waits for it"
    first.end()
    assert second.has.wait(WAIT_SECONDS)
    assert not third.has.is_set()
    second.end()
    assert third.has.wait(WAIT_SECONDS)
    third.end()
    fourth.end()


@pytest.mark.parametrize("how", ["timeout", "cancelled"])
def test_a_wait_that_is_given_up_leaves_the_queue(locks, how):
    first = Holder(locks, A)
    assert first.has.wait(WAIT_SECONDS)
    deadline = Deadline(0.01 if how == "timeout" else WAIT_SECONDS)
    second = Holder(locks, A, B, deadline=deadline)
    if how == "cancelled":
        waits(locks, 1)
        deadline.cancel()
    second.join(WAIT_SECONDS)
    assert second.error is not None
    assert second.error.code == how
    third = Holder(locks, B)
    assert third.has.wait(WAIT_SECONDS), "it waits behind one that has gone"
    third.end()
    first.end()


def test_a_body_that_fails_gives_its_keys_back(locks):
    deadline = Deadline(WAIT_SECONDS)
    with pytest.raises(RuntimeError), locks.hold([A], deadline):
        raise RuntimeError
    with locks.hold([A], deadline):
        pass
    deadline.close()


def test_no_descriptor_is_left(locks):
    before = os.listdir("/proc/self/fd")
    first = Holder(locks, A)
    assert first.has.wait(WAIT_SECONDS)
    others = [Holder(locks, A) for _ in range(8)]
    waits(locks, 8)
    first.end()
    for other in others:
        other.release.set()
    for other in others:
        other.end()
    assert os.listdir("/proc/self/fd") == before


def test_many_threads_on_few_keys_never_meet(locks):
    keys = [A, B, C]
    inside: dict = dict.fromkeys(keys, 0)
    wrong = []

    def work(number):
        deadline = Deadline(WAIT_SECONDS)
        for turn in range(60):
            mine = {keys[(number + turn) % 3], keys[turn % 3]}
            with locks.hold(mine, deadline):
                for key in mine:
                    inside[key] += 1
                    if inside[key] != 1:
                        wrong.append(key)
                for key in mine:
                    inside[key] -= 1
        deadline.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert wrong == []


def test_a_held_key_is_known():
    locks = KeyLocks()
    with Deadline(10.0) as deadline, locks.hold([("layer", "a")], deadline):
        assert locks.is_held(("layer", "a"))
        assert not locks.is_held(("layer", "b"))
    assert not locks.is_held(("layer", "a"))
