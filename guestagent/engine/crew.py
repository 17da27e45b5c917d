"""The processes that share the work of one request, each of which can undo its share until all is
decided.

Python runs one thread at a time: a batch of layers on threads takes one processor, however many
there are. So parts of it are done by other processes, which come from the engine's reserve.
"""

from collections.abc import Callable, Sequence

from guestagent.engine.member import Errand, Member, Undone, Verdict
from guestagent.engine.reserve import Reserve
from guestagent.engine.transaction import Operation
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.owner import Owner

__all__ = ("Crew",)


class Crew(Owner):
    """Those who work on one request. Not thread-safe.

    ``close`` ends whoever was neither told to keep what it made nor to undo it.
    """

    def __init__(self, reserve: Reserve, *, undo_seconds: float) -> None:
        """``undo_seconds`` bounds what they take to undo."""
        self._reserve = reserve
        self._undo_seconds = undo_seconds
        self._shares: list[_Share] = []

    def hire(
        self,
        job: object,
        op: Operation,
        *,
        undo_instead: Callable[[], None],
        fds: Sequence[int] = (),
    ) -> None:
        """Have a process do ``job``, for which it gets ``fds`` as its own.

        Should it die, ``undo_instead`` undoes the job, when the others have undone theirs.

        Raises:
            OSError: EAGAIN or ENOMEM, no process can be had.
            CallError: ``timeout`` or ``cancelled``, it does not take the job.
        """
        share = _Share(self._reserve.take(), undo_instead)
        self._shares.append(share)
        share.give(Errand(job, op.terms()), op.deadline, fds)

    def results(self, deadline: Deadline) -> list[object]:
        """Return what each one's work returned, in the order of hiring.

        Raises:
            CallError: ``timeout`` or ``cancelled``; ``internal``, one died.
        """
        return [share.member.receive(deadline) for share in self._shares]

    def call_off(self) -> None:
        """Have all stop and undo, without waiting for it. Idempotent."""
        for share in self._shares:
            share.call_off()

    def undo(self) -> None:
        """Have all undo what they made, and wait until they have. Idempotent.

        Raises:
            CallError: ``internal``, naming what could not be undone.
        """
        self.call_off()
        with Deadline(self._undo_seconds) as deadline:
            failures = [text for share in self._shares for text in share.undone(deadline)]
        failures += [text for share in self._shares for text in share.undone_instead()]
        if failures:
            raise CallError("internal", "; ".join(failures))

    def keep(self) -> None:
        """Have all leave what they made, now that it is decided, and let them go. Idempotent."""
        for share in self._shares:
            share.keep()
        self.close()

    def close(self) -> None:
        """Give back who is done, and end the others. Idempotent."""
        shares, self._shares = self._shares, []
        for share in shares:
            if share.is_settled:
                self._reserve.give_back(share.member)
            else:
                share.member.dismiss()


class _Share:
    """What one member does for a request. It is settled once nothing more is to be heard of it."""

    def __init__(self, member: Member, undo_instead: Callable[[], None]) -> None:
        self.member = member
        self.is_settled = False
        self._undo_instead = undo_instead
        self._is_called_off = False
        self._is_undone = False
        #: Why the member cannot undo it.
        self._lost: OSError | CallError | None = None

    def give(self, errand: Errand, deadline: Deadline, fds: Sequence[int]) -> None:
        try:
            self.member.send(errand, deadline, fds)
        except (OSError, CallError) as error:
            self._is_called_off = True  # of half an errand nothing is begun
            self._lose(error)
            raise

    def keep(self) -> None:
        if not self._is_called_off:
            self.is_settled = self._say(Verdict.KEEP)

    def call_off(self) -> None:
        if not self._is_called_off:
            self._is_called_off = True
            self._say(Verdict.UNDO)

    def _say(self, verdict: str) -> bool:
        """Return False for a member that cannot be told: mostly one that has not read its errand,
        and so leaves no room for a word."""
        try:
            with Deadline(0.0) as at_once:
                self.member.send(verdict, at_once)
        except (OSError, CallError) as error:
            self._lose(error)
            return False
        return True

    def _lose(self, error: OSError | CallError) -> None:
        """Have the share undone from here, when it comes to that."""
        self._is_undone = True
        self._lost = error

    def undone(self, deadline: Deadline) -> tuple[str, ...]:
        """Wait until the member has undone the share; return what could not be.

        Idempotent: whoever asks again is told nothing more.
        """
        if self._is_undone:
            return ()
        self._is_undone = True
        try:
            while not isinstance(said := self.member.receive(deadline), Undone):
                pass
        except (OSError, CallError) as error:
            self._lose(error)
            return ()
        self.is_settled = True
        return said.failures

    def undone_instead(self) -> tuple[str, ...]:
        """End a member that is dead or stuck, and undo its share from here; idempotent as well."""
        error, self._lost = self._lost, None
        if error is None:
            return ()
        what = f"the share of process {self.member.pid}"
        if not self.member.kill():
            return (f"{what}: {error}",)
        try:
            self._undo_instead()
        except (OSError, CallError) as left:
            return (f"{what}: {left}",)
        return ()
