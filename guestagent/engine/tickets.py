"""Numbers that several processes draw, each of which one of them gets."""

import os
from collections.abc import Iterator, Sequence

from vsock.owner import FdOwner

__all__ = ("Tickets",)

_TICKET_BYTES = 2
#: What a pipe takes at once, be it the smallest that Linux gives to who has too many.
_MOST = 4096 // _TICKET_BYTES
_ALL_BYTES = 64 * 1024


class Tickets(FdOwner):
    """A pipe that nobody writes to any more: each read takes the next number.

    Another process makes its own of the descriptor that it is given.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Tickets":
        """Issue at most 2048 numbers below 65536, to be drawn in this order.

        Raises:
            OSError: EMFILE or ENFILE.
        """
        if len(numbers) > _MOST:
            raise ValueError(f"{len(numbers)} tickets, more than {_MOST}")
        drawn, issued = os.pipe2(os.O_CLOEXEC)
        try:
            os.write(issued, b"".join(n.to_bytes(_TICKET_BYTES, "little") for n in numbers))
        finally:
            os.close(issued)
        return cls(drawn)

    def fileno(self) -> int:
        """Return the descriptor to give away; it stays ours."""
        return self._fd

    def __iter__(self) -> Iterator[int]:
        """Draw one number after the other until all are gone, whoever has them."""
        while ticket := os.read(self._fd, _TICKET_BYTES):
            yield int.from_bytes(ticket, "little")

    def void(self) -> None:
        """Take all that are left, so that nobody gets one."""
        os.read(self._fd, _ALL_BYTES)
