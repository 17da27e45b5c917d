"""Commands about the agent itself: connect, hello, features, shutdown and crashes."""

import time

import click

from guestagent.api.agent import AgentFeatures, AgentShutdown
from guestagent.api.observe import AgentCrashes, CrashReport
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.log import describe_line
from guestagent.host.ctl.profiles import Profiles, complete_profiles, resolve
from guestagent.host.ctl.session import Session, cannot_write, emit, pass_session, wrong_usage
from guestagent.host.ctl.style import plain, table, words_of
from vsock.address import parse_address
from vsock.errors import CallError

__all__ = ("AGENT_COMMANDS",)


@click.command()
@pass_session
def hello(session: Session) -> None:
    """Print the versions of agent and kernel, and what they can do."""
    with session.agent() as guest:
        reply = guest.hello
    facts = {"features": reply.features, **reply.boot, **reply.limits}
    session.show(
        reply,
        lambda: "\n".join(
            (
                plain(
                    f"agent {reply.agent} on Linux {reply.kernel}, protocol version {reply.version}"
                ),
                *(f"  {plain(name):20} {words_of(value)}" for name, value in facts.items()),
            )
        ),
    )


@click.command()
@pass_session
def features(session: Session) -> None:
    """List every feature of agent and kernel, and why one is not there."""
    reply = session.ask(AgentFeatures)
    rows = [
        (one.name, "yes" if one.is_there else "no", one.why_not or one.meaning)
        for one in reply.features
    ]
    session.show(reply, lambda: table(("FEATURE", "THERE", "WHY NOT, OR WHAT IT IS"), rows))


@click.command()
@click.option("--mode", type=click.Choice(("poweroff", "reboot", "exit")), default="poweroff")
@click.option("--force", is_flag=True, help="Continue although a mount is in use.")
@pass_session
def shutdown(session: Session, mode: str, force: bool) -> None:
    """Unmount everything, then end the machine or the agent."""
    reply = session.ask(AgentShutdown, mode=mode, force=force)
    session.show(reply, lambda: f"the guest unmounted everything; {mode}")


@click.command()
@click.argument("name", required=False, shell_complete=complete_profiles)
@click.argument("address", required=False)
@click.option("--no-check", is_flag=True, help="Do not connect to ADDRESS first.")
@click.option("--delete", is_flag=True, help="Forget NAME.")
@pass_session
def connect(
    session: Session, name: str | None, address: str | None, no_check: bool, delete: bool
) -> None:
    """Name the address of an agent; choose the default agent; or list the names.

    NAME ADDRESS keeps the address under the name and makes it the default, which is used where
    --connect is not given. NAME alone makes it the default. Without arguments the names are listed.
    """
    profiles = Profiles()
    if name is None:
        _list(session, profiles)
        return
    if "://" in name:
        raise click.UsageError(
            f"{name!r} is an address, not a name: `guestctl connect NAME {name}`"
        )
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
    session.say({"name": name, "address": kept}, f"{name} is {kept}, the default from now on")


def _add(session: Session, profiles: Profiles, name: str, address: str, *, check: bool) -> None:
    with wrong_usage():
        profiles.addresses[name] = str(parse_address(address))
    if check:
        with GuestAgent(address, connect_seconds=session.connect_seconds) as guest:
            about = f"{address}: agent {guest.hello.agent} on Linux {guest.hello.kernel}"
        if not session.as_json:
            click.echo(plain(about), err=True)


def _keep(profiles: Profiles) -> None:
    try:
        profiles.save()
    except OSError as problem:
        raise cannot_write(problem, str(profiles.path)) from problem


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


@click.command()
@click.argument("number", required=False, type=int)
@pass_session
def crashes(session: Session, number: int | None) -> None:
    """List the crash reports of the agent, or print report NUMBER in full."""
    reply = session.ask(AgentCrashes)
    if number is None:
        rows = [
            (str(one.number), _when(one), one.kind, one.signal or "-", one.reason)
            for one in reply.crashes
        ]
        session.show(reply, lambda: table(("NUMBER", "WHEN", "KIND", "SIGNAL", "REASON"), rows))
        return
    report = next((one for one in reply.crashes if one.number == number), None)
    if report is None:
        kept = ", ".join(str(one.number) for one in reply.crashes) or "none"
        raise CallError("not_found", f"there is no crash report {number} (kept: {kept})")
    session.show(report, lambda: _describe(report))


def _when(report: CrashReport) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(report.unix_ms / 1000))


def _describe(report: CrashReport) -> str:
    lines = [
        f"crash {report.number}: {plain(report.reason)}",
        f"  noticed     {_when(report)}",
        f"  agent       {report.agent}, pid {report.pid}, restarted {report.restarts} times before",
    ]
    for name, items in (
        ("in flight", report.requests),
        ("layers", report.layers),
        ("overlays", report.overlays),
        ("unfinished", report.unfinished),
        ("problems", report.problems),
    ):
        lines += [f"  {name if not i else '':10}  {plain(item)}" for i, item in enumerate(items)]
    if report.traceback:
        lines += ["", *(f"  {plain(line)}" for line in report.traceback.splitlines())]
    lines += ["", f"the last {len(report.log)} lines of its log:"]
    lines += [describe_line(line) for line in report.log]
    return "\n".join(lines)


AGENT_COMMANDS = (hello, features, shutdown, connect, crashes)
