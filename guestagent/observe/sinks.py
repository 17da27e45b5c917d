"""Where the log of this process goes, as the settings say: the console, the kernel's log.

The kernel drops what is written to /dev/kmsg faster than ten lines in five seconds, and does not
say so, unless ``printk_devkmsg`` is "on". So the sink sets that where it may; elsewhere it stays
below that rate by itself and says how many lines it left out.

Source: kernel/printk/printk.c, devkmsg_write(); Documentation/admin-guide/sysctl/kernel.rst.
"""

import os
import threading
import time

from guestagent.config import Config
from vsock.log import FORMATS, LEVELS, Line, fd_sink, log, words_of

__all__ = ("KernelLogSink", "open_sinks")

_SETTING = "/proc/sys/kernel/printk_devkmsg"
#: LEVELS as priorities of the kernel: debug, informational, warning, error.
_PRIORITIES = (7, 6, 4, 3)
#: The kernel takes lines below 1024 bytes, prefix included.
_LINE_BYTES = 900
_BURST_LINES, _PER_SECONDS = 9, 5.0


def open_sinks(config: Config, *, is_machine: bool) -> None:
    """Send the log, from its first line on, to where ``log_to`` says.

    ``is_machine``: the settings of the whole machine are this agent's to change.
    """
    log.set_level(config.log)
    if "console" in config.log_to:
        log.add_sink(fd_sink(2, FORMATS[config.log_format]), replay=True, is_slow=True)
    if "kmsg" in config.log_to:
        try:
            log.add_sink(KernelLogSink(may_set=is_machine), replay=True, is_slow=True)
        except OSError as error:
            log.warning("the log does not go to the kernel's", error=str(error))


class KernelLogSink:
    """A sink for /dev/kmsg. Thread-safe."""

    def __init__(
        self, path: str = "/dev/kmsg", *, setting: str = _SETTING, may_set: bool = False
    ) -> None:
        """``may_set`` lets it turn the kernel's rate limit off, which is the whole machine's.

        Raises:
            OSError: as open(2).
        """
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._is_limited = _mode(setting, may_set) != "on"
        self._left = float(_BURST_LINES)
        self._at = time.monotonic()
        self._missed = 0
        #: Lines that were left out.
        self.dropped = 0

    def __call__(self, line: Line) -> None:
        with self._lock:
            if self._fd < 0:
                return
            if self._is_limited and not self._may_write():
                self._missed += 1
                self.dropped += 1
                return
            missed, self._missed = self._missed, 0
        if missed:
            line = line.replace(text=f"{line.text} ({missed} lines left out before this one)")
        text = f"guestagent: {words_of(line)}".encode("utf-8", "backslashreplace")
        priority = _PRIORITIES[LEVELS.index(line.level)]
        try:
            os.write(self._fd, b"<%d>" % priority + text[:_LINE_BYTES].replace(b"\n", b" "))
        except OSError:  # writing to the log never fails the writer
            return

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _may_write(self) -> bool:
        """Take one from a bucket that fills again at the kernel's own rate."""
        now = time.monotonic()
        refill = (now - self._at) * _BURST_LINES / _PER_SECONDS
        self._left = min(float(_BURST_LINES), self._left + refill)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def _mode(setting: str, may_set: bool) -> str:
    try:
        if may_set:
            with open(setting, "w", encoding="ascii") as stream:
                stream.write("on")
    except OSError:  # set on the kernel command line, which is final
        pass
    try:
        with open(setting, encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return "ratelimit"
