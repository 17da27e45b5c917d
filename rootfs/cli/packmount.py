"""``guestctl pack mount`` and ``unmount``: the layers of a pack, or an image of it, in a guest."""

from pathlib import Path
from typing import Unpack

import click

from guestagent.api import LayersMount, LayerSpec, LayersUnmount
from guestagent.api.devices import VERITY_PRESETS
from guestagent.api.overlays import LayersMountReply
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.layer import parse_device
from guestagent.host.ctl.overlay import (
    OverlayWords,
    describe_batch,
    describe_unmounted,
    optional_overlay,
    overlay_options,
)
from guestagent.host.ctl.session import Session, pass_session
from guestagent.host.ctl.style import plain
from rootfs.cli.pack import manifest_of
from rootfs.cli.sign import signature_in
from rootfs.pack.manifest import Manifest, ManifestImage, layer_spec
from rootfs.pack.mounting import FORMS, OVERLAY, ImageMount, check_whiteouts, plan_image_mount
from vsock.errors import CallError

__all__ = ("PACK_COMMANDS", "find_image", "image_facts", "root_of")


@click.command("mount")
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--device",
    default="pmem:0",
    show_default=True,
    metavar="DEVICE",
    help="Attached as: pmem:N, virtio-blk:SERIAL, label:LABEL, scsi:CONTROLLER:LUN or /dev/...",
)
@click.option("--image", "image_id", metavar="ID", help="Mount this image of the pack.")
@click.option(
    "--form",
    type=click.Choice(FORMS),
    help="Of an image: one mount, or an overlay of its layers. Default: one mount where the kernel "
    "of the guest can.",
)
@click.option(
    "--overlay",
    "overlay_id",
    metavar="ID",
    help="Overlay the layers under this id; with --image the default is the image's.",
)
@click.option(
    "--preset", type=click.Choice(VERITY_PRESETS), default="default", help="Verity options."
)
@click.option(
    "--signatures",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory with ID.p7s for every verified layer, or for the image, for the kernel's "
    "keyring. Default: the signatures in the manifest.",
)
@click.option("--no-signatures", is_flag=True, help="Send none: for a kernel that has not the key.")
@overlay_options
@pass_session
def mount_command(
    session: Session,
    image: Path,
    device: str,
    image_id: str | None,
    form: str | None,
    overlay_id: str | None,
    preset: str,
    signatures: Path | None,
    no_signatures: bool,
    **words: Unpack[OverlayWords],
) -> None:
    """Mount all layers of a pack in the guest that it is attached to, and overlay them.

    With --image mount one image of the pack, which `guestctl image merge` has made.
    """
    if no_signatures and signatures is not None:
        raise click.UsageError("--signatures contradicts --no-signatures")
    manifest = manifest_of(image)
    place = parse_device(device).to_wire()

    def verified(specs: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        return _verified(specs, preset, signatures, is_signed=not no_signatures)

    if image_id is None:
        if form is not None:
            raise click.UsageError("--form is for an image: name it with --image ID")
        if overlay_id is not None:
            check_whiteouts(manifest.layers, userxattr=words["userxattr"])
        specs = tuple(LayerSpec.from_wire(layer_spec(one, place)) for one in manifest.layers)
        request = _request(verified(specs), overlay_id, words)
        with session.agent() as guest:
            reply = guest.layers_mount(request)
        session.show(reply, lambda: describe_batch(reply))
        return
    found = find_image(manifest, image_id)
    if words["userxattr"]:
        raise click.UsageError("--userxattr is not for an image, which was merged without it")
    with session.agent() as guest:
        plan = plan_image_mount(
            manifest,
            found,
            place,
            features=guest.hello.features,
            kernel=guest.hello.kernel,
            form=form,
        )
        if plan.form == OVERLAY or any(words.values()):
            overlay_id = overlay_id or image_id
        reply = guest.layers_mount(_request(verified(plan.layers), overlay_id, words))
    facts = image_facts(plan, reply)
    text = f"image {image_id} at {facts['target']}: {plan.reason}"
    session.say({**reply.to_wire(), "image": facts}, f"{describe_batch(reply)}\n{plain(text)}")


def _verified(
    specs: tuple[LayerSpec, ...], preset: str, signatures: Path | None, *, is_signed: bool
) -> tuple[LayerSpec, ...]:
    """Add to the verified ones what the command line says of verity. ``signatures`` is a directory
    of signatures in place of those of the manifest."""
    made = []
    for spec in specs:
        if spec.verity is not None:
            signature = spec.verity.signature if is_signed else None
            if signatures is not None:
                signature = signature_in(signatures, spec.layer_id)
            spec = spec.replace(verity=spec.verity.replace(preset=preset, signature=signature))
        made.append(spec)
    return tuple(made)


def _request(
    specs: tuple[LayerSpec, ...], overlay_id: str | None, words: OverlayWords
) -> LayersMount:
    try:
        ids = tuple(spec.layer_id for spec in specs)
        return LayersMount(layers=specs, overlay=optional_overlay(overlay_id, ids, words))
    except ValueError as problem:
        raise CallError("invalid", f"cannot mount the pack: {problem}", step="plan") from None


def image_facts(plan: ImageMount, reply: LayersMountReply) -> dict[str, object]:
    """Return how an image was mounted, as the output says it."""
    return {
        "image_id": plan.image_id,
        "form": plan.form,
        "reason": plan.reason,
        "target": root_of(reply),
    }


def root_of(reply: LayersMountReply) -> str:
    """Return where an image can be seen in the guest."""
    return reply.overlay.target if reply.overlay else reply.layers[0].target


def find_image(manifest: Manifest, image_id: str) -> ManifestImage:
    """Return an image of a pack.

    Raises:
        CallError: ``not_found``; it says which there are.
    """
    found = manifest.find_image(image_id)
    if found is None:
        known = ", ".join(image.image_id for image in manifest.images) or "none"
        raise CallError(
            "not_found",
            f"the pack {manifest.image!r} has no image {image_id!r}; its images: {known}",
            step="plan",
            object=image_id,
            hint="`guestctl image merge` makes one",
        )
    return found


@click.command("unmount")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--image", "image_id", metavar="ID", help="Unmount this image of the pack.")
@click.option("--overlay", "overlay_id", metavar="ID", help="The overlay of the layers.")
@click.option("--force", is_flag=True, help="Also remove layers of which only parts are left.")
@pass_session
def unmount_command(
    session: Session, image: Path, image_id: str | None, overlay_id: str | None, force: bool
) -> None:
    """Unmount all layers of a pack, and their overlay: all or nothing.

    With --image unmount one image, however it is mounted; layers that other overlays use stay.
    """
    manifest = manifest_of(image)
    found = None if image_id is None else find_image(manifest, image_id)
    with session.agent() as guest:
        ids = tuple(layer.layer_id for layer in manifest.layers)
        if found is not None:
            ids, overlay_id = _mounted_as(guest, found, overlay_id)
        try:
            request = LayersUnmount(layers=ids, overlay=overlay_id, force=force)
        except ValueError as problem:
            raise CallError("invalid", f"cannot unmount the pack: {problem}", step="plan") from None
        reply = guest.layers_unmount(request)
    session.show(reply, lambda: describe_unmounted(reply))


def _mounted_as(
    guest: GuestAgent, image: ManifestImage, overlay_id: str | None
) -> tuple[tuple[str, ...], str | None]:
    """Return the layers and the overlay that an image is mounted as."""
    if overlay_id is None:
        overlays = {overlay.overlay_id for overlay in guest.overlay_list()}
        overlay_id = image.image_id if image.image_id in overlays else None
    users = {layer.layer_id: set(layer.used_by) for layer in guest.layer_list()}
    names = (image.image_id,) if image.image_id in users else image.layers
    ids = tuple(name for name in names if not users.get(name, set()) - {overlay_id})
    return ids, overlay_id


#: For ``guestctl pack``.
PACK_COMMANDS: tuple[click.Command, ...] = (mount_command, unmount_command)
