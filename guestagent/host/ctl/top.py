"""``guestctl top``: layers, devices, timings and events of a guest, updated."""

import contextlib
import shutil
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from guestagent.api import Event, LayerReport, OverlayReport
from guestagent.api.agent import StatusReply
from guestagent.api.layers import DmDevice
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.events import describe_event
from guestagent.host.ctl.exposition import Timing, finite, parsed, step_timings, totals
from guestagent.host.ctl.layer import LAYER_HEADER, layer_rows
from guestagent.host.ctl.overlay import OVERLAY_HEADER, overlay_rows
from guestagent.host.ctl.session import Session, emit, pass_session
from guestagent.host.ctl.status import heading
from guestagent.host.ctl.style import count_of, cut, human_bytes, paint, plain, table
from vsock.errors import ConnectionClosed

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ("Picture", "look", "screen", "top")

_EVENTS_KEPT = 200
#: Requests that one update makes, which are left out of the rate.
_OWN_REQUESTS = 6
_DEVICE_HEADER = ("DEVICE", "DEV", "TYPE", "OPEN", "STATUS")
_TIMING_HEADER = ("STEP", "COUNT", "FAILED", "MEAN", "P50", "P95", "TOTAL")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The state of a guest. ``requests`` and ``seconds_cpu`` are totals since its agent started."""

    name: str
    status: StatusReply
    layers: tuple[LayerReport, ...]
    overlays: tuple[OverlayReport, ...]
    devices: tuple[DmDevice, ...]
    timings: tuple[Timing, ...]
    events: tuple[Event, ...]
    requests: float
    failures: float
    seconds_cpu: float


def look(guest: GuestAgent, name: str) -> Picture:
    """Ask a guest for everything on the screen."""
    text = guest.metrics()
    status = guest.status()
    samples = tuple(finite(parsed(text)))
    found = totals(samples)
    failed = (
        sample.value
        for sample in samples
        if sample.name == "guestagent_requests_total" and sample.label("code") != "ok"
    )
    since = max(0, status.event_sequence - _EVENTS_KEPT)
    return Picture(
        name=name,
        status=status,
        layers=guest.layer_list(),
        overlays=guest.overlay_list(),
        devices=guest.dm_list().devices,
        timings=step_timings(text),
        events=guest.events(since).events,
        requests=found.get("guestagent_requests_total", 0.0),
        failures=sum(failed),
        seconds_cpu=found.get("process_cpu_seconds_total", 0.0),
    )


@click.command()
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 60),
    default=1.0,
    show_default=True,
    help="Seconds between updates.",
)
@click.option("--once", is_flag=True, help="Print once and end, as without a terminal.")
@pass_session
def top(session: Session, interval: float, once: bool) -> None:
    """Watch layers, devices, timings and events of a guest; Ctrl-C ends it."""
    address = str(session.address)
    if session.as_json:
        with session.agent() as guest:
            emit(_plain(look(guest, address)))
    elif once or not sys.stdout.isatty():
        with session.agent() as guest:
            picture = look(guest, address)
        size = shutil.get_terminal_size((120, 0))
        click.echo(screen(picture, None, columns=size.columns, lines=size.lines or None))
    else:
        _watch(session, address, interval)


def _watch(session: Session, address: str, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    changed = threading.Event()
    before: Picture | None = None
    shown = "connecting"
    with (
        contextlib.suppress(KeyboardInterrupt),  # ends the command
        session.agent(reconnect=True) as guest,
        Live(console=console, screen=True) as live,
    ):
        guest.set_event_callback(lambda _event: changed.set())
        while True:
            lost = f"{paint('no connection', 'yellow')}: trying again\n"
            try:
                if not guest.closed:  # else it would wait for the next connection
                    picture = look(guest, address)
                    shown, lost = _fitting(console, picture, before), ""
                    before = picture
            except ConnectionClosed:
                pass
            live.update(Text.from_ansi(lost + shown), refresh=True)
            # after an event, look early, but let further events arrive first
            if changed.wait(interval):
                threading.Event().wait(min(0.2, interval))
            changed.clear()


def _fitting(console: "Console", picture: Picture, before: Picture | None) -> str:
    return screen(picture, before, columns=console.width, lines=console.height)


def screen(picture: Picture, before: Picture | None, *, columns: int, lines: int | None) -> str:
    """Return the screen in at most ``lines`` lines."""
    head = _head(picture, before, columns)
    # layers with a problem come first, so that they are among those that fit
    layers = sorted(picture.layers, key=lambda layer: layer.state == "mounted")
    tables = (
        (LAYER_HEADER, layer_rows(layers)),
        (OVERLAY_HEADER, overlay_rows(picture.overlays)),
        (_DEVICE_HEADER, [_device_row(device) for device in picture.devices]),
        (_TIMING_HEADER, [_timing_row(timing) for timing in picture.timings]),
    )
    filled = [table(names, rows, columns=columns).splitlines() for names, rows in tables if rows]
    if picture.events:
        events = [describe_event(event) for event in reversed(picture.events)]
        filled.append([paint("EVENTS", None, bold=True), *events])
    room = None if lines is None else max(0, lines - len(head))
    out = head
    for rows in _shared(filled, room):
        out += ["", *(cut(row, columns) for row in rows)]
    return "\n".join(out if lines is None else out[:lines])


def _shared(sections: list[list[str]], room: int | None) -> list[list[str]]:
    """Share the lines between the sections; lines that a section does not need go to the others."""
    if room is None:
        return [_first(rows, 30) for rows in sections]
    left = room - len(sections)
    shares: dict[int, int] = {}
    waiting = sorted(range(len(sections)), key=lambda place: len(sections[place]))
    while waiting:
        place = waiting.pop(0)
        shares[place] = min(len(sections[place]), max(0, left // (len(waiting) + 1)))
        left -= shares[place]
    # a section of a header and a line of how many more says nothing
    return [_first(rows, shares[place]) for place, rows in enumerate(sections) if shares[place] > 2]


def _first(rows: list[str], count: int) -> list[str]:
    if len(rows) <= count:
        return rows
    return [*rows[: count - 1], f"... and {len(rows) - count + 1} more"]


def _head(picture: Picture, before: Picture | None, columns: int) -> list[str]:
    status = picture.status
    head = [
        heading(status, f"{picture.name} "),
        f"       {human_bytes(status.rss_bytes)}, {count_of(status.threads, 'thread')}, "
        f"{count_of(status.connections, 'connection')}, {_rates(picture, before)}, "
        f"{count_of(status.event_sequence, 'event')}",
    ]
    head += [paint(f"       {plain(problem)}", "yellow") for problem in status.problems[:3]]
    return [cut(line, columns) for line in head]


def _rates(picture: Picture, before: Picture | None) -> str:
    text = f"{count_of(int(picture.requests), 'request')} ({picture.failures:.0f} refused)"
    if before is None or picture.status.pid != before.status.pid:
        return text
    seconds = picture.status.uptime_seconds - before.status.uptime_seconds
    if seconds <= 0:
        return text
    asked = max(0.0, picture.requests - before.requests - _OWN_REQUESTS) / seconds
    busy = (picture.seconds_cpu - before.seconds_cpu) / seconds * 100
    return f"{text}, {asked:.1f}/s, cpu {busy:.0f}%"


def _device_row(device: DmDevice) -> tuple[str, ...]:
    opens, status = str(device.open_count), device.status or "-"
    return device.name, device.dev, device.target_type, opens, status


def _timing_row(one: Timing) -> tuple[str, ...]:
    quantiles = (f"{one.quantile_ms(part):.1f}" for part in (0.5, 0.95))
    total = f"{one.seconds * 1000:.0f}"
    return one.step, str(one.count), str(one.failures), f"{one.mean_ms:.1f}", *quantiles, total


def _plain(picture: Picture) -> dict[str, object]:
    return {
        "status": picture.status.to_wire(),
        "layers": [layer.to_wire() for layer in picture.layers],
        "overlays": [overlay.to_wire() for overlay in picture.overlays],
        "devices": [device.to_wire() for device in picture.devices],
        "timings": [
            {
                "step": one.step,
                "count": one.count,
                "failures": one.failures,
                "mean_ms": round(one.mean_ms, 3),
                "p50_ms": round(one.quantile_ms(0.5), 3),
                "p95_ms": round(one.quantile_ms(0.95), 3),
                "total_ms": round(one.seconds * 1000, 3),
            }
            for one in picture.timings
        ],
        "events": [event.to_wire() for event in picture.events],
    }
