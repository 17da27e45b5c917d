"""Runs of consecutive blocks: cut, joined, and taken out of each other.

Ranges are pairs (first, end), ``end`` not included.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

__all__ = ("Run", "covers", "joined", "outside", "pairs", "pieces")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Blocks ``first`` to ``first + count - 1``. ``alike``: each is the level's uniform block."""

    first: int
    count: int
    alike: bool = False

    @property
    def end(self) -> int:
        return self.first + self.count


def pieces(run: Run, batch_blocks: int) -> Iterator[tuple[int, int]]:
    """Cut a run at multiples of ``batch_blocks``."""
    first = run.first
    while first < run.end:
        count = min(batch_blocks - first % batch_blocks, run.end - first)
        yield first, count
        first += count


def pairs(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) for each run of consecutive numbers."""
    for _, group in itertools.groupby(enumerate(blocks), key=lambda item: item[1] - item[0]):
        numbers = [block for _, block in group]
        yield numbers[0], len(numbers)


def covers(ranges: Sequence[tuple[int, int]], block: int) -> bool:
    """Say whether one of the ranges (ascending, apart) holds the block."""
    index = bisect.bisect(ranges, block, key=lambda item: item[0])
    return index > 0 and ranges[index - 1][1] > block


def outside(ranges: Sequence[tuple[int, int]], first: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of [first, end) that no range covers."""
    index = max(0, bisect.bisect(ranges, first, key=lambda item: item[0]) - 1)
    for start, stop in itertools.islice(ranges, index, None):
        if start >= end:
            break
        if start > first:
            yield first, start
        first = max(first, stop)
    if first < end:
        yield first, end


def joined(ranges: Iterable[tuple[int, int]]) -> Iterator[Run]:
    """Yield runs, those that touch as one."""
    first = end = 0
    for start, stop in ranges:
        if start != end or first == end:
            if end > first:
                yield Run(first=first, count=end - first)
            first = start
        end = stop
    if end > first:
        yield Run(first=first, count=end - first)
