"""``guestctl overlay`` and ``guestctl layers``: overlays of layers, and batches of both."""

import json
from collections.abc import Callable, Iterable
from typing import BinaryIO, TypedDict, TypeVar, Unpack

import click

from guestagent.api import (
    LayersMount,
    LayerSpec,
    LayersUnmount,
    OverlayReport,
    OverlaySpec,
)
from guestagent.api.overlays import (
    METACOPY,
    REDIRECT_DIR,
    XINO,
    LayersMountReply,
    LayersUnmountReply,
    OverlayList,
    OverlayOptions,
    OverlayTrim,
    OverlayUnmount,
    ScratchReport,
)
from guestagent.api.texts import SCRATCH_TEXTS, layer_from_text, scratch_from_text
from guestagent.host.ctl.completion import complete_layers, complete_overlays
from guestagent.host.ctl.layer import describe_gone, read_signature
from guestagent.host.ctl.session import Session, pass_session, with_options, wrong_usage
from guestagent.host.ctl.style import described, plain, spent, table

__all__ = (
    "OVERLAY_HEADER",
    "OverlayWords",
    "describe_batch",
    "describe_unmounted",
    "layers",
    "optional_overlay",
    "overlay",
    "overlay_options",
    "overlay_rows",
)

#: No request of this size is accepted by an agent.
_MAX_REQUEST_BYTES = 16 * 1024 * 1024
Command = TypeVar("Command", bound=Callable[..., object])


class OverlayWords(TypedDict):
    """What ``overlay_options`` add to a command: how an overlay is mounted."""

    target: str | None
    scratch: str | None
    metacopy: str | None
    redirect_dir: str | None
    xino: str | None
    volatile: bool
    userxattr: bool
    suid: bool
    dev: bool


overlay_options = with_options(
    click.option("--target", metavar="PATH", help="Default: /run/overlays/OVERLAY_ID."),
    click.option("--scratch", metavar="SCRATCH", help=f"Where changes go: {SCRATCH_TEXTS}."),
    click.option("--metacopy", type=click.Choice(METACOPY)),
    click.option("--redirect-dir", type=click.Choice(REDIRECT_DIR)),
    click.option("--xino", type=click.Choice(XINO)),
    click.option("--volatile", is_flag=True, help="Do not sync the scratch."),
    click.option("--userxattr", is_flag=True, help="Use the attributes user.overlay.*."),
    click.option("--suid", is_flag=True, help="Let set-uid programs take effect."),
    click.option("--dev", is_flag=True, help="Let device nodes take effect."),
)


def _overlay_spec(overlay_id: str, layer_ids: tuple[str, ...], words: OverlayWords) -> OverlaySpec:
    """Raises ValueError as ``OverlaySpec`` does."""
    return OverlaySpec(
        overlay_id=overlay_id,
        layers=layer_ids,
        target=words["target"],
        scratch=None if words["scratch"] is None else scratch_from_text(words["scratch"]),
        options=OverlayOptions(
            metacopy=words["metacopy"],
            redirect_dir=words["redirect_dir"],
            xino=words["xino"],
            volatile=words["volatile"],
            userxattr=words["userxattr"],
            suid=words["suid"],
            dev=words["dev"],
        ),
    )


def optional_overlay(
    overlay_id: str | None, layer_ids: tuple[str, ...], words: OverlayWords
) -> OverlaySpec | None:
    """Return the overlay of a batch, None where none is asked for.

    Raises:
        ValueError: as ``OverlaySpec``.
        UsageError: options of an overlay are given without its id.
    """
    if overlay_id is not None:
        return _overlay_spec(overlay_id, layer_ids, words)
    given = [name for name, value in words.items() if value]
    if given:
        name = given[0].replace("_", "-")
        raise click.UsageError(f"--{name} is for an overlay: name it with --overlay ID")
    return None


@click.group()
def overlay() -> None:
    """Overlays of mounted layers."""


@overlay.command("mount")
@click.argument("overlay_id")
@click.argument("layers", nargs=-1, required=True, shell_complete=complete_layers)
@overlay_options
@pass_session
def mount(
    session: Session, overlay_id: str, layers: tuple[str, ...], **words: Unpack[OverlayWords]
) -> None:
    """Overlay LAYERS, topmost first; read-only unless there is a scratch."""
    with wrong_usage():
        spec = _overlay_spec(overlay_id, layers, words)
    with session.agent() as guest:
        report = guest.overlay_mount(spec)
    session.show(report, lambda: _describe(report))


@overlay.command("unmount")
@click.argument("overlay_id", shell_complete=complete_overlays)
@click.option("--force", is_flag=True, help="Also remove an overlay of which only parts are left.")
@pass_session
def unmount(session: Session, overlay_id: str, force: bool) -> None:
    """Unmount an overlay; its layers stay."""
    session.tell(OverlayUnmount, describe_gone, overlay_id=overlay_id, force=force)


@overlay.command("trim")
@click.argument("overlay_id", shell_complete=complete_overlays)
@pass_session
def trim(session: Session, overlay_id: str) -> None:
    """Tell the device of an overlay's scratch which blocks are unused."""
    reply = session.ask(OverlayTrim, overlay_id=overlay_id)
    session.show(reply, lambda: f"{reply.trimmed_bytes} bytes are unused")


@overlay.command("list")
@pass_session
def list_overlays(session: Session) -> None:
    """List the overlays of a guest."""
    reply = session.ask(OverlayList)
    session.show(reply, lambda: table(OVERLAY_HEADER, overlay_rows(reply.overlays)))


OVERLAY_HEADER = ("OVERLAY", "STATE", "LAYERS", "SCRATCH", "METHOD", "TARGET")


def overlay_rows(overlays: Iterable[OverlayReport]) -> list[tuple[str, ...]]:
    """Return rows for ``OVERLAY_HEADER``."""
    return [
        (
            overlay.overlay_id,
            overlay.state,
            str(len(overlay.layers)),
            overlay.scratch.kind if overlay.scratch else "-",
            overlay.method,
            overlay.target,
        )
        for overlay in overlays
    ]


def _describe(report: OverlayReport) -> str:
    facts = [
        ("target", f"{report.target} (mount {report.mount_id}, by {report.method})"),
        ("layers", f"{' '.join(report.layers)} (topmost first)"),
        *([("scratch", _describe_scratch(report.scratch))] if report.scratch else []),
        ("ms", spent(report.timings_ms)),
    ]
    return described("overlay", report.overlay_id, report.state, facts)


def _describe_scratch(scratch: ScratchReport) -> str:
    words = [scratch.filesystem]
    words += ["encrypted"] if scratch.dm else []
    words += [f"shared with {' '.join(scratch.shared_with)}"] if scratch.shared_with else []
    room = f"{scratch.free_bytes} of {scratch.size_bytes} bytes are free"
    return f"{scratch.kind} {scratch.path} ({', '.join(words)}), {room}"


# --- batches


@click.group()
def layers() -> None:
    """Many layers at once, with their overlay: all or nothing."""


@layers.command("mount")
@click.argument("layer_texts", nargs=-1, metavar="[LAYER]...")
@click.option("--overlay", "overlay_id", metavar="ID", help="Overlay the layers under this id.")
@click.option(
    "--request",
    "request_file",
    type=click.File("rb"),
    help="Read the parameters of layers.mount from this file as JSON, - is standard input.",
)
@overlay_options
@pass_session
def mount_many(
    session: Session,
    layer_texts: tuple[str, ...],
    overlay_id: str | None,
    request_file: BinaryIO | None,
    **words: Unpack[OverlayWords],
) -> None:
    """Mount layers in parallel, then an overlay of them: all or nothing.

    LAYER is DEVICE,root=HEX[,id=ID][,offset=N,size=N][,fs=TYPE][,target=PATH], with the keys of the
    hash tree and signature=PATH as in guestagent.layer= of the kernel command line; topmost first.
    The file of a signature is one of this machine.
    """
    if (request_file is None) == (not layer_texts):
        raise click.UsageError("say either LAYERs or --request FILE")
    try:
        if request_file is not None:
            optional_overlay(overlay_id, ("x",), words)
            if overlay_id is not None:
                raise click.UsageError("--request says the overlay itself")
            text = request_file.read(_MAX_REQUEST_BYTES)
            request = LayersMount.from_wire(json.loads(text))
        else:
            specs = tuple(
                layer_from_text(t, f"layer{n}", _signature) for n, t in enumerate(layer_texts)
            )
            spec = optional_overlay(overlay_id, _ids(specs), words)
            request = LayersMount(layers=specs, overlay=spec)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(str(error)) from None
    with session.agent() as guest:
        reply = guest.layers_mount(request)
    session.show(reply, lambda: describe_batch(reply))


def _signature(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return read_signature(file)
    except OSError as error:
        raise ValueError(f"signature {path!r} cannot be read: {error.strerror}") from None


def _ids(specs: tuple[LayerSpec, ...]) -> tuple[str, ...]:
    return tuple(spec.layer_id for spec in specs)


@layers.command("unmount")
@click.argument("layer_ids", nargs=-1, metavar="[LAYER_ID]...", shell_complete=complete_layers)
@click.option(
    "--overlay",
    "overlay_id",
    metavar="ID",
    shell_complete=complete_overlays,
    help="Unmount this overlay first.",
)
@click.option("--force", is_flag=True, help="Also remove layers of which only parts are left.")
@pass_session
def unmount_many(
    session: Session, layer_ids: tuple[str, ...], overlay_id: str | None, force: bool
) -> None:
    """Unmount an overlay and layers, all or nothing; layers that are not named stay."""
    session.tell(
        LayersUnmount, describe_unmounted, layers=layer_ids, overlay=overlay_id, force=force
    )


def describe_batch(reply: LayersMountReply) -> str:
    """Return a table of the layers, and the overlay."""
    rows = [
        (
            layer.layer_id,
            layer.filesystem,
            str(layer.size_bytes),
            layer.verity.status if layer.verity is not None else "-",
            layer.verity.root_digest if layer.verity is not None else "-",
            f"{sum(layer.timings_ms.values()):.1f}",
            layer.target,
        )
        for layer in reply.layers
    ]
    text = table(("LAYER", "FS", "BYTES", "VERITY", "ROOT DIGEST", "MS", "TARGET"), rows)
    if reply.overlay is None:
        return text
    access = "read-only" if reply.overlay.scratch is None else "writable"
    place = plain(f"overlay {reply.overlay.overlay_id} at {reply.overlay.target}")
    return f"{text}\n{place}, {access}"


def describe_unmounted(reply: LayersUnmountReply) -> str:
    """Return the mounts and devices that a batch has removed."""
    return describe_gone(*reply.layers.values(), *([reply.overlay] if reply.overlay else []))
