"""Paths that are spoken for, none of which may lie on, in or above another."""

__all__ = ("Owner", "PathClaims")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: Who a claim belongs to: (kind, id).
Owner = tuple[str, str]


class PathClaims:
    """Path -> whose it is. A claim costs as many look-ups as the path has parts, however many
    others there are. Not thread-safe."""

    def __init__(self) -> None:
        self._owners: dict[str, Owner] = {}
        #: How many of the paths lie below this one.
        self._below: dict[str, int] = {}

    def get(self, path: str) -> Owner | None:
        return self._owners.get(path)

    def in_the_way_of(self, path: str) -> tuple[str, Owner] | None:
        """Return a path, with its owner, that this one lies on, in or above."""
        if not self._owners:
            return None
        for other in (path, *_above(path)):
            if other in self._owners:
                return other, self._owners[other]
        if path not in self._below:
            return None
        return next(item for item in self._owners.items() if item[0].startswith(path + "/"))

    def add(self, path: str, owner: Owner) -> None:
        """Claim a path that nothing is in the way of."""
        self._owners[path] = owner
        for parent in _above(path):
            self._below[parent] = self._below.get(parent, 0) + 1

    def drop(self, path: str) -> None:
        """Release a path. Idempotent."""
        if path not in self._owners:
            return
        del self._owners[path]
        for parent in _above(path):
            self._below[parent] -= 1
            if not self._below[parent]:
                del self._below[parent]


def _above(path: str) -> "Iterator[str]":
    while path := path.rpartition("/")[0]:
        yield path
