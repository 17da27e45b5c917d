"""Forked processes that share the work of a batch: what they made is kept, or undone, by word."""

import contextlib
import errno
import os
import select
import signal
import threading

import pytest

from guestagent.engine.crew import Crew, await_earlier_crews
from guestagent.engine.faults import Faults
from guestagent.engine.operation import Operation
from vsock.deadline import Deadline
from vsock.errors import CallError


@pytest.fixture
def op():
    with Deadline(20) as deadline:
        yield Operation(deadline)


@pytest.fixture
def crew(tmp_path):
    with Crew(str(tmp_path), "batch-1", keep_fds=(), undo_seconds=5) as crew:
        yield crew


def never():
    raise AssertionError("undone by the wrong process")


def until_called_off(op):
    """Work that has no end of its own."""
    with contextlib.suppress(CallError):
        op.deadline.wait([], "work")


def toucher(path):
    """Return work that makes a file, and undoes it."""

    def work(op):
        path.write_text("made")
        op.undo_by("file", path.unlink)
        return path.name

    return work


def test_results_come_in_the_order_of_hiring_and_stay(crew, op, tmp_path):
    names = [f"file{number}" for number in range(3)]
    for name in names:
        crew.hire(toucher(tmp_path / name), op, undo_instead=never)
    assert crew.results(op.deadline) == names
    crew.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_all_is_undone_by_who_made_it(crew, op, tmp_path):
    for name in ("a", "b"):
        crew.hire(toucher(tmp_path / name), op, undo_instead=never)
    crew.results(op.deadline)
    crew.undo()
    crew.undo()
    crew.close()
    assert list(tmp_path.iterdir()) == []


def test_one_that_still_works_stops_early_and_undoes(crew, op, tmp_path):
    def work(op):
        toucher(tmp_path / "a")(op)
        until_called_off(op)

    crew.hire(work, op, undo_instead=never)
    crew.undo()
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_undone_is_named(crew, op, tmp_path):
    def work(op):
        op.undo_by("the moon", lambda: os.unlink("/nowhere/moon"))

    crew.hire(work, op, undo_instead=never)
    crew.results(op.deadline)
    with pytest.raises(CallError, match=r"the moon: .*No such file"):
        crew.undo()


def test_the_share_of_one_that_died_is_undone_from_here(crew, op):
    undone = []
    crew.hire(
        lambda op: os.kill(os.getpid(), signal.SIGKILL),
        op,
        undo_instead=lambda: undone.append(1),
    )
    with pytest.raises(CallError, match="ended") as caught:
        crew.results(op.deadline)
    assert caught.value.code == "internal"
    crew.undo()
    assert undone == [1]


def test_one_that_dies_with_our_word_unread(crew, op):
    undone = []

    def work(op):
        until_called_off(op)
        os.kill(os.getpid(), signal.SIGKILL)

    crew.hire(work, op, undo_instead=lambda: undone.append(1))
    crew.undo()
    assert undone == [1]


def test_a_bug_in_the_work_ends_there_and_is_told(crew, op, capfd):
    undone = []
    crew.hire(lambda op: 1 // 0, op, undo_instead=lambda: undone.append(1))
    with pytest.raises(CallError, match="ended"):
        crew.results(op.deadline)
    crew.undo()
    crew.close()
    assert undone == [1]
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_one_that_hangs_is_ended_and_its_share_undone_from_here(tmp_path, op):
    undone = []

    def hang(op):
        signal.pause()

    with Crew(str(tmp_path), "b", keep_fds=(), undo_seconds=0.2) as crew:
        crew.hire(hang, op, undo_instead=lambda: undone.append(1))
        crew.undo()
    assert undone == [1]


def test_a_wait_for_results_can_be_cancelled(crew, op):
    crew.hire(until_called_off, op, undo_instead=never)
    timer = threading.Timer(0.05, op.deadline.cancel)
    timer.start()
    with pytest.raises(CallError) as caught:
        crew.results(op.deadline)
    assert caught.value.code == "cancelled"
    timer.join()


def test_a_result_larger_than_any_socket_buffer(crew, op):
    crew.hire(lambda op: b"x" * (4 << 20), op, undo_instead=never)
    (result,) = crew.results(op.deadline)
    assert len(result) == 4 << 20


def test_errors_of_calls_travel_whole(crew, op):
    error = CallError(
        "busy", "in use", errno=errno.EBUSY, step="s", object="o", hint="h", kernel_log=("k",)
    )
    error.is_placed = True
    crew.hire(lambda op: error, op, undo_instead=never)
    (result,) = crew.results(op.deadline)
    assert vars(result) == vars(error)


def test_nothing_that_is_open_here_stays_open_there(crew, op):
    """A connection closed here must end for its peer, however long the batch takes."""
    ours, theirs = os.pipe()
    kept_read, kept_write = os.pipe()
    crew._keep_fds = (kept_write,)

    def work(op):
        os.write(kept_write, b"!")
        until_called_off(op)

    crew.hire(work, op, undo_instead=never)
    assert os.read(kept_read, 1) == b"!"
    os.close(theirs)
    assert select.select([ours], [], [], 5)[0]
    assert os.read(ours, 1) == b""
    for fd in (ours, kept_read, kept_write):
        os.close(fd)


def test_faults_and_deadline_are_its_own(tmp_path):
    with Deadline(20) as deadline, Crew(str(tmp_path), "b", keep_fds=(), undo_seconds=5) as crew:
        op = Operation(deadline, faults=Faults.parse("make:EIO:2"))
        with op.step("make", "here"):
            pass

        def work(op):
            with op.step("make", "there"):
                pass
            try:
                with op.step("make", "there again"):
                    pass
            except CallError as error:
                return error.errno, op.deadline.remaining()

        crew.hire(work, op, undo_instead=never)
        ((number, remaining),) = crew.results(deadline)
    assert number == errno.EIO
    assert 0 < remaining <= 20


def test_the_next_life_waits_for_one_that_lives_on(tmp_path, op):
    directory = str(tmp_path)
    with Crew(directory, "b", keep_fds=(), undo_seconds=5) as crew:
        crew.hire(until_called_off, op, undo_instead=never)
        os.close(crew._life_fd)  # as the end of our life would
        crew._life_fd = -1
        with Deadline(0.1) as short, pytest.raises(CallError, match="end of"):
            await_earlier_crews(directory, short)
        timer = threading.Timer(0.05, crew.call_off)
        timer.start()
        with Deadline(10) as deadline:
            await_earlier_crews(directory, deadline)
        timer.join()
    assert list(tmp_path.iterdir()) == []


def test_the_next_life_forgets_a_crew_that_is_gone(tmp_path):
    os.mkfifo(tmp_path / "batch-1.crew")
    (tmp_path / "layer-a.entry").touch()
    with Deadline(5) as deadline:
        await_earlier_crews(str(tmp_path), deadline)
    assert [path.name for path in tmp_path.iterdir()] == ["layer-a.entry"]


def test_it_ends_with_the_process_that_forked_it(tmp_path):
    """However that ends: nobody would tell it what to do."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        deadline = Deadline(20)
        crew = Crew(str(tmp_path), "b", keep_fds=(write_end,), undo_seconds=5)
        crew.hire(lambda op: signal.pause(), Operation(deadline), undo_instead=never)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write_end)
    os.waitpid(child, 0)
    assert select.select([read_end], [], [], 5)[0]
    os.close(read_end)
    with Deadline(5) as deadline:
        await_earlier_crews(str(tmp_path), deadline)
