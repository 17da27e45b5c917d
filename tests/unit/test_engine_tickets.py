"""Numbers that several processes draw."""

import json
import os

import pytest

from guestagent.engine.tickets import Tickets


def test_numbers_come_in_their_order_and_end():
    with Tickets.of(range(250, 300)) as tickets:
        assert list(tickets) == [*range(250, 300)]
        assert list(tickets) == []


def test_there_may_be_none():
    with Tickets.of(()) as tickets:
        assert list(tickets) == []


def draw_in_another_process(tickets: Tickets, begin_fd: int) -> tuple[int, int]:
    """Start a process that draws once it can read; return it, and from where what it drew comes."""
    told, tells = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.read(begin_fd, 1)
            with open(tells, "w") as file:
                json.dump(list(Tickets(os.dup(tickets.fileno()))), file)
        finally:
            os._exit(0)
    os.close(tells)
    return pid, told


def test_each_number_is_drawn_once_whoever_draws():
    begin, begun = os.pipe()
    with Tickets.of(range(2048)) as tickets:
        others = [draw_in_another_process(tickets, begin) for _ in range(2)]
        os.write(begun, b"..")
        drawn = list(tickets)
        for pid, told in others:
            with open(told) as file:
                drawn += json.load(file)
            os.waitpid(pid, 0)
    os.close(begin)
    os.close(begun)
    assert sorted(drawn) == [*range(2048)]


def test_what_is_void_is_drawn_by_nobody():
    with Tickets.of(range(2048)) as tickets:
        assert next(iter(tickets)) == 0
        tickets.void()
        tickets.void()
        assert list(tickets) == []


def test_more_than_every_pipe_takes_are_refused():
    with pytest.raises(ValueError, match="2049 tickets"):
        Tickets.of(range(2049))


def test_nothing_stays_open():
    before = set(os.listdir("/proc/self/fd"))
    Tickets.of(range(3)).close()
    assert set(os.listdir("/proc/self/fd")) == before
