"""The metrics of many guests as one, and serving them within bounds."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.host.ctl.exporter import Exporter, MetricsServer
from guestagent.host.ctl.exposition import merged, parsed, quantile, step_timings
from tests.beds.handlebed import WAIT_SECONDS, Agent
from tests.beds.metricsbed import check, full, samples
from vsock.errors import ConnectionClosed

ONE = "# HELP a_total a\n# TYPE a_total counter\na_total 1\n"


# --- putting them together


def test_each_sample_says_whose_it_is() -> None:
    text, refused = merged({"one": ONE, 'two"\n': ONE})
    assert text.splitlines() == [
        "# HELP a_total a",
        "# TYPE a_total counter",
        'a_total{guest="one"} 1',
        'a_total{guest="two\\"\\n"} 1',
    ]
    assert refused == {"one": 0, 'two"\n': 0}


def test_the_linter_has_no_complaint_of_many() -> None:
    text = full().render({})
    together, refused = merged({"one": text, "two": text})
    assert set(refused.values()) == {0}
    check(together)
    assert len(samples(together)) == 2 * len(samples(text))


@pytest.mark.parametrize(
    "line",
    [
        "junk",
        "a_total",
        'a_total{x="1} 1',
        "a_total one",
        "a_total 1 2 3",
        'b_total{guest="other"} 1',
        "a_total{} 1}",
        "unknown 1",
        "a_total_bucket 1",
    ],
)
def test_merged_metrics_omit_malformed_lines(line: str) -> None:
    text, refused = merged({"one": f"{ONE}{line}\n"})
    assert refused == {"one": 1}
    assert text == merged({"one": ONE})[0]


def test_a_guest_cannot_speak_for_another() -> None:
    text, _ = merged({"one": f'{ONE}a_total{{guest="two"}} 9\n'})
    assert 'guest="two"' not in text


def test_a_guest_cannot_change_what_a_metric_is() -> None:
    lie = ONE.replace("counter", "gauge").replace(" 1\n", " 99\n")
    text, refused = merged({"one": ONE, "two": lie})
    assert "99" not in text
    assert refused == {"one": 0, "two": 1}
    check(text)


@given(st.text(max_size=300))
def test_whatever_a_guest_sends_is_no_failure(text: str) -> None:
    together, _ = merged({"one": ONE, "junk": text})
    assert 'a_total{guest="one"} 1' in together


def test_samples_are_read() -> None:
    (sample,) = parsed('a{x="1\\"2",y="z"} 1.5e3')
    assert (sample.name, sample.value, sample.label("y")) == ("a", 1500.0, "z")


# --- timings


def test_quantiles_are_those_of_prometheus() -> None:
    buckets = ((0.1, 10), (0.2, 20), (float("inf"), 20))
    assert quantile(buckets, 0.5) == pytest.approx(0.1)
    assert quantile(buckets, 0.75) == pytest.approx(0.15)
    assert quantile(((0.1, 0), (float("inf"), 5)), 0.5) == 0.1
    assert quantile((), 0.5) == 0.0


def test_steps_are_read_from_the_metrics() -> None:
    from guestagent.observe.metrics import Metrics

    metrics = Metrics()
    for _ in range(10):
        metrics.step("verity", 0.02, failed=False)
    metrics.step("device", 1.0, failed=True)
    first, second = step_timings(metrics.render({}))
    assert (first.step, first.count, first.failures) == ("device", 1, 1)
    assert (second.step, second.count, second.failures) == ("verity", 10, 0)
    assert second.mean_ms == pytest.approx(20)
    assert 10 < second.quantile_ms(0.5) <= 25


# --- serving


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[list[Agent]]:
    found = [Agent(tmp_path / f"agent{number}") for number in range(2)]
    for agent in found:
        agent.metrics = ONE
    yield found
    for agent in found:
        agent.stop()


class Silent:
    """One that takes connections and never answers."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix://{path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def accept(self) -> socket.socket:
        sock, _ = self._listener.accept()
        return sock

    def end(self) -> None:
        self._listener.close()


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Silent]:
    one = Silent(tmp_path / "silent")
    yield one
    one.end()


def test_guests_are_asked_at_once_each_within_its_time(agents: list[Agent], silent: Silent) -> None:
    guests = {"one": agents[0].address, "two": agents[1].address, "silent": silent.address}
    guests["missing"] = silent.address + "-not"
    with Exporter(guests, seconds=0.5) as exporter:
        for _ in range(2):
            begin = time.monotonic()
            text = exporter.text()
            assert time.monotonic() - begin < 5
            found = samples(text)
            assert found['a_total{guest="one"}'] == found['a_total{guest="two"}'] == 1
            up = {name: found[f'guestagent_up{{guest="{name}"}}'] for name in guests}
            assert up == {"one": 1, "two": 1, "silent": 0, "missing": 0}
            check(text)


def test_a_guest_that_comes_back_is_up_again(agents: list[Agent]) -> None:
    with Exporter({"one": agents[0].address}, seconds=2.0) as exporter:
        assert samples(exporter.text())['guestagent_up{guest="one"}'] == 1
        agents[0].stop()
        # the time of this scrape is spent in full: nobody is there
        assert samples(exporter.text(0.3))['guestagent_up{guest="one"}'] == 0
        last = exporter._guests[0].last
        assert last is not None
        wait([last], WAIT_SECONDS)
        agents[0].start()
        assert samples(exporter.text())['guestagent_up{guest="one"}'] == 1


def test_connections_are_kept_between_scrapes(agents: list[Agent]) -> None:
    with Exporter({"one": agents[0].address}, seconds=2.0) as exporter:
        for _ in range(5):
            exporter.text()
        assert agents[0].server.connection_count == 1


@pytest.fixture
def server(agents: list[Agent]) -> Iterator[MetricsServer]:
    guests = {f"guest{number}": agent.address for number, agent in enumerate(agents)}
    with (
        Exporter(guests, seconds=2.0) as exporter,
        MetricsServer(("127.0.0.1", 0), exporter) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(WAIT_SECONDS)


def get(server: MetricsServer, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=WAIT_SECONDS)  # type: ignore[arg-type]
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_a_scrape(server: MetricsServer) -> None:
    status, text = get(server, "/metrics")
    assert status == 200
    assert samples(text)['a_total{guest="guest1"}'] == 1
    assert get(server, "/")[0] == 404


def test_the_scrapes_own_timeout_counts(agents: list[Agent], silent: Silent) -> None:
    with Exporter({"silent": silent.address}, seconds=60.0) as exporter:
        begin = time.monotonic()
        exporter.text(0.2)
        assert time.monotonic() - begin < 10


def test_closing_waits_for_no_guest_that_never_says_hello(silent: Silent) -> None:
    with Exporter({"silent": silent.address}, seconds=0.2) as exporter:
        exporter.text()
        with silent.accept() as sock:
            assert sock.recv(1)  # asked for its hello, which it gets seconds for
            begin = time.monotonic()
            exporter.close()
            assert time.monotonic() - begin < 3
            assert isinstance(exporter._guests[0].last.exception(), ConnectionClosed)  # type: ignore[union-attr]


def test_idle_connections_do_not_use_up_the_server(server: MetricsServer) -> None:
    """Beyond the bound a connection is closed at once; those that go make room again."""
    host, port = server.server_address[:2]
    idle = []
    gone = 0
    for number in range(30):
        idle.append(socket.create_connection((host, port), WAIT_SECONDS))
        if number >= 8:  # one after the other: what overflows the backlog is tried again by TCP
            gone += idle[-1].recv(1) == b""
    assert gone == 22
    for sock in idle:
        sock.close()
    end = time.monotonic() + WAIT_SECONDS
    status = None
    while status is None and time.monotonic() < end:
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            status = get(server, "/metrics")[0]
    assert status == 200
