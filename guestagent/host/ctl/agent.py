"""Commands about the agent itself: connect, hello and shutdown."""

import click

from guestagent.api.request import Empty
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.profiles import Profiles, complete_profiles, resolve
from guestagent.host.ctl.session import Session, emit, pass_session
from guestagent.host.ctl.table import table
from vsock.address import parse_address
from vsock.errors import CallError

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


@click.command()
@click.argument("name", required=False, shell_complete=complete_profiles)
@click.argument("address", required=False)
@click.option("--no-check", is_flag=True, help="Do not ask the agent whether it is there.")
@click.option("--delete", is_flag=True, help="Forget NAME.")
@pass_session
def connect(
    session: Session, name: str | None, address: str | None, no_check: bool, delete: bool
) -> None:
    """Give an agent a name, or choose or list those that have one.

    With NAME and ADDRESS the name is kept, and used where no --connect is given. With NAME alone
    that one is used from now on; with neither, all are listed.
    """
    profiles = Profiles()
    if name is None:
        _list(session, profiles)
        return
    if "://" in name:
        raise click.UsageError(f"{name!r} is an address: say `guestctl connect NAME {name}`")
    if address is None and name not in profiles.addresses:
        resolve(name)
    if delete:
        del profiles.addresses[name]
        profiles.default = None if profiles.default == name else profiles.default
        _keep(profiles)
        session.say({"deleted": name}, f"{name} is forgotten")
        return
    if address is not None:
        _add(session, profiles, name, address, check=not no_check)
    profiles.default = name
    _keep(profiles)
    kept = profiles.addresses[name]
    session.say({"name": name, "address": kept}, f"{name} is {kept}, from now on without --connect")


def _add(session: Session, profiles: Profiles, name: str, address: str, *, check: bool) -> None:
    try:
        profiles.addresses[name] = str(parse_address(address))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if check:
        with GuestAgent(address, connect_seconds=session.connect_seconds) as guest:
            about = f"{address}: agent {guest.hello.agent} on Linux {guest.hello.kernel}"
        if not session.as_json:
            click.echo(about, err=True)


def _keep(profiles: Profiles) -> None:
    try:
        profiles.save()
    except OSError as problem:
        text = f"cannot write {str(profiles.path)!r}: {problem.strerror}"
        raise CallError("denied", text, errno=problem.errno, object=str(profiles.path)) from problem


def _list(session: Session, profiles: Profiles) -> None:
    if session.as_json:
        value = {"default": profiles.default, "profiles": profiles.addresses}
        emit(value)
        return
    rows = [
        ("*" if name == profiles.default else "", name, address)
        for name, address in sorted(profiles.addresses.items())
    ]
    click.echo(table(("", "NAME", "ADDRESS"), rows))


AGENT_COMMANDS = (hello, shutdown, connect)
