"""``guestctl log``: the agent's log, read and followed, or received from guests that send it.

A guest is not trusted: whatever it sends, the receiver goes on serving the others.
"""

import contextlib
import json
import selectors
import sys
from collections.abc import Iterator, Mapping

import click

from guestagent.api.observe import LOG_LEVELS, LogLine
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.session import (
    Session,
    emit,
    noted_interrupt,
    pass_session,
    wait_for_interrupt,
    wrong_usage,
)
from guestagent.host.ctl.style import paint, plain, tint
from vsock.address import VMADDR_CID_ANY, parse_address
from vsock.dial import listen
from vsock.errors import CallError
from vsock.stream import Listener, Stream

__all__ = ("SeenLines", "describe_line", "log")

_READ_BYTES = 64 * 1024
#: Longest line that is taken; a sender of a longer one is disconnected.
_LINE_BYTES = 1024 * 1024
_MAX_SENDERS = 128
#: Of the lines that are kept; an agent keeps three.
_MAX_PAGES = 64
#: Boots whose last line is remembered.
_MAX_BOOTS = 1024
_MAX_BOOT_ID = 64


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Print new lines until Ctrl-C.")
@click.option("--level", type=click.Choice(LOG_LEVELS), default="info", show_default=True)
@click.option("--since", type=int, metavar="NUMBER", help="Only lines after this number.")
@click.option("-n", "--lines", type=click.IntRange(0), help="Only the last lines.")
@click.option(
    "--listen",
    "listen_at",
    metavar="ADDRESS",
    help="Receive the log of guests that were booted with guestagent.log_dial= (for "
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

    With --follow a lost connection is made again, no line is printed twice, and JSON has one line
    for each.
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
    for _ in range(_MAX_PAGES):
        reply = guest.log(since, level=level)
        if reply.dropped and since > 0:
            click.echo(f"({reply.dropped} lines are no longer kept)", err=True)
        yield from reply.lines
        if not reply.more or reply.next <= since:
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
    pairs = "".join(f" {_field(name)}={_field(value)}" for name, value in fields.items())
    shown = paint(f"{plain(level):7}", tint(level))
    return f"[{uptime:12.6f}] {shown} {plain(text)}{pairs}"


def _field(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    is_word = text.isprintable() and not any(c in ' "=' for c in text)
    return text if is_word and text else repr(text)


# --- receiving


_INTERRUPT = "interrupt"


class SeenLines:
    """The number of the last line of each boot; past ``limit`` the least used goes."""

    def __init__(self, limit: int = _MAX_BOOTS) -> None:
        self._limit = limit
        self._last: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._last)

    def is_new(self, boot_id: str, number: int) -> bool:
        """Return whether a line has not been seen, and remember it."""
        last = self._last.pop(boot_id, 0)
        self._last[boot_id] = max(last, number)  # now the most recently used
        if len(self._last) > self._limit:
            del self._last[next(iter(self._last))]
        return number > last


class _Sender:
    """A guest that has connected."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.boot_id = ""
        self.rest = b""


class _Receiver:
    """Prints the lines that guests send, each once, and acknowledges them."""

    def __init__(self, session: Session, listener: Listener, interrupt_fd: int) -> None:
        self._session = session
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener.fileno(), selectors.EVENT_READ, None)
        self._selector.register(interrupt_fd, selectors.EVENT_READ, _INTERRUPT)
        self._seen = SeenLines()

    def turn(self) -> bool:
        """Wait for connections and lines, and take them; False when Ctrl-C ends the receiver.

        By then each printed line has been acknowledged.
        """
        for key, _ in self._selector.select():
            if key.data is _INTERRUPT:
                return False
            if isinstance(key.data, _Sender):
                self._read(key.data)
                continue
            try:
                stream = self._listener.accept()
            except BlockingIOError:
                continue
            if len(self._selector.get_map()) > _MAX_SENDERS:
                stream.close()
                continue
            self._selector.register(stream.fileno(), selectors.EVENT_READ, _Sender(stream))
        return True

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
        """Print a new line; return its number, 0 where the text is no line of the log."""
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise TypeError("not an object")
            if "stream" in line:
                sender.boot_id = str(line.get("boot_id", ""))[:_MAX_BOOT_ID]
                return 0
            if "dropped" in line:
                click.echo(f"({int(line['dropped'])} lines were lost)", err=True)
                return 0
            number, shown = int(line["number"]), self._shown(sender, line)
        # deep nesting ends in RecursionError, 1e999 as a number in OverflowError
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            click.echo(f"(not a line of a log: {text[:80]!r})", err=True)
            return 0
        if self._seen.is_new(sender.boot_id, number):
            click.echo(shown)
            sys.stdout.flush()
        return number

    def _shown(self, sender: _Sender, line: dict[str, object]) -> str:
        fields, uptime = line["fields"], line["uptime_seconds"]
        if not isinstance(fields, dict) or not isinstance(uptime, (int, float)):
            raise TypeError("not the fields of a line")
        if self._session.as_json:
            return json.dumps({**line, "boot_id": sender.boot_id})
        described = _described(float(uptime), str(line["level"]), str(line["text"]), fields)
        return f"{plain(sender.boot_id[:8])} {described}"

    def _acknowledge(self, sender: _Sender, number: int) -> None:
        try:
            sender.stream.send(b"%d\n" % number)
        except OSError:  # the guest has gone, and sends again what was not acknowledged
            return


def _receive(session: Session, text: str) -> None:
    """Print the lines that guests send to an address, until Ctrl-C."""
    with wrong_usage():
        address = parse_address(text)
    try:
        listener = listen(address, allowed_cids=frozenset((VMADDR_CID_ANY,)))
    except OSError as error:
        raise CallError(
            "device", f"cannot listen at {text}: {error.strerror}", errno=error.errno, object=text
        ) from error
    try:
        with noted_interrupt() as interrupt_fd:
            receiver = _Receiver(session, listener, interrupt_fd)
            click.echo(f"waiting for guests at {address}", err=True)
            try:
                while receiver.turn():
                    pass
            finally:
                receiver.close()
    finally:
        listener.close()
