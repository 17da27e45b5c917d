"""``guestctl layer``: mount, unmount, list, describe and check layers."""

import sys
from collections.abc import Callable, Iterable
from typing import BinaryIO, TypedDict, TypeVar, Unpack

import click

from guestagent.api import LayerReport, LayerSpec, Verity
from guestagent.api.devices import (
    DIGEST_BYTES,
    MAX_SIGNATURE_BYTES,
    VERITY_PRESETS,
    Device,
    LayerMapping,
)
from guestagent.api.layers import (
    MOUNT_OPTIONS,
    READONLY_POLICIES,
    SHOWN_PARTS,
    WHITEOUT_KINDS,
    LayerGet,
    LayerList,
    LayerUnmount,
    UnmountReply,
)
from guestagent.api.texts import device_from_text, mapping_from_text
from guestagent.host.client.methods import STREAM_DEADLINE_MS
from guestagent.host.ctl.completion import complete_layers
from guestagent.host.ctl.progress import progress_bar
from guestagent.host.ctl.session import Session, pass_session, with_options, wrong_usage
from guestagent.host.ctl.style import described, human_bytes, paint, plain, spent, table

__all__ = (
    "LAYER_HEADER",
    "TreeWords",
    "describe_gone",
    "describe_layer",
    "hex_bytes",
    "layer",
    "layer_rows",
    "parse_device",
    "read_signature",
    "tree_options",
)

Command = TypeVar("Command", bound=Callable[..., object])

_SHOWN_BLOCKS = 100


@click.group()
def layer() -> None:
    """Layers: in a guest, and as images on this host."""


def parse_device(text: str) -> Device:
    """Read a device as ``guestagent.api.texts`` has it, for an option or argument."""
    try:
        return device_from_text(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def hex_bytes(text: str) -> bytes:
    """Read bytes in hexadecimal; ``-`` is the empty value, as for veritysetup.

    Raises:
        click.BadParameter: it is not hexadecimal.
    """
    if text == "-":
        return b""
    if not text or len(text) % 2 or not all(c in "0123456789abcdefABCDEF" for c in text):
        raise click.BadParameter(f"{text!r} is not hexadecimal")
    return bytes.fromhex(text)


def _parse_mapping(texts: tuple[str, ...]) -> LayerMapping | None:
    try:
        return mapping_from_text(":".join(texts)) if texts else None
    except ValueError as error:
        raise click.BadParameter(f"--mapping: {error}") from None


class TreeWords(TypedDict):
    """What ``tree_options`` add to a command: where a hash area is, and what its superblock would
    say; the fields of VerityTerms but the root digest."""

    hash_offset_bytes: int | None
    superblock: bool
    salt: bytes | None
    algorithm: str | None
    hash_type: int | None
    data_blocks: int | None
    data_block_size: int | None
    hash_block_size: int | None


tree_options = with_options(
    click.option(
        "--hash-offset",
        "hash_offset_bytes",
        type=int,
        metavar="BYTES",
        help="Start of the hash area.",
    ),
    click.option(
        "--superblock/--no-superblock",
        default=True,
        help="It starts with a superblock, or --salt and the options after it say all.",
    ),
    click.option("--salt", type=hex_bytes, metavar="HEX", help="- is an empty salt."),
    click.option("--hash", "algorithm", type=click.Choice(tuple(DIGEST_BYTES))),
    click.option("--hash-type", type=click.IntRange(0, 1), help="0: Chrome OS."),
    click.option("--data-blocks", type=int, metavar="N"),
    click.option("--data-block-size", type=int, metavar="BYTES"),
    click.option("--hash-block-size", type=int, metavar="BYTES"),
)


@layer.command("mount")
@click.argument("layer_id")
@click.option(
    "--device",
    required=True,
    metavar="DEVICE",
    help="pmem:N, virtio-blk:SERIAL, label:LABEL, scsi:CONTROLLER:LUN[:PARTITION], /dev/...",
)
@click.option(
    "--mapping",
    multiple=True,
    metavar="OFFSET+SIZE[:OFFSET+SIZE]...",
    help="The byte range that holds the layer, or ranges that are put together. May be repeated.",
)
@click.option("--filesystem", default="erofs", show_default=True)
@click.option("--target", metavar="PATH", help="Default: /run/layers/LAYER_ID.")
@click.option("-o", "--option", "options", multiple=True, type=click.Choice(MOUNT_OPTIONS))
@click.option(
    "--root-digest",
    type=hex_bytes,
    metavar="HEX",
    help="Verify against this digest. What defines the hash tree is read from the superblock, for "
    "which the digest does not vouch, unless the options from --hash-offset on say it.",
)
@click.option(
    "--preset", type=click.Choice(VERITY_PRESETS), default="default", help="Verity options."
)
@click.option("--hash-device", metavar="DEVICE", help="The hash area is on this device.")
@click.option(
    "--signature",
    type=click.File("rb"),
    help="PKCS#7 of the root digest for the kernel's keyring, as `guestctl sign` makes it.",
)
@click.option("--allow-sha1", is_flag=True, help="Accept SHA-1, which is refused otherwise.")
@click.option(
    "--readonly-policy",
    type=click.Choice(tuple(READONLY_POLICIES)),
    default="read",
    show_default=True,
    help="For a device that is writable: refuse it, set it read-only, leave it so, or skip it.",
)
@click.option(
    "--whiteouts", type=click.Choice(WHITEOUT_KINDS), help="As `layer build` has said of the image."
)
@tree_options
@pass_session
def mount(
    session: Session,
    /,
    layer_id: str,
    device: str,
    mapping: tuple[str, ...],
    filesystem: str,
    target: str | None,
    options: tuple[str, ...],
    root_digest: bytes | None,
    preset: str,
    hash_device: str | None,
    signature: BinaryIO | None,
    allow_sha1: bool,
    readonly_policy: str,
    whiteouts: str | None,
    **terms: Unpack[TreeWords],
) -> None:
    """Mount a layer read-only, verified if a root digest is given.

    The hash area is behind the data, or on --hash-device. Options may leave out the values of its
    superblock; values that are given must equal them.
    """
    with wrong_usage():
        verity = None
        if root_digest is not None:
            verity = Verity(
                root_digest=root_digest,
                preset=preset,
                hash_device=None if hash_device is None else parse_device(hash_device),
                signature=None if signature is None else read_signature(signature),
                allow_sha1=allow_sha1,
                **terms,
            )
        elif _says_verity(terms) or hash_device or signature or allow_sha1 or preset != "default":
            raise click.UsageError("options of verity need --root-digest")
        spec = LayerSpec(
            layer_id=layer_id,
            device=parse_device(device),
            mapping=_parse_mapping(mapping),
            verity=verity,
            filesystem=filesystem,
            target=target,
            options=options,
            readonly_policy=readonly_policy,
            whiteouts=whiteouts,
        )
    with session.agent() as guest:
        report = guest.layer_mount(spec)
    session.show(report, lambda: describe_layer(report))


def _says_verity(terms: TreeWords) -> bool:
    values = [value for name, value in terms.items() if name != "superblock"]
    return not terms["superblock"] or any(value is not None for value in values)


def read_signature(file: BinaryIO) -> bytes:
    """Read a signature; one byte more than the agent accepts, so that it refuses a longer one."""
    return file.read(MAX_SIGNATURE_BYTES + 1)


@layer.command("unmount")
@click.argument("layer_id", shell_complete=complete_layers)
@click.option("--force", is_flag=True, help="Also remove a layer of which only parts are left.")
@pass_session
def unmount(session: Session, layer_id: str, force: bool) -> None:
    """Unmount a layer and remove its devices."""
    session.tell(LayerUnmount, describe_gone, layer_id=layer_id, force=force)


def describe_gone(*replies: UnmountReply) -> str:
    """Return the mounts and devices that were removed."""
    gone = [name for one in replies for name in (*one.unmounted, *one.removed_devices)]
    return f"gone: {plain(', '.join(gone))}" if gone else "nothing was mounted"


@layer.command("list")
@pass_session
def list_layers(session: Session) -> None:
    """List the layers of a guest."""
    reply = session.ask(LayerList)
    session.show(reply, lambda: table(LAYER_HEADER, layer_rows(reply.layers)))


LAYER_HEADER = ("LAYER", "STATE", "FS", "SIZE", "VERITY", "USED BY", "DEVICE", "TARGET")


def layer_rows(layers: Iterable[LayerReport]) -> list[tuple[str, ...]]:
    """Return rows for ``LAYER_HEADER``."""
    return [
        (
            layer.layer_id,
            layer.state,
            layer.filesystem,
            human_bytes(layer.size_bytes),
            layer.verity.status if layer.verity else "-",
            " ".join(layer.used_by) or "-",
            layer.device_node,
            layer.target,
        )
        for layer in layers
    ]


@layer.command("get")
@click.argument("layer_id", shell_complete=complete_layers)
@pass_session
def get(session: Session, layer_id: str) -> None:
    """Describe a layer: devices, tables, options, timings."""
    session.tell(LayerGet, describe_layer, layer_id=layer_id)


@layer.command("check")
@click.argument("layer_id", shell_complete=complete_layers)
@pass_session
def check(session: Session, layer_id: str) -> None:
    """Read a whole layer in the guest through verity, and print every corrupt block.

    The exit status is 1 if a block is corrupt. `layer verify` checks an image on this host.
    """
    with session.agent() as guest, progress_bar(f"reading {layer_id}", session.as_json) as progress:
        reply = guest.layer_verify(layer_id, progress=progress, deadline_ms=STREAM_DEADLINE_MS)
    blocks = ", ".join(map(str, reply.corrupt_blocks[:_SHOWN_BLOCKS]))
    more = len(reply.corrupt_blocks) - _SHOWN_BLOCKS
    if reply.corrupt_blocks:
        text = f"{paint('corrupt', 'red')}: blocks {blocks}" + (f" and {more} more" * (more > 0))
    else:
        text = f"{paint('intact', 'green')}: {human_bytes(reply.read_bytes)} read"
    session.show(reply, lambda: f"layer {layer_id}: {text}")
    if reply.corrupt_blocks:
        sys.exit(1)


def describe_layer(report: LayerReport) -> str:
    """Return the description of a mounted layer for a person."""
    already = ", was mounted already" if report.already else ""
    facts = [
        ("target", f"{report.target} (mount {report.mount_id}, {','.join(report.options)})"),
        (
            "filesystem",
            f"{report.filesystem} on {report.device_node} ({report.dev}), "
            f"{report.size_bytes} bytes ({human_bytes(report.size_bytes)})",
        ),
    ]
    if report.verity is not None:
        verity = report.verity
        facts.append(("verity", f"{verity.algorithm} {verity.root_digest} ({verity.status})"))
    if report.range_count > 1:
        facts.append(("ranges", str(report.range_count)))
    for dm in report.dm:
        more = f"; and {dm.target_count - SHOWN_PARTS} more" * (dm.target_count > SHOWN_PARTS)
        facts.append(("dm", f"{dm.name} {dm.dev}: {dm.table}{more}"))
    facts += [("overlaps", other) for other in report.overlaps]
    facts.append(("ms", spent(report.timings_ms)))
    return described("layer", report.layer_id, report.state, facts, already)
