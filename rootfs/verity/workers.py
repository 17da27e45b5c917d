"""Many independent tasks on all cores, with progress, a deadline and clean failure.

Hashing in Python scales with processes (2.2 times on two cores here) better than with threads (1.8
times: each block takes the interpreter lock twice). So tasks run in forked children, unless this
process has other threads, whose locks a child would inherit half held: then in threads.
"""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeVar

from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("available_cores", "run")

Task = TypeVar("Task")

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def run(
    tasks: Sequence[Task],
    make_worker: Callable[[], Callable[[Task], bytes]],
    on_done: Callable[[int, bytes], None],
    *,
    workers: int | None,
    deadline: Deadline,
    step: str,
) -> None:
    """Run every task once, in any order; return when all are done.

    There is a worker for each core where ``workers`` does not say how many. ``make_worker`` is
    called once in each worker and returns what runs a task there. ``on_done`` is
    called in the caller's thread with the index of a task and what it returned. After an error no
    worker is running any more: a worker that has begun a task ends it first.

    Raises:
        CallError: ``timeout`` or ``cancelled``; ``internal``, a worker died.
        Exception: the first that a task raised.
    """
    workers = min(available_cores() if workers is None else workers, len(tasks))
    if workers <= 1:
        work = make_worker()
        for index, task in enumerate(tasks):
            deadline.check(step)
            on_done(index, work(task))
        return
    try:
        _run_in_pool(tasks, make_worker, on_done, workers, deadline, step)
    except BrokenExecutor as problem:  # of a result, or as soon as a task is handed in
        raise CallError("internal", f"a worker died while: {step}", step=step) from problem


def _run_in_pool(
    tasks: Sequence[Task],
    make_worker: Callable[[], Callable[[Task], bytes]],
    on_done: Callable[[int, bytes], None],
    workers: int,
    deadline: Deadline,
    step: str,
) -> None:
    done: deque[tuple[int, Future[bytes]]] = deque()
    with contextlib.ExitStack() as cleanup:
        wake = os.eventfd(0, os.EFD_CLOEXEC)
        cleanup.callback(os.close, wake)
        executor = _executor(workers, tasks, make_worker)
        cleanup.callback(executor.shutdown, cancel_futures=True)
        with _interrupts_put_off():  # the first task forks the children
            for index in range(len(tasks)):
                note = functools.partial(_note, done, wake, index)
                executor.submit(_do, index).add_done_callback(note)
        for _ in tasks:
            while not done:
                deadline.wait((wake,), step)
                os.eventfd_read(wake)
            index, future = done.popleft()
            on_done(index, future.result())


def _note(done: "deque[Any]", wake: int, index: int, future: "Future[bytes]") -> None:
    done.append((index, future))
    os.eventfd_write(wake, 1)


def _executor(
    workers: int, tasks: Sequence[Task], make_worker: Callable[[], Callable[[Task], bytes]]
) -> ProcessPoolExecutor | ThreadPoolExecutor:
    if threading.active_count() > 1:
        return ThreadPoolExecutor(workers, initializer=_begin, initargs=(tasks, make_worker))
    fork = multiprocessing.get_context("fork")
    initargs = (tasks, make_worker, os.getpid())
    return ProcessPoolExecutor(workers, fork, initializer=_begin_child, initargs=initargs)


@contextlib.contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Defer SIGINT: the interpreter loses a SIGINT that comes while it forks, and a child must not
    take SIGINT before it runs its own code."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Mine(threading.local):
    """What a worker works at; a forked child has one thread as well."""

    tasks: Sequence[Any]
    make_worker: Callable[[], Callable[[Any], bytes]]
    work: Callable[[Any], bytes] | None = None


_mine = _Mine()


def _begin_child(
    tasks: Sequence[Any], make_worker: Callable[[], Callable[[Any], bytes]], parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the parent as well
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _begin(tasks, make_worker)


def _begin(tasks: Sequence[Any], make_worker: Callable[[], Callable[[Any], bytes]]) -> None:
    _mine.tasks, _mine.make_worker = tasks, make_worker


def _do(index: int) -> bytes:
    if _mine.work is None:
        _mine.work = _mine.make_worker()
    return _mine.work(_mine.tasks[index])
