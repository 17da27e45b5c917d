"""The parts of a device that layers take, and whether two layers take the same bytes."""

from collections.abc import Iterable

from guestagent.api import ByteRange

__all__ = ("Areas", "areas_of", "share_bytes")

#: (begin, end) of disjoint parts in bytes, in order.
Areas = tuple[tuple[int, int], ...]


def areas_of(ranges: Iterable[ByteRange]) -> Areas:
    """Return the parts that ranges cover, which may overlap and come in any order."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((part.offset_bytes, part.end_bytes) for part in ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return tuple(merged)


def share_bytes(some: Areas, others: Areas) -> bool:
    """Say whether two sets of parts have a byte in common."""
    at = other_at = 0
    while at < len(some) and other_at < len(others):
        (begin, end), (other_begin, other_end) = some[at], others[other_at]
        if begin < other_end and other_begin < end:
            return True
        if end <= other_end:
            at += 1
        else:
            other_at += 1
    return False
