"""``guestctl log``: the agent's log, read and followed, or received from guests that send it."""

import contextlib
import json
import os
import selectors
from collections.abc import Iterator, Mapping

import click

from guestagent.api.observe import LOG_LEVELS, LogLine
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.session import Session, emit, pass_session, wait_for_interrupt
from guestagent.host.ctl.style import paint, plain, tint
from vsock.address import VMADDR_CID_ANY, UnixAddress, parse_address
from vsock.dial import listen
from vsock.errors import CallError
from vsock.stream import Listener, Stream

__all__ = ("describe_line", "log")

_READ_BYTES = 64 * 1024
#: A line is far shorter; who sends more without an end is no agent.
_LINE_BYTES = 1024 * 1024


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with those that come; Ctrl-C ends it.")
@click.option("--level", type=click.Choice(LOG_LEVELS), default="info", show_default=True)
@click.option("--since", type=int, metavar="NUMBER", help="Only lines after this one.")
@click.option("-n", "--lines", type=click.IntRange(0), help="Only so many at the end.")
@click.option(
    "--listen",
    "listen_at",
    metavar="ADDRESS",
    help="Receive what guests send that were booted with guestagent.log_dial= (for "
    "hybrid:///PATH and port 1026 at unix:///PATH_1026).",
)
@pass_session
def log(
    session: Session,
    follow: bool,
    level: str,
    since: int | None,
    lines: int | None,
    listen_at: str | None,
) -> None:
    """Print the agent's log, which begins with the first line of its boot.

    With --follow a lost connection is made again, and nothing is told twice; JSON comes one line
    each.
    """
    if listen_at is not None:
        _receive(session, listen_at)
        return
    if since is not None and lines is not None:
        raise click.UsageError("--since and --lines exclude each other")
    if follow:
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it, whenever it comes
            _follow(session, since, lines, level)
        return
    with session.agent() as guest:
        found = list(_all_lines(guest, since or 0, level))
    if lines is not None:
        found = _last(found, lines)
    if session.as_json:
        emit([line.to_wire() for line in found])
    else:
        for line in found:
            click.echo(describe_line(line))


def _all_lines(guest: GuestAgent, since: int, level: str) -> Iterator[LogLine]:
    while True:
        reply = guest.log(since, level=level)
        if reply.dropped and since > 0:
            click.echo(f"({reply.dropped} lines are no longer kept)", err=True)
        yield from reply.lines
        if not reply.more:
            return
        since = reply.next


def _last(found: list[LogLine], count: int) -> list[LogLine]:
    return found[max(0, len(found) - count) :]


def _follow(session: Session, since: int | None, lines: int | None, level: str) -> None:
    def show(line: LogLine) -> None:
        if session.as_json:
            emit(line.to_wire(), is_line=True)
        else:
            click.echo(describe_line(line))

    with session.agent(reconnect=True) as guest:
        start = since or 0 if lines != 0 else None
        if lines:
            found = _last(list(_all_lines(guest, 0, level)), lines)
            start = found[0].number - 1 if found else 0
        guest.follow_log(show, since=start, level=level)
        wait_for_interrupt()


def describe_line(line: LogLine) -> str:
    """Return a line for a person."""
    return _described(line.uptime_seconds, line.level, line.text, line.fields)


def _described(uptime: float, level: str, text: str, fields: Mapping[str, object]) -> str:
    pairs = "".join(f" {name}={_field(value)}" for name, value in fields.items())
    shown = paint(f"{level:7}", tint(level))
    return f"[{uptime:12.6f}] {shown} {plain(text)}{pairs}"


def _field(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    is_word = text.isprintable() and not any(c in ' "=' for c in text)
    return text if is_word and text else repr(text)


# --- receiving


class _Sender:
    """A guest that has connected."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.boot_id = ""
        self.rest = b""


class _Receiver:
    """Prints what guests send, each line once, and tells them what it has."""

    def __init__(self, session: Session, listener: Listener) -> None:
        self._session = session
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener.fileno(), selectors.EVENT_READ, None)
        #: Boot -> the number of its last line.
        self._seen: dict[str, int] = {}

    def turn(self) -> None:
        """Wait for something to come, and take it."""
        for key, _ in self._selector.select():
            if isinstance(key.data, _Sender):
                self._read(key.data)
                continue
            try:
                stream = self._listener.accept()
            except BlockingIOError:
                continue
            self._selector.register(stream.fileno(), selectors.EVENT_READ, _Sender(stream))

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Sender):
                key.data.stream.close()
        self._selector.close()

    def _read(self, sender: _Sender) -> None:
        try:
            data = sender.stream.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, sender.rest = (sender.rest + data).split(b"\n")
        last = 0
        for line in lines:
            last = max(last, self._take(sender, line))
        if last and data:
            self._acknowledge(sender, last)
        if not data or len(sender.rest) > _LINE_BYTES:
            self._selector.unregister(sender.stream.fileno())
            sender.stream.close()

    def _take(self, sender: _Sender, text: bytes) -> int:
        """Print a line that is new; return its number, 0 for what is no line of the log."""
        try:
            line = json.loads(text)
            if "stream" in line:
                sender.boot_id = str(line.get("boot_id", ""))
                return 0
            if "dropped" in line:
                click.echo(f"({int(line['dropped'])} lines were lost)", err=True)
                return 0
            number, uptime = int(line["number"]), float(line["uptime_seconds"])
            level, words, fields = str(line["level"]), str(line["text"]), dict(line["fields"])
        except (ValueError, TypeError, KeyError):
            click.echo(f"(not a line of a log: {text[:80]!r})", err=True)
            return 0
        if number <= self._seen.get(sender.boot_id, 0):
            return number
        self._seen[sender.boot_id] = number
        if self._session.as_json:
            emit({**line, "boot_id": sender.boot_id}, is_line=True)
        else:
            click.echo(f"{plain(sender.boot_id[:8])} {_described(uptime, level, words, fields)}")
        return number

    def _acknowledge(self, sender: _Sender, number: int) -> None:
        try:
            sender.stream.send(b"%d\n" % number)
        except OSError:  # it has gone: then it sends again what it was not told of
            return


def _receive(session: Session, text: str) -> None:
    """Print what is sent to an address until Ctrl-C."""
    try:
        address = parse_address(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        listener = listen(address, allowed_cids=frozenset((VMADDR_CID_ANY,)))
    except OSError as error:
        raise CallError(
            "device", f"cannot listen at {text}: {error.strerror}", errno=error.errno, object=text
        ) from error
    receiver = _Receiver(session, listener)
    click.echo(f"waiting for guests at {address}", err=True)
    try:
        while True:
            receiver.turn()
    except KeyboardInterrupt:
        return
    finally:
        receiver.close()
        listener.close()
        if isinstance(address, UnixAddress) and os.path.exists(address.path):
            os.unlink(address.path)
