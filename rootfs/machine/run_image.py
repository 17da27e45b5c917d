"""From a container image to what a virtual machine needs to mount it: layers, pack, boot image."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from guestagent.api import LayersMount, LayerSpec, OverlaySpec, TmpfsScratch
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.image.images import build_layers
from rootfs.imagefile.errors import from_os_error
from rootfs.pack.manifest import Manifest, layer_spec
from rootfs.pack.pack import new_pack
from vsock.errors import CallError

__all__ = ("OVERLAY_ID", "Prepared", "mount_request", "prepare")

OVERLAY_ID = "root"
FEATURES = ("pmem", "virtio-blk", "verity", "erofs", "overlay", "vsock", "console")
_ID_DIGITS = 12

Progress = Callable[[int, int], None]


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
    platform: str | None = None,
    reference: str | None = None,
    source_format: str = "auto",
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda step: None,
) -> Prepared:
    """Build the layers of ``source``, verified, as ``pack.img`` in ``directory``, and a boot image.

    ``report`` is called with each step that begins.

    Raises:
        CallError: as ``build_layers``; ``conflict``, there is a pack already.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise from_os_error(problem, step="create", object=directory) from problem
    report(f"building the layers of {source}")
    results = build_layers(
        source,
        directory,
        verity=True,
        platform=platform,
        reference=reference,
        source_format=source_format,
        progress=progress,
    )
    with new_pack(directory / "pack.img") as pack:
        for result in results:  # the lowest first; each is added above those before it
            pack.add(
                result.path,
                result.source_digest.removeprefix("sha256:")[:_ID_DIGITS],
                verity=result.verity,
                source_digest=result.source_digest,
                whiteouts=result.whiteouts,
            )
            result.path.unlink()
        manifest = pack.manifest
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
