"""The console of a machine as a file that grows: its tail, and waiting for a text in it."""

import contextlib
import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from vsock.deadline import Deadline

__all__ = ("ConsoleFile",)

_IN_MODIFY = 2  # linux/inotify.h
_libc = ctypes.CDLL(None, use_errno=True)


class ConsoleFile:
    """What a machine has printed, in the file ``path``, which it appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> str:
        """Return all of it, with line ends of one character and without terminal sequences."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return ""
        return data.decode(errors="replace").replace("\r\n", "\n").replace("\x1bc", "")

    def tail(self, lines: int = 40) -> str:
        """Return the last lines."""
        return "\n".join(self.read().splitlines()[-lines:])

    def wait_for(self, text: str, deadline: Deadline, *, until: Sequence[int] = ()) -> bool:
        """Wait until ``text`` is there; False when one of ``until`` became readable before it.

        Raises:
            CallError: ``timeout`` or ``cancelled``.
            OSError: the file cannot be watched.
        """
        with contextlib.ExitStack() as stack:
            watch = _watch(self.path)
            stack.callback(os.close, watch)
            while text not in self.read():
                ready = deadline.wait([watch, *until], f"waiting for {text!r} on the console")
                if watch in ready:
                    os.read(watch, 4096)
                elif text not in self.read():
                    return False
        return True


def _watch(path: Path) -> int:
    """Return an inotify descriptor that is readable when the file has been written to."""
    fd: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if fd >= 0 and _libc.inotify_add_watch(fd, os.fsencode(path), _IN_MODIFY) >= 0:
        return fd
    number = ctypes.get_errno()
    if fd >= 0:
        os.close(fd)
    raise OSError(number, f"cannot watch the console: {os.strerror(number)}", str(path))
