"""Processes that wait for work: how they come, are used again, and go."""

import errno
import os
import select
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from guestagent.engine.crew import Crew
from guestagent.engine.member import Errand, Member, Verdict
from guestagent.engine.reserve import Reserve, await_earlier_members
from guestagent.engine.transaction import Operation, Terms
from tests.beds.crewbed import (
    WAIT_SECONDS,
    do,
    is_child,
    kill_idle,
    live_and_die,
    never,
    pid,
    pid_of_one,
    run,
    touch,
    watched,
    work_on,
)
from vsock.deadline import Deadline
from vsock.errors import CallError

TERMS = Terms(seconds=20.0, faults=())


@pytest.fixture
def op() -> Iterator[Operation]:
    with Deadline(20) as deadline:
        yield Operation(deadline)


@pytest.fixture
def reserve(tmp_path: Path) -> Iterator[Reserve]:
    with Reserve(str(tmp_path), do) as reserve:
        yield reserve


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def signs_of_life(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.members"))


# --- used again


def test_one_process_does_one_errand_after_the_other(reserve):
    assert len({pid_of_one(reserve) for _ in range(5)}) == 1


def test_one_that_undid_is_used_again(reserve, tmp_path):
    assert run(reserve, partial(touch, tmp_path / "a"), undo=True) == pid_of_one(reserve)


def test_crews_at_once_have_different_members(reserve, op):
    with Crew(reserve, undo_seconds=5) as one, Crew(reserve, undo_seconds=5) as other:
        for crew in (one, one, other):
            crew.hire(pid, op, undo_instead=never)
        pids = [*one.results(op.deadline), *other.results(op.deadline)]
        one.keep()
        other.keep()
    assert len(set(pids)) == 3
    assert pid_of_one(reserve) in pids


def test_crews_on_many_threads(reserve, tmp_path):
    wrong = []

    def batches(thread: int) -> None:
        for number in range(8):
            path = tmp_path / f"file-{thread}-{number}"
            run(reserve, partial(touch, path), undo=bool(number % 2))
            if path.exists() == bool(number % 2):
                wrong.append(path)

    threads = [threading.Thread(target=batches, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(list(tmp_path.glob("file-*"))) == 4 * 4


def test_an_idle_one_that_was_killed_is_replaced(reserve):
    before = pid_of_one(reserve)
    kill_idle(before)
    assert pid_of_one(reserve) != before
    assert not is_child(before)


def test_the_signals_of_a_terminal_or_a_shutdown_are_not_theirs(reserve):
    before = pid_of_one(reserve)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        os.kill(before, number)
    assert pid_of_one(reserve) == before


def count_threads(_op: Operation) -> int:
    return threading.active_count()


def test_an_errand_leaves_no_thread_behind(reserve):
    assert {run(reserve, count_threads, undo=bool(i % 2)) for i in range(60)} == {2}


def count_fds(_op: Operation) -> int:
    return len(open_fds())


def test_an_errand_leaves_no_descriptor_open(reserve):
    assert len({run(reserve, count_fds, undo=bool(i % 2)) for i in range(10)}) == 1


# --- what they have of who forked them


def test_nothing_that_is_open_here_stays_open_there(tmp_path, op):
    """A connection closed here must end for its peer, however long a member lives."""
    ours, theirs = os.pipe()
    kept_read, kept_write = os.pipe()
    with Reserve(str(tmp_path), do, keep_fds=lambda: (kept_write,)) as reserve:
        run(reserve, partial(write_to, kept_write))
        assert os.read(kept_read, 1) == b"!"
        os.close(theirs)
        assert select.select([ours], [], [], WAIT_SECONDS)[0]
        assert os.read(ours, 1) == b""
    for fd in (ours, kept_read, kept_write):
        os.close(fd)


def write_to(fd: int, _op: Operation) -> None:
    os.write(fd, b"!")


def test_a_member_has_no_connection_but_its_own(reserve, op):
    """Or another one would not see the end of its own."""
    with Crew(reserve, undo_seconds=5) as crew:
        for _ in range(3):
            crew.hire(sockets, op, undo_instead=never)
        assert crew.results(op.deadline) == [1, 1, 1]
        crew.keep()


def sockets(_op: Operation) -> int:
    """Return how many sockets beyond standard input and output are open."""
    fds = [fd for fd in open_fds() if int(fd) > 2 and os.path.lexists(f"/proc/self/fd/{fd}")]
    return sum(os.readlink(f"/proc/self/fd/{fd}").startswith("socket:") for fd in fds)


# --- they go


def test_close_leaves_no_process_no_file_and_nothing_open(tmp_path, op):
    before = open_fds()
    reserve = Reserve(str(tmp_path), do)
    with Crew(reserve, undo_seconds=5) as crew:
        for _ in range(2):
            crew.hire(pid, op, undo_instead=never)
        pids = crew.results(op.deadline)
        crew.keep()
    assert signs_of_life(tmp_path)
    reserve.close()
    reserve.close()
    assert [is_child(pid) for pid in pids] == [False, False]
    assert list(tmp_path.iterdir()) == []
    op.deadline.close()
    assert open_fds() == before


def test_a_next_life_still_waits_for_one_at_work_when_it_was_closed(tmp_path, op):
    reserve = Reserve(str(tmp_path), do)
    with Crew(reserve, undo_seconds=5) as crew:
        crew.hire(work_on, op, undo_instead=never)
        reserve.close()
        with Deadline(0.1) as short, pytest.raises(CallError, match="end of"):
            await_earlier_members(str(tmp_path), short)
        crew.undo()
    with Deadline(WAIT_SECONDS) as deadline:
        await_earlier_members(str(tmp_path), deadline)
    assert signs_of_life(tmp_path) == []


def test_nobody_is_had_from_a_closed_reserve(tmp_path):
    reserve = Reserve(str(tmp_path), do)
    reserve.close()
    with pytest.raises(OSError, match="shutdown") as caught:
        reserve.take()
    assert caught.value.errno == errno.ESHUTDOWN
    assert list(tmp_path.iterdir()) == []


def test_one_given_back_after_close_goes(reserve):
    member = reserve.take()
    reserve.close()
    reserve.give_back(member)
    assert not is_child(member.pid)


def test_a_reserve_that_nobody_needed_leaves_nothing(tmp_path):
    Reserve(str(tmp_path), do).close()
    assert list(tmp_path.iterdir()) == []


def test_no_more_are_kept_than_there_are_processors(reserve, op):
    kept = os.cpu_count() or 1
    with Crew(reserve, undo_seconds=5) as crew:
        for _ in range(kept + 2):
            crew.hire(pid, op, undo_instead=never)
        pids = crew.results(op.deadline)
        crew.keep()
    assert sum(is_child(pid) for pid in pids) == kept


def test_who_is_idle_for_long_goes(tmp_path):
    """And so does the one that came after."""
    with Reserve(str(tmp_path), do, idle_seconds=0.02) as reserve:
        for _ in range(2):
            member = reserve.take()
            with watched(member.pid) as ends_in:
                assert member.lives()
                reserve.give_back(member)
                assert ends_in(WAIT_SECONDS)
            assert signs_of_life(tmp_path)
        assert len(signs_of_life(tmp_path)) == 1
    assert not is_child(member.pid)
    assert list(tmp_path.iterdir()) == []


def test_who_works_is_not_idle(tmp_path, op):
    with Reserve(str(tmp_path), do, idle_seconds=0.02) as reserve:
        worker, other = reserve.take(), reserve.take()
        worker.send(Errand(work_on, TERMS), op.deadline)
        with watched(other.pid) as ends_in:
            reserve.give_back(other)
            assert ends_in(WAIT_SECONDS)
        assert worker.lives()
        worker.send(Verdict.UNDO, op.deadline)
        assert worker.receive(op.deadline) is None
        worker.dismiss()


def test_one_that_does_not_go_is_killed(reserve):
    member = reserve.take()
    os.kill(member.pid, signal.SIGSTOP)
    member.dismiss()
    assert not is_child(member.pid)


def test_one_that_dies_while_it_is_given_an_errand(reserve, op):
    """Who gives it sees that when it asks for the result, whatever the socket says."""
    member = reserve.take()
    os.kill(member.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, member.pid, os.WSTOPPED)
    errors: list[OSError] = []

    def send() -> None:
        try:
            member.send(Errand(partial(len, b"x" * (4 << 20)), TERMS), op.deadline)
        except OSError as error:
            errors.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    while select.select([], [member._line], [], 0)[1]:
        op.deadline.check("the socket is full")
    os.kill(member.pid, signal.SIGKILL)
    sender.join()
    assert errors == []
    with pytest.raises(CallError, match="ended"):
        member.receive(op.deadline)
    member.dismiss()


def test_without_a_thread_to_let_them_go_none_is_kept(reserve):
    """What a batch has made is decided when members are given back: it must not fail by that."""
    member = reserve.take()
    before = threading.stack_size(1 << 46)  # of which no kernel has one
    try:
        with pytest.raises(RuntimeError):
            threading.Thread(target=print).start()
        reserve.give_back(member)
    finally:
        threading.stack_size(before)
    assert not is_child(member.pid)
    assert pid_of_one(reserve) == pid_of_one(reserve)


# --- they end with the agent


class Witness:
    """A pipe that members hold open: it ends when the last of them has."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()

    def keep_fds(self) -> tuple[int, ...]:
        return (self.write_end,)

    def forget(self) -> None:
        os.close(self.write_end)

    def sees_the_end(self) -> bool:
        ended = select.select([self.read_end], [], [], WAIT_SECONDS)[0]
        return bool(ended) and os.read(self.read_end, 1) == b""

    def close(self) -> None:
        os.close(self.read_end)


@pytest.fixture
def witness() -> Iterator[Witness]:
    witness = Witness()
    yield witness
    witness.close()


def hired(directory: Path, witness: Witness, job: object) -> Member:
    """Give a job to a member, as a life of the agent does."""
    member = Reserve(str(directory), do, keep_fds=witness.keep_fds).take()
    with Deadline(20) as deadline:
        member.send(Errand(job, TERMS), deadline)
    return member


def pause(path: Path, op: Operation) -> None:
    """Hang where no deadline reaches."""
    touch(path, op)
    while True:
        signal.pause()


def test_one_that_works_ends_with_the_agent(tmp_path, witness):
    """Wherever it is, and it undoes nothing."""
    state, path = tmp_path / "state", tmp_path / "made"
    state.mkdir()

    def life() -> None:
        member = hired(state, witness, partial(pause, path))
        with Deadline(WAIT_SECONDS) as deadline:
            while not path.exists():
                deadline.check("it works")
        assert member.lives()

    live_and_die(life)
    witness.forget()
    assert witness.sees_the_end()
    assert path.exists()


def test_one_that_waits_for_a_verdict_undoes_nothing_without(tmp_path, witness):
    state, path = tmp_path / "state", tmp_path / "made"
    state.mkdir()

    def life() -> None:
        member = hired(state, witness, partial(touch, path))
        with Deadline(WAIT_SECONDS) as deadline:
            assert member.receive(deadline) == member.pid

    live_and_die(life)
    witness.forget()
    assert witness.sees_the_end()
    assert path.exists()


def test_an_idle_one_ends_with_the_agent(tmp_path, witness):
    def life() -> None:
        reserve = Reserve(str(tmp_path), do, keep_fds=witness.keep_fds)
        run(reserve, pid)

    live_and_die(life)
    witness.forget()
    assert witness.sees_the_end()


# --- the next life


def stop(_op: Operation) -> None:
    """Be as one that is stuck in the kernel: not even a SIGKILL of its own making ends it."""
    os.kill(os.getpid(), signal.SIGSTOP)


def leave_one_stuck(directory: Path, witness: Witness) -> int:
    """Have an agent die whose member cannot; return that one's process."""
    said, say = os.pipe()

    def life() -> None:
        member = hired(directory, witness, stop)
        os.waitid(os.P_PID, member.pid, os.WSTOPPED)
        os.write(say, str(member.pid).encode())

    live_and_die(life)
    os.close(say)
    with os.fdopen(said) as told:
        return int(told.read())


def test_the_next_life_waits_for_one_that_lives_on(tmp_path, witness):
    stuck = leave_one_stuck(tmp_path, witness)
    witness.forget()
    try:
        with Deadline(0.1) as short, pytest.raises(CallError, match="end of") as caught:
            await_earlier_members(str(tmp_path), short)
        assert caught.value.code == "timeout"
    finally:
        os.kill(stuck, signal.SIGCONT)
    with Deadline(WAIT_SECONDS) as deadline:
        await_earlier_members(str(tmp_path), deadline)
    assert list(tmp_path.iterdir()) == []
    assert witness.sees_the_end()


def test_a_next_life_works_beside_one_that_is_stuck(tmp_path, witness):
    """And the one after that still waits for it."""
    stuck = leave_one_stuck(tmp_path, witness)
    witness.forget()
    try:
        with Reserve(str(tmp_path), do) as reserve:
            assert pid_of_one(reserve) == pid_of_one(reserve)
        with Deadline(0.1) as short, pytest.raises(CallError, match="end of"):
            await_earlier_members(str(tmp_path), short)
    finally:
        os.kill(stuck, signal.SIGCONT)
    assert witness.sees_the_end()


def test_the_next_life_forgets_those_who_are_gone(tmp_path, witness):
    (tmp_path / "layer-a.entry").touch()
    live_and_die(lambda: run(Reserve(str(tmp_path), do, keep_fds=witness.keep_fds), pid))
    witness.forget()
    assert len(signs_of_life(tmp_path)) == 1
    with Deadline(WAIT_SECONDS) as deadline:
        await_earlier_members(str(tmp_path), deadline)
    assert [path.name for path in tmp_path.iterdir()] == ["layer-a.entry"]


def test_no_process_can_be_had(tmp_path):
    """No directory, no sign of life, no member: told, with nothing left open."""
    before = open_fds()
    with Reserve(str(tmp_path / "nowhere"), do) as reserve, pytest.raises(FileNotFoundError):
        reserve.take()
    assert open_fds() == before
