"""Commands about the agent itself: status, hello, events, shutdown."""

import click

from guestagent.api import Empty
from guestagent.ctl.session import Session, pass_session

__all__ = ("AGENT_COMMANDS",)


@click.command()
@pass_session
def hello(session: Session) -> None:
    """Say which agent and kernel are there, and what they can do."""
    with session.agent() as guest:
        reply = guest.hello
    session.show(
        reply,
        lambda: "\n".join(
            (
                f"agent {reply.agent} on Linux {reply.kernel}, protocol version {reply.version}",
                f"  features  {' '.join(reply.features)}",
                *(f"  {name:20} {value}" for name, value in reply.boot.items()),
            )
        ),
    )


@click.command()
@pass_session
def status(session: Session) -> None:
    """Say how the agent is."""
    with session.agent() as guest:
        reply = guest.status()
    numbers = "\n".join(
        f"  {name:20} {value}"
        for name, value in reply.to_wire().items()
        if name not in ("state", "problems")
    )
    problems = "".join(f"\n  problem: {problem}" for problem in reply.problems)
    session.show(reply, lambda: f"{reply.state}{problems}\n{numbers}")


@click.command()
@click.option("--since", default=0, show_default=True, help="Sequence number to start after.")
@pass_session
def events(session: Session, since: int) -> None:
    """List what has happened."""
    with session.agent() as guest:
        reply = guest.events(since)
    lines = [
        " ".join(
            [str(event.sequence), event.kind]
            + [
                f"{name}={value}"
                for name, value in event.to_wire().items()
                if name not in ("sequence", "kind") and value not in (None, "")
            ]
        )
        for event in reply.events
    ]
    session.show(reply, lambda: "\n".join(lines) or "none")


@click.command()
@click.option("--mode", type=click.Choice(("poweroff", "reboot", "exit")), default="poweroff")
@click.option("--force", is_flag=True, help="Go on although something is busy.")
@pass_session
def shutdown(session: Session, mode: str, force: bool) -> None:
    """Unmount everything, then end the machine or the agent."""
    with session.agent() as guest:
        guest.shutdown(mode, force=force)
    session.show(Empty(), lambda: f"the guest unmounted everything; {mode}")


AGENT_COMMANDS = (hello, status, events, shutdown)
