"""What many layers need one after the other, opened for the first and held for the rest."""

import os

from vsock.closeable import Closeable

__all__ = ("OpenOnce",)


class OpenOnce(Closeable):
    """Owns descriptors, by path. Not thread-safe."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def get(self, path: str) -> int | None:
        """Return the descriptor of a path that is held; it stays ours."""
        return self._fds.get(path)

    def open(self, path: str) -> int:
        """Return a descriptor for reading; it stays ours.

        Raises:
            OSError: it cannot be opened.
        """
        fd = self._fds.get(path)
        if fd is None:
            fd = self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return fd

    def keep(self, path: str, fd: int) -> None:
        """Take a descriptor over."""
        self.forget(path)
        self._fds[path] = fd

    def forget(self, path: str) -> None:
        """Close the descriptor of a path, if one is held."""
        fd = self._fds.pop(path, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Idempotent."""
        for path in list(self._fds):
            self.forget(path)
