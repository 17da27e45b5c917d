"""The calls of a server: let in within bounds, run in place or on a thread, answered once."""

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from vsock.connection import Budget, Call, Connection, Later, Outcome
from vsock.errors import CallError
from vsock.rpc import Request
from vsock.threads import start_thread

__all__ = ("Calls", "Handler")

#: Answers a call, or leaves it for later.
Handler = Callable[[Call], "Outcome | Later"]

_IDLE_SECONDS = 20.0
#: A thread's stack costs memory only where it was touched; this bounds the address space.
_STACK_BYTES = 1024 * 1024
_stack_size_lock = threading.Lock()

#: What a call takes in memory beside its parameters: its deadline, its locks, its places in queues.
_CALL_BYTES = 1536
#: The only call of a connection is let in when memory is short, unless its parameters take more.
_FREE_BYTES = 4096

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
        urgent: frozenset[str],
        workers: int,
        budget: Budget,
        on_end: Callable[[], None],
        on_resume: Callable[[Call], None],
    ) -> None:
        """The decoded requests in flight share ``budget``; ``on_end`` follows each call.

        ``on_resume`` has the server's thread ``start`` a call once more, whose handler has waited.
        """
        self._handler = handler
        self._quick = quick
        self._workers = _Workers(self._run, urgent, workers)
        self._budget = budget
        self._on_end = on_end
        self._on_resume = on_resume
        #: Threads add, discard and copy: each is one step under the interpreter lock.
        self._calls: set[Call] = set()
        self._waiting: set[Call] = set()  # have a deadline, and no thread yet
        self._closing = False

    def __len__(self) -> int:
        return len(self._calls)

    def close_admission(self) -> None:
        """Refuse requests from now on, but for the quick ones: a cancel must still get in."""
        self._closing = True

    def admit(self, connection: Connection, request: Request) -> Call:
        """Begin the call of a request.

        Raises:
            CallError: ``busy``, ``resource`` or ``invalid``; there is no call.
        """
        is_quick = request.method in self._quick
        if self._closing and not is_quick:
            raise CallError("busy", "the server is stopping", step="accept request")
        # a quick call ends before the next message is decoded
        is_only = not connection.owes_answers and request.memory_bytes <= _FREE_BYTES
        held_bytes = 0 if is_quick or is_only else request.memory_bytes + _CALL_BYTES
        if held_bytes and not self._budget.take(held_bytes):
            raise CallError(
                "resource",
                f"no memory for another request: {self._budget.used_bytes} bytes are in use",
                step="accept request",
                hint="wait for an answer before the next request",
            )
        try:
            call = connection.begin(request, held_bytes)
        except CallError:
            self._budget.give_back(held_bytes)
            raise
        self._calls.add(call)
        return call

    def start(self, call: Call) -> float | None:
        """Run a quick call here and now, any other on a thread.

        Returns the monotonic time at which ``expire`` is due on its account, None for never.
        """
        if call.method in self._quick:
            self._run(call)
            return None
        if call.deadline.at is not None:
            self._waiting.add(call)
        call.on_withdraw = self._withdraw
        try:
            self._workers.submit(call)
        except RuntimeError as problem:
            error = CallError("resource", f"no thread can be started: {problem}", step="start")
            if call.withdraw():
                call.connection.answer(call, Outcome(error.to_wire(), None))
            return None
        return call.deadline.at

    def expire(self) -> float | None:
        """Answer the calls whose deadline passed before a thread was free for them.

        Returns the monotonic time at which this is due again, None for never.
        """
        soonest: float | None = None
        for call in list(self._waiting):
            expires_at = call.deadline.at
            if call.deadline.expired:
                if call.withdraw():
                    call.connection.answer_over(call)
            elif expires_at is not None:
                soonest = expires_at if soonest is None else min(soonest, expires_at)
        return soonest

    def cancel_all(self) -> None:
        """Cancel every call, also those whose connection has ended."""
        for call in list(self._calls):
            call.connection.cancel(call.msgid)
            call.deadline.cancel()

    def close(self) -> None:
        """End the threads as they come free."""
        self._workers.close()

    def _withdraw(self, call: Call) -> None:
        self._waiting.discard(call)
        if self._workers.forget(call):
            self._strike(call)

    def _run(self, call: Call) -> None:
        self._waiting.discard(call)
        if call.take():
            self._run_taken(call)
        else:
            self._strike(call)

    def _run_taken(self, call: Call) -> None:
        outcome: Outcome | Later = _LOST
        try:
            if call.later is None:  # a handler that has waited tells what for
                call.deadline.check(f"wait for a thread to run {call.method}")
            outcome = self._handler(call)
        except CallError as error:
            outcome = Outcome(error.to_wire(), None)
        finally:
            # even when the handler breaks its contract the peer gets its answer
            if isinstance(outcome, Outcome):
                try:
                    call.connection.answer(call, outcome)
                finally:
                    self._strike(call)
        if isinstance(outcome, Later):
            call.later = outcome
            outcome.attach(partial(self._resume, call), partial(self._finish, call))

    def _resume(self, call: Call) -> None:
        assert call.later is not None
        call.waited_seconds += call.later.seconds
        call.give_back()
        self._on_resume(call)

    def _finish(self, call: Call) -> None:
        assert call.later is not None
        call.waited_seconds += call.later.seconds
        self._run_taken(call)

    def _strike(self, call: Call) -> None:
        self._calls.discard(call)
        if call.held_bytes:
            self._budget.give_back(call.held_bytes)
        self._on_end()


class _Lane:
    """Calls of which ``most`` may run, ``most_of_one`` of a connection. Connections take turns."""

    def __init__(self, *, most_of_one: int, most: int) -> None:
        self._most_of_one = most_of_one
        self._most = most
        self._waiting: dict[Connection, deque[Call]] = {}  # the next connection in turn first
        self._running: dict[Connection, int] = {}
        self._running_count = 0

    def add(self, call: Call) -> None:
        self._waiting.setdefault(call.connection, deque()).append(call)

    def pick(self) -> Call | None:
        """Let the next call run that may; None if there is none."""
        if self._running_count >= self._most:
            return None
        for connection in self._waiting:
            if self._running.get(connection, 0) < self._most_of_one:
                break
        else:
            return None
        queue = self._waiting.pop(connection)
        call = queue.popleft()
        if queue:
            self._waiting[connection] = queue  # the last in turn now
        self._running[connection] = self._running.get(connection, 0) + 1
        self._running_count += 1
        return call

    def ended(self, call: Call) -> None:
        """Account for the end of a call that was picked."""
        self._running_count -= 1
        self._running[call.connection] -= 1
        if not self._running[call.connection]:
            del self._running[call.connection]

    def put_back(self, call: Call) -> None:
        """Have a call that was picked wait again, as the next of its connection."""
        self.ended(call)
        self._waiting.setdefault(call.connection, deque()).appendleft(call)

    def forget(self, call: Call) -> bool:
        """Have ``call`` wait no more; False if it does not."""
        queue = self._waiting.get(call.connection)
        if queue is None or call not in queue:
            return False
        queue.remove(call)
        if not queue:
            del self._waiting[call.connection]
        return True


class _Idle:
    """A thread that waits for a call, or for None, with which it ends."""

    __slots__ = ("_woken", "call")

    def __init__(self) -> None:
        self.call: Call | None = None
        self._woken = threading.Lock()
        self._woken.acquire()

    def wake(self, call: Call | None) -> None:
        self.call = call
        self._woken.release()

    def wait(self, seconds: float = -1) -> bool:
        """Return whether it was woken."""
        return self._woken.acquire(timeout=seconds)


class _Workers:
    """Up to ``max_threads`` threads, started when there is work and ended when there was none.

    Some of them, a quarter and four at most, are out of reach for the calls of one connection, and
    half of these for those of all connections: they are kept for ``urgent`` methods, so that long
    calls cannot keep a peer from asking what is there, unmounting and shutting down.

    ``run`` must not raise. A call that makes it raise costs its thread, with the traceback where
    ``threading.excepthook`` puts it, and no other call.
    """

    def __init__(
        self, run: Callable[[Call], None], urgent: frozenset[str], max_threads: int
    ) -> None:
        self._run = run
        self._urgent_methods = urgent
        self._max_threads = max_threads
        kept = min(4, max_threads // 4)
        self._common = _Lane(most_of_one=max_threads - kept, most=max_threads - kept // 2)
        self._urgent = _Lane(most_of_one=max(1, kept // 2), most=max_threads)
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        #: The first to have come is woken first: it has rested, and gets the processor sooner.
        self._idle: deque[_Idle] = deque()
        self._closed = False

    def submit(self, call: Call) -> None:
        """Run ``call`` as soon as a thread may.

        Raises:
            RuntimeError: no thread runs and none can be started; the call still waits.
        """
        with self._lock:
            assert not self._closed
            self._lane(call).add(call)
            self._hand_out()

    def forget(self, call: Call) -> bool:
        """Have ``call`` wait no more; False if it does not."""
        with self._lock:
            return self._lane(call).forget(call)

    def close(self) -> None:
        """Let the queued calls run and the threads end; they do not keep the process alive."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, deque()
        for each in idle:
            each.wake(None)

    def _lane(self, call: Call) -> _Lane:
        return self._urgent if call.method in self._urgent_methods else self._common

    def _pick(self) -> Call | None:
        return self._urgent.pick() or self._common.pick()

    def _hand_out(self) -> None:
        """Give calls to idle threads, or to new ones."""
        while (self._idle or len(self._threads) < self._max_threads) and (call := self._pick()):
            if self._idle:
                self._idle.popleft().wake(call)
                continue
            try:
                self._start_thread(call)
            except RuntimeError:
                self._lane(call).put_back(call)
                if not self._threads:
                    raise
                return

    def _start_thread(self, call: Call) -> None:
        thread = threading.Thread(target=self._work, args=(call,), name="rpc-worker", daemon=True)
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

    def _work(self, call: Call) -> None:
        running: Call | None = call
        try:
            while running is not None:
                self._run(running)
                running = self._next(running)
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())
                if running is not None:  # it raised: this thread is lost, its work goes on
                    self._lane(running).ended(running)
                    self._hand_out()

    def _next(self, done: Call) -> Call | None:
        """Account for the end of a call and return the next one; None to end the thread."""
        with self._lock:
            self._lane(done).ended(done)
            call = self._pick()
            if call is not None or self._closed:
                return call
            own = _Idle()
            self._idle.append(own)
        if not own.wait(_IDLE_SECONDS):
            with self._lock:
                if own in self._idle:
                    self._idle.remove(own)
                    return None
            own.wait()  # it is being woken at this moment
        return own.call
