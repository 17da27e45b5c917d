"""OCI image layouts: from ``index.json`` to the layers of one image, every digest checked.

Source: OCI image specification 1.1 (image-layout, image-index, manifest, descriptor, layer);
Docker image manifest version 2, schema 2.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rootfs.image.filestore import AmbiguousError, FileStore, read_json
from rootfs.image.platform import Platform, default_platform, fitting, listed, same_name
from vsock.errors import CallError

__all__ = (
    "MAX_LOOKED_UP",
    "LayerBlob",
    "find_layers",
    "is_layout",
    "pair_layers",
    "refuse_incomplete",
)

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z", re.ASCII)
_MAX_INDEX_DEPTH = 4
_MAX_LAYERS = 1000
#: Images whose platforms are looked up in their configurations.
MAX_LOOKED_UP = 100
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
_CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
#: What says of a document that it is an index, and an image.
_KEYS = ("manifests", "layers", "config")
_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlob:
    """A layer as it is stored. ``digest`` and ``size_bytes`` are of the file ``name`` of the store,
    None where nothing tells; ``diff_id`` is the digest of the uncompressed tar."""

    name: str
    digest: str | None
    size_bytes: int | None
    diff_id: str


def is_layout(store: FileStore) -> bool:
    return store.has("oci-layout") and store.has("index.json")


def refuse_incomplete(store: FileStore) -> None:
    """Refuse a layout that has lost its ``oci-layout``: it is no image of its own files.

    Raises:
        CallError: ``unsupported``.
    """
    try:
        index, _ = read_json(store, "index.json")
    except CallError:
        return
    listed_here = index.get("manifests") if isinstance(index, Mapping) else None
    for each in listed_here if isinstance(listed_here, list) else ():
        digest = each.get("digest") if isinstance(each, Mapping) else None
        if isinstance(digest, str) and _DIGEST.match(digest) and store.has(blob_name(digest, "")):
            problem = _refused("unsupported", "index.json", "images, but there is no oci-layout")
            problem.hint = "--format tar or directory takes its files as they are"
            raise problem


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
    value, _ = read_json(store, "index.json")
    index = _object(value, "index.json")
    _check_kind(index, "index.json", _INDEXES)
    descriptors = _descriptors(index, "index.json")
    names = [name for each in descriptors for name in _names(each)]
    if reference is not None:
        descriptors = [
            each for each in descriptors if any(same_name(n, reference) for n in _names(each))
        ]
        if not descriptors:
            what = f"no image of the name {reference!r}; the names are {listed(names)}"
            raise _refused("not_found", "index.json", what)
    wanted = None if platform is None else Platform.parse(platform)
    if wanted is None and len(_by_digest(descriptors, "index.json")) > 1:
        _refuse_names(descriptors)
    manifest, where = _choose(store, descriptors, wanted, "index.json", 0)
    return _layers_of(store, manifest, where)


def _choose(
    store: FileStore,
    descriptors: list[Mapping[str, object]],
    wanted: Platform | None,
    where: str,
    depth: int,
) -> tuple[Mapping[str, object], str]:
    """Return the one manifest for the platform, going down nested indexes.

    Of several that fit, the first counts in a nested index, which is one image, and under one name.
    """
    images = _images(descriptors, where)
    candidates = [(Platform.of(each.get("platform")), each) for each in images]
    if wanted is not None or len(images) > 1:
        untold = sum(told is None for told, _ in candidates)
        if untold > MAX_LOOKED_UP:
            raise _refused("resource", where, f"{untold} images without a platform; name one")
        known = [(told or _platform_in(store, each, where), each) for told, each in candidates]
        asked = wanted or Platform.parse(default_platform())
        candidates = fitting(known, asked)
        if not candidates:
            there = listed(told for told, _ in known)
            raise _refused("not_found", where, f"no image for {asked}; the platforms are {there}")
    names = {_names(each)[:1] for _, each in candidates}
    variants = {told.full for told, _ in candidates if told is not None}
    if len(candidates) > 1 and (
        len(variants) > 1 or (not depth and (len(names) > 1 or () in names))
    ):
        raise _ambiguous(where, [each for _, each in candidates], variants)
    descriptor = candidates[0][1]
    document, name = _document(store, descriptor, where)
    if descriptor["mediaType"] in _MANIFESTS:
        _check_kind(document, name, _MANIFESTS)
        return document, name
    _check_kind(document, name, _INDEXES)
    if depth == _MAX_INDEX_DEPTH:
        raise _refused("invalid", where, f"indexes nested over {_MAX_INDEX_DEPTH} deep")
    return _choose(store, _descriptors(document, name), wanted, name, depth + 1)


def _images(descriptors: list[Mapping[str, object]], where: str) -> list[Mapping[str, object]]:
    """Return the descriptors of images and indexes, each digest once; others are to be ignored.

    Raises:
        CallError: ``unsupported``, there are only others; ``not_found``, there are none.
    """
    listed_images = [each for each in _by_digest(descriptors, where) if not _is_attestation(each)]
    kinds = [_text(each, "mediaType", where) for each in listed_images]
    images = [
        each
        for each, kind in zip(listed_images, kinds, strict=True)
        if kind in _INDEXES + _MANIFESTS and "artifactType" not in each
    ]
    if not images and kinds:
        raise _refused("unsupported", where, f"the media type {kinds[0]!r}")
    if not images:
        raise _refused("not_found", where, "no image")
    return images


def _by_digest(descriptors: list[Mapping[str, object]], where: str) -> list[Mapping[str, object]]:
    found: dict[str, Mapping[str, object]] = {}
    for each in descriptors:
        found.setdefault(_text(each, "digest", where), each)
    return list(found.values())


def _platform_in(store: FileStore, descriptor: Mapping[str, object], where: str) -> Platform | None:
    """Return the platform that the configuration of an image states; an index has none."""
    if descriptor["mediaType"] not in _MANIFESTS:
        return None
    manifest, name = _document(store, descriptor, where)
    config = _object(manifest.get("config"), f"{name} config")
    if config.get("mediaType") not in _CONFIGS:
        return Platform(os="unknown", architecture="unknown")  # something else than an image
    return Platform.of(_document(store, config, name)[0])


def _refuse_names(descriptors: list[Mapping[str, object]]) -> None:
    """Refuse to choose between images of several names by the platform of this machine."""
    images = [each for each in descriptors if not _is_attestation(each)]
    if len({_names(each)[0] for each in images if _names(each)}) > 1:
        raise _ambiguous("index.json", images, set())


def _ambiguous(
    where: str, images: list[Mapping[str, object]], variants: set[Platform]
) -> AmbiguousError:
    names = listed(name for each in images for name in _names(each)[:1])
    choice = f"name one: the names are {names}"
    if len(variants) > 1:
        choice = f"the platforms are {listed(sorted(variants, key=str))}"
    return _two_ways(where, f"{len(images)} images that fit; {choice}")


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


def _check_kind(document: Mapping[str, object], name: str, kinds: tuple[str, ...]) -> None:
    """Refuse a document that another reader could take for one of the other kind.

    Source: OCI image specification 1.0.2, on CVE-2021-41190; Go's encoding/json, which takes keys
    whatever their case.
    """
    own = document.get("mediaType", kinds[0])
    if not isinstance(own, str) or own in (_MANIFESTS if kinds is _INDEXES else _INDEXES):
        raise _two_ways(name, f"the media type {own!r}: it says that it is another kind")
    index_keys = [key for key in document if key.casefold() == "manifests"]
    image_keys = [key for key in document if key.casefold() in ("layers", "config", "fslayers")]
    if index_keys and image_keys:
        raise _two_ways(name, f"both {image_keys[-1]!r} and {index_keys[-1]!r}")
    for key in (*index_keys, *image_keys):
        if key not in _KEYS:
            raise _two_ways(name, f"the key {key!r}, which some readers take for another")


def _is_attestation(descriptor: Mapping[str, object]) -> bool:
    kind = _annotations(descriptor).get("vnd.docker.reference.type")
    return kind == "attestation-manifest"


def _names(descriptor: Mapping[str, object]) -> tuple[str, ...]:
    annotations = _annotations(descriptor)
    return tuple(each for name in _NAMES if isinstance(each := annotations.get(name), str))


def _annotations(descriptor: Mapping[str, object]) -> Mapping[str, object]:
    value = descriptor.get("annotations")
    return value if isinstance(value, Mapping) else {}


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


def _two_ways(where: str, what: str) -> AmbiguousError:
    problem = _refused("invalid", where, what)
    return AmbiguousError(problem.code, problem.message, step=problem.step, object=problem.object)


def _refused(code: str, where: str, what: str) -> CallError:
    return CallError(
        code,
        f"cannot read the image: {where!r} has {what}",
        step="read the image",
        object=where,
    )
