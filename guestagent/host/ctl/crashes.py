"""``guestctl crashes``: how earlier lives of the agent ended."""

import time

import click

from guestagent.api.observe import CrashReport
from guestagent.host.ctl.log import describe_line
from guestagent.host.ctl.session import Session, pass_session
from guestagent.host.ctl.style import plain
from guestagent.host.ctl.table import table
from vsock.errors import CallError

__all__ = ("crashes",)


@click.command()
@click.argument("number", required=False, type=int)
@pass_session
def crashes(session: Session, number: int | None) -> None:
    """List how lives of the agent ended that did not end in order, or tell all about one."""
    with session.agent() as guest:
        reply = guest.crashes()
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
        f"  agent       {report.agent}, pid {report.pid}, {report.restarts} lives before it",
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
