"""The fault-injection seam: off unless configured, never on in production.

A fault is ``STEP:KIND[:NTH]`` (at the ``NTH`` coming of a step, or at every one) or ``#NTH:KIND``
(at the ``NTH`` step of any name); several are joined by a comma. KIND is an errno to fail with,
``BLOCK`` to wait there until the request's deadline or cancel, ``LATE`` to have the deadline pass
there, or ``KILL`` to end the process there as ``kill -9`` does. A fault strikes before the step
does its work.
"""

import errno
import os
import signal
import threading

from vsock.deadline import Deadline
from vsock.record import Record

__all__ = ("Fault", "Faults")

BLOCK, KILL, LATE = "BLOCK", "KILL", "LATE"


class Fault(Record):
    """Strike at step ``step`` (or any, when empty), at its ``nth`` coming (every one, when 0)."""

    step: str
    kind: str
    nth: int = 0

    def check(self) -> None:
        is_errno = isinstance(getattr(errno, self.kind, None), int)
        if not is_errno and self.kind not in (BLOCK, KILL, LATE):
            raise ValueError(f"fault kind {self.kind!r} is no errno, {BLOCK}, {KILL} or {LATE}")
        if not self.step and self.nth < 1:
            raise ValueError("a fault at any step needs a number from 1")

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Read STEP:KIND[:NTH] or #NTH:KIND; ValueError says what is wrong."""
        name, _, rest = text.partition(":")
        kind, colon, nth_text = rest.partition(":")
        if name.startswith("#"):
            if colon:
                raise ValueError(f"fault {text!r} has two counts")
            name, nth_text, colon = "", name[1:], ":"
        if colon and not (nth_text.isascii() and nth_text.isdigit()):
            raise ValueError(f"fault {text!r}: {nth_text!r} is no count")
        return cls(step=name, kind=kind, nth=int(nth_text or 0))

    def to_text(self) -> str:
        if not self.step:
            return f"#{self.nth}:{self.kind}"
        return f"{self.step}:{self.kind}" + (f":{self.nth}" if self.nth else "")

    def is_due(self, step: str, counts: dict[str, int]) -> bool:
        """Return whether this strikes at ``step``, reached for the ``counts``-th time by name."""
        if self.step not in ("", step):
            return False
        return self.nth in (0, counts[self.step])


class Faults:
    """Counts the steps that are reached and strikes where a fault says so. Thread-safe."""

    def __init__(self, faults: tuple[Fault, ...] = ()) -> None:
        self._lock = threading.Lock()
        self.struck = 0
        self.arm(faults)

    @classmethod
    def parse(cls, text: str) -> "Faults":
        return cls(_parse_all(text))

    def arm(self, faults: "tuple[Fault, ...] | str") -> None:
        """Replace the faults and count from 0 again."""
        faults = _parse_all(faults)
        with self._lock:
            self._faults = faults
            self._reached: dict[str, int] = {"": 0}

    def to_text(self) -> str:
        """Return the faults in the form that ``parse`` reads, for another process."""
        with self._lock:
            return ",".join(fault.to_text() for fault in self._faults)

    def reach(self, step: str, deadline: Deadline) -> None:
        """Strike if a fault is due at this coming of ``step``.

        Raises:
            OSError: the errno of the fault.
            CallError: ``timeout`` or ``cancelled``, of a fault that blocks or is late.
        """
        if not self._faults:
            return
        with self._lock:
            self._reached[""] += 1
            self._reached[step] = self._reached.get(step, 0) + 1
            due = next((f for f in self._faults if f.is_due(step, self._reached)), None)
            if due is None:
                return
            self.struck += 1
        if due.kind == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if due.kind == BLOCK:
            deadline.wait([], step)
        if due.kind == LATE:
            deadline.limit(0.0)
            deadline.check(step)
        number = getattr(errno, due.kind)
        raise OSError(number, f"injected: {os.strerror(number)}")


def _parse_all(text: "tuple[Fault, ...] | str") -> tuple[Fault, ...]:
    if not isinstance(text, str):
        return text
    return tuple(Fault.parse(part) for part in text.split(",") if part)
