"""Objects that own kernel resources: closed by ``close``, or by the end of a ``with`` block."""

import os

TYPE_CHECKING = False  # as typing's, without its import
if TYPE_CHECKING:
    from typing import Self

__all__ = ("Closeable", "FdOwner")


class Closeable:
    """Base of owners. A subclass frees what it owns in ``close``, which is idempotent."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FdOwner(Closeable):
    """Owns one descriptor, ``_fd``: -1 before there is one, and after ``close``."""

    _fd: int = -1

    def close(self) -> None:
        """Close the descriptor. Idempotent; no other thread may still be using it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
