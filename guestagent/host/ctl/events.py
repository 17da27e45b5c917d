"""``guestctl events``: the events of a guest, listed and followed."""

import contextlib
import threading
import time

import click

from guestagent.api import Event
from guestagent.api.agent import EVENT_KINDS
from guestagent.host.client import ALL_EVENTS, event_mask
from guestagent.host.ctl.session import Session, emit, pass_session, wait_for_interrupt
from guestagent.host.ctl.style import paint, plain, tint

__all__ = ("describe_event", "events")

_KIND_COLUMNS = max(map(len, EVENT_KINDS))


@click.command()
@click.option("--since", default=0, show_default=True, help="Sequence number to start after.")
@click.option("-f", "--follow", is_flag=True, help="Print new events until Ctrl-C.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(EVENT_KINDS),
    help="Only events of this kind; may be repeated.",
)
@pass_session
def events(session: Session, since: int, follow: bool, kinds: tuple[str, ...]) -> None:
    """List events of the guest, the oldest first.

    With --follow a lost connection is made again, no event is printed twice, and JSON has one line
    for each.
    """
    if follow:
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it, whenever it comes
            _follow(session, since, event_mask(*kinds) if kinds else ALL_EVENTS, kinds)
        return
    with session.agent() as guest:
        reply = guest.events(since)
    if kinds:
        chosen = tuple(event for event in reply.events if event.kind in kinds)
        reply = reply.replace(events=chosen)
    lines = [describe_event(event) for event in reply.events]
    if reply.dropped:
        lines.insert(0, f"({reply.dropped} earlier events are no longer kept)")
    session.show(reply, lambda: "\n".join(lines) or "none")


def _follow(session: Session, since: int, mask: int, kinds: tuple[str, ...]) -> None:
    shown, boot_id = since, ""
    lock = threading.Lock()

    def show(event: Event) -> None:
        nonlocal shown, boot_id
        with lock:
            # an event may be both listed and sent
            if event.sequence > shown or event.boot_id != boot_id:
                shown, boot_id = event.sequence, event.boot_id
                _print(session, event)

    with session.agent(reconnect=True) as guest:
        with lock:  # events that are sent meanwhile are printed after the list
            guest.set_event_callback(show, mask)
            reply = guest.events(since)
            boot_id = reply.boot_id
            for event in reply.events:
                shown = event.sequence
                if not kinds or event.kind in kinds:
                    _print(session, event)
        wait_for_interrupt()


def _print(session: Session, event: Event) -> None:
    if session.as_json:
        emit(event.to_wire(), is_line=True)
    else:
        click.echo(describe_event(event))


def describe_event(event: Event) -> str:
    """Return a line for a person."""
    when = time.strftime("%H:%M:%S", time.localtime(event.unix_ms / 1000))
    about = [event.layer_id, event.overlay_id, event.pool_id, event.volume_id, event.device]
    words = [word for word in about if word]
    if event.block is not None:
        words.append(f"block {event.block}")
    if event.detail:
        words.append(event.detail)
    if event.traceparent:
        words.append(f"trace {event.traceparent.split('-')[1]}")
    if event.dropped:
        words.append(f"({event.dropped} events before it were not delivered)")
    kind = paint(plain(event.kind).ljust(_KIND_COLUMNS), tint(event.kind))
    return f"{when}  {event.sequence:>5}  {kind}  {plain(' '.join(words))}".rstrip()
