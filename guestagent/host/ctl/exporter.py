"""Many guests for one Prometheus server: asked in parallel, each with its own deadline.

A guest that does not answer in time is down for this scrape only. It holds one thread, and never a
second one, until it answers or its connection ends. Not by prometheus_client, whose server starts a
thread for every request without a limit.
"""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn

from guestagent.host.client import GuestAgent
from guestagent.host.ctl.exposition import merged
from vsock.closeable import Closeable
from vsock.deadline import Deadline
from vsock.errors import RpcError

__all__ = ("CONTENT_TYPE", "Exporter", "MetricsServer")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_THREADS = 32
#: Scrapes at once; Prometheus makes one.
_MAX_REQUESTS = 8
_REQUEST_SECONDS = 10.0
#: Part of the server's time limit that is kept for merging and sending.
_RESERVE_SECONDS = 0.5


class _Guest:
    """One guest: its connection is kept between scrapes and made again when it is lost."""

    def __init__(self, name: str, address: str, until: Deadline) -> None:
        self.name = name
        self._address = address
        self._until = until
        self._handle: GuestAgent | None = None
        self.last: Future[tuple[str, float]] | None = None

    def scrape(self, seconds: float) -> tuple[str, float]:
        """Return the text and the seconds that it took; runs on one thread at a time."""
        begin = time.monotonic()
        if self._handle is None or self._handle.closed:
            self.close()
            self._handle = GuestAgent(
                self._address,
                connect_seconds=seconds,
                deadline_ms=max(1, int(seconds * 1000)),
                until=self._until,
            )
        return self._handle.metrics(), time.monotonic() - begin

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


class Exporter(Closeable):
    """Asks all guests in parallel. A context manager."""

    def __init__(self, guests: Mapping[str, str], *, seconds: float) -> None:
        """``guests``: name -> address; ``seconds``: time limit of each answer."""
        self._until = Deadline()
        self._guests = [_Guest(name, address, self._until) for name, address in guests.items()]
        self._seconds = seconds
        self._lock = threading.Lock()
        threads = min(_MAX_THREADS, len(self._guests))
        self._pool = ThreadPoolExecutor(threads, "scrape")

    def close(self) -> None:
        """End requests in flight without waiting for any guest. Idempotent."""
        self._until.cancel()
        self._pool.shutdown(cancel_futures=True)
        for guest in self._guests:
            guest.close()
        self._until.close()

    def text(self, seconds: float | None = None) -> str:
        """Return the metrics of every guest, and which of them answered."""
        bound = self._seconds if seconds is None else min(self._seconds, seconds)
        with self._lock:
            asked = [(guest, self._ask(guest, bound)) for guest in self._guests]
        wait([future for _, future in asked], bound)
        texts: dict[str, str] = {}
        took: dict[str, float] = {}
        for guest, future in asked:
            answer = _answer(future)
            if answer is not None:
                texts[guest.name], took[guest.name] = answer
        text, refused = merged(texts)
        return text + merged({name: self._about(name, took, refused) for name in self._names()})[0]

    def _names(self) -> list[str]:
        return [guest.name for guest in self._guests]

    def _ask(self, guest: _Guest, seconds: float) -> "Future[tuple[str, float]]":
        if guest.last is None or guest.last.done():
            guest.last = self._pool.submit(guest.scrape, seconds)
        return guest.last

    @staticmethod
    def _about(name: str, took: Mapping[str, float], refused: Mapping[str, int]) -> str:
        rows = (
            ("guestagent_up", "gauge", "1 if the guest answered this scrape", int(name in took)),
            (
                "guestagent_scrape_duration_seconds",
                "gauge",
                "time that the guest took to answer",
                round(took.get(name, 0.0), 6),
            ),
            (
                "guestagent_scrape_refused_lines",
                "gauge",
                "lines of the guest's answer that are not of the format",
                refused.get(name, 0),
            ),
        )
        return "".join(
            f"# HELP {metric} {summary}\n# TYPE {metric} {kind}\n{metric} {value}\n"
            for metric, kind, summary, value in rows
        )


def _answer(future: "Future[tuple[str, float]]") -> tuple[str, float] | None:
    if not future.done():
        return None
    try:
        return future.result()
    except (RpcError, OSError):
        return None


class MetricsServer(ThreadingMixIn, HTTPServer):
    """``GET /metrics`` for a Prometheus server; a few requests at once, no more."""

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], exporter: Exporter) -> None:
        """Listen.

        Raises:
            OSError: as bind(2).
        """
        self.exporter = exporter
        self._places = threading.BoundedSemaphore(_MAX_REQUESTS)
        super().__init__(address, _Handler)

    def process_request(self, request: object, client_address: object) -> None:
        """Serve on a new thread; refuse the request where all are in use."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[arg-type]
            return
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        """Serve, then free the place for the next request."""
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing when a peer closes its connection early."""


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    server_version = "guestctl"
    sys_version = ""
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        """Answer /metrics; 404 for every other path."""
        if self.path.partition("?")[0] != "/metrics":
            self._send(404, "there is only /metrics\n")
            return
        self._send(200, self.server.exporter.text(self._seconds()))

    def _seconds(self) -> float | None:
        """Return the time limit that Prometheus sent, less a reserve; None where it sent none."""
        try:
            seconds = float(self.headers.get("X-Prometheus-Scrape-Timeout-Seconds", ""))
        except ValueError:
            return None
        return max(0.1, seconds - _RESERVE_SECONDS) if 0 < seconds < 3600 else None

    def _send(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: scrapes come every few seconds."""
