"""What ``docker save`` writes: ``manifest.json`` with the paths of config and layers.

Archives of Docker 25 and later are OCI layouts as well, and are read as such where the layout lists
the image.

Source: moby/moby image/spec/v1.2 ("Combined Image JSON + Filesystem Changeset Format").
"""

import hashlib
import os
import re
from collections.abc import Mapping

from rootfs.image.filestore import AmbiguousError, FileStore, read_json
from rootfs.image.oci import MAX_LOOKED_UP, LayerBlob, pair_layers
from rootfs.image.platform import Platform, fitting, listed, same_name
from vsock.errors import CallError

__all__ = ("find_layers", "is_archive", "refuse_legacy")

_CONFIG_NAME = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?\Z", re.ASCII)
_MANIFEST = "manifest.json"
#: Of an image in it.
_KEYS = ("config", "layers", "repotags")
_START_BYTES = 64 << 10
#: Of a file that may list many, how many ids are looked at.
_MAX_IDS = 1000


def is_archive(store: FileStore) -> bool:
    """Say whether the store has such a manifest, damaged or not, not just a file of that name."""
    if not store.has(_MANIFEST):
        return False
    try:
        value, _ = read_json(store, _MANIFEST)
    except CallError:
        return _was_manifest(store)
    return isinstance(value, list) and (not value or any(map(_is_image, value)))


def _is_image(value: object) -> bool:
    return isinstance(value, Mapping) and any(key.casefold() in _KEYS for key in value)


def _was_manifest(store: FileStore) -> bool:
    """Say whether what cannot be read begins as such a manifest does."""
    try:
        with store.open(_MANIFEST) as file:
            start = os.pread(file.fd, min(file.size_bytes, _START_BYTES), file.start_bytes)
    except CallError:
        return False
    return b'"Config"' in start and b'"Layers"' in start


def refuse_legacy(store: FileStore) -> None:
    """Refuse an archive of Docker before 1.10, or one whose manifest was lost: it is no image of
    its own files.

    Raises:
        CallError: ``unsupported``.
    """
    if _json(store, _MANIFEST) is None and store.has(_MANIFEST):
        what = "manifest.json says null"
    elif _is_legacy(_json(store, "repositories"), store):
        what = "it has no manifest.json, as Docker wrote them before 1.10"
    else:
        return
    raise CallError(
        "unsupported",
        f"cannot read the docker archive: {what}",
        step="read the image",
        object=_MANIFEST,
        hint="load it into Docker and save it again; --format tar takes its files as they are",
    )


def _is_legacy(repositories: object, store: FileStore) -> bool:
    """Say whether a file ``repositories`` names images of this archive: {name: {tag: id}}."""
    if not isinstance(repositories, Mapping):
        return False
    tags = [each for each in repositories.values() if isinstance(each, Mapping)]
    ids = [each for tagged in tags for each in tagged.values() if isinstance(each, str)]
    return any(store.has(f"{each}/layer.tar") for each in ids[:_MAX_IDS])


def _json(store: FileStore, name: str) -> object:
    """Return a JSON file of the store; None for ``null``, False for what is not there."""
    try:
        return read_json(store, name)[0]
    except CallError:
        return False


def find_layers(
    store: FileStore, *, platform: str | None = None, reference: str | None = None
) -> tuple[LayerBlob, ...]:
    """Return the layers of the image tagged ``reference``, or of the only one; the lowest first.

    Raises:
        CallError: ``not_found``; ``invalid``; ``integrity``, the config is not what its name says.
    """
    value, _ = read_json(store, _MANIFEST)
    if not isinstance(value, list):
        raise _refused("invalid", "it is no list")
    images = [each for each in value if isinstance(each, Mapping)]
    tags = listed(tag for each in images for tag in _tags(each))
    if reference is not None:
        images = [each for each in images if any(same_name(t, reference) for t in _tags(each))]
    if not images:
        raise _refused("not_found", f"it has no image {reference or ''}; the names are {tags}")
    if platform is not None and len(images) > MAX_LOOKED_UP:
        problem = _refused("resource", f"it has {len(images)} images; name one")
        raise AmbiguousError("resource", problem.message, step=problem.step, object=_MANIFEST)
    if platform is not None:
        images = _of_platform(store, images, Platform.parse(platform))
    if len(images) > 1:
        raise AmbiguousError(
            "invalid",
            f"cannot read the image: {_MANIFEST}: it has {len(images)} images; name one: the names "
            f"are {tags}",
            step="read the image",
            object=_MANIFEST,
        )
    config_name, names = images[0].get("Config"), images[0].get("Layers")
    if not isinstance(config_name, str) or not isinstance(names, list):
        raise _refused("invalid", "it has no Config or no Layers")
    if not all(isinstance(name, str) for name in names):
        raise _refused("invalid", "it has a layer that is no text")
    config = _config(store, config_name)
    for name in names:
        if not store.has(name):
            raise _refused("not_found", f"the layer {name!r} is not in the archive")
    return pair_layers([(name, None, None) for name in names], config, _MANIFEST, config_name)


def _config(store: FileStore, name: str) -> Mapping[str, object]:
    config, raw = read_json(store, name)
    told = _CONFIG_NAME.match(name)
    if told is not None and hashlib.sha256(raw).hexdigest() != told[1]:
        raise _refused("integrity", f"the content of {name!r} is not of that digest")
    if not isinstance(config, Mapping):
        raise _refused("invalid", f"{name!r} is no JSON object")
    return config


def _of_platform(
    store: FileStore, images: list[Mapping[str, object]], wanted: Platform
) -> list[Mapping[str, object]]:
    known = []
    for each in images:
        name = each.get("Config")
        if not isinstance(name, str):
            raise _refused("invalid", "it has no Config")
        known.append((Platform.of(_config(store, name)), each))
    found = fitting(known, wanted)
    if not found:
        there = listed(told for told, _ in known)
        raise _refused("not_found", f"it has no image for {wanted}; the platforms are {there}")
    return [each for _, each in found]


def _tags(image: Mapping[str, object]) -> list[object]:
    tags = image.get("RepoTags")
    return tags if isinstance(tags, list) else []


def _refused(code: str, what: str) -> CallError:
    return CallError(
        code,
        f"cannot read the image: {_MANIFEST}: {what}",
        step="read the image",
        object=_MANIFEST,
    )
