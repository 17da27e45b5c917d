"""The root of ``guestctl``: the options before the command, and the collection of commands."""

import dataclasses
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

import click

from guestagent import __version__
from guestagent.host.ctl.agent import AGENT_COMMANDS
from guestagent.host.ctl.completion import completion
from guestagent.host.ctl.console import console
from guestagent.host.ctl.dev import dev
from guestagent.host.ctl.dm import device, dm
from guestagent.host.ctl.events import events
from guestagent.host.ctl.fs import fs
from guestagent.host.ctl.layer import layer
from guestagent.host.ctl.log import log
from guestagent.host.ctl.man import man
from guestagent.host.ctl.metrics import metrics
from guestagent.host.ctl.net import net
from guestagent.host.ctl.overlay import layers, overlay
from guestagent.host.ctl.policy import policy
from guestagent.host.ctl.profiles import complete_profiles
from guestagent.host.ctl.session import Session, uses_session
from guestagent.host.ctl.share import share
from guestagent.host.ctl.status import status
from guestagent.host.ctl.thin import pool, volume
from guestagent.host.ctl.top import top
from vsock.rpc import Limits

__all__ = ("collect", "guestctl", "main")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--connect",
    "address",
    envvar="GUESTCTL_CONNECT",
    metavar="AGENT",
    shell_complete=complete_profiles,
    help="The agent: vsock://CID:PORT, unix:///PATH, hybrid:///PATH:PORT, or a NAME that `guestctl "
    "connect` keeps. Default: the default of `guestctl connect`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option(
    "--wait",
    "connect_seconds",
    type=click.FloatRange(min=0.0),
    default=10.0,
    show_default=True,
    help="Seconds to try to connect while the machine boots.",
)
@click.option(
    "--deadline",
    "deadline_ms",
    type=click.IntRange(1, Limits().max_deadline_ms),
    default=60_000,
    show_default=True,
    help="Time limit of each request in milliseconds.",
)
@click.option(
    "--traceparent",
    envvar="TRACEPARENT",
    metavar="W3C",
    help="Trace context for every request; the agent's log and events carry it.",
)
@click.version_option(__version__)
@click.pass_context
def guestctl(
    context: click.Context,
    address: str | None,
    as_json: bool,
    connect_seconds: float,
    deadline_ms: int,
    traceparent: str | None,
) -> None:
    """Control a guest agent, and build the images that it mounts.

    Exit status: 0 success, 1 failure (the error says what to do next), 2 wrong usage.
    """
    context.obj = Session(
        agent_name=address,
        as_json=as_json,
        connect_seconds=connect_seconds,
        deadline_ms=deadline_ms,
        traceparent=traceparent,
    )
    if as_json:
        context.default_map = _json_everywhere(guestctl)


def _json_everywhere(group: click.Group) -> dict[str, object]:
    """Return defaults by which --json before a command also sets the command's own --json."""
    return {
        name: _json_everywhere(command) if isinstance(command, click.Group) else {"as_json": True}
        for name, command in group.commands.items()
    }


def _set_address(context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    session = context.find_object(Session)
    if value is not None and session is not None:
        context.obj = dataclasses.replace(session, agent_name=value)


def _set_json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    session = context.find_object(Session)
    if value and session is not None:
        context.obj = dataclasses.replace(session, as_json=True)


def _add_common_options(command: click.Command) -> None:
    """Accept --connect and --json behind a command as well."""
    names = {parameter.name for parameter in command.params}
    if "address" not in names:
        command.params.append(
            click.Option(
                ["--connect", "address"],
                expose_value=False,
                callback=_set_address,
                metavar="AGENT",
                shell_complete=complete_profiles,
                help="The agent, as before the command.",
            )
        )
    if "as_json" not in names:
        command.params.append(
            click.Option(
                ["--json", "as_json"],
                is_flag=True,
                expose_value=False,
                callback=_set_json,
                help="Print JSON.",
            )
        )


def main() -> None:
    """Entry point of the console script."""
    collect()
    sys.exit(guestctl(prog_name="guestctl"))


def collect() -> click.Group:
    """Add the commands of this package and of other packages; return the root.

    An entry point in the group ``guestctl.commands`` is a module with ``COMMANDS`` (for the root)
    and ``LAYER_COMMANDS`` (for ``guestctl layer``): so the host's tools appear here although this
    package must not import them.
    """
    own = (status, top, events, log, metrics, console, completion, man)
    for command in (
        *AGENT_COMMANDS,
        *own,
        layer,
        layers,
        overlay,
        net,
        pool,
        volume,
        dev,
        policy,
        share,
        dm,
        device,
        fs,
    ):
        guestctl.add_command(command)
    for entry in sorted(entry_points(group="guestctl.commands"), key=lambda entry: entry.name):
        module = entry.load()
        for command in getattr(module, "COMMANDS", ()):
            guestctl.add_command(command)
        for command in getattr(module, "LAYER_COMMANDS", ()):
            layer.add_command(command)
    for command in leaves(guestctl):
        if uses_session(command):
            _add_common_options(command)
    return guestctl


def leaves(group: click.Group) -> Iterator[click.Command]:
    """Yield every command that is not a group."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from leaves(command)
        else:
            yield command
