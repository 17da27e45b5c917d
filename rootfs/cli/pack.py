"""``guestctl pack``: many layers in one file; ``packmount`` has the commands that need a guest."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, Unpack

import click

from guestagent.api.layers import WHITEOUT_KINDS
from guestagent.host.ctl.layer import hex_bytes
from guestagent.host.ctl.progress import progress_bar
from guestagent.host.ctl.session import emit, reports_errors
from guestagent.storage.verity import VerityParameters, VerityTerms
from rootfs.image.images import FILESYSTEMS
from rootfs.image.source import FORMATS, SourceChoices
from rootfs.image.spool import DEFAULT_MAX_BYTES
from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.hasharea import identify
from rootfs.pack.manifest import Manifest, ManifestImage, ManifestLayer
from rootfs.pack.pack import (
    DAX_ALIGNMENT_BYTES,
    PAGE_ALIGNMENT_BYTES,
    Pack,
    build_pack,
    manifest_path_of,
)
from rootfs.pack.sidecar import Sidecar
from rootfs.verity.verifier import read_layer
from vsock.errors import CallError

__all__ = ("image_line", "image_of", "manifest_of", "pack", "source_options")

Command = TypeVar("Command", bound=Callable[..., None])


_SOURCE_OPTIONS = (
    click.option("--format", "source_format", type=click.Choice(FORMATS), default="auto"),
    click.option("--platform", metavar="OS/ARCH", help="Which image of several: linux/arm64."),
    click.option("--reference", metavar="NAME", help="Which image of several, by name."),
    click.option(
        "--drop-xattrs",
        metavar="PATTERN",
        multiple=True,
        help="Leave out attributes of such names: 'com.apple.*'.",
    ),
    click.option(
        "--max-bytes",
        type=click.IntRange(min=1),
        default=DEFAULT_MAX_BYTES,
        show_default=True,
        help="What the source may grow to uncompressed.",
    ),
)


def source_options(command: Command) -> Command:
    """Add the options by which a source is read, named as in ``SourceChoices``."""
    for option in reversed(_SOURCE_OPTIONS):
        command = option(command)
    return command


@click.group("pack")
def pack() -> None:
    """Images that hold many layers, for a VPMem, NVDIMM or disk device.

    IMAGE is the image or its manifest, IMAGE.json.
    """


def image_of(path: Path) -> Path:
    """Return the image of a path that may name its manifest."""
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
@source_options
@reports_errors
def build_command(
    *,
    source: str,
    image: Path,
    dax: bool,
    no_verity: bool,
    as_json: bool,
    **choices: Unpack[SourceChoices],
) -> None:
    """Make a pack of all layers of SOURCE, a container image, with hash trees."""
    with progress_bar("building", as_json) as progress:
        choices["progress"] = progress
        manifest = build_pack(
            source,
            image,
            alignment_bytes=DAX_ALIGNMENT_BYTES if dax else PAGE_ALIGNMENT_BYTES,
            inline_tails=not dax,
            verity=not no_verity,
            **choices,
        )
    _show(manifest, as_json)


@pack.command("add")
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("layer", type=click.Path(path_type=Path))
@click.option("--id", "layer_id", metavar="ID", help="Default: the file's name.")
@click.option(
    "--root-digest", type=hex_bytes, metavar="HEX", help="The digest that its hash tree must have."
)
@click.option(
    "--sidecar",
    is_flag=True,
    help="Take the digest that its hash tree must have from LAYER.dmverity.",
)
@click.option("--no-verity", is_flag=True, help="Accept a layer without a hash tree.")
@click.option("--source-digest", metavar="sha256:HEX", help="Digest of the source of the layer.")
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
        Pack.open(image_of(image), writable=True) as opened,
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
    """Return the parameters in the hash area of the layer.

    Its root digest must be ``root_digest``, if given; with a sidecar, that of the sidecar.
    """
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
    with OsErrors("open", layer), layer.open("rb") as file:
        found = identify(file.fileno())
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
@click.argument("name", metavar="ID")
@click.option("--trim", is_flag=True, help="Cut free space off the end of the file.")
@reports_errors
def remove_command(*, image: Path, name: str, trim: bool, as_json: bool) -> None:
    """Remove a layer that no image needs, or an image; its range becomes free."""
    with Pack.open(image_of(image), writable=True) as opened:
        removed = opened.remove(name, trim=trim)
    if as_json:
        emit(removed.to_json())


@pack.command("list")
@click.argument("image", type=click.Path(path_type=Path))
@reports_errors
def list_command(*, image: Path, as_json: bool) -> None:
    """List the layers, topmost first, and the images."""
    _show(manifest_of(image), as_json)


@pack.command("check")
@click.argument("image", type=click.Path(path_type=Path))
@reports_errors
def check_command(*, image: Path, as_json: bool) -> None:
    """Read every layer and image and compare it with the manifest (exit status 1 if it differs)."""
    with Pack.open(image_of(image)) as opened, progress_bar("checking", as_json) as progress:
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


def manifest_of(image: Path) -> Manifest:
    return Manifest.load(image if image.suffix == ".json" else manifest_path_of(image))


def _show(manifest: Manifest, as_json: bool) -> None:
    if as_json:
        emit(manifest.to_json())
        return
    for layer in manifest.layers:
        click.echo(_line(layer))
    for image in manifest.images:
        click.echo(image_line(image))


def image_line(image: ManifestImage) -> str:
    """Return a line for a person: what an image adds to the pack, and what it is of."""
    added = sum(part.size_bytes for part in image.own_ranges)
    place = f"{image.metadata_range.offset_bytes:>14} {added:>14}"
    root = image.verity.root_digest.hex()
    return f"{place}  {'image':8} {image.image_id}  {root}  {','.join(image.layers)}"


def _line(layer: ManifestLayer) -> str:
    root = layer.verity.root_digest.hex() if layer.verity is not None else "-"
    place = f"{layer.offset_bytes:>14} {layer.size_bytes:>14}"
    return f"{place}  {layer.filesystem:8} {layer.layer_id}  {root}"
