"""``guestctl status``: how a guest is, on one screen."""

import shutil
import sys

import click

from guestagent.api import Event, LayerReport, OverlayReport
from guestagent.api.agent import EventsReply, HelloReply, StatusReply
from guestagent.host.ctl.events import describe_event
from guestagent.host.ctl.session import Session, emit, pass_session
from guestagent.host.ctl.style import (
    ago,
    elided,
    human_bytes,
    human_seconds,
    paint,
    plain,
    table,
    terminal_columns,
    tint,
    width_of,
)

__all__ = ("count_of", "layer_rows", "status")

#: What stands around the rows of the tables, and the prompt behind it all.
_FIXED_LINES = 13
_EVENTS = 4
_OVERLAYS = 3
LAYER_HEADER = ("LAYER", "STATE", "FS", "SIZE", "VERITY", "USED BY", "TARGET")


@click.command()
@click.option("--check", is_flag=True, help="Exit with status 1 when the agent is degraded.")
@pass_session
def status(session: Session, check: bool) -> None:
    """Say how the agent is, what it has mounted, and what happened last."""
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
    """Return how many layers fit on the screen, with everything else."""
    lines = shutil.get_terminal_size(fallback=(80, 24)).lines if sys.stdout.isatty() else 1000
    others = _EVENTS + problems
    if overlays:
        others += 2 + min(overlays, _OVERLAYS) + (overlays > _OVERLAYS)
    return max(3, lines - _FIXED_LINES - others)


def _head(session: Session, hello: HelloReply, reply: StatusReply) -> list[str]:
    state = paint(reply.state, tint(reply.state), bold=True)
    again = f", {reply.restarts} lives before it" if reply.restarts else ""
    return [
        f"{state}  agent {plain(hello.agent)} on Linux {plain(hello.kernel)}, "
        f"up {human_seconds(reply.uptime_seconds)}{again}",
        f"       {_shortened(str(session.address))}",
    ]


def _shortened(text: str) -> str:
    columns = terminal_columns()
    return text if columns is None else elided(text, columns - 7)


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


def count_of(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def layer_rows(layers: tuple[LayerReport, ...]) -> list[tuple[str, ...]]:
    """Return rows for ``LAYER_HEADER``."""
    return [
        (
            layer.layer_id,
            layer.state,
            layer.filesystem,
            human_bytes(layer.size_bytes),
            layer.verity.status if layer.verity else "-",
            " ".join(layer.used_by) or "-",
            layer.target,
        )
        for layer in layers
    ]


def _layers(layers: tuple[LayerReport, ...], room: int) -> list[str]:
    if not layers:
        return []
    # those that are not well first: they must not be among those that do not fit
    ordered = sorted(layers, key=lambda layer: layer.state == "mounted")
    lines = [
        "",
        *_indented(table(LAYER_HEADER, layer_rows(tuple(ordered[:room])), columns=_edge())),
    ]
    if len(ordered) > room:
        lines.append(f"  and {len(ordered) - room} more: guestctl layer list")
    return lines


def _overlays(overlays: tuple[OverlayReport, ...]) -> list[str]:
    if not overlays:
        return []
    rows = [
        (
            overlay.overlay_id,
            overlay.state,
            str(len(overlay.layers)),
            overlay.scratch.kind if overlay.scratch else "-",
            overlay.target,
        )
        for overlay in overlays[:_OVERLAYS]
    ]
    header = ("OVERLAY", "STATE", "LAYERS", "SCRATCH", "TARGET")
    lines = ["", *_indented(table(header, rows, columns=_edge()))]
    if len(overlays) > _OVERLAYS:
        lines.append(f"  and {len(overlays) - _OVERLAYS} more: guestctl overlay list")
    return lines


def _events(events: tuple[Event, ...]) -> list[str]:
    if not events:
        return []
    edge = _edge()
    lines = [f"  {_cut(describe_event(event), edge)}" for event in events[-_EVENTS:]]
    return ["", *lines]


def _cut(text: str, edge: int | None) -> str:
    # colours take no columns, and a line of colour is not cut in two
    if edge is None or width_of(click.unstyle(text)) <= edge:
        return text
    return click.unstyle(text)[: edge - 1] + "…"


def _edge() -> int | None:
    columns = terminal_columns()
    return None if columns is None else columns - 2


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
