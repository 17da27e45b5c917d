"""Where the next layer goes in an image: first fit over the ranges in use. Pure arithmetic."""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ("FileRange", "first_fit", "free_ranges", "overlapping", "round_up")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class FileRange:
    """Bytes of a file, ``offset_bytes`` up to, but not with, ``end_bytes``; not empty. Unlike the
    ``ByteRange`` of a request it need not be whole sectors."""

    offset_bytes: int
    size_bytes: int

    def __post_init__(self) -> None:
        if self.offset_bytes < 0 or self.size_bytes <= 0:
            raise ValueError(f"no range: {self.size_bytes} bytes at {self.offset_bytes}")

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.size_bytes


def round_up(value: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is not below ``value``."""
    return -(-value // step) * step


def free_ranges(used: Iterable[FileRange], total_bytes: int) -> list[FileRange]:
    """Return the maximal unused ranges below ``total_bytes``, in ascending order.

    ``used`` may come in any order and may overlap.
    """
    free = []
    end = 0
    for taken in sorted(used):
        gap_end = min(taken.offset_bytes, total_bytes)
        if gap_end > end:
            free.append(FileRange(offset_bytes=end, size_bytes=gap_end - end))
        end = max(end, taken.end_bytes)
    if end < total_bytes:
        free.append(FileRange(offset_bytes=end, size_bytes=total_bytes - end))
    return free


def first_fit(used: Iterable[FileRange], size_bytes: int, alignment_bytes: int) -> int:
    """Return the lowest aligned offset with ``size_bytes`` unused; there is no upper bound."""
    offset = 0
    for taken in sorted(used):
        if offset + size_bytes <= taken.offset_bytes:
            return offset
        offset = max(offset, round_up(taken.end_bytes, alignment_bytes))
    return offset


def overlapping(ranges: Iterable[FileRange]) -> list[tuple[FileRange, FileRange]]:
    """Return the pairs of neighbours, by offset, that share bytes."""
    pairs = []
    widest: FileRange | None = None
    for current in sorted(ranges):
        if widest is not None and current.offset_bytes < widest.end_bytes:
            pairs.append((widest, current))
        if widest is None or current.end_bytes > widest.end_bytes:
            widest = current
    return pairs
