"""``guestctl overlay``: overlays of mounted layers."""

import click

from guestagent.api import OverlayReport, OverlaySpec
from guestagent.api.overlays import OverlayListReply
from guestagent.api.texts import scratch_from_text
from guestagent.host.ctl.completion import complete_layers, complete_overlays
from guestagent.host.ctl.session import Session, pass_session
from guestagent.host.ctl.style import table

__all__ = ("overlay",)


@click.group()
def overlay() -> None:
    """Overlays of mounted layers."""


@overlay.command("mount")
@click.argument("overlay_id")
@click.argument("layers", nargs=-1, required=True, shell_complete=complete_layers)
@click.option("--target", metavar="PATH", help="Default: /run/overlays/OVERLAY_ID.")
@click.option(
    "--scratch",
    metavar="SCRATCH",
    help="tmpfs:BYTES, dir:PATH[,adopt], device:DEVICE[,FS][,adopt|fresh].",
)
@pass_session
def mount(
    session: Session,
    overlay_id: str,
    layers: tuple[str, ...],
    target: str | None,
    scratch: str | None,
) -> None:
    """Overlay LAYERS, topmost first; read-only unless there is a scratch."""
    try:
        spec = OverlaySpec(
            overlay_id=overlay_id,
            layers=layers,
            target=target,
            scratch=scratch_from_text(scratch) if scratch is not None else None,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with session.agent() as guest:
        report = guest.overlay_mount(spec)
    session.show(report, lambda: _describe(report))


@overlay.command("unmount")
@click.argument("overlay_id", shell_complete=complete_overlays)
@click.option("--force", is_flag=True, help="Also clean up an overlay that is half gone.")
@pass_session
def unmount(session: Session, overlay_id: str, force: bool) -> None:
    """Unmount an overlay; its layers stay."""
    with session.agent() as guest:
        reply = guest.overlay_unmount(overlay_id, force=force)
    gone = ", ".join(reply.unmounted)
    session.show(reply, lambda: f"gone: {gone}" if gone else "nothing was mounted")


@overlay.command("list")
@pass_session
def list_overlays(session: Session) -> None:
    """List the overlays of a guest."""
    with session.agent() as guest:
        reports = guest.overlay_list()
    header = ("OVERLAY", "STATE", "LAYERS", "SCRATCH", "TARGET")
    rows = [
        (
            report.overlay_id,
            report.state,
            str(len(report.layers)),
            report.scratch.kind if report.scratch else "-",
            report.target,
        )
        for report in reports
    ]
    session.show(OverlayListReply(overlays=reports), lambda: table(header, rows))


def _describe(report: OverlayReport) -> str:
    spent = "  ".join(f"{step} {ms:.1f}" for step, ms in report.timings_ms.items())
    return "\n".join(
        (
            f"overlay {report.overlay_id}: {report.state}",
            f"  target  {report.target} (mount {report.mount_id}, by {report.method})",
            f"  layers  {' '.join(report.layers)} (topmost first)",
            f"  ms      {spent}",
        )
    )
