"""One request: its deadline, the time of each step, and how to undo what it has made.

Every step runs inside ``step()``, which checks the deadline, times the work, and adds the step and
its object to an error. The time of a step runs from the end of the step before it. Whatever a step
makes is registered with ``on_rollback()`` on the next line. Leaving the ``with`` block without
``commit()`` runs the undos in reverse, and tries each of them even if another fails.
"""

import errno
import os
import time
from collections.abc import Callable, Sequence

from guestagent.api.devices import Device
from guestagent.engine.faults import Faults
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.devicemapper.targets import Target
from guestagent.storage.kmsg import KernelLog
from guestagent.storage.mountinfo import describe_space
from vsock.deadline import Deadline
from vsock.errors import CallError, errno_name
from vsock.log import log

__all__ = ("Transaction", "code_of_errno")

#: Not allowed, or a signature that the kernel does not accept: by no key it has, revoked or past
#: its time, wrong, or made in a way that it cannot check.
_DENIED = (
    errno.EPERM, errno.EACCES,
    errno.ENOKEY, errno.EKEYREVOKED, errno.EKEYEXPIRED, errno.EKEYREJECTED, errno.ENOPKG,
)  # fmt: skip

Undo = Callable[[], None]
#: Told of each step that ends: its name, the seconds it took, whether it failed.
StepListener = Callable[[str, float, bool], None]


class Transaction:
    """Not thread-safe: a transaction on several threads makes one ``child`` for each item."""

    def __init__(
        self,
        deadline: Deadline,
        *,
        faults: Faults | None = None,
        kernel_log: KernelLog | None = None,
        traceparent: str | None = None,
        on_left: Callable[[str], None] | None = None,
        on_step: StepListener | None = None,
        parent: "Transaction | None" = None,
        may_be_left: bool = False,
    ) -> None:
        """``on_left`` is told of everything that could not be undone, ``on_step`` of each step.

        ``may_be_left``: while it waits for a device the request is left, and begun again.
        """
        self.deadline = deadline
        #: Devices that this request has found: the layers of a batch are often on the same one.
        self.resolved_devices: dict[Device, BlockDevice] = parent.resolved_devices if parent else {}
        #: Linear tables that this request has loaded, by name: one may have thousands of targets.
        self.loaded_tables: dict[str, Sequence[Target]] = parent.loaded_tables if parent else {}
        #: Directories that this request has seen to exist: the targets of a batch share parents.
        self._directories: set[str] = parent._directories if parent else set()
        self.traceparent = traceparent
        self.may_be_left = may_be_left
        self.timings_ms: dict[str, float] = {}
        #: Monotonic time at which the last step ended, 0 before the first.
        self._ended_at = 0.0
        self.faults = faults
        self._kernel_log = kernel_log
        self._log_mark: int | None = None
        if parent is not None:
            self._log_mark = parent._log_mark
        elif kernel_log is not None:
            self._log_mark = kernel_log.mark()
        self._on_left = on_left
        self.on_step = on_step
        #: What it is, how to undo it, whether it is a record of something only.
        self._undos: list[tuple[str, Undo, bool]] = []

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        failures = self.roll_back()
        for failure in failures:
            log.error("not undone", what=failure)
            if self._on_left is not None:
                self._on_left(failure)
        if failures and isinstance(error, CallError):
            left = f"not undone: {'; '.join(failures)}"
            error.hint = f"{error.hint}; {left}" if error.hint else left

    def child(self) -> "Transaction":
        """Return a transaction with the same deadline, whose undos can be ``adopt``ed later."""
        return Transaction(
            self.deadline,
            faults=self.faults,
            kernel_log=self._kernel_log,
            traceparent=self.traceparent,
            on_left=self._on_left,
            on_step=self.on_step,
            parent=self,
        )

    def adopt(self, child: "Transaction") -> None:
        """Take over what ``child`` would have to undo."""
        self._undos.extend(child._undos)
        child._undos.clear()

    def sees_directory(self, path: str) -> bool:
        """Return whether a directory is there; once it was, it is not looked at again."""
        if path not in self._directories:
            if not os.access(path, os.F_OK, follow_symlinks=False):
                return False
            self._directories.add(path)
        return True

    def on_rollback(self, what: str, undo: Undo, *, is_record: bool = False) -> None:
        """Register how to undo what the step before has made; ``what`` names it in errors.

        ``is_record`` is for what is written down about a thing, not the thing itself: it stays
        when something that was made after it could not be undone, so that a restart tries again.
        """
        self._undos.append((what, undo, is_record))

    def commit(self) -> None:
        """Keep everything that was made."""
        self._undos.clear()

    def roll_back(self) -> tuple[str, ...]:
        """Undo in reverse order; return what could not be undone, with why."""
        failures: list[str] = []
        while self._undos:
            what, undo, is_record = self._undos.pop()
            if is_record and failures:
                continue
            try:
                undo()
            except (OSError, CallError) as error:
                failures.append(f"{what}: {error}")
        return tuple(failures)

    def step(
        self, step: str, object: str, *, code: str = "device", is_checked: bool = True
    ) -> "_Step":
        """Do one step to ``object``, in a ``with`` block.

        The deadline is checked before it, unless the step does so itself (``is_checked`` False).

        An OSError becomes a CallError of ``code`` (or a closer one). The milliseconds are added up
        under ``step``, so that a step may be entered again.
        """
        return _Step(self, step, object, code, is_checked)

    def _end(self, step: str, spent: float, failed: bool) -> None:
        spent_ms = int(spent * 1e6) / 1000  # whole microseconds, cheaper than by round()
        timings_ms = self.timings_ms
        timings_ms[step] = round(timings_ms[step] + spent_ms, 3) if step in timings_ms else spent_ms
        if self.on_step is not None:
            self.on_step(step, spent, failed)

    def kernel_lines(self) -> tuple[str, ...]:
        """Return what the kernel has logged since the operation began."""
        if self._kernel_log is None or self._log_mark is None:
            return ()
        return self._kernel_log.since(self._log_mark)

    def _error_of(self, error: OSError, step: str, object: str, code: str) -> CallError:
        name = errno_name(error.errno) or "no errno"
        about = f" on {error.filename!r}" if error.filename else ""
        failed = CallError(
            code_of_errno(error.errno, code),
            f"{step} of {object} failed{about}: {error.strerror or error} ({name})",
            errno=error.errno,
            step=step,
            object=object,
            hint=_what_is_full(error, object),
            kernel_log=self.kernel_lines(),
        )
        failed.has_step = True
        return failed


class _Step:
    """One step of a transaction, timed."""

    __slots__ = ("_begin", "_code", "_is_checked", "_object", "_op", "_step")

    def __init__(
        self, op: Transaction, step: str, object: str, code: str, is_checked: bool
    ) -> None:
        self._op = op
        self._step = step
        self._object = object
        self._code = code
        self._is_checked = is_checked
        self._begin = 0.0

    def __enter__(self) -> None:
        op, step = self._op, self._step
        self._begin = op._ended_at or time.monotonic()
        try:
            if self._is_checked:
                op.deadline.check(step, self._begin)
            if op.faults is not None:
                op.faults.reach(step, op.deadline)
        except (OSError, CallError) as error:  # a deadline that passed, a fault that strikes
            self.__exit__(type(error), error, None)
            raise

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        now = self._op._ended_at = time.monotonic()
        self._op._end(self._step, now - self._begin, error is not None)
        if error is None:
            return
        if isinstance(error, OSError):
            raise self._op._error_of(error, self._step, self._object, self._code) from error
        if isinstance(error, CallError) and not error.has_step:
            # the step that failed is the innermost
            error.step = self._step
            error.object = error.object or self._object
            error.has_step = True


def _what_is_full(error: OSError, object: str) -> str | None:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    for path in (object, error.filename):
        if isinstance(path, str) and path.startswith("/") and not path.startswith("/dev/"):
            return describe_space(path)
    return None


def code_of_errno(number: int | None, code: str) -> str:
    """Return the code that tells a caller more than ``code``, where the errno alone decides."""
    if number in (errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EDQUOT):
        return "resource"
    if number in _DENIED:
        return "denied"
    if number in (errno.EBUSY,):
        return "busy"
    return code
