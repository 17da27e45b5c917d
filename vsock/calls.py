"""The calls of a server: let in within bounds, run in place or on a thread, answered once."""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable

from vsock.connection import Call, Connection, Outcome
from vsock.errors import CallError
from vsock.rpc import Request
from vsock.threads import start_thread

__all__ = ("Calls", "Handler", "Workers")

_IDLE_SECONDS = 20.0
#: A thread's stack costs memory only where it was touched; this bounds the address space.
_STACK_BYTES = 1024 * 1024
_stack_size_lock = threading.Lock()

Handler = Callable[[Call], Outcome]

_LOST = Outcome(CallError("internal", "the handler failed", step="handle request").to_wire(), None)


class Calls:
    """Every call between its request and its answer.

    ``admit``, ``start`` and ``expire`` are for the thread of the server; the calls themselves may
    end on any.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        quick: frozenset[str],
        workers: int,
        max_bytes: int,
        on_end: Callable[[], None],
    ) -> None:
        """``max_bytes`` bounds what the requests hold together; ``on_end`` follows each call."""
        self._handler = handler
        self._quick = quick
        self._workers = Workers(workers)
        self._max_bytes = max_bytes
        self._on_end = on_end
        self._lock = threading.Lock()
        self._calls: set[Call] = set()
        self._bytes = 0
        self._waiting: set[Call] = set()  # have a deadline, and no thread yet
        self._closing = False

    def __len__(self) -> int:
        return len(self._calls)

    def close_admission(self) -> None:
        """Refuse requests from now on, but for the quick ones: a cancel must still get in."""
        self._closing = True

    def admit(self, connection: Connection, request: Request) -> Call:
        """Enter a request into the books.

        Raises:
            CallError: ``busy``, ``resource`` or ``invalid``; it was not entered.
        """
        if self._closing and request.method not in self._quick:
            raise CallError("busy", "the server is stopping", step="accept request")
        if self._bytes + request.memory_bytes > self._max_bytes:
            raise CallError(
                "resource",
                f"the requests in flight hold {self._bytes} bytes of {self._max_bytes}",
                step="accept request",
                hint="wait for an answer before the next request",
            )
        call = connection.begin(request)
        with self._lock:
            self._calls.add(call)
            self._bytes += call.memory_bytes
        return call

    def start(self, call: Call) -> float | None:
        """Run a quick call here and now, any other on a thread.

        Returns the monotonic time at which ``expire`` is due on its account, None for never.
        """
        if call.method in self._quick:
            self._run(call)
            return None
        seconds = call.deadline.remaining()
        if seconds is not None:
            self._waiting.add(call)
        try:
            begun = self._workers.submit(functools.partial(self._run, call))
        except RuntimeError as problem:
            error = CallError("resource", f"no thread can be started: {problem}", step="start")
            if call.take():
                call.connection.answer(call, Outcome(error.to_wire(), None))
            self._waiting.discard(call)
            self._strike(call)
            return None
        return None if begun or seconds is None else time.monotonic() + seconds

    def expire(self) -> float | None:
        """Answer those whose deadline passed before a thread was free for them.

        Returns the monotonic time at which this is due again, None for never.
        """
        soonest: float | None = None
        for call in list(self._waiting):
            seconds = call.deadline.remaining()
            if seconds == 0.0:
                self._waiting.discard(call)
                if call.take():
                    call.connection.answer_over(call)
            elif seconds is not None:
                soonest = seconds if soonest is None else min(soonest, seconds)
        return None if soonest is None else time.monotonic() + soonest

    def cancel_all(self) -> None:
        """Cancel every call, also those whose connection has ended."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.connection.cancel(call.msgid)
            call.deadline.cancel()

    def close(self) -> None:
        """End the threads as they come free."""
        self._workers.close(0.0)

    def _run(self, call: Call) -> None:
        self._waiting.discard(call)
        try:
            if call.take():
                self._handle(call)
        finally:
            self._strike(call)

    def _handle(self, call: Call) -> None:
        outcome = _LOST
        try:
            call.deadline.check(f"wait for a thread to run {call.method}")
            outcome = self._handler(call)
        except CallError as error:
            outcome = Outcome(error.to_wire(), None)
        finally:
            # even when the handler breaks its contract the peer gets its answer
            call.connection.answer(call, outcome)

    def _strike(self, call: Call) -> None:
        with self._lock:
            self._calls.discard(call)
            self._bytes -= call.memory_bytes
        self._on_end()


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
