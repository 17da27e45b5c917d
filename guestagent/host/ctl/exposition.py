"""The Prometheus text of many guests as one: every sample with a label that says whose it is.

What a guest sends is not trusted: a line that is not of the format is left out and counted, so that
one guest can neither spoil the others' numbers nor speak in their name.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ("Sample", "merged", "parsed")

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
    """A line: ``labels`` are as they were written, escapes and all."""

    name: str
    labels: tuple[tuple[str, str], ...]
    number: str

    @property
    def value(self) -> float:
        return float(self.number)

    def label(self, name: str) -> str:
        """Return a label's value, empty where there is none."""
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
    """Yield the samples of a text; what is none is left out."""
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match is not None and _is_number(match[3]):
            labels = tuple(_ONE_LABEL.findall(match[2] or ""))
            yield Sample(name=match[1], labels=labels, number=match[3])


def merged(texts: Mapping[str, str], label: str = "guest") -> tuple[str, dict[str, int]]:
    """Return one text of the texts of many, by name, and how many lines of each were left out.

    A label of that name which a guest has set itself is taken away.
    """
    families: dict[str, _Family] = {}
    refused: dict[str, int] = {}
    for name, text in texts.items():
        refused[name] = _add(families, text, (label, _escaped(name)))
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
    """Note what the first that has a metric says of it."""
    family = families.setdefault(comment[2], _Family())
    if comment[1] == "HELP" and not family.summary:
        family.summary = comment[3]
    elif comment[1] == "TYPE" and family.kind == "untyped" and comment[3] in _KINDS:
        family.kind = comment[3]


def _family_of(families: dict[str, _Family], said: Mapping[str, str], name: str) -> _Family | None:
    """Return the metric that a sample belongs to, None if its guest says nothing of it, or not
    what the guests before it said."""
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
