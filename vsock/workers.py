"""Threads that are started when there is work for them, and end when there has been none."""

import threading
from collections import deque
from collections.abc import Callable

from vsock.threads import start_thread

__all__ = ("Workers",)

_IDLE_SECONDS = 20.0
#: A thread's stack costs memory only where it was touched; this bounds the address space.
_STACK_BYTES = 1024 * 1024
_stack_size_lock = threading.Lock()


class Workers:
    """Runs jobs on up to ``max_threads`` daemon threads.

    A job must not raise. One that does loses its thread, with the traceback where
    ``threading.excepthook`` puts it, and no other job.
    """

    def __init__(self, max_threads: int, *, idle_seconds: float = _IDLE_SECONDS) -> None:
        self._max_threads = max_threads
        self._idle_seconds = idle_seconds
        self._jobs: deque[Callable[[], None]] = deque()
        self._ready = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    @property
    def thread_count(self) -> int:
        return len(self._threads)

    def submit(self, job: Callable[[], None]) -> bool:
        """Queue ``job``; return False if it has to wait for another to end.

        Raises:
            RuntimeError: no thread runs and none can be started; the job is not queued.
        """
        with self._ready:
            assert not self._closed
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._ready.notify()
                return True
            if len(self._threads) >= self._max_threads:
                return False
            try:
                self._start_thread()
            except RuntimeError:
                if self._threads:
                    return False
                self._jobs.pop()
                raise
            return True

    def close(self, seconds: float) -> bool:
        """Let the queued jobs run, end the threads; return whether all ended within ``seconds``.

        Jobs that are still running go on; their threads do not keep the process alive.
        """
        with self._ready:
            self._closed = True
            self._ready.notify_all()
            return self._ready.wait_for(lambda: not self._threads, seconds)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="rpc-worker", daemon=True)
        self._threads.add(thread)
        with _stack_size_lock:
            before = threading.stack_size(_STACK_BYTES)
            try:
                start_thread(thread)
            except RuntimeError:
                self._threads.discard(thread)
                raise
            finally:
                threading.stack_size(before)

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                job()
        finally:
            with self._ready:
                self._threads.discard(threading.current_thread())
                if self._jobs:  # this one was lost to a job that raised
                    self._start_thread()
                self._ready.notify_all()

    def _next(self) -> Callable[[], None] | None:
        with self._ready:
            if not self._jobs and not self._closed:
                self._idle += 1
                self._ready.wait_for(lambda: self._jobs or self._closed, self._idle_seconds)
                self._idle -= 1
            return self._jobs.popleft() if self._jobs else None
