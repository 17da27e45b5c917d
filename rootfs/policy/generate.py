"""A policy from the manifest of a pack: its layers and its images, and the least beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from guestagent.api.overlays import OverlayOptions
from guestagent.policy.document import (
    Chain,
    DeviceRules,
    Exposure,
    LayerTree,
    NoScratch,
    Policy,
    PolicyLayer,
    ScratchRule,
)
from guestagent.storage.verity import VerityParameters
from rootfs.pack.manifest import Manifest, ManifestImage, ManifestLayer
from rootfs.policy.order import free_name
from vsock.errors import CallError

__all__ = ("FORMS", "Choices", "StackedLayers", "layer_of", "policy_of_pack", "policy_of_stacks")

#: How an image may be mounted: as one mount, as an overlay of its layers, or either.
FORMS = ("either", "merged", "overlay")
#: What a host needs to mount and unmount, and to see what it has mounted.
_METHODS = (
    *("layer.mount", "layer.unmount", "layer.list", "layers.mount", "layers.unmount"),
    *("overlay.mount", "overlay.unmount", "overlay.list"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a policy says beside its layers and overlays. The defaults allow no more than to mount
    them read-only and to unmount them, and tell the host nothing else.

    ``name``: default, that of the only image, or "pack". ``scratch``: where changes may go.
    ``instances`` overlays of the same layers may be mounted at the same time.
    """

    name: str | None = None
    svn: int = 0
    form: str = FORMS[0]
    scratch: tuple[ScratchRule, ...] = (NoScratch(),)
    suid: bool = False
    instances: int = 1
    devices: tuple[str, ...] = ("pmem", "virtio-blk")
    methods: tuple[str, ...] = ()
    console: tuple[str, ...] = ()
    log: str = "none"
    errors: str = "codes"


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedLayers:
    """Layers that are overlaid under a name, topmost first."""

    name: str
    layers: tuple[PolicyLayer, ...]


def policy_of_pack(
    manifest: Manifest, choices: Choices, images: Sequence[ManifestImage] = ()
) -> Policy:
    """Return a policy for images of a pack: those given, else all, else an overlay of all layers.

    An image may be mounted in either form, unless ``choices`` name one. The ids of layers are those
    in the manifest; where a layer lies in the pack is left open, its hash tree is not.

    Raises:
        CallError: ``invalid``, a layer has no hash tree, or the policy would be none that an agent
            reads.
    """
    pack, images = manifest.image, images or manifest.images

    def stack(name: str, members: Sequence[ManifestLayer]) -> StackedLayers:
        return StackedLayers(name=name, layers=tuple(layer_of(each, pack) for each in members))

    stacks = [] if images else [stack("pack", manifest.layers)]
    for image in images:
        if choices.form != "merged":
            stacks.append(stack(image.image_id, manifest.layers_of(image)))
        if choices.form != "overlay":
            merged = _merged(image, pack)
            stacks.append(StackedLayers(name=image.image_id, layers=(merged,)))
    name = images[0].image_id if len(images) == 1 else "pack"
    return policy_of_stacks(stacks, choices, name=name, source=pack)


def policy_of_stacks(
    stacks: Sequence[StackedLayers], choices: Choices, *, name: str, source: str
) -> Policy:
    """Return a policy for these overlays and their layers. ``name`` is its name unless ``choices``
    have one; ``source`` is the file that they are from, for errors.

    Raises:
        CallError: ``invalid``, it would be no policy that an agent reads.
    """
    layers: dict[LayerTree, PolicyLayer] = {}
    ids: set[str] = set()
    names: set[str] = set()
    chains = []
    where = "policy"
    try:
        for stack in stacks:
            for layer in stack.layers:
                if layer.verity not in layers:
                    layers[layer.verity] = layer.replace(
                        id=free_name(layer.id, ids), max_instances=choices.instances
                    )
            where = stack.name
            chain = Chain(
                name=free_name(stack.name, names),
                layers=tuple(layers[layer.verity].id for layer in stack.layers),
                options=OverlayOptions(
                    userxattr=any(layer.whiteouts == "user" for layer in stack.layers),
                    suid=choices.suid,
                ),
                scratch=choices.scratch,
                max_instances=choices.instances,
            )
            chains.append(chain)
        where = "policy"
        return Policy(
            name=choices.name or name,
            svn=choices.svn,
            layers=tuple(layers.values()),
            chains=tuple(chains),
            devices=DeviceRules(kinds=tuple(dict.fromkeys(choices.devices))),
            expose=Exposure(
                methods=tuple(dict.fromkeys((*_METHODS, *choices.methods))),
                console=tuple(dict.fromkeys(choices.console)),
                shell="sh" in choices.console,
                log=choices.log,
                errors=choices.errors,
            ),
        )
    except ValueError as problem:
        text = f"cannot make a policy of {source!r}: {where}: {problem}"
        raise CallError("invalid", text, step="make the policy", object=where) from None


def layer_of(layer: ManifestLayer, pack: str) -> PolicyLayer:
    """Return a layer of a manifest as a policy has it; ``pack`` names the manifest in errors.

    Raises:
        CallError: ``invalid``, it has no hash tree, or none that a policy takes.
    """
    if layer.verity is None:
        raise CallError(
            "invalid",
            f"cannot make a policy of {pack!r}: layer {layer.layer_id} has no hash tree, so "
            "nothing says what is in it",
            step="make the policy",
            object=layer.layer_id,
            hint="`guestctl layer format` makes one; `pack build` makes one of every layer",
        )
    return PolicyLayer(
        id=layer.layer_id,
        verity=_tree(layer.verity, layer.layer_id, pack),
        filesystem=layer.filesystem,
        size_bytes=layer.size_bytes,
        whiteouts=layer.whiteouts,
    )


def _merged(image: ManifestImage, pack: str) -> PolicyLayer:
    return PolicyLayer(
        id=image.image_id,
        verity=_tree(image.verity, image.image_id, pack),
        filesystem="erofs",
        size_bytes=sum(part.size_bytes for part in image.ranges),
    )


def _tree(verity: VerityParameters, name: str, pack: str) -> LayerTree:
    fields: Mapping[str, object] = verity.as_dict()
    try:
        return LayerTree(**fields)  # type: ignore[arg-type]  # the same fields
    except ValueError as problem:
        raise CallError(
            "invalid",
            f"cannot make a policy of {pack!r}: layer {name}: {problem}",
            step="make the policy",
            object=name,
        ) from None
