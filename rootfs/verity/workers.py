"""Many independent tasks on all cores, with progress, a deadline and clean failure.

Hashing in Python scales with processes (2.2 times on two cores here) better than with threads (1.8
times: each block takes the interpreter lock twice). So tasks run in forked children, unless this
process has other threads, whose locks a child would inherit half held: then in threads. A child
answers by a pipe and touches nothing but the descriptors that its tasks name.
"""

import contextlib
import fcntl
import os
import pickle
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.threads import start_thread

__all__ = ("available_cores", "run")

Task = TypeVar("Task")

_HEADER = struct.Struct("<iI")
_INDEX = struct.Struct("<I")
_FAILED = -1
_PIPE_READ_BYTES = 1 << 16


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def run(
    tasks: Sequence[Task],
    make_worker: Callable[[], Callable[[Task], bytes]],
    on_done: Callable[[int, bytes], None],
    *,
    workers: int,
    deadline: Deadline,
    step: str,
) -> None:
    """Run every task once, in any order; return when all are done.

    ``make_worker`` is called once in each worker and returns what runs a task there. ``on_done`` is
    called in the caller's thread with the index of a task and what it returned. After an error no
    worker is running any more.

    Raises:
        CallError: ``timeout`` or ``cancelled``; ``internal``, a worker died.
        Exception: the first that a task raised.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        work = make_worker()
        for index, task in enumerate(tasks):
            deadline.check(step)
            on_done(index, work(task))
    elif threading.active_count() == 1:
        _run_processes(tasks, make_worker, on_done, workers, deadline, step)
    else:
        _run_threads(tasks, make_worker, on_done, workers, deadline, step)


def _run_processes(
    tasks: Sequence[Task],
    make_worker: Callable[[], Callable[[Task], bytes]],
    on_done: Callable[[int, bytes], None],
    workers: int,
    deadline: Deadline,
    step: str,
) -> None:
    with contextlib.ExitStack() as cleanup:
        # children share the position of this file: each read, under a lock, takes the next task
        queue = os.memfd_create("tasks", os.MFD_CLOEXEC)
        cleanup.callback(os.close, queue)
        os.write(queue, b"".join(_INDEX.pack(index) for index in range(len(tasks))))
        os.lseek(queue, 0, os.SEEK_SET)
        children: dict[int, bytearray] = {}
        for _ in range(workers):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            with _interrupts_put_off():
                pid = os.fork()
                if pid == 0:
                    _child(queue, writer, (reader, *children), tasks, make_worker)
                cleanup.callback(_end_child, pid, reader)
            os.close(writer)
            children[reader] = bytearray()
        pending = set(range(len(tasks)))
        while pending:
            for fd in deadline.wait(children, step):
                piece = os.read(fd, _PIPE_READ_BYTES)
                if not piece:
                    del children[fd]
                    if not children:
                        raise CallError("internal", f"a worker died while: {step}", step=step)
                    continue
                children[fd] += piece
                for index, payload in _messages(children[fd]):
                    pending.remove(index)
                    on_done(index, payload)


def _messages(buffer: bytearray) -> Iterator[tuple[int, bytes]]:
    while len(buffer) >= _HEADER.size:
        index, length = _HEADER.unpack_from(buffer)
        end = _HEADER.size + length
        if len(buffer) < end:
            return
        payload = bytes(buffer[_HEADER.size : end])
        del buffer[:end]
        if index == _FAILED:
            raise _unpickled(payload)
        yield index, payload


def _end_child(pid: int, reader: int) -> None:
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@contextlib.contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Let Ctrl-C wait: the interpreter swallows one that comes while it forks, and a child must not
    take it before it has come to its own code."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(
    queue: int,
    writer: int,
    unused: Sequence[int],
    tasks: Sequence[Task],
    make_worker: Callable[[], Callable[[Task], bytes]],
) -> None:
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the parent as well
        for fd in unused:  # else no child would see that the parent is gone
            os.close(fd)
        try:
            work = make_worker()
            while piece := _next_task(queue):
                (index,) = _INDEX.unpack(piece)
                payload = work(tasks[index])
                _write_all(writer, _HEADER.pack(index, len(payload)) + payload)
        except (CallError, OSError, ValueError, MemoryError) as problem:
            payload = _pickled(problem)
            _write_all(writer, _HEADER.pack(_FAILED, len(payload)) + payload)
        os._exit(0)
    finally:
        os._exit(1)  # whatever happened, a child never returns into the parent's code


def _next_task(queue: int) -> bytes:
    # a memfd's position is not advanced atomically; a record lock ends with its process
    fcntl.lockf(queue, fcntl.LOCK_EX)
    try:
        return os.read(queue, _INDEX.size)
    finally:
        fcntl.lockf(queue, fcntl.LOCK_UN)


def _pickled(problem: Exception) -> bytes:
    # a CallError has arguments that pickle does not know of
    wire = problem.to_wire() if isinstance(problem, CallError) else None
    return pickle.dumps((wire, None if wire else problem))


def _unpickled(payload: bytes) -> Exception:
    wire, problem = pickle.loads(payload)  # written by our own child
    assert wire is not None or isinstance(problem, Exception)
    return CallError.from_wire(wire) if wire is not None else problem


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _run_threads(
    tasks: Sequence[Task],
    make_worker: Callable[[], Callable[[Task], bytes]],
    on_done: Callable[[int, bytes], None],
    workers: int,
    deadline: Deadline,
    step: str,
) -> None:
    queue = iter(range(len(tasks)))  # next() on it is atomic under the interpreter lock
    results: list[tuple[int, bytes | Exception]] = []
    wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
    stop = threading.Event()

    def loop() -> None:
        outcome: tuple[int, bytes | Exception] | None = (
            _FAILED,
            CallError("internal", f"a worker died while: {step}", step=step),
        )
        try:
            work = make_worker()
            for index in queue:
                if stop.is_set():
                    break
                results.append((index, work(tasks[index])))
                os.eventfd_write(wake, 1)
            outcome = None
        except (CallError, OSError, ValueError, MemoryError) as problem:
            outcome = (_FAILED, problem)
        finally:
            if outcome is not None:
                results.append(outcome)
                os.eventfd_write(wake, 1)

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(workers)]
    try:
        for thread in threads:
            start_thread(thread)
        for taken in range(len(tasks)):
            deadline.wait((wake,), step)
            os.eventfd_read(wake)
            index, result = results[taken]
            if isinstance(result, Exception):
                raise result
            on_done(index, result)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        os.close(wake)
