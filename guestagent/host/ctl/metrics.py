"""``guestctl metrics``: the metrics of a guest, or of many guests for a Prometheus server."""

import click

from guestagent.api.observe import AgentMetrics
from guestagent.host.ctl.exposition import parsed
from guestagent.host.ctl.profiles import resolve
from guestagent.host.ctl.session import Session, emit, pass_session, wrong_usage
from guestagent.host.ctl.style import guarded
from vsock.address import parse_address
from vsock.errors import CallError

__all__ = ("metrics",)


@click.command()
@click.option(
    "--serve",
    metavar="HOST:PORT",
    help="Answer a Prometheus server at http://HOST:PORT/metrics, until Ctrl-C.",
)
@click.option(
    "--guest",
    "guests",
    multiple=True,
    metavar="NAME=AGENT",
    help="With --serve: a guest and its address or profile; may be repeated.",
)
@click.option(
    "--timeout",
    "seconds",
    type=click.FloatRange(0.1, 300),
    default=5.0,
    show_default=True,
    help="With --serve: time limit in seconds for the answer of a guest.",
)
@pass_session
def metrics(session: Session, serve: str | None, guests: tuple[str, ...], seconds: float) -> None:
    """Print the agent's metrics in the Prometheus text format.

    With --serve it answers for any number of guests, each sample with a label `guest`;
    `guestagent_up` says which guests answered.
    """
    if serve is None:
        if guests:
            raise click.UsageError("--guest is for --serve")
        _print(session)
        return
    # here, because http.server and email are a seventh of what every other command would load
    from guestagent.host.ctl.exporter import Exporter, MetricsServer

    host, port = _place(serve)
    named = _guests(session, guests)
    with Exporter(named, seconds=seconds) as exporter:
        try:
            server = MetricsServer((host, port), exporter)
        except OSError as error:
            raise CallError(
                "device",
                f"cannot listen at {serve}: {error.strerror}",
                errno=error.errno,
                object=serve,
                hint="use another port, or end the program that listens there",
            ) from error
        with server:
            bound = server.server_address
            click.echo(f"{len(named)} guests at http://{host}:{bound[1]}/metrics", err=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return


def _print(session: Session) -> None:
    text = session.ask(AgentMetrics).text
    if session.as_json:
        emit(
            [
                {"name": sample.name, "labels": dict(sample.labels), "value": _value(sample.number)}
                for sample in parsed(text)
            ]
        )
    else:
        click.echo(guarded(text), nl=False)


def _value(text: str) -> float | int | str:
    if text.isdigit():
        return int(text)
    value = float(text)
    return value if abs(value) < float("inf") else text


def _place(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise click.UsageError(f"--serve {text!r}: expected HOST:PORT, e.g. 127.0.0.1:9101")
    return host.strip("[]"), int(port)


def _guests(session: Session, guests: tuple[str, ...]) -> dict[str, str]:
    """Read NAME=AGENT; without any, the agent that --connect names."""
    named: dict[str, str] = {}
    for text in guests:
        name, equals, agent = text.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--guest {text!r}: expected NAME=AGENT")
        if name in named:
            raise click.UsageError(f"--guest {name!r} is given twice")
        named[name] = str(resolve(agent))
    if not named:
        if session.address is None:
            raise click.UsageError("which guests? say --guest NAME=ADDRESS, once for each")
        named["guest"] = session.address
    with wrong_usage():
        for address in named.values():
            parse_address(address)
    return named
