"""Metrics with a sample of every family, and Prometheus's own linter."""

import subprocess
from pathlib import Path

from guestagent.observe.metrics import FAMILIES, Metrics

PROMTOOL = Path(__file__).parents[2] / ".cache/tools/prometheus/usr/bin/promtool"


def samples(text: str) -> dict[str, float]:
    """Return name with labels -> value."""
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }


def check(text: str) -> None:
    """Have Prometheus's own linter read it."""
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def full() -> Metrics:
    """Return metrics with a sample of every counter and histogram."""
    metrics = Metrics()
    for family in FAMILIES.values():
        labels = tuple(f'a "{label}"\\\n' for label in family.labels)
        if family.kind == "counter":
            metrics.count(family.name, *labels)
        elif family.kind == "histogram":
            metrics.observe(family.name, 0.02, *labels)
    return metrics
