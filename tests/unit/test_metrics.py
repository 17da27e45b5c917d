"""The metrics: right numbers in the right form, judged by promtool."""

import pytest

from guestagent.observe.metrics import BUCKETS_SECONDS, Collector, Metrics
from tests.beds.calls import at_once
from tests.beds.metricsbed import check, full, samples


def test_a_histogram_counts_where_it_belongs() -> None:
    metrics = Metrics()
    name = "guestagent_step_duration_seconds"
    for seconds in (0.0005, 0.0006, 31.0):
        metrics.step("verity", seconds, failed=seconds > 30)
    found = samples(metrics.render({}))
    assert found[f'{name}_bucket{{step="verity",le="0.0005"}}'] == 1
    assert found[f'{name}_bucket{{step="verity",le="0.001"}}'] == 2
    assert found[f'{name}_bucket{{step="verity",le="30"}}'] == 2
    assert found[f'{name}_bucket{{step="verity",le="+Inf"}}'] == 3
    assert found[f'{name}_count{{step="verity"}}'] == 3
    assert found[f'{name}_sum{{step="verity"}}'] == pytest.approx(31.0011)
    assert found['guestagent_step_failures_total{step="verity"}'] == 1


def test_buckets_grow() -> None:
    assert list(BUCKETS_SECONDS) == sorted(set(BUCKETS_SECONDS))


def test_the_linter_has_no_complaint() -> None:
    check(full().render({}))


def test_the_linter_would_complain() -> None:
    with pytest.raises(AssertionError):
        check(full().render({}).replace("_total", ""))


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.count("guestagent_requests_total", f"method{number}", "ok")
    found = samples(metrics.render({}))
    assert found['guestagent_requests_total{method="other",code="other"}'] == 1000 - 256
    assert sum(value for name, value in found.items() if "requests_total" in name) == 1000


def test_no_count_is_lost_among_threads() -> None:
    metrics = Metrics()

    def work(_number: int) -> None:
        for _ in range(500):
            metrics.step("mount", 0.001, failed=False)

    at_once(work, range(8))
    found = samples(metrics.render({}))
    assert found['guestagent_step_duration_seconds_count{step="mount"}'] == 4000


def test_the_process_is_told() -> None:
    found = samples(Collector(Metrics()).text())
    assert found["process_resident_memory_bytes"] > 1 << 20
    assert found["process_open_fds"] >= 3
    assert found["process_threads"] >= 1
    assert 0 <= found["guestagent_uptime_seconds"] < 60
    check(Collector(Metrics()).text())
