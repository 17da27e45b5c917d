"""From a container image to what a virtual machine needs to mount it: layers, pack, boot image."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from guestagent.api import LayersMount, OverlaySpec, TmpfsScratch
from guestagent.api.agent import HelloReply
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.image.source import SourceChoices
from rootfs.imagefile.errors import OsErrors
from rootfs.pack.manifest import Manifest
from rootfs.pack.mounting import OVERLAY, ImageMount, plan_image_mount, plan_layers_mount
from rootfs.pack.pack import Pack, build_pack
from vsock.errors import CallError

__all__ = ("IMAGE_ID", "Prepared", "build_image_pack", "mount_request", "prepare")

#: The id of the image in its pack, and so of its mount and of its overlay.
IMAGE_ID = "root"
FEATURES = ("pmem", "virtio-blk", "verity", "erofs", "overlay", "vsock", "console")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a machine is made of. ``initrd`` serves every monitor that is known here."""

    kernel: Kernel
    initrd: Path
    pack: Path
    manifest: Manifest


def prepare(
    source: str,
    directory: Path,
    kernel: Kernel,
    *,
    cache_dir: Path,
    report: Callable[[str], None] = lambda step: None,
    **choices: Unpack[SourceChoices],
) -> Prepared:
    """Build the layers of ``source``, verified, and an image merged of them, if they can be merged,
    as ``pack.img`` in ``directory``; and a boot image.

    ``report`` is called with each step that begins.

    Raises:
        CallError: as ``build_pack`` and ``Pack.merge``; ``conflict``, there is a pack already.
    """
    with OsErrors("create", directory):
        directory.mkdir(parents=True, exist_ok=True)
    manifest = build_image_pack(source, directory / "pack.img", report=report, **choices)
    features: tuple[str, ...] = FEATURES
    if kernel.modules.has("virtio_mmio"):
        features += ("virtio-mmio",)
    report("building the boot image")
    initramfs = build_initramfs(
        InitramfsSpec(kernel=kernel, features=features), cache_dir=cache_dir
    )
    return Prepared(
        kernel=kernel, initrd=initramfs.path, pack=directory / "pack.img", manifest=manifest
    )


def build_image_pack(
    source: str,
    path: Path,
    *,
    report: Callable[[str], None] = lambda step: None,
    **choices: Unpack[SourceChoices],
) -> Manifest:
    """Build a pack of the verified layers of ``source``, and merge them; where no image can be made
    of them, they can still be overlaid. The same image gives the same hash trees.

    Raises:
        CallError: as ``build_pack``, and as ``Pack.merge`` for other reasons.
    """
    report(f"building the layers of {source}")
    build_pack(source, path, verity=True, **choices)
    report("merging the layers")
    with Pack.open(path, writable=True) as pack:
        try:
            pack.merge(IMAGE_ID, [layer.layer_id for layer in pack.layers])
        except CallError as problem:
            if problem.code not in ("unsupported", "resource"):
                raise
            report(f"going on without one mount: {problem.message}")
        return pack.manifest


def mount_request(
    manifest: Manifest,
    device: dict[str, object],
    hello: HelloReply,
    *,
    scratch_bytes: int | None = None,
) -> tuple[ImageMount, LayersMount]:
    """Ask for the image: as one mount if it is merged and the guest that said ``hello`` can,
    else as an overlay of the layers; writable in memory, if ``scratch_bytes`` is given.

    Raises:
        CallError: ``invalid``, the agent would refuse it.
    """
    image = manifest.find_image(IMAGE_ID)
    if image is not None:
        plan = plan_image_mount(
            manifest, image, device, features=hello.features, kernel=hello.kernel
        )
    else:
        plan = plan_layers_mount(IMAGE_ID, manifest.layers, device, "they are not merged")
    overlay = None
    try:
        if plan.form == OVERLAY or scratch_bytes is not None:
            scratch = None if scratch_bytes is None else TmpfsScratch(size_bytes=scratch_bytes)
            overlay = OverlaySpec(overlay_id=IMAGE_ID, layers=plan.layer_ids, scratch=scratch)
        return plan, LayersMount(layers=plan.layers, overlay=overlay)
    except ValueError as problem:
        text = f"cannot ask for the image: {problem}"
        raise CallError("invalid", text, step="plan", object="image") from None
