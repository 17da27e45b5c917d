"""OCI image layouts: from ``index.json`` to the layers of one image, every digest checked.

Source: OCI image specification 1.1 (image-layout, image-index, manifest, descriptor, layer);
Docker image manifest version 2, schema 2.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rootfs.image.filestore import FileStore, read_json
from vsock.errors import CallError

__all__ = ("LayerBlob", "default_platform", "find_layers", "is_layout", "pair_layers")

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z", re.ASCII)
_MAX_INDEX_DEPTH = 4
_MAX_LAYERS = 1000
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_LAYERS = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
)
#: Layers whose content may not be passed on, and so is often not there.
_FOREIGN_LAYERS = (
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
)
_MACHINES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "i686": "386",
    "riscv64": "riscv64",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
}
_REFERENCE_NAMES = ("org.opencontainers.image.ref.name", "io.containerd.image.name")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlob:
    """A layer as it is stored. ``digest`` and ``size_bytes`` are of the file ``name`` of the store,
    None where nothing tells; ``diff_id`` is the digest of the uncompressed tar."""

    name: str
    digest: str | None
    size_bytes: int | None
    diff_id: str


def default_platform() -> str:
    """Return the platform of this machine as images name it, such as ``linux/amd64``."""
    machine = os.uname().machine
    return f"linux/{_MACHINES.get(machine, machine)}"


def is_layout(store: FileStore) -> bool:
    return store.has("oci-layout") and store.has("index.json")


def find_layers(
    store: FileStore, *, platform: str | None = None, reference: str | None = None
) -> tuple[LayerBlob, ...]:
    """Return the layers of the one image that is asked for, the lowest first.

    Raises:
        CallError: ``not_found``, no such image, or a foreign layer's content is not here;
            ``invalid``, the layout is broken or the choice not unique; ``unsupported``, a media
            type; ``integrity``, a blob is not what its digest says.
    """
    layout, _ = read_json(store, "oci-layout")
    version = _text(_object(layout, "oci-layout"), "imageLayoutVersion", "oci-layout")
    if version.partition(".")[0] != "1":
        raise _refused("unsupported", "oci-layout", f"layout version {version!r}")
    index, _ = read_json(store, "index.json")
    listed = _object(index, "index.json")
    descriptors = _descriptors(listed, "index.json")
    if reference is not None:
        descriptors = [each for each in descriptors if _is_named(each, reference)]
        if not descriptors:
            raise _refused("not_found", "index.json", f"no image of the name {reference!r}")
    manifest, where = _choose(store, descriptors, platform, "index.json", 0)
    return _layers_of(store, manifest, where)


def _choose(
    store: FileStore,
    descriptors: list[Mapping[str, object]],
    platform: str | None,
    where: str,
    depth: int,
) -> tuple[Mapping[str, object], str]:
    """Return the one manifest for the platform, going down nested indexes."""
    images = [each for each in descriptors if not _is_attestation(each)]
    candidates = images
    if platform is not None or len(images) > 1:
        wanted = platform or default_platform()
        candidates = [each for each in images if _platform_fits(each, wanted)]
        if not candidates:
            raise _refused("not_found", where, f"no image for {wanted}")
    if not candidates:
        raise _refused("not_found", where, "no image")
    if len({_text(each, "digest", where) for each in candidates}) > 1:
        raise _refused("invalid", where, f"{len(candidates)} images fit; name one")
    descriptor = candidates[0]
    kind = _text(descriptor, "mediaType", where)
    if kind not in _INDEXES + _MANIFESTS:
        raise _refused("unsupported", where, f"the media type {kind!r}")
    document, name = _document(store, descriptor, where)
    if kind in _MANIFESTS:
        return document, name
    if depth == _MAX_INDEX_DEPTH:
        raise _refused("invalid", where, f"indexes nested over {_MAX_INDEX_DEPTH} deep")
    return _choose(store, _descriptors(document, name), platform, name, depth + 1)


def _layers_of(
    store: FileStore, manifest: Mapping[str, object], where: str
) -> tuple[LayerBlob, ...]:
    config_descriptor = _object(manifest.get("config"), f"{where} config")
    config, config_name = _document(store, config_descriptor, where)
    layers = [_object(each, f"{where} layers") for each in _list(manifest, "layers", where)]
    blobs = []
    for layer in layers:
        kind = _text(layer, "mediaType", where)
        name = blob_name(_text(layer, "digest", where), where)
        if kind not in _LAYERS + _FOREIGN_LAYERS:
            raise _refused("unsupported", where, f"a layer of the media type {kind!r}")
        if not store.has(name):
            foreign = ", a foreign layer: fetch it from its urls" if kind in _FOREIGN_LAYERS else ""
            raise _refused("not_found", where, f"no blob {name!r}{foreign}")
        blobs.append((name, _text(layer, "digest", where), _number(layer, "size", where)))
    return pair_layers(blobs, config, where, config_name)


def pair_layers(
    blobs: Sequence[tuple[str, str | None, int | None]],
    config: Mapping[str, object],
    where: str,
    config_name: str,
) -> tuple[LayerBlob, ...]:
    """Return layers from (name, digest, size) and the diff ids of the image's configuration.

    Raises:
        CallError: ``invalid``, they do not pair.
    """
    rootfs = _object(config.get("rootfs"), f"{config_name} rootfs")
    diff_ids = _list(rootfs, "diff_ids", config_name)
    if len(diff_ids) != len(blobs) or len(blobs) > _MAX_LAYERS:
        raise _refused(
            "invalid", where, f"{len(blobs)} layers, but {len(diff_ids)} diff_ids in its config"
        )
    layers = []
    for (name, digest, size_bytes), diff_id in zip(blobs, diff_ids, strict=True):
        if not isinstance(diff_id, str) or not _DIGEST.match(diff_id):
            raise _refused("unsupported", config_name, f"the diff_id {diff_id!r}")
        layers.append(LayerBlob(name=name, digest=digest, size_bytes=size_bytes, diff_id=diff_id))
    return tuple(layers)


def blob_name(digest: str, where: str) -> str:
    """Return where a layout keeps a blob.

    Raises:
        CallError: ``unsupported``, no sha256 digest.
    """
    found = _DIGEST.match(digest)
    if found is None:
        raise _refused("unsupported", where, f"the digest {digest[:100]!r}; sha256 is known")
    return f"blobs/sha256/{found[1]}"


def _document(
    store: FileStore, descriptor: Mapping[str, object], where: str
) -> tuple[Mapping[str, object], str]:
    """Return the JSON object that a descriptor means, checked against its digest and size."""
    digest = _text(descriptor, "digest", where)
    name = blob_name(digest, where)
    value, raw = read_json(store, name)
    found = "sha256:" + hashlib.sha256(raw).hexdigest()
    if found != digest:
        raise _refused("integrity", name, f"content of the digest {found}")
    size = _number(descriptor, "size", where)
    if size != len(raw):
        raise _refused("integrity", name, f"{len(raw)} bytes, but {where} says {size}")
    return _object(value, name), name


def _is_attestation(descriptor: Mapping[str, object]) -> bool:
    kind = _annotations(descriptor).get("vnd.docker.reference.type")
    return kind == "attestation-manifest"


def _is_named(descriptor: Mapping[str, object], reference: str) -> bool:
    annotations = _annotations(descriptor)
    return any(annotations.get(name) == reference for name in _REFERENCE_NAMES)


def _annotations(descriptor: Mapping[str, object]) -> Mapping[str, object]:
    value = descriptor.get("annotations")
    return value if isinstance(value, Mapping) else {}


def _platform_fits(descriptor: Mapping[str, object], wanted: str) -> bool:
    """A descriptor without platform fits any: then there is nothing to choose by."""
    platform = descriptor.get("platform")
    if not isinstance(platform, Mapping):
        return True
    parts = wanted.split("/")
    told = [platform.get("os"), platform.get("architecture"), platform.get("variant")]
    return told[: len(parts)] == parts


def _descriptors(index: Mapping[str, object], where: str) -> list[Mapping[str, object]]:
    return [_object(each, f"{where} manifests") for each in _list(index, "manifests", where)]


def _object(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise _refused("invalid", where, "something that is no JSON object")
    return value


def _list(value: Mapping[str, object], key: str, where: str) -> list[object]:
    found = value.get(key)
    if not isinstance(found, list):
        raise _refused("invalid", where, f"no list {key!r}")
    return found


def _text(value: Mapping[str, object], key: str, where: str) -> str:
    found = value.get(key)
    if not isinstance(found, str):
        raise _refused("invalid", where, f"no text {key!r}")
    return found


def _number(value: Mapping[str, object], key: str, where: str) -> int:
    found = value.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise _refused("invalid", where, f"no size {key!r}")
    return found


def _refused(code: str, where: str, what: str) -> CallError:
    return CallError(
        code,
        f"cannot read the image: {where!r} has {what}",
        step="read the image",
        object=where,
    )
