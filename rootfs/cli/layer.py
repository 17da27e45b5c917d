"""``guestctl layer format | verify | dump``: hash areas of images on this host.

The root digest is the last thing printed, when all is on disk. Nothing half made is left behind.
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable
from typing import TypeVar, Unpack
from uuid import UUID

import click

from guestagent.host.ctl.layer import TreeWords, hex_bytes, tree_options
from guestagent.host.ctl.progress import progress_bar
from guestagent.host.ctl.session import emit, reports_errors
from guestagent.host.ctl.style import words_of
from guestagent.storage.verity import DIGEST_BYTES, FieldError, VerityParameters, VerityTerms
from rootfs.cli.sign import COMMANDS
from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.hasharea import data_end
from rootfs.imagefile.output import check_output
from rootfs.pack.sidecar import Sidecar
from rootfs.verity.formatter import LAYER_SALT, derive_uuid, format_image
from rootfs.verity.runs import Run
from rootfs.verity.verifier import VerifyResult, read_layer, verify_image
from vsock.errors import CallError

__all__ = ("COMMANDS", "LAYER_COMMANDS")

Command = TypeVar("Command", bound=Callable[..., None])
_SHOWN_RUNS = 100


def _block_range(text: str) -> tuple[int, int | None]:
    """Read FIRST:END; either may be left out."""
    first, colon, end = text.partition(":")
    if not colon or not (f"0{first}0{end}".isascii() and f"0{first}0{end}".isdigit()):
        raise click.BadParameter(f"{text!r} is not FIRST:END")
    return int(first or 0), int(end) if end else None


def _area_options(command: Command) -> Command:
    """Add the options that say where the hash area is, and what its superblock would say."""
    add = click.option("--hash-file", type=click.Path(), help="The hash area is in this file.")
    return add(tree_options(command))


def _terms(options: TreeWords, root_digest: bytes | None = None) -> VerityTerms:
    try:
        return VerityTerms(root_digest=root_digest, **options)
    except FieldError as problem:
        raise CallError("invalid", str(problem), object=problem.field) from None


@click.command("format")
@click.argument("image", type=click.Path())
@click.option("--salt", type=hex_bytes, metavar="HEX", help="Salt; - is none. Default: random.")
@click.option("--uuid", type=click.UUID, help="Default: random.")
@click.option(
    "--reproducible",
    is_flag=True,
    help="Take the salt of all layers, and derive the UUID from the content of the image.",
)
@click.option("--hash", "algorithm", type=click.Choice(tuple(DIGEST_BYTES)), default="sha256")
@click.option("--hash-type", type=click.IntRange(0, 1), default=1, help="0: Chrome OS.")
@click.option("--data-block-size", type=int, metavar="BYTES", default=4096, show_default=True)
@click.option("--hash-block-size", type=int, metavar="BYTES", default=4096, show_default=True)
@click.option("--data-blocks", type=int, help="Hash this number of blocks.")
@click.option(
    "--hash-offset",
    "hash_offset_bytes",
    type=int,
    metavar="BYTES",
    help="Default: behind the data.",
)
@click.option("--hash-file", type=click.Path(), help="Put the hash area there, not behind.")
@click.option(
    "--superblock/--no-superblock", default=True, help="Write a superblock, or the tree alone."
)
@click.option("--sidecar", is_flag=True, help="Write IMAGE.dmverity, as containerd does.")
@click.option("--force", is_flag=True, help="Replace a hash area, or a hash file.")
@click.option("--workers", type=click.IntRange(min=1), help="Default: one for each core.")
@reports_errors
def format_command(
    *,
    image: str,
    uuid: UUID | None,
    reproducible: bool,
    hash_file: str | None,
    sidecar: bool,
    force: bool,
    workers: int | None,
    as_json: bool,
    **options: Unpack[TreeWords],
) -> None:
    """Add a dm-verity hash area to IMAGE, in place."""
    terms = _terms(options)
    if reproducible:
        if terms.salt is not None or uuid is not None:
            raise click.UsageError("--reproducible makes --salt and --uuid itself")
        uuid = _content_uuid(image, terms.data_blocks, terms.data_block_size or 4096)
        terms = terms.replace(salt=LAYER_SALT)
    if sidecar and (not terms.superblock or hash_file is not None):
        raise click.UsageError("a sidecar describes a superblock in IMAGE")
    if sidecar:
        check_output(Sidecar.path_of(image), inputs=(image,))
    with progress_bar("hashing", as_json) as progress:
        result = format_image(
            image,
            terms=terms,
            uuid=uuid,
            hash_file=hash_file,
            force=force,
            durable=True,
            workers=workers,
            progress=progress,
        )
    if sidecar:
        Sidecar.of(result.parameters).save(Sidecar.path_of(image))
    _show(_facts(result.parameters, result.uuid), as_json)


def _content_uuid(image: str, data_blocks: int | None, block_size_bytes: int) -> UUID:
    digest = hashlib.sha256()
    left = None if data_blocks is None else data_blocks * block_size_bytes
    with OsErrors("read", image), open(image, "rb") as file:
        if left is None:
            left = data_end(file.fileno(), os.fstat(file.fileno()).st_size, image)
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return derive_uuid(digest.digest())


@click.command("dump")
@click.argument("image", type=click.Path())
@_area_options
@reports_errors
def dump_command(
    *, image: str, hash_file: str | None, as_json: bool, **options: Unpack[TreeWords]
) -> None:
    """Print the parameters of the hash area of IMAGE, without checking it."""
    layer = read_layer(image, terms=_terms(options), hash_file=hash_file)
    vhd = {} if layer.footer is None else {"vhd_uuid": str(layer.footer.uuid)}
    _show({**vhd, **_facts(layer.parameters, layer.uuid)}, as_json)


def _facts(parameters: VerityParameters, uuid: UUID | None) -> dict[str, object]:
    facts: dict[str, object] = {} if uuid is None else {"uuid": str(uuid)}
    facts |= parameters.to_wire()
    facts["tree_offset_bytes"] = parameters.tree_offset_bytes
    facts["hash_blocks"] = parameters.hash_blocks
    facts["levels"] = parameters.levels
    facts["end_bytes"] = parameters.end_bytes
    facts["root_digest"] = facts.pop("root_digest")  # last, where the eye is
    return facts


def _show(facts: dict[str, object], as_json: bool) -> None:
    if as_json:
        emit(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:{width}}  {words_of(value)}")


@click.command("verify")
@click.argument("image", type=click.Path())
@click.option(
    "--root-digest",
    type=hex_bytes,
    metavar="HEX",
    help="Default: the digest that the tree has.",
)
@click.option(
    "--sidecar", is_flag=True, help="Root digest and offset are in IMAGE.dmverity, of containerd."
)
@click.option(
    "--range",
    "block_range",
    type=_block_range,
    metavar="FIRST:END",
    help="Data blocks FIRST to END - 1.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Default: one for each core.")
@_area_options
@reports_errors
def verify_command(
    *,
    image: str,
    root_digest: bytes | None,
    sidecar: bool,
    block_range: tuple[int, int | None] | None,
    workers: int | None,
    hash_file: str | None,
    as_json: bool,
    **options: Unpack[TreeWords],
) -> None:
    """Check IMAGE against its hash tree and name every corrupt block (exit status 1)."""
    if sidecar:
        if (
            root_digest is not None
            or options["hash_offset_bytes"] is not None
            or hash_file is not None
        ):
            raise click.UsageError("--sidecar says the root digest, and where the hash area is")
        known = Sidecar.load(Sidecar.path_of(image))
        root_digest, options["hash_offset_bytes"] = known.root_digest, known.hash_offset_bytes
    first, end = block_range or (0, None)
    with progress_bar("verifying", as_json) as progress:
        result = verify_image(
            image,
            terms=_terms(options, root_digest),
            hash_file=hash_file,
            first_block=first,
            end_block=end,
            workers=workers,
            progress=progress,
        )
    if as_json:
        emit({"intact": result.intact, **_found(result)})
    else:
        _describe(image, result, trusted=root_digest is not None)
    if not result.intact:
        sys.exit(1)


def _found(result: VerifyResult) -> dict[str, object]:
    return {
        "first_block": result.first_block,
        "end_block": result.end_block,
        "root_digest": result.parameters.root_digest,
        "corrupt_data_blocks": result.corrupt_data_blocks,
        "corrupt_data": [_run(run) for run in result.corrupt_data],
        "corrupt_hash": [{"level": level, "block": block} for level, block in result.corrupt_hash],
        "unproven_data": [_run(run) for run in result.unproven_data],
    }


def _run(run: Run) -> dict[str, object]:
    fields = dataclasses.asdict(run)
    del fields["alike"]
    return fields


def _describe(image: str, result: VerifyResult, *, trusted: bool) -> None:
    where = f"data blocks {result.first_block}:{result.end_block} of {image}"
    if result.intact:
        against = "the root digest" if trusted else "their own tree (no root digest was given)"
        click.echo(f"intact: {where} match {against}")
        return
    click.echo(f"corrupt: {where}")
    for level, block in result.corrupt_hash[:_SHOWN_RUNS]:
        click.echo(f"  hash block {block} of level {level}")
    for run in result.corrupt_data[:_SHOWN_RUNS]:
        click.echo(f"  data block {_range(run)}")
    for run in result.unproven_data[:_SHOWN_RUNS]:
        click.echo(f"  unproven: data block {_range(run)}")
    lists = (result.corrupt_hash, result.corrupt_data, result.unproven_data)
    hidden = sum(max(0, len(found) - _SHOWN_RUNS) for found in lists)
    if hidden:
        click.echo(f"  and {hidden} more (--json lists them)")


def _range(run: Run) -> str:
    return str(run.first) if run.count == 1 else f"{run.first}-{run.end - 1}"


#: For ``guestctl layer``.
LAYER_COMMANDS: tuple[click.Command, ...] = (format_command, verify_command, dump_command)
