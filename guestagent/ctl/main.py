"""The root of ``guestctl``: options before the command, and where commands come from."""

from importlib.metadata import entry_points

import click

from guestagent import __version__
from guestagent.ctl.agent import AGENT_COMMANDS
from guestagent.ctl.console import console
from guestagent.ctl.dm import dm
from guestagent.ctl.fs import fs
from guestagent.ctl.layer import layer
from guestagent.ctl.overlay import overlay
from guestagent.ctl.session import Session

__all__ = ("guestctl", "main")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--connect",
    "address",
    envvar="GUESTCTL_CONNECT",
    metavar="ADDRESS",
    help="The agent: vsock://CID:PORT, unix:///PATH, hybrid:///PATH:PORT.",
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
    type=click.IntRange(1, 86_400_000),
    default=60_000,
    show_default=True,
    help="Milliseconds that the agent may take for a request.",
)
@click.version_option(__version__)
@click.pass_context
def guestctl(
    context: click.Context,
    address: str | None,
    as_json: bool,
    connect_seconds: float,
    deadline_ms: int,
) -> None:
    """Drive a guest agent, and make what it mounts."""
    context.obj = Session(
        address=address,
        as_json=as_json,
        connect_seconds=connect_seconds,
        deadline_ms=deadline_ms,
    )


def main() -> None:
    """Entry point of the console script."""
    _collect()
    guestctl(prog_name="guestctl")


def _collect() -> None:
    """Add the commands of this package, and those that other packages offer.

    An entry point in the group ``guestctl.commands`` is a module with ``COMMANDS`` (for the root)
    and ``LAYER_COMMANDS`` (for ``guestctl layer``): so the host's tools appear here although this
    package must not import them.
    """
    for command in (*AGENT_COMMANDS, layer, overlay, dm, fs, console):
        guestctl.add_command(command)
    for entry in sorted(entry_points(group="guestctl.commands"), key=lambda entry: entry.name):
        module = entry.load()
        for command in getattr(module, "COMMANDS", ()):
            guestctl.add_command(command)
        for command in getattr(module, "LAYER_COMMANDS", ()):
            layer.add_command(command)
