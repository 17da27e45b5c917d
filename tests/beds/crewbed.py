"""What members of a reserve do in tests, and a life of the agent that ends as by ``kill -9``."""

import contextlib
import os
import select
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from guestagent.engine.crew import Crew
from guestagent.engine.reserve import Reserve
from guestagent.engine.transaction import Operation
from vsock.deadline import Deadline
from vsock.errors import CallError

WAIT_SECONDS = 10.0

#: What a job is in tests: it is pickled by its name, and so are its arguments in a ``partial``.
Job = Callable[[Operation], object]


def do(job: object, _fds: Sequence[int], op: Operation) -> object:
    """Do a job of the tests: the work that their reserves are made for."""
    assert callable(job)
    return job(op)


# --- jobs


def pid(_op: Operation) -> int:
    return os.getpid()


def touch(path: Path, op: Operation) -> int:
    """Make a file, which an undo removes; return who did."""
    path.write_text("made")
    op.undo_by("file", path.unlink)
    return os.getpid()


def work_on(op: Operation) -> None:
    """Work that has no end of its own."""
    with contextlib.suppress(CallError):
        op.deadline.wait([], "work")


def touch_and_work_on(path: Path, op: Operation) -> None:
    touch(path, op)
    work_on(op)


def die(_op: Operation) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- who has them done


def never() -> None:
    raise AssertionError("undone by the wrong process")


def run(reserve: Reserve, job: Job, *, undo: bool = False) -> object:
    """Have one member do ``job``, and keep or undo it; return its result."""
    with Deadline(WAIT_SECONDS) as deadline, Crew(reserve, undo_seconds=5) as crew:
        crew.hire(job, Operation(deadline), undo_instead=never)
        (result,) = crew.results(deadline)
        crew.undo() if undo else crew.keep()
    return result


def pid_of_one(reserve: Reserve) -> int:
    """Return the process that does the next errand."""
    found = run(reserve, pid)
    assert isinstance(found, int)
    return found


@contextlib.contextmanager
def watched(pid: int) -> Iterator[Callable[[float], bool]]:
    """Yield what waits for the end of a process, and says whether it came in so many seconds."""
    pidfd = os.pidfd_open(pid)
    try:
        yield partial(_is_readable, pidfd)
    finally:
        os.close(pidfd)


def _is_readable(fd: int, seconds: float) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def is_child(pid: int) -> bool:
    """Say whether a process is ours and was not collected."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def kill_idle(pid: int) -> None:
    """Kill a member that is idle, and see it dead, but leave it to be collected."""
    with watched(pid) as ends_in:
        os.kill(pid, signal.SIGKILL)
        assert ends_in(WAIT_SECONDS)


def live_and_die(life: Callable[[], object]) -> None:
    """Run ``life`` in a process that then ends as by ``kill -9``, and see it dead."""
    child = os.fork()
    if child == 0:
        try:
            life()
        except BaseException:
            traceback.print_exc()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
