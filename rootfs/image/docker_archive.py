"""What ``docker save`` writes: ``manifest.json`` with the paths of config and layers.

Archives of Docker 25 and later are OCI layouts as well; those are read as such.

Source: moby/moby image/spec/v1.2 ("Combined Image JSON + Filesystem Changeset Format").
"""

import hashlib
import re
from collections.abc import Mapping

from rootfs.image.filestore import FileStore, read_json
from rootfs.image.oci import LayerBlob, pair_layers
from vsock.errors import CallError

__all__ = ("find_layers", "is_archive")

_CONFIG_NAME = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?\Z", re.ASCII)
_MANIFEST = "manifest.json"


def is_archive(store: FileStore) -> bool:
    """Say whether the store has such a manifest, not just a file of that name."""
    if not store.has(_MANIFEST):
        return False
    try:
        value, _ = read_json(store, _MANIFEST)
    except CallError:
        return False
    return isinstance(value, list) and all(
        isinstance(each, Mapping) and {"Config", "Layers"} <= each.keys() for each in value
    )


def find_layers(store: FileStore, *, reference: str | None = None) -> tuple[LayerBlob, ...]:
    """Return the layers of the image tagged ``reference``, or of the only one; the lowest first.

    Raises:
        CallError: ``not_found``; ``invalid``; ``integrity``, the config is not what its name says.
    """
    value, _ = read_json(store, _MANIFEST)
    if not isinstance(value, list):
        raise _refused("invalid", "it is no list")
    images = [each for each in value if isinstance(each, Mapping)]
    if reference is not None:
        images = [each for each in images if reference in _tags(each)]
    if not images:
        raise _refused("not_found", f"it has no image {reference or ''}".rstrip())
    if len(images) > 1:
        raise _refused("invalid", f"it has {len(images)} images; name one")
    config_name, names = images[0].get("Config"), images[0].get("Layers")
    if not isinstance(config_name, str) or not isinstance(names, list):
        raise _refused("invalid", "it has no Config or no Layers")
    if not all(isinstance(name, str) for name in names):
        raise _refused("invalid", "it has a layer that is no text")
    config, raw = read_json(store, config_name)
    told = _CONFIG_NAME.match(config_name)
    if told is not None and hashlib.sha256(raw).hexdigest() != told[1]:
        raise _refused("integrity", f"the content of {config_name!r} is not of that digest")
    if not isinstance(config, Mapping):
        raise _refused("invalid", f"{config_name!r} is no JSON object")
    for name in names:
        if not store.has(name):
            raise _refused("not_found", f"the layer {name!r} is not in the archive")
    return pair_layers([(name, None, None) for name in names], config, _MANIFEST, config_name)


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
