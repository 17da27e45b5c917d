"""``guestctl pack``: many layers in one image, and mounting them in a guest."""

import dataclasses
import sys
import tempfile
from pathlib import Path

import click

from guestagent.api import LayersMount, LayerSpec, OverlaySpec
from guestagent.api.overlays import LayersMountReply
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.layer import hex_bytes
from guestagent.host.ctl.progress import progress_bar
from guestagent.host.ctl.session import emit, reports_errors
from guestagent.storage.verity import VerityParameters, VerityTerms
from rootfs.image.images import FILESYSTEMS, build_layers
from rootfs.image.source import FORMATS
from rootfs.imagefile.errors import from_os_error
from rootfs.imagefile.hasharea import identify
from rootfs.pack.manifest import WHITEOUT_KINDS, Manifest, ManifestLayer, layer_spec
from rootfs.pack.pack import (
    DAX_ALIGNMENT_BYTES,
    PAGE_ALIGNMENT_BYTES,
    Pack,
    manifest_path_of,
    new_pack,
)
from rootfs.pack.sidecar import Sidecar
from rootfs.verity.verifier import read_layer
from vsock.errors import CallError, RpcError

__all__ = ("pack",)

_ID_DIGITS = 16


@click.group("pack")
def pack() -> None:
    """Put many layers into one image for a VPMem, NVDIMM or disk device.

    IMAGE is the image or its manifest, IMAGE.json.
    """


def _image_of(path: Path) -> Path:
    """Return the image, where its manifest was named."""
    if path.suffix != ".json":
        return path
    return path.with_name(Manifest.load(path).image)


@pack.command("create")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--dax", is_flag=True, help="Align layers to 2 MiB, for huge pages.")
@reports_errors
def create_command(*, image: Path, dax: bool, as_json: bool) -> None:
    """Make an empty pack."""
    alignment = DAX_ALIGNMENT_BYTES if dax else PAGE_ALIGNMENT_BYTES
    with Pack.create(image, alignment_bytes=alignment) as made:
        _show(made.manifest, as_json)


@pack.command("build")
@click.argument("source", type=click.Path(allow_dash=True))
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--dax", is_flag=True, help="Align layers to 2 MiB, for huge pages.")
@click.option("--no-verity", is_flag=True, help="Build the layers without hash trees.")
@click.option("--format", "source_format", type=click.Choice(FORMATS), default="auto")
@click.option("--platform", metavar="OS/ARCH", help="Which image of several, e.g. linux/arm64.")
@click.option("--reference", metavar="NAME", help="Which image of several, by name.")
@click.option(
    "--drop-xattrs",
    metavar="PATTERN",
    multiple=True,
    help="Leave out attributes of such names: 'com.apple.*'.",
)
@reports_errors
def build_command(
    *,
    source: str,
    image: Path,
    dax: bool,
    no_verity: bool,
    source_format: str,
    platform: str | None,
    reference: str | None,
    drop_xattrs: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a pack of all layers of SOURCE, a container image, with hash trees."""
    alignment = DAX_ALIGNMENT_BYTES if dax else PAGE_ALIGNMENT_BYTES
    with (
        progress_bar("building", as_json) as progress,
        new_pack(image, alignment_bytes=alignment) as made,
        tempfile.TemporaryDirectory(prefix="layers-", dir=made.path.parent) as directory,
    ):
        for result in build_layers(
            source,
            directory,
            inline_tails=not dax,
            verity=not no_verity,
            source_format=source_format,
            platform=platform,
            reference=reference,
            drop_xattrs=drop_xattrs,
            progress=progress,
        ):
            made.add(
                result.path,
                result.source_digest.removeprefix("sha256:")[:_ID_DIGITS],
                verity=result.verity,
                source_digest=result.source_digest,
                whiteouts=result.whiteouts,
            )
            result.path.unlink()
    _show(made.manifest, as_json)


@pack.command("add")
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("layer", type=click.Path(path_type=Path))
@click.option("--id", "layer_id", metavar="ID", help="Default: the file's name.")
@click.option("--root-digest", type=hex_bytes, metavar="HEX", help="What its tree must hash to.")
@click.option("--sidecar", is_flag=True, help="What its tree must hash to is in LAYER.dmverity.")
@click.option("--no-verity", is_flag=True, help="Take it without a hash tree.")
@click.option("--source-digest", metavar="sha256:HEX", help="What it was built from.")
@click.option(
    "--whiteouts", type=click.Choice(WHITEOUT_KINDS), help="As `layer build` has said of the image."
)
@click.option(
    "--position", type=click.IntRange(min=0), default=0, help="Layers above it; default: none."
)
@reports_errors
def add_command(
    *,
    image: Path,
    layer: Path,
    layer_id: str | None,
    root_digest: bytes | None,
    sidecar: bool,
    no_verity: bool,
    source_digest: str | None,
    whiteouts: str | None,
    position: int,
    as_json: bool,
) -> None:
    """Copy the image LAYER into the pack, on top of the others."""
    verity = None if no_verity else _verity_of(layer, root_digest, sidecar)
    with (
        Pack.open(_image_of(image), writable=True) as opened,
        progress_bar("copying", as_json) as progress,
    ):
        added = opened.add(
            layer,
            layer_id or layer.name.partition(".")[0],
            filesystem=_filesystem_of(layer),
            verity=verity,
            source_digest=source_digest,
            whiteouts=whiteouts,
            position=position,
            progress=progress,
        )
    if as_json:
        emit(added.to_json())
    else:
        click.echo(_line(added))


def _verity_of(layer: Path, root_digest: bytes | None, sidecar: bool) -> VerityParameters:
    """Return what the layer's own hash area says, which has to hash to ``root_digest``, if given,
    or be where the sidecar says and hash to what it says."""
    hash_offset_bytes = None
    if sidecar:
        if root_digest is not None:
            raise click.UsageError("--sidecar has a root digest: leave out --root-digest")
        known = Sidecar.load(Sidecar.path_of(layer))
        root_digest, hash_offset_bytes = known.root_digest, known.hash_offset_bytes
    try:
        terms = VerityTerms(root_digest=root_digest, hash_offset_bytes=hash_offset_bytes)
    except ValueError as problem:
        raise click.UsageError(str(problem)) from None
    try:
        return read_layer(layer, terms=terms).parameters
    except CallError as problem:
        if problem.code == "not_found" and layer.exists():
            problem.hint = "`guestctl layer format` makes one; --no-verity takes it without"
        raise


def _filesystem_of(layer: Path) -> str:
    try:
        with layer.open("rb") as file:
            found = identify(file.fileno())
    except OSError as problem:
        raise from_os_error(problem, step="open", object=layer) from problem
    if found not in FILESYSTEMS:
        raise CallError(
            "invalid",
            f"cannot add {str(layer)!r}: it holds no erofs, squashfs or ext4",
            step="add to the pack",
            object=str(layer),
        )
    return found


@pack.command("remove")
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("layer_id")
@click.option("--trim", is_flag=True, help="Cut free space off the end of the image.")
@reports_errors
def remove_command(*, image: Path, layer_id: str, trim: bool, as_json: bool) -> None:
    """Take a layer out; its range is used again."""
    with Pack.open(_image_of(image), writable=True) as opened:
        removed = opened.remove(layer_id, trim=trim)
    if as_json:
        emit(removed.to_json())


@pack.command("list")
@click.argument("image", type=click.Path(path_type=Path))
@reports_errors
def list_command(*, image: Path, as_json: bool) -> None:
    """List the layers, topmost first."""
    manifest = Manifest.load(image if image.suffix == ".json" else manifest_path_of(image))
    _show(manifest, as_json)


@pack.command("check")
@click.argument("image", type=click.Path(path_type=Path))
@reports_errors
def check_command(*, image: Path, as_json: bool) -> None:
    """Read every layer and compare it with the manifest (exit status 1 if it differs)."""
    with Pack.open(_image_of(image)) as opened, progress_bar("checking", as_json) as progress:
        report = opened.check(progress=progress)
    if as_json:
        emit({"sound": report.is_sound, **dataclasses.asdict(report)})
    else:
        for finding in report.findings:
            click.echo(f"wrong: {finding.layer_id or 'the pack'}: {finding.problem}")
        for layer_id in report.unchecked:
            click.echo(f"unchecked: {layer_id}: it has neither a hash tree nor a digest")
        click.echo(
            f"{'sound' if report.is_sound else 'damaged'}: {report.used_bytes} bytes used, "
            f"{report.free_bytes} free, {report.largest_free_bytes} in one piece"
        )
    if not report.is_sound:
        sys.exit(1)


@pack.command("mount")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--connect", metavar="ADDRESS", help="The agent; default: that of guestctl.")
@click.option("--pmem", type=click.IntRange(0, 255), metavar="N", help="Attached as /dev/pmemN.")
@click.option("--virtio-blk", metavar="SERIAL", help="Attached as this virtio-blk disk.")
@click.option("--path", metavar="DEVICE", help="Attached as this block device.")
@click.option("--overlay", metavar="ID", help="Overlay the layers under this id.")
@click.option("--target", metavar="DIR", help="Where the overlay goes.")
@reports_errors
def mount_command(
    *,
    image: Path,
    connect: str | None,
    pmem: int | None,
    virtio_blk: str | None,
    path: str | None,
    overlay: str | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Mount all layers of a pack in the guest that it is attached to, and overlay them."""
    manifest = Manifest.load(image if image.suffix == ".json" else manifest_path_of(image))
    device = _device(pmem, virtio_blk, path)
    if target is not None and overlay is None:
        raise click.UsageError("--target is where the overlay goes: name it with --overlay ID")
    _show_mounted(_ask_agent(connect, _mount_request(manifest, device, overlay, target)), as_json)


def _ask_agent(connect: str | None, request: LayersMount) -> LayersMountReply:
    """Have the agent mount it: ``connect``, or else the one of the command line's start."""
    session = click.get_current_context().obj
    address = connect or getattr(session, "address", None)
    if address is None:
        raise click.UsageError("which agent? say --connect ADDRESS")
    # --wait and --deadline stand before the command, on a guestctl that has them
    names = ("connect_seconds", "deadline_ms")
    options = {name: getattr(session, name) for name in names if hasattr(session, name)}
    try:
        with GuestAgent(address, **options) as guest:
            return guest.layers_mount(request)
    except ValueError as problem:
        raise click.UsageError(str(problem)) from None
    except CallError:
        raise
    except (RpcError, OSError) as problem:
        text = f"cannot mount the pack: {problem}"
        raise CallError("internal", text, step="talk to the agent", object=address) from problem


def _device(pmem: int | None, virtio_blk: str | None, path: str | None) -> dict[str, object]:
    given: list[dict[str, object]] = []
    if pmem is not None:
        given.append({"kind": "pmem", "number": pmem})
    if virtio_blk is not None:
        given.append({"kind": "virtio-blk", "serial": virtio_blk})
    if path is not None:
        given.append({"kind": "path", "path": path})
    if len(given) > 1:
        raise click.UsageError("--pmem, --virtio-blk and --path: give one")
    return given[0] if given else {"kind": "pmem", "number": 0}


def _mount_request(
    manifest: Manifest, device: dict[str, object], overlay: str | None, target: str | None
) -> LayersMount:
    """Build the request; it is checked here as the agent will check it.

    Raises:
        CallError: ``invalid``.
    """
    for layer in manifest.layers:
        # the overlay is mounted without userxattr, and would show what such a layer has removed
        if overlay is not None and layer.whiteouts in ("user", "both"):
            raise CallError(
                "invalid",
                f"cannot overlay layer {layer.layer_id!r}: its opaque directories are marked by "
                "user.overlay.opaque, for overlays mounted with userxattr",
                step="plan",
                object=layer.layer_id,
            )
    specs = tuple(
        LayerSpec.from_wire(layer_spec(layer, device), f"layers[{index}]")
        for index, layer in enumerate(manifest.layers)
    )
    ids = tuple(layer.layer_id for layer in manifest.layers)
    try:
        spec = None
        if overlay is not None:
            spec = OverlaySpec(overlay_id=overlay, layers=ids, target=target)
        return LayersMount(layers=specs, overlay=spec)
    except ValueError as problem:
        raise CallError("invalid", f"cannot mount the pack: {problem}", step="plan") from None


def _show_mounted(reply: LayersMountReply, as_json: bool) -> None:
    if as_json:
        emit(reply.to_wire())
        return
    for layer in reply.layers:
        verity = f" verity {layer.verity.root_digest}" if layer.verity is not None else ""
        click.echo(f"{layer.layer_id}  {layer.target}  {layer.filesystem}{verity}")
    if reply.overlay is not None:
        click.echo(f"{reply.overlay.overlay_id}  {reply.overlay.target}  overlay")


def _show(manifest: Manifest, as_json: bool) -> None:
    if as_json:
        emit(manifest.to_json())
        return
    for layer in manifest.layers:
        click.echo(_line(layer))


def _line(layer: ManifestLayer) -> str:
    root = layer.verity.root_digest.hex() if layer.verity is not None else "-"
    place = f"{layer.offset_bytes:>14} {layer.size_bytes:>14}"
    return f"{place}  {layer.filesystem:8} {layer.layer_id}  {root}"
