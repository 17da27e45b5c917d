"""What is spoken for: paths, none of which may lie on, in or above another, and ranges of bytes,
which may."""

from bisect import bisect_left, insort

from guestagent.api import ByteRange

__all__ = ("Owner", "PathClaims", "SharedRanges", "parent_of")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: Who a claim belongs to: (kind, id).
Owner = tuple[str, str]


class PathClaims:
    """Path -> whose it is. A claim costs as many look-ups as there are directories above the path
    that no other has below it, however many others there are. Not thread-safe."""

    def __init__(self) -> None:
        self._owners: dict[str, Owner] = {}
        #: How many claims, and directories that have claims below them, are in a directory.
        self._inside: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"PathClaims({sorted(self._owners.items())})"

    def get(self, path: str) -> Owner | None:
        return self._owners.get(path)

    def conflicting_path(self, path: str) -> tuple[str, Owner] | None:
        """Return a path, with its owner, that this one lies on, in or above."""
        if not self._owners:
            return None
        other = path
        while other and other not in self._inside:
            owner = self._owners.get(other)
            if owner is not None:
                return other, owner
            other = parent_of(other)
        if other != path:  # nobody owns what is above somebody's
            return None
        return next(item for item in self._owners.items() if item[0].startswith(path + "/"))

    def add(self, path: str, owner: Owner) -> None:
        """Claim a path that nothing is in the way of."""
        self._owners[path] = owner
        while path := parent_of(path):
            inside = self._inside[path] = self._inside.get(path, 0) + 1
            if inside > 1:
                return

    def drop(self, path: str) -> None:
        """Release a path. Idempotent."""
        if self._owners.pop(path, None) is None:
            return
        while path := parent_of(path):
            self._inside[path] -= 1
            if self._inside[path]:
                return
            del self._inside[path]


def parent_of(path: str) -> str:
    """Return the directory that a path is in, or nothing for one at the top."""
    return path.rpartition("/")[0]


class SharedRanges:
    """Ranges of bytes of one device, each by whose it is. Not thread-safe.

    Sorted by where they begin, so that a search looks only at those that begin inside a range or
    less than the length of the longest before it: a few, where lengths are much the same.
    """

    def __init__(self) -> None:
        #: (first byte, byte after the last, whose it is)
        self._ranges: list[tuple[int, int, str]] = []
        self._longest_bytes = 0

    def __repr__(self) -> str:
        return f"SharedRanges({self._ranges})"

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
