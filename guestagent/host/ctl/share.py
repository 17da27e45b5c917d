"""``guestctl share``: directories of the host in the guest."""

import click

from guestagent.api import share as api
from guestagent.host.ctl.layer import describe_gone
from guestagent.host.ctl.session import Session, pass_session
from guestagent.host.ctl.style import described, spent, table

__all__ = ("share",)


@click.group()
def share() -> None:
    """Directories that the host serves to the guest by virtiofs or 9p."""


@share.command("mount")
@click.argument("share_id")
@click.argument("tag")
@click.option(
    "--kind", type=click.Choice(api.SHARE_KINDS), default=api.SHARE_KINDS[0], show_default=True
)
@click.option("--target", metavar="PATH", help="Default: /run/shares/SHARE_ID.")
@click.option("--write", "is_writable", is_flag=True, help="Let the guest write to it.")
@click.option(
    "--msize",
    "msize_bytes",
    type=click.IntRange(api.MSIZE_MIN, api.MSIZE_MAX),
    help="Bytes of the largest message of a 9p share.",
)
@pass_session
def mount(session: Session, /, is_writable: bool, **fields: object) -> None:
    """Mount the directory that the host serves under TAG."""
    session.tell(api.ShareMount, _describe, read_only=not is_writable, **fields)


@share.command("unmount")
@click.argument("share_id")
@pass_session
def unmount(session: Session, share_id: str) -> None:
    """Unmount a share; busy while it is in use."""
    session.tell(api.ShareUnmount, describe_gone, share_id=share_id)


@share.command("list")
@pass_session
def list_shares(session: Session) -> None:
    """List the shares of a guest."""
    reply = session.ask(api.ShareList)
    header = ("SHARE", "STATE", "KIND", "TAG", "ACCESS", "TARGET")
    rows = [
        (each.share_id, each.state, each.kind, each.tag, _access(each), each.target)
        for each in reply.shares
    ]
    session.show(reply, lambda: table(header, rows))


def _access(report: api.ShareReport) -> str:
    return "ro" if report.read_only else "rw"


def _describe(report: api.ShareReport) -> str:
    facts = [
        ("target", f"{report.target} (mount {report.mount_id})"),
        ("tag", f"{report.tag} ({report.kind})"),
        ("options", ",".join(report.options)),
        ("ms", spent(report.timings_ms)),
    ]
    return described("share", report.share_id, report.state, facts)
