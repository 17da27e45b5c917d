"""One request at work: its deadline, what each step took, and how to undo what it has made.

An operation is a transaction. Every step runs inside ``step()``, which checks the deadline, times
the work, and gives an error the step and the object it was about. Whatever a step makes is
registered with ``undo_by()`` on the next line; leaving the ``with`` block without ``commit()`` runs
the undos in reverse, each tried even if another fails.
"""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guestagent.engine.faults import Faults
from guestagent.storage.kmsg import KernelLog
from vsock.deadline import Deadline
from vsock.errors import CallError, errno_name

__all__ = ("Operation", "code_of_errno")

Undo = Callable[[], None]


class Operation:
    """Not thread-safe: an operation that works in parallel makes one ``child`` for each thread."""

    def __init__(
        self,
        deadline: Deadline,
        *,
        faults: Faults | None = None,
        kernel_log: KernelLog | None = None,
        traceparent: str | None = None,
        batch: str | None = None,
    ) -> None:
        self.deadline = deadline
        self.traceparent = traceparent
        self.batch = batch
        self.timings_ms: dict[str, float] = {}
        self._faults = faults
        self._kernel_log = kernel_log
        self._log_mark = kernel_log.mark() if kernel_log else None
        self._undos: list[tuple[str, Undo]] = []

    def __enter__(self) -> "Operation":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        failures = self.roll_back()
        if failures and isinstance(error, CallError):
            left = "; ".join(failures)
            error.hint = (
                f"{error.hint}; not undone: {left}" if error.hint else f"not undone: {left}"
            )

    def child(self) -> "Operation":
        """Return an operation under the same deadline whose undos can be ``adopt``ed later."""
        return Operation(
            self.deadline,
            faults=self._faults,
            kernel_log=self._kernel_log,
            traceparent=self.traceparent,
            batch=self.batch,
        )

    def adopt(self, child: "Operation") -> None:
        """Take over what ``child`` would have to undo."""
        self._undos.extend(child._undos)
        child._undos.clear()

    def undo_by(self, what: str, undo: Undo) -> None:
        """Register how to undo what the step before has made; ``what`` names it in errors."""
        self._undos.append((what, undo))

    def commit(self) -> None:
        """Keep everything that was made."""
        self._undos.clear()

    def roll_back(self) -> tuple[str, ...]:
        """Undo in reverse order; return what could not be undone, with why."""
        failures: list[str] = []
        while self._undos:
            what, undo = self._undos.pop()
            try:
                undo()
            except (OSError, CallError) as error:
                failures.append(f"{what}: {error}")
        return tuple(failures)

    @contextmanager
    def step(self, step: str, object: str, *, code: str = "device") -> Iterator[None]:
        """Do one step to ``object``; an OSError becomes a CallError of ``code`` (or a closer one).

        The milliseconds are added up under ``step``, so that a step may be entered again.
        """
        self.deadline.check(step)
        begin = time.perf_counter()
        try:
            if self._faults is not None:
                self._faults.reach(step)
            yield
        except OSError as error:
            raise self._error_of(error, step, object, code) from error
        except CallError as error:
            error.step = error.step or step
            error.object = error.object or object
            raise
        finally:
            spent_ms = (time.perf_counter() - begin) * 1000
            self.timings_ms[step] = round(self.timings_ms.get(step, 0.0) + spent_ms, 3)

    def kernel_lines(self) -> tuple[str, ...]:
        """Return what the kernel has logged since the operation began."""
        if self._kernel_log is None or self._log_mark is None:
            return ()
        return self._kernel_log.since(self._log_mark)

    def _error_of(self, error: OSError, step: str, object: str, code: str) -> CallError:
        name = errno_name(error.errno) or "no errno"
        about = f" on {error.filename!r}" if error.filename else ""
        return CallError(
            code_of_errno(error.errno, code),
            f"{step} of {object} failed{about}: {error.strerror or error} ({name})",
            errno=error.errno,
            step=step,
            object=object,
            kernel_log=self.kernel_lines(),
        )


def code_of_errno(number: int | None, code: str) -> str:
    """Return the code that tells a caller more than ``code``, where the errno alone decides."""
    if number in (errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EDQUOT):
        return "resource"
    if number in (errno.ENOKEY, errno.EKEYREJECTED, errno.EPERM, errno.EACCES):
        return "denied"
    if number in (errno.EBUSY,):
        return "busy"
    return code
