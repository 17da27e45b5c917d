"""Commands about the agent itself: hello and shutdown."""

import click

from guestagent.api import Empty
from guestagent.host.ctl.session import Session, pass_session

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
@click.option("--mode", type=click.Choice(("poweroff", "reboot", "exit")), default="poweroff")
@click.option("--force", is_flag=True, help="Go on although something is busy.")
@pass_session
def shutdown(session: Session, mode: str, force: bool) -> None:
    """Unmount everything, then end the machine or the agent."""
    with session.agent() as guest:
        guest.shutdown(mode, force=force)
    session.show(Empty(), lambda: f"the guest unmounted everything; {mode}")


AGENT_COMMANDS = (hello, shutdown)
