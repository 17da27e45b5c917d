"""The fault-injection seam: off unless configured, never on in production.

``Faults.parse("verity:EIO")`` fails every step named ``verity``; ``"#3:ENOMEM"`` fails the third
step that is reached, whatever its name; ``"mount:EIO:2"`` fails the second ``mount`` only. Several
are joined by a comma. A fault strikes before the step does its work.
"""

import errno
import os
import threading

from vsock.record import Record

__all__ = ("Fault", "Faults")


class Fault(Record):
    """Fail step ``step`` (or any, when empty) at its ``nth`` coming (every one, when 0)."""

    step: str
    errno: int
    nth: int = 0

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Read STEP:ERRNO[:NTH] or #NTH:ERRNO; ValueError says what is wrong."""
        name, _, rest = text.partition(":")
        errno_name, _, nth_text = rest.partition(":")
        number = getattr(errno, errno_name or "EIO", None)
        if not isinstance(number, int):
            raise ValueError(f"fault {text!r}: unknown errno {errno_name!r}")
        if name.startswith("#"):
            name, nth_text = "", name[1:]
        if nth_text and not nth_text.isdigit():
            raise ValueError(f"fault {text!r}: {nth_text!r} is no count")
        return cls(step=name, errno=number, nth=int(nth_text or 0))


class Faults:
    """Counts the steps that are reached and strikes where a fault says so. Thread-safe."""

    def __init__(self, faults: tuple[Fault, ...] = ()) -> None:
        self._faults = faults
        self._lock = threading.Lock()
        self._reached: dict[str, int] = {"": 0}
        self.struck = 0

    @classmethod
    def parse(cls, text: str) -> "Faults":
        return cls(tuple(Fault.parse(part) for part in text.split(",") if part))

    def reach(self, step: str) -> None:
        """Raise OSError if a fault is due at this coming of ``step``."""
        if not self._faults:
            return
        with self._lock:
            self._reached[""] += 1
            self._reached[step] = self._reached.get(step, 0) + 1
            for fault in self._faults:
                count = self._reached[fault.step] if fault.step in ("", step) else -1
                if count == fault.nth or (fault.nth == 0 and fault.step == step):
                    self.struck += 1
                    raise OSError(fault.errno, f"injected: {os.strerror(fault.errno)}")
