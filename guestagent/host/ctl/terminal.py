"""The user's own terminal: raw during a console session, with escapes to leave it."""

import contextlib
import os
import termios
import tty
from collections.abc import Iterator

__all__ = ("HELP", "LEAVE", "Escapes", "raw_terminal")

#: What ``Escapes.feed`` returns as action when the user leaves; any other is a text to show.
LEAVE = "leave"
HELP = (
    "\r\nAt the start of a line:\r\n"
    "  ~.  leave; the guest goes on\r\n"
    "  ~~  send one ~\r\n"
    "  ~?  this\r\n"
)
_TILDE = ord("~")
_LINE_ENDS = b"\r\n\x03\x04"


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Deliver every key unchanged within the block."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        os.write(fd, b"\r")


class Escapes:
    """Finds ``~.``, ``~~`` and ``~?`` at the start of a line. Pure."""

    def __init__(self) -> None:
        self._at_start = True
        self._tilde = False

    def feed(self, data: bytes) -> tuple[bytes, str | None]:
        """Return what to pass on, and an action: ``LEAVE``, or a text to show, or None.

        What follows a ``~.`` is dropped.
        """
        out = bytearray()
        action: str | None = None
        for byte in data:
            if self._tilde:
                self._tilde = False
                if byte == ord("."):
                    return bytes(out), LEAVE
                if byte == ord("?"):
                    action = HELP
                    self._at_start = True
                    continue
                out.append(_TILDE)
                self._at_start = False
                if byte == _TILDE:
                    continue
            if byte == _TILDE and self._at_start:
                self._tilde = True
                continue
            out.append(byte)
            self._at_start = byte in _LINE_ENDS
        return bytes(out), action
