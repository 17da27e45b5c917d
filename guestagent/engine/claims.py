"""What is spoken for: paths, none of which may lie on, in or above another, and ranges of bytes,
which may."""

from bisect import bisect_left, insort

from guestagent.api import ByteRange

__all__ = ("Owner", "PathClaims", "SharedRanges")

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


class SharedRanges:
    """Ranges of bytes of one device, each by whose it is. Not thread-safe.

    Sorted by where they begin, so that a search looks only at those that begin inside a range or
    less than the length of the longest before it: a few, where lengths are much the same.
    """

    def __init__(self) -> None:
        #: (first byte, byte after the last, whose it is)
        self._ranges: list[tuple[int, int, str]] = []
        self._longest_bytes = 0

    def __len__(self) -> int:
        return len(self._ranges)

    def add(self, area: ByteRange, owner: str) -> None:
        insort(self._ranges, _extent(area, owner))
        self._longest_bytes = max(self._longest_bytes, area.size_bytes)

    def drop(self, area: ByteRange, owner: str) -> None:
        """Forget what was added."""
        self._ranges.remove(_extent(area, owner))

    def sharing(self, area: ByteRange) -> "Iterator[str]":
        """Yield who has bytes of a range, in the order of where theirs begin."""
        begin, end, _ = _extent(area, "")
        first = bisect_left(self._ranges, (begin - self._longest_bytes,))
        last = bisect_left(self._ranges, (end,))
        for _, other_end, owner in self._ranges[first:last]:
            if begin < other_end:
                yield owner


def _extent(area: ByteRange, owner: str) -> tuple[int, int, str]:
    return area.offset_bytes, area.offset_bytes + area.size_bytes, owner


def _above(path: str) -> "Iterator[str]":
    while path := path.rpartition("/")[0]:
        yield path
