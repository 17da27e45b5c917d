"""Objects that own something of the kernel's: closed by hand, or by the end of a ``with`` block."""

import os

TYPE_CHECKING = False  # as typing's, without its import
if TYPE_CHECKING:
    from typing import Self

__all__ = ("FdOwner", "Owner")


class Owner:
    """Whoever derives from it frees what is owned in ``close``, which is idempotent."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FdOwner(Owner):
    """Owns one descriptor, ``_fd``: -1 before there is one, and after ``close``."""

    _fd: int = -1

    def close(self) -> None:
        """Close the descriptor. Idempotent; no other thread may still be using it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
