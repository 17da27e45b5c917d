"""What to mount at boot, from the settings. Pure but for reading the manifest.

| root=        | hash area on the device | what happens                        |
|--------------|-------------------------|-------------------------------------|
| a digest     | there and fits          | the layer is verified               |
| a digest     | absent or another       | the boot ends                       |
| none         | there                   | the boot ends: that is contradictory |
| none         | absent                  | mounted, unless require_verity      |
"""

from guestagent.api import LayerSpec, OverlaySpec
from guestagent.api.texts import (
    ROOT_ID,
    device_from_text,
    layer_from_text,
    overlay_from_text,
    scratch_from_text,
)
from guestagent.storage.hashing import new_hash
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("BootPlan", "plan_boot")

_MANIFEST_VERSION = 1
_MAX_MANIFEST_BYTES = 4 * 1024 * 1024


class BootPlan(Record):
    """Layers, topmost first, and the overlay of them; None with a single layer that is the root."""

    layers: tuple[LayerSpec, ...]
    overlay: OverlaySpec | None

    def check(self) -> None:
        if not self.layers:
            raise ValueError("no layer is named")

    @property
    def root_target(self) -> str:
        """Where the root-to-be is mounted."""
        return self.overlay.mount_point if self.overlay else self.layers[0].mount_point


def plan_boot(
    layers: tuple[str, ...], overlay: str | None, manifests: tuple[str, ...]
) -> BootPlan | None:
    """Return the plan, or None if nothing is asked for at boot.

    Raises:
        CallError: ``invalid`` or ``integrity``: settings or a manifest contradict each other.
    """
    if not layers and not manifests:
        if overlay is None:
            return None
        raise CallError("invalid", "guestagent.overlay= without any layer", object="overlay")
    try:
        specs = [layer_from_text(text, f"layer{index}") for index, text in enumerate(layers)]
        for manifest in manifests:
            specs += _from_manifest(manifest)
        ids = [spec.layer_id for spec in specs]
        twice = [layer_id for layer_id in ids if ids.count(layer_id) > 1]
        if twice:
            raise ValueError(f"layer {twice[0]!r} is named twice")
        return BootPlan(layers=tuple(specs), overlay=_overlay(overlay, tuple(ids)))
    except ValueError as error:
        raise CallError("invalid", str(error), step="plan boot") from None


def _overlay(text: str | None, ids: tuple[str, ...]) -> OverlaySpec | None:
    if text is None:
        return OverlaySpec(overlay_id=ROOT_ID, layers=ids) if len(ids) > 1 else None
    wanted = overlay_from_text(text)
    unknown = [layer_id for layer_id in wanted.layers if layer_id not in ids]
    if unknown:
        raise ValueError(f"overlay {wanted.overlay_id!r} names {unknown[0]!r}, which is no layer")
    return OverlaySpec(
        overlay_id=wanted.overlay_id,
        layers=wanted.layers or ids,
        scratch=scratch_from_text(wanted.scratch) if wanted.scratch else None,
    )


def _from_manifest(text: str) -> list[LayerSpec]:
    """Read PATH,DEVICE[,sha256=HEX]: the layers of a pack, by its manifest in the boot image."""
    path, *words = text.split(",")
    if not words:
        raise ValueError(f"manifest {text!r}: which device? expected PATH,DEVICE[,sha256=HEX]")
    device = device_from_text(words[0]).to_wire()
    digest = None
    for word in words[1:]:
        key, _, value = word.partition("=")
        if key != "sha256":
            raise ValueError(f"manifest {text!r}: {word!r} is no sha256=HEX")
        if digest is not None:
            raise ValueError(f"manifest {text!r}: sha256 is given twice")
        digest = value
    document = _load(path, digest)
    version = document.get("version")
    if type(version) is not int or version != _MANIFEST_VERSION:
        raise ValueError(f"manifest {path!r}: version {document.get('version')!r} is not known")
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise ValueError(f"manifest {path!r}: layers is no list")
    return [_layer(path, layer, device) for layer in layers]


def _load(path: str, digest: str | None) -> dict[str, object]:
    import json

    try:
        with open(path, "rb") as stream:
            raw = stream.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"manifest {path!r} cannot be read: {error.strerror}") from None
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise ValueError(f"manifest {path!r} is larger than {_MAX_MANIFEST_BYTES} bytes")
    if digest is not None:
        hasher = new_hash("sha256")
        hasher.update(raw)
        found = hasher.hexdigest()
        if found != digest.lower():
            text = f"manifest {path!r} has the digest {found}, expected {digest}"
            raise CallError("integrity", text, step="plan boot", object=path)
    try:
        document = json.loads(raw, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"manifest {path!r} is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"manifest {path!r} is no map")
    return document


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a map of a JSON object, in which no reader may see another value than this one does."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice in one object of the manifest")
    return found


def _layer(path: str, layer: object, device: dict[str, object]) -> LayerSpec:
    if not isinstance(layer, dict):
        raise ValueError(f"manifest {path!r}: a layer is no map")
    if "verity" not in layer:  # null says that there is none; silence may be a loss
        raise ValueError(f"manifest {path!r}: layer {layer.get('id')!r} does not say its verity")
    spec = {
        "layer_id": layer.get("id"),
        "device": device,
        "mapping": {
            "offset_bytes": layer.get("offset_bytes"),
            "size_bytes": layer.get("size_bytes"),
        },
        "filesystem": layer.get("filesystem"),
        "verity": layer.get("verity"),
    }
    return LayerSpec.from_wire(spec, f"{path}: layer {layer.get('id')!r}")
