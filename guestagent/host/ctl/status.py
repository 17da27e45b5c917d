"""``guestctl status``: the state of a guest on one screen."""

import shutil
import sys

import click

from guestagent.api import Event, LayerReport, OverlayReport
from guestagent.api.agent import EventsReply, HelloReply, StatusReply
from guestagent.host.ctl.events import describe_event
from guestagent.host.ctl.layer import LAYER_HEADER, layer_rows
from guestagent.host.ctl.overlay import OVERLAY_HEADER, overlay_rows
from guestagent.host.ctl.session import Session, emit, pass_session
from guestagent.host.ctl.style import (
    ago,
    count_of,
    cut,
    human_bytes,
    human_seconds,
    paint,
    plain,
    table,
    terminal_columns,
    tint,
)

__all__ = ("heading", "status")

#: Lines around the rows of the tables, and the prompt behind them.
_FIXED_LINES = 13
_EVENTS = 4
_OVERLAYS = 3


@click.command()
@click.option("--check", is_flag=True, help="Exit with status 1 when the agent is degraded.")
@pass_session
def status(session: Session, check: bool) -> None:
    """Print the state of the agent, its layers and overlays, and the last events."""
    with session.agent() as guest:
        reply = guest.status()
        if not session.as_json:
            layers, overlays = guest.layer_list(), guest.overlay_list()
            events = guest.events(max(0, reply.event_sequence - _EVENTS))
            hello = guest.hello
    if session.as_json:
        emit(reply.to_wire())
    else:
        click.echo(_screen(session, hello, reply, layers, overlays, events))
    if check and reply.state != "ready":
        sys.exit(1)


def _screen(
    session: Session,
    hello: HelloReply,
    reply: StatusReply,
    layers: tuple[LayerReport, ...],
    overlays: tuple[OverlayReport, ...],
    events: EventsReply,
) -> str:
    return "\n".join(
        (
            *_head(session, hello, reply),
            "",
            *_numbers(reply, events.events),
            *(f"  problem      {paint(plain(problem), 'yellow')}" for problem in reply.problems),
            *_layers(layers, _room(len(overlays), len(reply.problems))),
            *_overlays(overlays),
            *_events(events.events),
        )
    )


def _room(overlays: int, problems: int) -> int:
    """Return how many layers fit on the screen beside the other lines."""
    lines = shutil.get_terminal_size(fallback=(80, 24)).lines if sys.stdout.isatty() else 1000
    others = _EVENTS + problems
    if overlays:
        others += 2 + min(overlays, _OVERLAYS) + (overlays > _OVERLAYS)
    return max(3, lines - _FIXED_LINES - others)


def _head(session: Session, hello: HelloReply, reply: StatusReply) -> list[str]:
    return [
        heading(reply, f"agent {plain(hello.agent)} on Linux {plain(hello.kernel)},"),
        cut(f"       {session.address}", terminal_columns()),
    ]


def heading(reply: StatusReply, name: str) -> str:
    """Return the first line of a screen: state, name, time since the start, restarts."""
    state = paint(plain(reply.state), tint(reply.state), bold=True)
    restarts = f", restarted {count_of(reply.restarts, 'time')}" if reply.restarts else ""
    return f"{state}  {name} up {human_seconds(reply.uptime_seconds)}{restarts}"


def _numbers(reply: StatusReply, events: tuple[Event, ...]) -> list[str]:
    last = f", the last {ago(events[-1].unix_ms)}" if events else ""
    lost = f", {reply.events_dropped} not delivered" if reply.events_dropped else ""
    return [
        f"  mounted      {count_of(reply.layers, 'layer')}, {count_of(reply.overlays, 'overlay')}, "
        f"{count_of(reply.dm_devices, 'dm device')}",
        f"  serving      {count_of(reply.connections, 'connection')}, "
        f"{count_of(max(0, reply.requests_in_flight - 1), 'request')} in flight beside this one",
        f"  using        {human_bytes(reply.rss_bytes)} of memory, "
        f"{count_of(reply.threads, 'thread')}, pid {reply.pid}",
        f"  events       {reply.event_sequence} so far{last}{lost}",
    ]


def _layers(layers: tuple[LayerReport, ...], room: int) -> list[str]:
    # layers with a problem come first, so that they are among those that fit
    ordered = sorted(layers, key=lambda layer: layer.state == "mounted")
    shown = table(LAYER_HEADER, layer_rows(ordered[:room]), columns=_edge())
    return _section(shown, len(ordered) - room, "layer") if layers else []


def _overlays(overlays: tuple[OverlayReport, ...]) -> list[str]:
    shown = table(OVERLAY_HEADER, overlay_rows(overlays[:_OVERLAYS]), columns=_edge())
    return _section(shown, len(overlays) - _OVERLAYS, "overlay") if overlays else []


def _section(shown: str, hidden: int, kind: str) -> list[str]:
    more = [f"  and {hidden} more: guestctl {kind} list"] if hidden > 0 else []
    return ["", *(f"  {line}" for line in shown.splitlines()), *more]


def _events(events: tuple[Event, ...]) -> list[str]:
    lines = [f"  {cut(describe_event(event), _edge())}" for event in events[-_EVENTS:]]
    return ["", *lines] if lines else []


def _edge() -> int | None:
    columns = terminal_columns()
    return None if columns is None else columns - 2
