"""The manifest of a pack: which layer lies where in the file, and what it must hash to.

JSON, version 2, described by ``schema/manifest-v2.json``; version 1, which has no ``images``, is
read too. The checks here are by hand, so that an error names the field and the reason. Layers are
listed topmost first: the order of the overlay.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from guestagent.api.devices import MAX_SIGNATURE_BYTES, SECTOR_BYTES
from guestagent.api.layers import LAYER_FILESYSTEMS, WHITEOUT_KINDS
from guestagent.storage.verity import PART_STEP_BYTES, FieldError, VerityParameters
from rootfs.imagefile.inputs import read_input
from rootfs.imagefile.output import write_file
from rootfs.imagefile.ranges import FileRange, overlapping, round_up
from vsock.errors import CallError

__all__ = (
    "IMAGE_STEP_BYTES",
    "Manifest",
    "ManifestImage",
    "ManifestLayer",
    "image_spec",
    "layer_spec",
    "verity_map",
)

VERSION = 2
#: Images are a whole number of these: what virtio-pmem and NVDIMM devices are mapped by.
IMAGE_STEP_BYTES = 2 << 20
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_LAYERS = 65536
_MAX_IMAGES = 4096
_MAX_BYTES = (1 << 63) - 1
_MAX_ALIGNMENT_BYTES = 1 << 30
_LAYER_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z", re.ASCII)
_HEX = re.compile(r"(?:[0-9a-f]{2})*\Z", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestLayer:
    """One layer. ``content_digest`` is over all its bytes in the image and is there to check layers
    that have no hash tree. ``whiteouts`` says which attribute marks its opaque directories, one of
    ``WHITEOUT_KINDS``; None: not known. ``signature`` is over the root digest, for the kernel: a
    detached PKCS#7 in DER (``rootfs.pack.pkcs7``)."""

    layer_id: str
    offset_bytes: int
    size_bytes: int
    filesystem: str
    verity: VerityParameters | None = None
    source_digest: str | None = None
    content_digest: str | None = None
    whiteouts: str | None = None
    signature: bytes | None = None

    def __post_init__(self) -> None:
        _check_id(self.layer_id)
        _check_number("offset_bytes", self.offset_bytes, 0, _MAX_BYTES, SECTOR_BYTES)
        _check_number("size_bytes", self.size_bytes, SECTOR_BYTES, _MAX_BYTES, SECTOR_BYTES)
        if self.filesystem not in LAYER_FILESYSTEMS:
            known = ", ".join(LAYER_FILESYSTEMS)
            raise FieldError("filesystem", f"{self.filesystem!r} is none of {known}")
        if self.whiteouts is not None and self.whiteouts not in WHITEOUT_KINDS:
            raise FieldError(
                "whiteouts", f"{self.whiteouts!r} is none of {', '.join(WHITEOUT_KINDS)}"
            )
        for name in ("source_digest", "content_digest"):
            value = getattr(self, name)
            if value is not None and not _DIGEST.match(value):
                raise FieldError(name, f"{value!r} is no sha256:HEX")
        _check_signature(self.verity, self.signature)
        if self.verity is not None:
            end = max(self.verity.end_bytes, self.verity.data_size_bytes)
            if end > self.size_bytes:
                raise FieldError("verity", f"ends at {end}, the layer at {self.size_bytes}")

    @property
    def range(self) -> FileRange:
        return FileRange(offset_bytes=self.offset_bytes, size_bytes=self.size_bytes)

    @property
    def part_range(self) -> FileRange | None:
        """The verified data with zeros up to whole 512 KiB, as a part of an image; None: the layer
        has no hash tree, or its hash area is where the zeros would be."""
        if self.verity is None:
            return None
        size_bytes = round_up(self.verity.data_size_bytes, PART_STEP_BYTES)
        hash_area = self.verity.superblock or self.verity.levels
        if hash_area and self.verity.hash_offset_bytes < size_bytes:
            return None
        if size_bytes > self.size_bytes:
            return None
        return FileRange(offset_bytes=self.offset_bytes, size_bytes=size_bytes)

    def to_json(self) -> dict[str, object]:
        return {
            "id": self.layer_id,
            "offset_bytes": self.offset_bytes,
            "size_bytes": self.size_bytes,
            "filesystem": self.filesystem,
            "verity": None if self.verity is None else _signed_map(self.verity, self.signature),
            "source_digest": self.source_digest,
            "content_digest": self.content_digest,
            # left out where it is not known: readers of before refuse fields that they do not know
            **({} if self.whiteouts is None else {"whiteouts": self.whiteouts}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestImage:
    """Layers merged into one EROFS file system, with one hash tree over all of it.

    ``layers`` are ids, topmost first. ``ranges``, put together, are what is mounted: the merged
    metadata, the data of each layer, topmost first as in the device table of the file system, and
    the hash area. The metadata and the layers are filled up with zeros to whole 512 KiB.
    ``signature`` is as of a layer.
    """

    image_id: str
    layers: tuple[str, ...]
    ranges: tuple[FileRange, ...]
    verity: VerityParameters
    signature: bytes | None = None

    def __post_init__(self) -> None:
        _check_id(self.image_id)
        _check_signature(self.verity, self.signature)
        if not 0 < len(self.layers) <= _MAX_LAYERS:
            raise FieldError("layers", f"{len(self.layers)} of them")
        if len(set(self.layers)) != len(self.layers):
            raise FieldError("layers", "a layer is named twice")
        if len(self.ranges) != len(self.layers) + 2:
            raise FieldError("ranges", f"not {len(self.layers) + 2} for {len(self.layers)} layers")
        for index, part in enumerate(self.ranges):
            step = PART_STEP_BYTES if index < len(self.ranges) - 1 else SECTOR_BYTES
            _check_range(f"ranges[{index}]", part, step)
        data_bytes = sum(part.size_bytes for part in self.ranges[:-1])
        if self.verity.data_size_bytes != data_bytes:
            raise FieldError(
                "verity.data_blocks", f"{self.verity.data_size_bytes} bytes of {data_bytes}"
            )
        if self.verity.hash_offset_bytes != data_bytes:
            raise FieldError(
                "verity.hash_offset_bytes",
                f"{self.verity.hash_offset_bytes} is not where the data ends, {data_bytes}",
            )
        end_bytes = data_bytes + self.hash_range.size_bytes
        if self.verity.end_bytes != end_bytes:
            raise FieldError(
                f"ranges[{len(self.ranges) - 1}].size_bytes",
                f"ends at {end_bytes}, the hash tree at {self.verity.end_bytes}",
            )

    @property
    def metadata_range(self) -> FileRange:
        return self.ranges[0]

    @property
    def hash_range(self) -> FileRange:
        return self.ranges[-1]

    @property
    def own_ranges(self) -> tuple[FileRange, FileRange]:
        """What no layer holds: the metadata and the hash area."""
        return self.metadata_range, self.hash_range

    def to_json(self) -> dict[str, object]:
        return {
            "id": self.image_id,
            "layers": list(self.layers),
            "ranges": [_range_map(part) for part in self.ranges],
            "verity": _signed_map(self.verity, self.signature),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A pack: ``image`` is a file name beside the manifest; ``layers`` are topmost first;
    ``images`` are merged from them."""

    image: str
    size_bytes: int
    alignment_bytes: int
    layers: tuple[ManifestLayer, ...] = field(default=())
    images: tuple[ManifestImage, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.image or "/" in self.image or "\0" in self.image or self.image in (".", ".."):
            raise FieldError("image", f"{self.image!r} is no file name")
        _check_number("size_bytes", self.size_bytes, 0, _MAX_BYTES, IMAGE_STEP_BYTES)
        _check_number(
            "alignment_bytes", self.alignment_bytes, 4096, _MAX_ALIGNMENT_BYTES, SECTOR_BYTES
        )
        if self.alignment_bytes & (self.alignment_bytes - 1):
            raise FieldError("alignment_bytes", f"{self.alignment_bytes} is no power of two")
        self._check_ids()
        for index, layer in enumerate(self.layers):
            if layer.offset_bytes % self.alignment_bytes:
                problem = f"{layer.offset_bytes} is no multiple of {self.alignment_bytes}"
                raise FieldError(f"layers[{index}].offset_bytes", problem)
            if layer.range.end_bytes > self.size_bytes:
                problem = f"ends at {layer.range.end_bytes}, the image at {self.size_bytes}"
                raise FieldError(f"layers[{index}].size_bytes", problem)
        for index, image in enumerate(self.images):
            self._check_image(f"images[{index}]", image)
        self._check_overlaps()

    def _check_ids(self) -> None:
        places = [(layer.layer_id, f"layers[{n}].id") for n, layer in enumerate(self.layers)]
        places += [(image.image_id, f"images[{n}].id") for n, image in enumerate(self.images)]
        seen: dict[str, str] = {}
        for name, place in places:
            first = seen.setdefault(name, place)
            if first != place:
                raise FieldError(place, f"the same as {first}")

    def _check_image(self, path: str, image: ManifestImage) -> None:
        parts = []
        layers = {layer.layer_id: layer for layer in self.layers}
        for index, layer_id in enumerate(image.layers):
            layer = layers.get(layer_id)
            if layer is None:
                raise FieldError(f"{path}.layers[{index}]", f"{layer_id!r} is no layer")
            if layer.filesystem != "erofs":
                raise FieldError(f"{path}.layers[{index}]", f"{layer_id!r} is no erofs")
            if layer.part_range is None:
                raise FieldError(
                    f"{path}.layers[{index}]", f"{layer_id!r} is not verified and padded"
                )
            parts.append(layer.part_range)
        if tuple(parts) != image.ranges[1:-1]:
            raise FieldError(f"{path}.ranges", "not those of its layers")
        for index in (0, len(image.ranges) - 1):
            if image.ranges[index].end_bytes > self.size_bytes:
                problem = f"ends at {image.ranges[index].end_bytes}, the pack at {self.size_bytes}"
                raise FieldError(f"{path}.ranges[{index}].size_bytes", problem)

    def _check_overlaps(self) -> None:
        owners = [(layer.range, layer.layer_id) for layer in self.layers]
        owners += [(part, image.image_id) for image in self.images for part in image.own_ranges]
        for first, second in overlapping(part for part, _ in owners):
            names = [owner for part, owner in owners if part in (first, second)]
            raise FieldError("layers", f"{' and '.join(names)} share bytes")

    @property
    def used_ranges(self) -> tuple[FileRange, ...]:
        """The ranges of all layers and images; they are apart."""
        own = (part for image in self.images for part in image.own_ranges)
        return (*(layer.range for layer in self.layers), *own)

    def find(self, layer_id: str) -> ManifestLayer | None:
        return next((layer for layer in self.layers if layer.layer_id == layer_id), None)

    def find_image(self, image_id: str) -> ManifestImage | None:
        return next((image for image in self.images if image.image_id == image_id), None)

    @property
    def root_digests(self) -> dict[str, bytes]:
        """The root digests of all verified layers and of the images, by id."""
        found = {each.layer_id: each.verity.root_digest for each in self.layers if each.verity}
        return found | {image.image_id: image.verity.root_digest for image in self.images}

    @property
    def is_signed(self) -> bool:
        """Whether a root digest in it has a signature."""
        signatures = [layer.signature for layer in self.layers]
        return any((*signatures, *(image.signature for image in self.images)))

    def layers_of(self, image: ManifestImage) -> tuple[ManifestLayer, ...]:
        """Return the layers of an image, topmost first."""
        found = {layer.layer_id: layer for layer in self.layers}
        return tuple(found[layer_id] for layer_id in image.layers)

    def to_json(self) -> dict[str, object]:
        return {
            "version": VERSION,
            "image": self.image,
            "size_bytes": self.size_bytes,
            "alignment_bytes": self.alignment_bytes,
            "layers": [layer.to_json() for layer in self.layers],
            "images": [image.to_json() for image in self.images],
        }

    def save(self, path: str | os.PathLike[str], *, replace: bool = True) -> None:
        """Write the manifest so that a reader sees the old one or this one, never a part.

        Raises:
            CallError: as ``write_file``.
        """
        text = json.dumps(self.to_json(), indent=2) + "\n"
        write_file(path, text.encode(), replace=replace)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Manifest":
        """Read and check a manifest.

        Raises:
            CallError: ``invalid``, with the path of the field in ``object``; ``unsupported``, of a
                later version; by errno otherwise.
        """
        raw = read_input(path, _MAX_MANIFEST_BYTES, step="read the manifest")
        try:
            return cls.from_json(json.loads(raw, object_pairs_hook=_unique))
        except FieldError as problem:
            code = "unsupported" if isinstance(problem, _LaterVersion) else "invalid"
            raise CallError(
                code,
                f"cannot use the manifest {os.fspath(path)!r}: {problem}",
                step="check the manifest",
                object=problem.field,
            ) from None
        except (ValueError, RecursionError) as problem:
            raise CallError(
                "invalid",
                f"cannot use the manifest {os.fspath(path)!r}: no JSON: {problem}",
                step="parse the manifest",
                object=os.fspath(path),
            ) from None

    @classmethod
    def from_json(cls, value: object) -> "Manifest":
        """Build a manifest from parsed JSON.

        Raises:
            FieldError: ``field`` is the path of what is wrong, such as ``layers[2].verity.salt``.
        """
        top = _Fields(value, "")
        version = top.number("version")
        if version > VERSION:
            raise _LaterVersion(
                "version", f"{version} is later than {VERSION}, which this program knows"
            )
        if version < 1:
            raise FieldError("version", f"{version} is neither 1 nor {VERSION}")
        layers = top.list_of("layers", _MAX_LAYERS)
        images = top.list_of("images", _MAX_IMAGES) if version > 1 else []
        fields = {
            "image": top.text("image"),
            "size_bytes": top.number("size_bytes"),
            "alignment_bytes": top.number("alignment_bytes"),
        }
        top.finish()
        return cls(
            **fields,  # type: ignore[arg-type]  # each is taken by its type
            layers=tuple(
                _layer(one, f"layers[{index}]", version) for index, one in enumerate(layers)
            ),
            images=tuple(_image(one, f"images[{index}]") for index, one in enumerate(images)),
        )


class _LaterVersion(FieldError):
    """The manifest is of a version that was defined after this program."""


class _Fields:
    """A JSON object being taken apart: what is asked for must be there, the rest must not."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, Mapping):
            raise FieldError(path or "manifest", f"{type(value).__name__}, not an object")
        self._left = dict(value)
        self._path = path

    def name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def has(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str) -> object:
        if key not in self._left:
            raise FieldError(self.name(key), "missing")
        return self._left.pop(key)

    def number(self, key: str) -> int:
        value = self.take(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise FieldError(self.name(key), f"{value!r} is no integer")
        return value

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str):
            raise FieldError(self.name(key), f"{value!r} is no text")
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if self._left.get(key) is not None else self._left.pop(key, None)

    def list_of(self, key: str, most: int) -> list[object]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > most:
            raise FieldError(self.name(key), f"no list of at most {most}")
        return value

    def boolean(self, key: str) -> bool:
        value = self.take(key)
        if not isinstance(value, bool):
            raise FieldError(self.name(key), f"{value!r} is neither true nor false")
        return value

    def octets(self, key: str) -> bytes:
        value = self.text(key)
        if not _HEX.match(value):
            raise FieldError(self.name(key), f"{value[:80]!r} is no lower-case hexadecimal text")
        return bytes.fromhex(value)

    def finish(self) -> None:
        if self._left:
            raise FieldError(self.name(str(min(self._left))), "not a field of this version")


def _layer(value: object, path: str, version: int) -> ManifestLayer:
    fields = _Fields(value, path)
    tree, verity, signature = fields.take("verity"), None, None
    try:
        if tree is not None:
            verity, signature = _verity(tree, f"{path}.verity", version)
        layer = ManifestLayer(
            layer_id=fields.text("id"),
            offset_bytes=fields.number("offset_bytes"),
            size_bytes=fields.number("size_bytes"),
            filesystem=fields.text("filesystem"),
            verity=verity,
            signature=signature,
            source_digest=fields.optional_text("source_digest"),
            content_digest=fields.optional_text("content_digest"),
            whiteouts=fields.optional_text("whiteouts"),
        )
    except FieldError as problem:
        raise _below(path, problem) from None
    fields.finish()
    return layer


def _image(value: object, path: str) -> ManifestImage:
    fields = _Fields(value, path)
    names = fields.list_of("layers", _MAX_LAYERS)
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise FieldError(f"{path}.layers[{index}]", f"{name!r} is no text")
    ranges = fields.list_of("ranges", _MAX_LAYERS + 2)
    try:
        verity, signature = _verity(fields.take("verity"), f"{path}.verity", VERSION)
        image = ManifestImage(
            image_id=fields.text("id"),
            layers=tuple(map(str, names)),
            ranges=tuple(
                _range(part, f"{path}.ranges[{index}]") for index, part in enumerate(ranges)
            ),
            verity=verity,
            signature=signature,
        )
    except FieldError as problem:
        raise _below(path, problem) from None
    fields.finish()
    return image


def _range(value: object, path: str) -> FileRange:
    fields = _Fields(value, path)
    offset_bytes, size_bytes = fields.number("offset_bytes"), fields.number("size_bytes")
    fields.finish()
    _check_number(f"{path}.offset_bytes", offset_bytes, 0, _MAX_BYTES, SECTOR_BYTES)
    _check_number(f"{path}.size_bytes", size_bytes, SECTOR_BYTES, _MAX_BYTES, SECTOR_BYTES)
    return FileRange(offset_bytes=offset_bytes, size_bytes=size_bytes)


def _verity(value: object, path: str, version: int) -> tuple[VerityParameters, bytes | None]:
    """Return the parameters and, if there is one, the signature of their root digest."""
    fields = _Fields(value, path)
    signature = None
    if version > 1 and fields.has("signature"):
        signature = fields.octets("signature")
    try:
        verity = VerityParameters(
            root_digest=fields.octets("root_digest"),
            salt=fields.octets("salt"),
            algorithm=fields.text("algorithm"),
            hash_type=fields.number("hash_type"),
            data_blocks=fields.number("data_blocks"),
            data_block_size=fields.number("data_block_size"),
            hash_block_size=fields.number("hash_block_size"),
            hash_offset_bytes=fields.number("hash_offset_bytes"),
            superblock=fields.boolean("superblock"),
        )
    except FieldError as problem:
        raise _below(path, problem) from None
    fields.finish()
    return verity, signature


def _below(path: str, problem: FieldError) -> FieldError:
    """Return the error with its field named from the top."""
    if problem.field.startswith(path):
        return problem
    text = str(problem).removeprefix(f"{problem.field}: ")
    return FieldError(f"{path}.{problem.field}", text)


def verity_map(verity: VerityParameters) -> dict[str, object]:
    """Return the parameters by their names in a request and a manifest, digests in hexadecimal."""
    digests = {"root_digest": verity.root_digest.hex(), "salt": verity.salt.hex()}
    return {**verity.to_wire(), **digests}


def _signed_map(verity: VerityParameters, signature: bytes | None) -> dict[str, object]:
    """Return what ``Verity`` of a request reads: the parameters, and the signature if there is
    one."""
    signed = {} if signature is None else {"signature": signature.hex()}
    return {**verity_map(verity), **signed}


def _range_map(part: FileRange) -> dict[str, object]:
    return {"offset_bytes": part.offset_bytes, "size_bytes": part.size_bytes}


def image_spec(image: ManifestImage, device: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters of ``layer.mount`` for an image of a pack, whose id becomes the layer's
    id; ``device`` is that of ``layer_spec``. It needs the feature ``erofs-flattened``."""
    return {
        "layer_id": image.image_id,
        "device": dict(device),
        "mapping": [_range_map(part) for part in image.ranges],
        "filesystem": "erofs",
        "verity": _signed_map(image.verity, image.signature),
    }


def layer_spec(layer: ManifestLayer, device: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters of ``layer.mount`` for a layer of a pack that is attached as ``device``
    (``{"kind": "pmem", "number": 0}`` and so on; see ``guestagent.api``)."""
    spec: dict[str, object] = {
        "layer_id": layer.layer_id,
        "device": dict(device),
        "mapping": _range_map(layer.range),
        "filesystem": layer.filesystem,
    }
    if layer.verity is not None:
        spec["verity"] = _signed_map(layer.verity, layer.signature)
    if layer.whiteouts is not None:
        spec["whiteouts"] = layer.whiteouts
    return spec


def _check_id(name: str) -> None:
    if not _LAYER_ID.match(name):
        raise FieldError("id", f"{name!r} is no layer id")


def _check_signature(verity: VerityParameters | None, signature: bytes | None) -> None:
    if signature is None:
        return
    if verity is None:
        raise FieldError("signature", "there is no root digest that it could be over")
    if not 0 < len(signature) <= MAX_SIGNATURE_BYTES:
        problem = f"has {len(signature)} bytes, not 1 to {MAX_SIGNATURE_BYTES}"
        raise FieldError("verity.signature", problem)


def _check_range(name: str, part: FileRange, step: int) -> None:
    _check_number(f"{name}.offset_bytes", part.offset_bytes, 0, _MAX_BYTES, SECTOR_BYTES)
    _check_number(f"{name}.size_bytes", part.size_bytes, step, _MAX_BYTES, step)


def _check_number(name: str, value: int, least: int, most: int, step: int) -> None:
    if not least <= value <= most:
        raise FieldError(name, f"{value} is not between {least} and {most}")
    if value % step:
        raise FieldError(name, f"{value} is no multiple of {step}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise FieldError(name, "given twice in one object")
            seen.add(name)
    return result
