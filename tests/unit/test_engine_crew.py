"""Processes that share the work of a batch: what they made is kept, or undone, by word."""

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from guestagent.engine.crew import Crew
from guestagent.engine.faults import Faults
from guestagent.engine.reserve import Reserve
from guestagent.engine.transaction import Operation
from tests.beds.crewbed import (
    die,
    do,
    never,
    pid,
    run,
    touch,
    touch_and_work_on,
    work_on,
)
from vsock.deadline import Deadline
from vsock.errors import CallError


@pytest.fixture
def op() -> Iterator[Operation]:
    with Deadline(20) as deadline:
        yield Operation(deadline)


@pytest.fixture
def reserve(tmp_path: Path) -> Iterator[Reserve]:
    state = tmp_path / "state"
    state.mkdir()
    with Reserve(str(state), do) as reserve:
        yield reserve


@pytest.fixture
def crew(reserve: Reserve) -> Iterator[Crew]:
    with Crew(reserve, undo_seconds=5) as crew:
        yield crew


@pytest.fixture
def files(tmp_path: Path) -> Path:
    directory = tmp_path / "files"
    directory.mkdir()
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- kept or undone


def named(name: str, path: Path, op: Operation) -> str:
    touch(path, op)
    return name


def test_results_come_in_the_order_of_hiring_and_stay(crew, op, files):
    for name in ("a", "b", "c"):
        crew.hire(partial(named, name, files / name), op, undo_instead=never)
    assert crew.results(op.deadline) == ["a", "b", "c"]
    crew.keep()
    crew.keep()
    crew.close()
    assert names(files) == ["a", "b", "c"]


def test_all_is_undone_by_who_made_it(crew, op, files):
    for name in ("a", "b"):
        crew.hire(partial(touch, files / name), op, undo_instead=never)
    crew.results(op.deadline)
    crew.undo()
    crew.undo()
    crew.close()
    assert names(files) == []


def test_each_errand_is_kept_or_undone_for_itself(reserve, files):
    pids = [
        run(reserve, partial(touch, files / name), undo=undo)
        for name, undo in (("a", False), ("b", True), ("c", False), ("d", True))
    ]
    assert len(set(pids)) == 1
    assert names(files) == ["a", "c"]


def test_what_nobody_decided_is_not_undone(reserve, op, files):
    """The journal knows of it; the next life acts."""
    with Crew(reserve, undo_seconds=5) as crew:
        crew.hire(partial(touch, files / "a"), op, undo_instead=never)
        crew.results(op.deadline)
    assert names(files) == ["a"]


def test_one_that_still_works_stops_early_and_undoes(crew, op, files):
    crew.hire(partial(touch_and_work_on, files / "a"), op, undo_instead=never)
    crew.undo()
    assert names(files) == []


def leave_the_moon(op: Operation) -> None:
    op.undo_by("the moon", lambda: os.unlink("/nowhere/moon"))


def test_what_cannot_be_undone_is_named(crew, op):
    crew.hire(leave_the_moon, op, undo_instead=never)
    crew.results(op.deadline)
    with pytest.raises(CallError, match=r"the moon: .*No such file"):
        crew.undo()


# --- those who die


def test_the_share_of_one_that_died_is_undone_from_here(crew, op):
    undone = []
    crew.hire(die, op, undo_instead=lambda: undone.append(1))
    with pytest.raises(CallError, match="ended") as caught:
        crew.results(op.deadline)
    assert caught.value.code == "internal"
    crew.undo()
    assert undone == [1]


def die_when_called_off(op: Operation) -> None:
    work_on(op)
    die(op)


def test_one_that_dies_with_our_word_unread(crew, op):
    undone = []
    crew.hire(die_when_called_off, op, undo_instead=lambda: undone.append(1))
    crew.undo()
    assert undone == [1]


def test_what_cannot_be_undone_from_here_is_named(crew, op):
    crew.hire(die, op, undo_instead=lambda: os.unlink("/nowhere/moon"))
    with pytest.raises(CallError, match=r"share of process \d+: .*No such file"):
        crew.undo()


def divide_by_zero(_op: Operation) -> float:
    return 1 / 0


def test_a_bug_in_the_work_ends_there_and_is_told(reserve, op, capfd):
    before = run(reserve, pid)
    undone = []
    with Crew(reserve, undo_seconds=5) as crew:
        crew.hire(divide_by_zero, op, undo_instead=lambda: undone.append(1))
        with pytest.raises(CallError, match="ended"):
            crew.results(op.deadline)
        crew.undo()
    assert undone == [1]
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert run(reserve, pid) != before


def hang(_op: Operation) -> None:
    signal.pause()


def test_one_that_hangs_is_ended_and_its_share_undone_from_here(reserve, op):
    undone = []
    with Crew(reserve, undo_seconds=0.2) as crew:
        crew.hire(hang, op, undo_instead=lambda: undone.append(1))
        crew.undo()
    assert undone == [1]


def stop_one(reserve: Reserve) -> int:
    """Have the one that is hired next do nothing at all; return its pid."""
    member = reserve.take()
    os.kill(member.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, member.pid, os.WSTOPPED)
    reserve.give_back(member)
    return member.pid


def test_one_that_does_not_take_its_job_is_ended_at_the_deadline(reserve):
    stopped, undone = stop_one(reserve), []
    # it cannot undo either, and is not waited for until it has
    with Deadline(0.2) as deadline, Crew(reserve, undo_seconds=1000) as crew:
        op, job = Operation(deadline), partial(give_back, os.urandom(4 << 20))
        with pytest.raises(CallError) as caught:
            crew.hire(job, op, undo_instead=lambda: undone.append(1))
        assert caught.value.code == "timeout"
        assert f"process {stopped}" in caught.value.message
        crew.undo()
        crew.undo()
    assert undone == [1]
    assert not Path(f"/proc/{stopped}").exists()


def test_one_that_is_stopped_with_its_job_is_not_waited_for(reserve, op):
    """There is room for its job, and then for no more word."""
    stopped, undone = stop_one(reserve), []
    with Crew(reserve, undo_seconds=1000) as crew:
        job = partial(give_back, b"")
        crew.hire(job, op, undo_instead=lambda: undone.append(1))
        (share,) = crew._shares
        with contextlib.suppress(BlockingIOError):
            while True:
                share.member._line._end.send(b"x" * 65536, socket.MSG_DONTWAIT)
        with contextlib.suppress(BlockingIOError):
            while True:
                share.member._line._end.send(b"x", socket.MSG_DONTWAIT)
        crew.undo()
    assert undone == [1]
    assert not Path(f"/proc/{stopped}").exists()


def test_one_that_cannot_be_told_does_not_keep_others_from_undoing(crew, op, files, monkeypatch):
    undone = []
    crew.hire(work_on, op, undo_instead=lambda: undone.append(1))
    crew.hire(partial(touch_and_work_on, files / "b"), op, undo_instead=never)
    first = crew._shares[0].member

    def fail(*_: object) -> None:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(first._line, "send_until", fail)
    crew.undo()
    assert undone == [1]
    assert names(files) == []


def test_one_that_is_neither_told_to_keep_nor_to_undo_is_not_used_again(reserve, op):
    before = run(reserve, pid)
    with Crew(reserve, undo_seconds=5) as crew:
        crew.hire(pid, op, undo_instead=never)
        assert crew.results(op.deadline) == [before]
    assert run(reserve, pid) != before


# --- what goes to and fro


def test_a_wait_for_results_can_be_cancelled(crew, op):
    crew.hire(work_on, op, undo_instead=never)
    timer = threading.Timer(0.05, op.deadline.cancel)
    timer.start()
    with pytest.raises(CallError) as caught:
        crew.results(op.deadline)
    assert caught.value.code == "cancelled"
    timer.join()


def give_back(what: bytes, _op: Operation) -> bytes:
    return what


def test_a_job_and_a_result_larger_than_any_socket_buffer(crew, op):
    data = os.urandom(4 << 20)
    crew.hire(partial(give_back, data), op, undo_instead=never)
    assert crew.results(op.deadline) == [data]


def busy(_op: Operation) -> CallError:
    error = CallError(
        "busy", "in use", errno=errno.EBUSY, step="s", object="o", hint="h", kernel_log=("k",)
    )
    error.is_placed = True
    return error


def test_errors_of_calls_travel_whole(crew, op):
    crew.hire(busy, op, undo_instead=never)
    (result,) = crew.results(op.deadline)
    assert vars(result) == vars(busy(op))


def test_a_job_that_cannot_be_packed_leaves_nothing(reserve, op, tmp_path):
    undone = []
    with Crew(reserve, undo_seconds=5) as crew:
        with pytest.raises(Exception, match=r"[Pp]ickle"):
            crew.hire(lambda op: None, op, undo_instead=lambda: undone.append(1))
        crew.undo()
    assert undone == [1]
    assert isinstance(run(reserve, pid), int)
    reserve.close()
    assert names(tmp_path / "state") == []


def fail_at_second(op: Operation) -> tuple[int | None, float | None, int]:
    with op.step("make", "there"):
        pass
    with pytest.raises(CallError) as caught, op.step("make", "there again"):
        pass
    return caught.value.errno, op.deadline.remaining(), os.getpid()


def test_faults_and_deadline_are_its_own(reserve):
    with Deadline(20) as deadline:
        op = Operation(deadline, faults=Faults.parse("make:EIO:2"))
        with op.step("make", "here"):
            pass
        pids = set()
        for _ in range(2):  # each errand counts from 0
            with Crew(reserve, undo_seconds=5) as crew:
                crew.hire(fail_at_second, op, undo_instead=never)
                ((number, remaining, who),) = crew.results(deadline)
                crew.keep()
            assert number == errno.EIO
            assert 0 < remaining <= 20
            pids.add(who)
    assert len(pids) == 1


def test_faults_are_those_of_the_errand(reserve):
    """And not those of when the process was forked."""
    with Deadline(20) as deadline, Crew(reserve, undo_seconds=5) as crew:
        run(reserve, pid)
        op = Operation(deadline, faults=Faults.parse("make:EIO:2"))
        crew.hire(fail_at_second, op, undo_instead=never)
        ((number, _, _),) = crew.results(deadline)
    assert number == errno.EIO


def wait_for_nothing(op: Operation) -> str:
    with pytest.raises(CallError) as caught:
        op.deadline.wait([], "work")
    return caught.value.code


def test_an_errand_ends_by_its_own_deadline(crew, op):
    with Deadline(0.05) as short:
        crew.hire(wait_for_nothing, Operation(short), undo_instead=never)
    assert crew.results(op.deadline) == ["timeout"]
