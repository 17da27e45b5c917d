"""From a container image to what a virtual machine needs to mount it: layers, pack, boot image."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from guestagent.api import LayersMount, LayerSpec, OverlaySpec, TmpfsScratch
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.image.source import SourceChoices
from rootfs.imagefile.errors import from_os_error
from rootfs.pack.manifest import Manifest, layer_spec
from rootfs.pack.pack import build_pack
from vsock.errors import CallError

__all__ = ("OVERLAY_ID", "Prepared", "mount_request", "prepare")

OVERLAY_ID = "root"
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
    """Build the layers of ``source``, verified, as ``pack.img`` in ``directory``, and a boot image.

    ``report`` is called with each step that begins.

    Raises:
        CallError: as ``build_pack``; ``conflict``, there is a pack already.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise from_os_error(problem, step="create", object=directory) from problem
    report(f"building the layers of {source}")
    manifest = build_pack(source, directory / "pack.img", verity=True, **choices)
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


def mount_request(
    manifest: Manifest, device: dict[str, object], *, scratch_bytes: int | None = None
) -> LayersMount:
    """Ask for all layers and their overlay; writable in memory, if ``scratch_bytes`` is given.

    Raises:
        CallError: ``invalid``, the agent would refuse it.
    """
    try:
        scratch = None if scratch_bytes is None else TmpfsScratch(size_bytes=scratch_bytes)
        return LayersMount(
            layers=tuple(
                LayerSpec.from_wire(layer_spec(layer, device)) for layer in manifest.layers
            ),
            overlay=OverlaySpec(
                overlay_id=OVERLAY_ID,
                layers=tuple(layer.layer_id for layer in manifest.layers),
                scratch=scratch,
            ),
        )
    except ValueError as problem:
        text = f"cannot ask for the layers: {problem}"
        raise CallError("invalid", text, step="plan", object="image") from None
