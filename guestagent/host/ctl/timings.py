"""What a guest's steps took, from its own histograms."""

from collections.abc import Iterable
from dataclasses import dataclass

from guestagent.host.ctl.exposition import Sample, parsed

__all__ = ("Timing", "quantile", "step_timings", "totals")

_STEP = "guestagent_step_duration_seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """A step: how often, how long in all, and its cumulative buckets (upper bound, count)."""

    step: str
    count: int
    seconds: float
    failures: int
    buckets: tuple[tuple[float, int], ...]

    @property
    def mean_ms(self) -> float:
        return self.seconds / self.count * 1000 if self.count else 0.0

    def quantile_ms(self, part: float) -> float:
        """Return an estimate of a quantile in milliseconds."""
        return quantile(self.buckets, part) * 1000


def quantile(buckets: Iterable[tuple[float, int]], part: float) -> float:
    """Return an estimate as ``histogram_quantile`` has it: a straight line within a bucket.

    In the last, unbounded bucket it is that bucket's lower bound.
    """
    places = tuple(buckets)
    if not places or not places[-1][1]:
        return 0.0
    rank = part * places[-1][1]
    low, below = 0.0, 0
    for bound, count in places:
        if count >= rank:
            if bound == float("inf"):
                return low
            share = (rank - below) / (count - below) if count > below else 1.0
            return low + (bound - low) * share
        low, below = bound, count
    return low


def step_timings(text: str) -> tuple[Timing, ...]:
    """Return every step of a guest's metrics, the one that took most in all first."""
    buckets: dict[str, list[tuple[float, int]]] = {}
    counts: dict[str, int] = {}
    sums: dict[str, float] = {}
    failures: dict[str, int] = {}
    for sample in parsed(text):
        step = sample.label("step")
        if sample.name == f"{_STEP}_bucket":
            buckets.setdefault(step, []).append((float(sample.label("le")), int(sample.value)))
        elif sample.name == f"{_STEP}_count":
            counts[step] = int(sample.value)
        elif sample.name == f"{_STEP}_sum":
            sums[step] = sample.value
        elif sample.name == "guestagent_step_failures_total":
            failures[step] = int(sample.value)
    timings = (
        Timing(
            step=step,
            count=count,
            seconds=sums.get(step, 0.0),
            failures=failures.get(step, 0),
            buckets=tuple(sorted(buckets.get(step, ()))),
        )
        for step, count in counts.items()
    )
    return tuple(sorted(timings, key=lambda timing: -timing.seconds))


def totals(samples: Iterable[Sample]) -> dict[str, float]:
    """Return name -> sum over all labels."""
    found: dict[str, float] = {}
    for sample in samples:
        found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
