"""Mounting an image of a pack: as one mount, or as an overlay of its layers. Both show the same."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from guestagent.api import LayerSpec
from rootfs.pack.manifest import Manifest, ManifestImage, ManifestLayer, image_spec, layer_spec
from vsock.errors import CallError

__all__ = (
    "FORMS",
    "MERGED",
    "OVERLAY",
    "ImageMount",
    "check_whiteouts",
    "plan_image_mount",
    "plan_layers_mount",
)

#: One mount of the merged file system, through one linear and one verity device.
MERGED = "merged"
#: An overlay of the layers, each of which is mounted by itself.
OVERLAY = "overlay"
FORMS = (MERGED, OVERLAY)
_FEATURE = "erofs-flattened"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMount:
    """How an image is mounted: ``form`` is one of ``FORMS``, ``reason`` says why. ``layers`` are to
    be mounted, topmost first, and with the form ``overlay`` overlaid."""

    image_id: str
    form: str
    reason: str
    layers: tuple[LayerSpec, ...]

    @property
    def layer_ids(self) -> tuple[str, ...]:
        return tuple(layer.layer_id for layer in self.layers)


def plan_image_mount(
    manifest: Manifest,
    image: ManifestImage,
    device: Mapping[str, object],
    *,
    features: Collection[str],
    kernel: str,
    form: str | None = None,
) -> ImageMount:
    """Return how to mount an image in a guest that has these ``features`` of ``agent.hello``.

    ``form`` is what was asked for by name; None takes the one mount where it can be had. ``kernel``
    is the guest's version, for the reason.

    Raises:
        CallError: ``unsupported``, the guest cannot mount the form that was asked for.
    """
    has_feature = _FEATURE in features
    if form == MERGED and not has_feature:
        raise CallError(
            "unsupported",
            f"cannot mount image {image.image_id!r} as one mount: the guest's Linux {kernel} has "
            f"no {_FEATURE}, which came with Linux 6.4",
            step="plan",
            object=image.image_id,
            hint="leave the form open, and its layers are overlaid",
        )
    asked = "it was asked for"
    if form == MERGED or (form is None and has_feature):
        why = asked if form else f"Linux {kernel} has {_FEATURE}"
        return ImageMount(
            image_id=image.image_id,
            form=MERGED,
            reason=f"one mount of {len(image.ranges)} ranges: {why}",
            layers=(LayerSpec.from_wire(image_spec(image, device)),),
        )
    why = asked if form else f"Linux {kernel} has no {_FEATURE}, which came with Linux 6.4"
    return plan_layers_mount(image.image_id, manifest.layers_of(image), device, why)


def plan_layers_mount(
    image_id: str, layers: Sequence[ManifestLayer], device: Mapping[str, object], why: str
) -> ImageMount:
    """Return how to mount an image as an overlay of its layers, topmost first; ``why`` is for the
    reason.

    Raises:
        CallError: ``invalid``, the whiteouts of a layer are none for this overlay.
    """
    check_whiteouts(layers, userxattr=False)
    return ImageMount(
        image_id=image_id,
        form=OVERLAY,
        reason=f"an overlay of {len(layers)} layers: {why}",
        layers=tuple(LayerSpec.from_wire(layer_spec(layer, device)) for layer in layers),
    )


def check_whiteouts(layers: Collection[ManifestLayer], *, userxattr: bool) -> None:
    """Refuse layers to overlay or merge, of which names that a layer removed would be back.

    Raises:
        CallError: ``invalid``, with the layer.
    """
    unfit = ("both", "trusted" if userxattr else "user")
    for layer in layers:
        if layer.whiteouts in unfit:
            kind = "with" if userxattr else "without"
            raise CallError(
                "invalid",
                f"cannot overlay the layers {kind} userxattr: the whiteouts of layer "
                f"{layer.layer_id} are of the kind {layer.whiteouts}",
                step="plan",
                object=layer.layer_id,
                hint="no overlay can be made of it"
                if layer.whiteouts == "both"
                else f"say it {'without' if userxattr else 'with'} --userxattr",
            )
