"""``guestctl overlay``: overlays of mounted layers."""

import click

from guestagent.api import (
    DeviceScratch,
    DirectoryScratch,
    OverlayListReply,
    OverlayReport,
    OverlaySpec,
    Scratch,
    TmpfsScratch,
)
from guestagent.ctl.layer import parse_device
from guestagent.ctl.session import Session, pass_session
from guestagent.ctl.table import table

__all__ = ("overlay",)


@click.group()
def overlay() -> None:
    """Overlays of mounted layers."""


def _parse_scratch(text: str | None) -> Scratch | None:
    """Read tmpfs:BYTES, dir:PATH or device:DEVICE[,FILESYSTEM]."""
    if text is None:
        return None
    kind, _, rest = text.partition(":")
    if kind == "tmpfs":
        return TmpfsScratch(size_bytes=int(rest, 0))
    if kind == "dir":
        return DirectoryScratch(path=rest)
    if kind == "device":
        device, _, filesystem = rest.partition(",")
        return DeviceScratch(device=parse_device(device), filesystem=filesystem or "ext4")
    raise ValueError(f"scratch {text!r}: expected tmpfs:BYTES, dir:PATH or device:DEVICE[,FS]")


@overlay.command("mount")
@click.argument("overlay_id")
@click.argument("layers", nargs=-1, required=True)
@click.option("--target", metavar="PATH", help="Default: /run/overlays/OVERLAY_ID.")
@click.option("--scratch", metavar="SCRATCH", help="tmpfs:BYTES, dir:PATH, device:DEVICE[,FS].")
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
            overlay_id=overlay_id, layers=layers, target=target, scratch=_parse_scratch(scratch)
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with session.agent() as guest:
        report = guest.overlay_mount(spec)
    session.show(report, lambda: _describe(report))


@overlay.command("unmount")
@click.argument("overlay_id")
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
