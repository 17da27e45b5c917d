"""Prometheus text of guests: parsed, and merged into one text with a label ``guest`` per sample.

A guest is not trusted: a malformed line is left out and counted, so that one guest can neither
spoil another guest's numbers nor report in its name. Not by prometheus_client: its parser stops at
the first malformed line, and it takes and writes ``a b`` and ``a}b`` as names of metrics, which
makes a server refuse the whole scrape.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ("Sample", "Timing", "finite", "merged", "parsed", "quantile", "step_timings", "totals")

_STEP = "guestagent_step_duration_seconds"
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*"'
_SAMPLE = re.compile(
    rf"({_NAME})(?:\{{((?:{_LABEL})(?:,{_LABEL})*)?\}})? ([0-9eE.+-]+|[+-]Inf|NaN)"
)
_ONE_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\.)*)"')
_COMMENT = re.compile(rf"# (HELP|TYPE) ({_NAME}) (.*)")
_KINDS = ("counter", "gauge", "histogram", "summary", "untyped")
_SUFFIXES = ("_bucket", "_sum", "_count")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A line of the text; the values of ``labels`` keep their escapes."""

    name: str
    labels: tuple[tuple[str, str], ...]
    number: str

    @property
    def value(self) -> float:
        return float(self.number)

    def label(self, name: str) -> str:
        """Return a label's value, empty where the sample has no such label."""
        return dict(self.labels).get(name, "")

    def text(self, more: Iterable[tuple[str, str]] = ()) -> str:
        """Return the line, with more labels before its own."""
        pairs = ",".join(f'{name}="{value}"' for name, value in (*more, *self.labels))
        return f"{self.name}{{{pairs}}} {self.number}" if pairs else f"{self.name} {self.number}"


@dataclass(slots=True, kw_only=True)
class _Family:
    kind: str = "untyped"
    summary: str = ""
    lines: list[str] = field(default_factory=list)


def parsed(text: str) -> Iterator[Sample]:
    """Yield the samples of a text; malformed lines are left out."""
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match is not None and _is_number(match[3]):
            labels = tuple(_ONE_LABEL.findall(match[2] or ""))
            yield Sample(name=match[1], labels=labels, number=match[3])


def merged(texts: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """Merge texts by name of the guest; return the text, and each guest's count of lines left out.

    A label ``guest`` that a guest has set itself is removed.
    """
    families: dict[str, _Family] = {}
    refused: dict[str, int] = {}
    for name, text in texts.items():
        refused[name] = _add(families, text, ("guest", _escaped(name)))
    lines = []
    for name, family in families.items():
        if family.lines:
            lines.append(f"# HELP {name} {family.summary}")
            lines.append(f"# TYPE {name} {family.kind}")
            lines += family.lines
    return "".join(f"{line}\n" for line in lines), refused


def _add(families: dict[str, _Family], text: str, whose: tuple[str, str]) -> int:
    refused = 0
    said: dict[str, str] = {}
    for line in text.split("\n"):
        comment = _COMMENT.fullmatch(line)
        if comment is not None:
            _describe(families, comment)
            if comment[1] == "TYPE":
                said[comment[2]] = comment[3]
            continue
        sample = next(parsed(line), None)
        if sample is None:
            refused += bool(line) and not line.startswith("#")
            continue
        family = _family_of(families, said, sample.name)
        if family is None:
            refused += 1
            continue
        labels = tuple(pair for pair in sample.labels if pair[0] != whose[0])
        own = Sample(name=sample.name, labels=labels, number=sample.number)
        family.lines.append(own.text((whose,)))
    return refused


def _describe(families: dict[str, _Family], comment: re.Match[str]) -> None:
    """Take the summary and the kind from the first guest that describes a metric."""
    family = families.setdefault(comment[2], _Family())
    if comment[1] == "HELP" and not family.summary:
        family.summary = comment[3]
    elif comment[1] == "TYPE" and family.kind == "untyped" and comment[3] in _KINDS:
        family.kind = comment[3]


def _family_of(families: dict[str, _Family], said: Mapping[str, str], name: str) -> _Family | None:
    """Return the metric of a sample; None if its guest gave it no type, or another type than an
    earlier guest."""
    for suffix in ("", *_SUFFIXES):
        base = name.removesuffix(suffix) if suffix else name
        if (suffix and base == name) or base not in said:
            continue
        family = families[base]
        is_histogram = family.kind in ("histogram", "summary")
        return family if said[base] == family.kind and bool(suffix) == is_histogram else None
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# --- durations of a guest's steps, from its histograms


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """A step: number of runs, total seconds, cumulative buckets (upper bound in seconds, count)."""

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
    """Return an estimate as PromQL's ``histogram_quantile`` does: linear within a bucket.

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
    """Return every step of a guest's metrics, the largest total time first."""
    buckets: dict[str, list[tuple[float, int]]] = {}
    counts: dict[str, int] = {}
    sums: dict[str, float] = {}
    failures: dict[str, int] = {}
    for sample in finite(parsed(text)):
        step = sample.label("step")
        if sample.name == f"{_STEP}_bucket":
            with contextlib.suppress(ValueError):  # another bound than a number
                bound = float(sample.label("le"))
                buckets.setdefault(step, []).append((bound, int(sample.value)))
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


def finite(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield the samples to count with: a guest may send any number."""
    return (sample for sample in samples if math.isfinite(sample.value))


def totals(samples: Iterable[Sample]) -> dict[str, float]:
    """Return name -> sum over all labels."""
    found: dict[str, float] = {}
    for sample in samples:
        found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
