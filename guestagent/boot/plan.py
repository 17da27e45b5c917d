"""What to mount at boot, from the settings. Pure but for reading manifests and signatures.

| root=        | hash area on the device | what happens                        |
|--------------|-------------------------|-------------------------------------|
| a digest     | there and fits          | the layer is verified               |
| a digest     | absent or another       | the boot ends                       |
| none         | there                   | the boot ends: that is contradictory |
| none         | absent                  | mounted, unless require_verity      |
"""

from guestagent.api import LayerSpec, OverlaySpec
from guestagent.api.devices import MAX_SIGNATURE_BYTES
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

#: Version 2 adds ``images``.
_MANIFEST_VERSIONS = (1, 2)
_MAX_MANIFEST_BYTES = 4 * 1024 * 1024


class BootPlan(Record):
    """Layers, topmost first, and the overlay of them; None with a single layer that is the root."""

    layers: tuple[LayerSpec, ...]
    overlay: OverlaySpec | None

    def check(self) -> None:
        if not self.layers:
            raise ValueError("no layer is named")
        if self.overlay is None and self.layers[0].readonly_policy == "ignore":
            raise ValueError(
                f"layer {self.layers[0].layer_id!r} is the root, and not to be left out"
            )

    @property
    def root_target(self) -> str:
        """Where the root-to-be is mounted."""
        return self.overlay.mount_point if self.overlay else self.layers[0].mount_point


def plan_boot(
    layers: tuple[str, ...],
    overlay: str | None,
    manifests: tuple[str, ...],
    *,
    flattens_erofs: bool = False,
) -> BootPlan | None:
    """Return the plan, or None if nothing is asked for at boot.

    ``flattens_erofs`` says whether this kernel mounts the image of a manifest as one layer; the
    layers of the image are overlaid elsewhere.

    Raises:
        CallError: ``invalid`` or ``integrity``: settings or a manifest contradict each other.
    """
    if not layers and not manifests:
        if overlay is None:
            return None
        raise CallError("invalid", "guestagent.overlay= without any layer", object="overlay")
    try:
        specs = [
            layer_from_text(text, f"layer{index}", _read_signature)
            for index, text in enumerate(layers)
        ]
        images: dict[str, tuple[str, ...]] = {}
        for manifest in manifests:
            image, found = _from_manifest(manifest, flattens_erofs)
            specs += found
            if image is not None:
                images[image] = tuple(spec.layer_id for spec in found)
        ids = [spec.layer_id for spec in specs]
        twice = [layer_id for layer_id in ids if ids.count(layer_id) > 1]
        if twice:
            raise ValueError(f"layer {twice[0]!r} is named twice")
        return BootPlan(layers=tuple(specs), overlay=_overlay(overlay, tuple(ids), images))
    except ValueError as error:
        raise CallError("invalid", str(error), step="plan boot") from None


def _overlay(
    text: str | None, ids: tuple[str, ...], images: dict[str, tuple[str, ...]]
) -> OverlaySpec | None:
    """``images`` has the layers that each image is mounted as, so that an overlay may name it."""
    if text is None:
        return OverlaySpec(overlay_id=ROOT_ID, layers=ids) if len(ids) > 1 else None
    wanted = overlay_from_text(text)
    named = [each for name in wanted.layers for each in images.get(name, (name,))]
    unknown = [layer_id for layer_id in named if layer_id not in ids]
    if unknown:
        raise ValueError(f"overlay {wanted.overlay_id!r} names {unknown[0]!r}, which is no layer")
    return OverlaySpec(
        overlay_id=wanted.overlay_id,
        layers=tuple(named) or ids,
        scratch=scratch_from_text(wanted.scratch) if wanted.scratch else None,
    )


def _from_manifest(text: str, flattens_erofs: bool) -> tuple[str | None, list[LayerSpec]]:
    """Read PATH,DEVICE[,sha256=HEX][,image=ID]: a pack, by its manifest in the boot image.

    Return the id of the image, if one is named, and what is to be mounted of the pack.
    """
    form = "PATH,DEVICE[,sha256=HEX][,image=ID]"
    path, *words = text.split(",")
    if not words:
        raise ValueError(f"manifest {text!r}: which device? expected {form}")
    device = device_from_text(words[0]).to_wire()
    said: dict[str, str] = {}
    for word in words[1:]:
        key, _, value = word.partition("=")
        if key not in ("sha256", "image"):
            raise ValueError(f"manifest {text!r}: {word!r} is no part of {form}")
        if key in said:
            raise ValueError(f"manifest {text!r}: {key} is given twice")
        said[key] = value
    document = _load(path, said.get("sha256"))
    version = document.get("version")
    if type(version) is not int or version not in _MANIFEST_VERSIONS:
        raise ValueError(f"manifest {path!r}: version {document.get('version')!r} is not known")
    layers = _maps(path, document, "layers")
    wanted = said.get("image")
    if wanted is None:
        return None, [_layer(path, layer, _range_of(layer), device) for layer in layers]
    image = _named(path, _maps(path, document, "images"), wanted, "image")
    if image.get("verity") is None:
        raise ValueError(f"manifest {path!r}: image {wanted!r} has no hash tree")
    if flattens_erofs:
        ranges = _maps(path, image, "ranges")
        spec = {**image, "filesystem": "erofs"}
        return wanted, [_layer(path, spec, [_range_of(part) for part in ranges], device)]
    names = image.get("layers")
    if not isinstance(names, list) or not names:
        raise ValueError(f"manifest {path!r}: image {wanted!r} has no list of layers")
    parts = [_named(path, layers, name, "layer") for name in names]
    return wanted, [_layer(path, layer, _range_of(layer), device) for layer in parts]


def _maps(path: str, document: dict[str, object], key: str) -> list[dict[str, object]]:
    found = document.get(key)
    if not isinstance(found, list):
        raise ValueError(f"manifest {path!r}: {key} is no list")
    for each in found:
        if not isinstance(each, dict):
            raise ValueError(f"manifest {path!r}: {key} holds what is no map")
    return found


def _named(path: str, found: list[dict[str, object]], name: object, kind: str) -> dict[str, object]:
    named = [each for each in found if each.get("id") == name]
    if len(named) != 1:
        raise ValueError(f"manifest {path!r}: {len(named)} of {kind} {name!r}, not one")
    return named[0]


def _load(path: str, digest: str | None) -> dict[str, object]:
    import json

    raw = _read("manifest", path, _MAX_MANIFEST_BYTES)
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


def _read_signature(path: str) -> bytes:
    return _read("signature", path, MAX_SIGNATURE_BYTES)


def _read(kind: str, path: str, most_bytes: int) -> bytes:
    """Read a file of the boot image; ``kind`` is what it should be, for the error."""
    try:
        with open(path, "rb") as stream:
            raw = stream.read(most_bytes + 1)
    except OSError as error:
        raise ValueError(f"{kind} {path!r} cannot be read: {error.strerror}") from None
    if len(raw) > most_bytes:
        raise ValueError(f"{kind} {path!r} is larger than {most_bytes} bytes")
    return raw


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a map of a JSON object, in which no reader may see another value than this one does."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice in one object of the manifest")
    return found


def _range_of(part: dict[str, object]) -> dict[str, object]:
    return {"offset_bytes": part.get("offset_bytes"), "size_bytes": part.get("size_bytes")}


def _layer(
    path: str, layer: dict[str, object], mapping: object, device: dict[str, object]
) -> LayerSpec:
    if "verity" not in layer:  # null says that there is none; silence may be a loss
        raise ValueError(f"manifest {path!r}: layer {layer.get('id')!r} does not say its verity")
    spec = {
        "layer_id": layer.get("id"),
        "device": device,
        "mapping": mapping,
        "filesystem": layer.get("filesystem"),
        "verity": layer.get("verity"),
        "whiteouts": layer.get("whiteouts"),
    }
    return LayerSpec.from_wire(spec, f"{path}: layer {layer.get('id')!r}")
