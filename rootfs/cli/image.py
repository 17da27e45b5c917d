"""``guestctl layer build``: file system images from directories, tars and container images; and
``guestctl image``: layers of a pack merged into one file system."""

from pathlib import Path
from typing import Unpack

import click

from guestagent.host.ctl.progress import progress_bar
from guestagent.host.ctl.session import emit, reports_errors
from guestagent.host.ctl.style import words_of
from rootfs.cli.pack import image_line, image_of, pack, source_options
from rootfs.cli.packmount import PACK_COMMANDS
from rootfs.cli.policy import policy
from rootfs.image.images import (
    FILESYSTEMS,
    BuildOptions,
    ImageResult,
    build_image,
    build_layers,
)
from rootfs.image.tartree import Whiteouts
from rootfs.imagefile.output import check_output
from rootfs.pack.pack import Pack
from rootfs.pack.sidecar import Sidecar

__all__ = ("COMMANDS", "LAYER_COMMANDS")

_WHITEOUTS = tuple(each.value for each in Whiteouts if each is not Whiteouts.APPLY)


@click.command("build")
@click.argument("source", type=click.Path(allow_dash=True))
@click.argument("output", type=click.Path())
@click.option("--filesystem", type=click.Choice(FILESYSTEMS), default="erofs", show_default=True)
@click.option("--compression", metavar="NAME", help="lz4hc, zstd...; default: none.")
@click.option("--dax", is_flag=True, help="EROFS: start every file at a new block.")
@click.option("--verity", is_flag=True, help="Append a dm-verity hash area.")
@click.option("--vhd", is_flag=True, help="Append the footer of a fixed VHD.")
@click.option("--sidecar", is_flag=True, help="Write OUTPUT.dmverity, as containerd does.")
@click.option(
    "--layers", is_flag=True, help="One image for each layer of a container image, in OUTPUT/."
)
@click.option(
    "--whiteouts",
    "markers",
    type=click.Choice(_WHITEOUTS),
    default="overlay",
    show_default=True,
    help="What .wh. markers become: overlayfs form (-user: for userxattr mounts), or plain files.",
)
@source_options
@reports_errors
def build_command(
    *,
    source: str,
    output: str,
    dax: bool,
    vhd: bool,
    sidecar: bool,
    layers: bool,
    markers: str,
    as_json: bool,
    **choices: Unpack[BuildOptions],
) -> None:
    """Build a layer image from SOURCE: a directory, a tar, an OCI layout, a docker archive, or -.

    The same source gives the same image, byte for byte.
    """
    if sidecar and not choices["verity"]:
        raise click.UsageError("--sidecar describes a hash area: it needs --verity")
    if dax and (choices["filesystem"] != "erofs" or choices["compression"]):
        raise click.UsageError("--dax is for uncompressed EROFS")
    if sidecar and not layers:
        check_output(Sidecar.path_of(output), inputs=(source,))
    choices["inline_tails"] = not dax
    choices["vhd_footer"] = vhd
    choices["whiteouts"] = Whiteouts(markers)
    build = build_layers if layers else build_image
    with progress_bar("building", as_json) as progress:
        choices["progress"] = progress
        built = build(source, output, **choices)
    results = (built,) if isinstance(built, ImageResult) else built
    for result in results if sidecar else ():
        assert result.verity is not None
        Sidecar.of(result.verity).save(Sidecar.path_of(result.path))
    facts = [_facts(result) for result in results]
    if as_json:
        emit(facts if layers else facts[0])
        return
    for each in facts:
        width = max(map(len, each))
        click.echo("\n".join(f"{name:{width}}  {words_of(value)}" for name, value in each.items()))


def _facts(result: ImageResult) -> dict[str, object]:
    facts: dict[str, object] = {
        "path": str(result.path),
        "filesystem": result.filesystem,
        "compression": result.compression or "none",
        "size_bytes": result.size_bytes,
        "inodes": result.inode_count,
        "source_digest": result.source_digest,
        "uuid": str(result.uuid),
        "whiteouts": result.whiteouts,
    }
    if result.verity is not None:
        facts["hash_offset_bytes"] = result.verity.hash_offset_bytes
        facts["salt"] = result.verity.salt.hex()
        facts["root_digest"] = result.verity.root_digest.hex()
    return facts


@click.group("image")
def image() -> None:
    """Layers of a pack merged into one file system, which a guest mounts at once."""


@image.command("merge")
@click.argument("pack_image", metavar="PACK", type=click.Path(path_type=Path))
@click.option("--id", "image_id", metavar="ID", required=True)
@click.option(
    "--layers", metavar="TOP,...,BOTTOM", required=True, help="Layers of the pack, topmost first."
)
@reports_errors
def merge_command(*, pack_image: Path, image_id: str, layers: str, as_json: bool) -> None:
    """Merge layers of PACK: their data are shared, only metadata and a hash tree are added."""
    with (
        Pack.open(image_of(pack_image), writable=True) as opened,
        progress_bar("merging", as_json) as progress,
    ):
        merged = opened.merge(image_id, layers.split(","), progress=progress)
    if as_json:
        emit(merged.to_json())
    else:
        click.echo(image_line(merged))


for _command in PACK_COMMANDS:
    pack.add_command(_command)

#: For ``guestctl layer``.
LAYER_COMMANDS: tuple[click.Command, ...] = (build_command,)
#: For ``guestctl``.
COMMANDS: tuple[click.Command, ...] = (image, pack, policy)
