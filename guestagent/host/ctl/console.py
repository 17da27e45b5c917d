"""``guestctl console``: a guest's debug console at this terminal, or its answers for a script."""

import sys
from contextlib import suppress

import click

from guestagent.api.agent import AGENT_PORT
from guestagent.api.console import CONSOLE_PORT, DISABLED
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.console_client import ConsoleClient, attach_line
from guestagent.host.ctl.profiles import resolve
from guestagent.host.ctl.session import Session, pass_session, wrong_usage
from vsock.address import (
    Address,
    HybridAddress,
    SerialAddress,
    UnixAddress,
    VsockAddress,
    parse_address,
)
from vsock.dial import connect
from vsock.errors import CallError, ConnectionClosed
from vsock.stream import Stream

__all__ = ("console", "console_address")

#: A console that is there answers at once; else the agent is asked whether there is one.
_FIRST_SECONDS = 1.0


@click.command()
@click.argument("address", required=False)
@click.option("-c", "--command", metavar="COMMAND", help="Run a command and leave.")
@click.option("-t", "--tty", "wants_terminal", is_flag=True, help="A terminal for that, too.")
@click.option(
    "--line", "is_line", is_flag=True, help="ADDRESS is a bare serial line, without the protocol."
)
@pass_session
def console(
    session: Session,
    address: str | None,
    command: str | None,
    wants_terminal: bool,
    is_line: bool,
) -> None:
    """Open the debug console of a guest.

    ADDRESS is an agent's (its console is on port 1022 there) or the console's own; without it,
    --connect counts. Exits as the command did: 0, 1 it failed, 2 wrong usage, and with `sh -c` as
    the shell. At a terminal ~. at the start of a line leaves and ~? lists what else there is. What
    is not a terminal sends commands, one a line.
    """
    text = resolve(address) if address else session.address
    if text is None:
        raise click.UsageError("which guest? say ADDRESS, a profile, or --connect ADDRESS")
    with wrong_usage():
        place = parse_address(text)
    if is_line or isinstance(place, SerialAddress):
        if command is not None:
            raise click.UsageError("a bare line takes no -c")
        sys.exit(attach_line(connect(place, session.connect_seconds)))
    dialler = Dialler(place, session.connect_seconds, is_agent=address is None)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    client = ConsoleClient(
        dialler.dial,
        command=command,
        is_terminal=is_terminal and (command is None or wants_terminal),
    )
    sys.exit(client.run())


def console_address(agent: Address, port: int = CONSOLE_PORT) -> Address | None:
    """Return where the console of an agent is, None where its address does not say that."""
    if isinstance(agent, VsockAddress):
        return VsockAddress(cid=agent.cid, port=port)
    if isinstance(agent, HybridAddress):
        return HybridAddress(path=agent.path, port=port)
    return None


class Dialler:
    """Reaches the console that an address stands for, and says why when there is none."""

    def __init__(self, address: Address, seconds: float, *, is_agent: bool) -> None:
        """``is_agent``: a Unix socket is the agent's, not the console's own."""
        is_unix_agent = is_agent and isinstance(address, UnixAddress)
        self._is_agent = is_unix_agent or getattr(address, "port", None) == AGENT_PORT
        self._address = address
        self._seconds = seconds

    def dial(self, seconds: float | None = None) -> Stream:
        """Connect, trying for ``seconds``, by default as long as the user said.

        Raises:
            ConnectionClosed: nothing answers there.
            CallError: ``denied``, the agent is there and its console is off.
        """
        seconds = self._seconds if seconds is None else seconds
        if not self._is_agent:
            return connect(self._address, seconds)
        console = console_address(self._address)
        if console is not None:
            # a console that is off does not answer, and the agent says so
            with suppress(ConnectionClosed):
                return connect(console, min(seconds, _FIRST_SECONDS))
        return connect(self._ask_agent(seconds), seconds)

    def _ask_agent(self, seconds: float) -> Address:
        """Return the address of the console that the agent states."""
        agent = self._address
        with GuestAgent(agent, connect_seconds=seconds) as guest:
            listed = guest.hello.boot.get("console")
        texts = [str(text) for text in listed] if isinstance(listed, (list, tuple)) else []
        if not texts:
            raise CallError(
                "denied",
                DISABLED,
                object=str(agent),
                hint=f"boot the guest with guestagent.console=vsock:{CONSOLE_PORT} to have one",
            )
        for console in map(parse_address, texts):
            if isinstance(console, UnixAddress) and isinstance(agent, UnixAddress):
                return console
            if isinstance(console, VsockAddress):
                seen_from_here = console_address(agent, console.port)
                if seen_from_here is not None:
                    return seen_from_here
        raise CallError(
            "not_found",
            "the console cannot be reached from here",
            object=str(agent),
            hint=f"it is at {', '.join(texts)}; --line takes a serial line's host side",
        )
