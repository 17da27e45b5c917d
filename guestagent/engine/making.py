"""Many layers brought up beside each other: on a few threads, of a few processes where these are
worth their while."""

import contextlib
import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

from guestagent.engine.crew import Crew
from guestagent.engine.inventory import LayerClaim, LiveLayer
from guestagent.engine.layers import Layers
from guestagent.engine.parallel import for_each
from guestagent.engine.readback import LayerSeen, see_layer
from guestagent.engine.recovery import KernelView, remove_traces
from guestagent.engine.reserve import Reserve
from guestagent.engine.state import EngineState
from guestagent.engine.tickets import Tickets
from guestagent.engine.transaction import Operation
from guestagent.storage.mountinfo import mounts_by_target
from guestagent.storage.openonce import OpenOnce
from vsock.errors import CallError

__all__ = ("ManyLayers", "reserve_for")

#: A process that is new costs about as much as two layers, and has to earn it.
_LAYERS_PER_PROCESS = 4
#: Threads of each of several processes. One runs Python while the other waits for a thread of the
#: kernel, as happens a dozen times for each layer.
_THREADS_PER_PROCESS = 2
#: How much of a batch is divided among the processes. The rest goes to who is done first: the
#: processors of a guest are not equally fast, as others have a share in each.
_DIVIDED = 0.75


class _Share:
    """What came of a part of the layers: those that were made, as the kernel has them, by their
    number. ``error`` is that of the layer with the number ``at``, or of all of them, and ended it;
    ``steps`` is what an operation tells a listener, where nobody listened."""

    __slots__ = ("at", "error", "made", "steps")

    def __init__(self) -> None:
        self.made: dict[int, LayerSeen] = {}
        self.at: int | None = None
        self.error: CallError | None = None
        self.steps: list[tuple[str, float, bool]] = []


class _Job:
    """A part of the layers, begun under the name ``begun``: those numbered in ``own``, and of the
    others each whose number is drawn. ``claims`` has all of these by their number.

    ``cpu`` is the processor to make them on, or None for any, and ``threads`` how many do.
    """

    __slots__ = ("begun", "claims", "cpu", "own", "threads")

    def __init__(
        self,
        begun: str,
        claims: Mapping[int, LayerClaim],
        own: range,
        *,
        cpu: int | None,
        threads: int,
    ) -> None:
        self.begun = begun
        self.claims = claims
        self.own = own
        self.cpu = cpu
        self.threads = threads


class _Worker:
    """Makes layers, here or in another process."""

    def __init__(self, state: EngineState, layers: Layers) -> None:
        self._state = state
        self._layers = layers

    def do_errand(self, job: object, fds: Sequence[int], op: Operation) -> _Share:
        """Do a share in another process, where nobody listens to the steps."""
        assert isinstance(job, _Job)
        steps: list[tuple[str, float, bool]] = []
        op.on_step = lambda *step: steps.append(step)
        (tickets_fd,) = fds
        share = self.do_share(job, Tickets(tickets_fd), op)
        share.steps = steps
        return share

    def do_share(self, job: _Job, tickets: Tickets, op: Operation) -> _Share:
        """Make layers, then write down and look at them all."""
        share = _Share()
        try:
            lives = self._make_on_threads(job, tickets, share, op)
            self.write(lives, job.begun, op)
            self.look_at(lives, share, op)
        except CallError as error:
            share.error = error
        return share

    def _make_on_threads(
        self, job: _Job, tickets: Tickets, share: _Share, op: Operation
    ) -> dict[int, LiveLayer]:
        """Return the layers that were made, by number.

        Raises:
            CallError: the one that tells most, of the layer whose number ``share`` has then.
        """
        children: dict[int, Operation] = {}
        lives: dict[int, LiveLayer] = {}
        failed: dict[int, CallError] = {}

        def work(_thread: int, own: range) -> None:
            with _on_cpu(job.cpu), OpenOnce() as held:
                for number in itertools.chain(own, tickets):
                    if failed:
                        return
                    child = children[number] = op.child()
                    try:
                        lives[number] = self._layers.make(job.claims[number], child, held)
                    except CallError as error:
                        failed[number] = error
                        tickets.void()  # nobody need begin another

        try:
            owns = [job.own[number :: job.threads] for number in range(job.threads)]
            for_each(owns, work, threads=job.threads)
        finally:
            for _, child in sorted(children.items()):
                op.adopt(child)
        if failed:
            share.at, error = min(failed.items(), key=_order_of_telling)
            raise error
        return dict(sorted(lives.items()))

    def look_at(self, lives: Mapping[int, LiveLayer], share: _Share, op: Operation) -> None:
        with op.step("read back", f"{len(lives)} layers"):
            mounts = mounts_by_target(live.spec.mount_point for live in lives.values())
            for share.at, live in lives.items():
                share.made[share.at] = see_layer(self._state.control, live, mounts)

    def write(self, lives: Mapping[int, LiveLayer], begun: str, op: Operation) -> None:
        with op.step("journal", f"{len(lives)} layers", code="resource"):
            self._layers.write(tuple(lives.values()), begun, op)


def _order_of_telling(failure: tuple[int | None, CallError]) -> tuple[bool, bool, int]:
    """Sort failures: the cause before who was stopped by it or by the deadline, what is about one
    layer before what is about many, and layers in their order."""
    at, error = failure
    return error.code in ("timeout", "cancelled"), at is None, at or 0


def _cpus_for(processes: int) -> Sequence[int | None]:
    """Return a processor for each of several processes, where there are enough."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[:processes] if 1 < processes <= len(allowed) else [None] * processes


@contextlib.contextmanager
def _on_cpu(cpu: int | None) -> Iterator[None]:
    """Keep this thread on one processor.

    It often waits for a thread of the kernel, for less time than Linux thinks worth looking for
    other work. Left to it the processes of a batch meet on one processor again and again.
    """
    allowed = os.sched_getaffinity(0)
    if cpu not in allowed:
        yield
        return
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def reserve_for(state: EngineState, layers: Layers) -> Reserve:
    """Return a reserve of processes that make layers."""
    work = _Worker(state, layers).do_errand
    return Reserve(state.directory, work, keep_fds=lambda: (state.control.fileno(),))


class ManyLayers:
    """Makes the layers of one batch, all of them claimed, and begun under the name ``begun``.

    Use as a context manager around the operation, at whose end every process has to be done.
    """

    def __init__(
        self, state: EngineState, layers: Layers, reserve: Reserve, begun: str, op: Operation
    ) -> None:
        self._state = state
        self._layers = layers
        self._begun = begun
        self._op = op
        self._worker = _Worker(state, layers)
        self._crew = Crew(reserve, undo_seconds=state.rules.undo_seconds)

    def __enter__(self) -> "ManyLayers":
        return self

    def __exit__(self, *_: object) -> None:
        self._crew.close()

    def keep(self) -> None:
        """Let the processes go, now that all is decided. Idempotent."""
        self._crew.keep()

    def make(self, claims: Sequence[LayerClaim]) -> list[LayerSeen]:
        """Make them all; what has to be undone later becomes the operation's to undo.

        Raises:
            CallError: of the first layer, in their order, that failed by itself.
        """
        if not claims:
            return []
        with self._op.step("layers", f"{len(claims)} layers", code="resource"):
            return self._make(claims, self._process_count(len(claims)))

    def _process_count(self, layers: int) -> int:
        at_most = self._state.rules.processes or len(os.sched_getaffinity(0))
        return max(1, min(at_most, layers // _LAYERS_PER_PROCESS))

    def _thread_count(self, processes: int) -> int:
        # a process that is alone has all processors; more than one thread beyond gets in the way
        useful = _THREADS_PER_PROCESS if processes > 1 else (os.cpu_count() or 1) + 1
        return min(self._state.rules.parallel, useful)

    def _make(self, claims: Sequence[LayerClaim], processes: int) -> list[LayerSeen]:
        op, crew = self._op, self._crew
        op.undo_by("what the processes of the batch made", crew.undo)
        threads = min(self._thread_count(processes), len(claims))
        length = int(len(claims) * _DIVIDED) // processes
        rest = range(length * processes, len(claims))
        with Tickets.of(rest) as tickets:
            own, *others = (
                self._job(claims, range(number * length, (number + 1) * length), rest, cpu, threads)
                for number, cpu in enumerate(_cpus_for(processes))
            )
            for job in others:
                undo = partial(self._undo_claims, job.claims.values())
                crew.hire(job, op, undo_instead=undo, fds=(tickets.fileno(),))
            return self._gather(claims, self._worker.do_share(own, tickets, op))

    def _job(
        self, claims: Sequence[LayerClaim], own: range, rest: range, cpu: int | None, threads: int
    ) -> _Job:
        may_make = {number: claims[number] for number in (*own, *rest)}
        return _Job(self._begun, may_make, own, cpu=cpu, threads=threads)

    def _gather(self, claims: Sequence[LayerClaim], own: _Share) -> list[LayerSeen]:
        """Return what all have made, in the order of the claims, unless something failed."""
        op, done = self._op, [own]
        if own.error is None:
            for result in self._crew.results(op.deadline):
                assert isinstance(result, _Share)
                done.append(result)
        else:
            self._crew.call_off()
        made: dict[int, LayerSeen] = {}
        for came_of in done:
            if op.on_step is not None:
                for step in came_of.steps:
                    op.on_step(*step)
            made.update(came_of.made)
        failed = [(came_of.at, came_of.error) for came_of in done if came_of.error is not None]
        if failed:
            at, error = min(failed, key=_order_of_telling)
            raise self._completed(error) if at is None else self._blame(claims[at], error)
        return [made[number] for number in range(len(claims))]

    def _undo_claims(self, claims: Collection[LayerClaim]) -> None:
        """Take away what a process may have made that can no longer do it.

        Raises:
            CallError: ``internal``, naming all that stays.
        """
        kernel = KernelView.look(self._state)
        failures = []
        for claim in claims:
            try:
                self._state.journal.remove_layer(claim.spec.layer_id)
                remove_traces(self._state, kernel, claim.traces)
            except (OSError, CallError) as error:
                failures.append(f"layer {claim.spec.layer_id}: {error}")
        if failures:
            raise CallError("internal", "; ".join(failures))

    def _blame(self, claim: LayerClaim, error: CallError) -> CallError:
        """Tell of a layer that failed; return its error, which names it."""
        spec = claim.spec
        self._layers.announce_failure(spec, self._completed(error), self._op)
        if repr(spec.layer_id) not in error.message:
            error.message = f"layer {spec.layer_id!r}: {error.message}"
        return error

    def _completed(self, error: CallError) -> CallError:
        """Return an error with what the kernel said, which a forked process does not follow."""
        if error.errno is not None and not error.kernel_log:
            error.kernel_log = self._op.kernel_lines()
        return error
