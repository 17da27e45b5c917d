"""The manifest of a pack: which layer lies where in the image, and what it must hash to.

JSON, version 1, described by ``schema/manifest-v1.json``. The checks here are by hand, so that an
error names the field and the reason. Layers are listed topmost first: the order of the overlay.
"""

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from guestagent.api.devices import SECTOR_BYTES
from guestagent.api.layers import LAYER_FILESYSTEMS
from guestagent.storage.verity import FieldError, VerityParameters
from rootfs.imagefile.errors import from_os_error
from rootfs.imagefile.output import write_file
from rootfs.imagefile.ranges import FileRange, overlapping
from vsock.errors import CallError

__all__ = (
    "IMAGE_STEP_BYTES",
    "WHITEOUT_KINDS",
    "Manifest",
    "ManifestLayer",
    "layer_spec",
    "verity_map",
)

VERSION = 1
#: Images are a whole number of these: what virtio-pmem and NVDIMM devices are mapped by.
IMAGE_STEP_BYTES = 2 << 20
#: ``trusted.overlay.opaque``, for overlays; ``user.overlay.opaque``, for overlays mounted with
#: userxattr; a layer without opaque directories suits either, one with both kinds neither.
WHITEOUT_KINDS = ("none", "trusted", "user", "both")
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_LAYERS = 65536
_MAX_BYTES = (1 << 63) - 1
_MAX_ALIGNMENT_BYTES = 1 << 30
_LAYER_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z", re.ASCII)
_HEX = re.compile(r"(?:[0-9a-f]{2})*\Z", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestLayer:
    """One layer. ``content_digest`` is over all its bytes in the image and is there to check layers
    that have no hash tree. ``whiteouts`` says which attribute marks its opaque directories, one of
    ``WHITEOUT_KINDS``; None: not known."""

    layer_id: str
    offset_bytes: int
    size_bytes: int
    filesystem: str
    verity: VerityParameters | None = None
    source_digest: str | None = None
    content_digest: str | None = None
    whiteouts: str | None = None

    def __post_init__(self) -> None:
        if not _LAYER_ID.match(self.layer_id):
            raise FieldError("id", f"{self.layer_id!r} is no layer id")
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
        if self.verity is not None:
            end = max(self.verity.end_bytes, self.verity.data_size_bytes)
            if end > self.size_bytes:
                raise FieldError("verity", f"ends at {end}, the layer at {self.size_bytes}")

    @property
    def range(self) -> FileRange:
        return FileRange(offset_bytes=self.offset_bytes, size_bytes=self.size_bytes)

    def to_json(self) -> dict[str, object]:
        return {
            "id": self.layer_id,
            "offset_bytes": self.offset_bytes,
            "size_bytes": self.size_bytes,
            "filesystem": self.filesystem,
            "verity": None if self.verity is None else verity_map(self.verity),
            "source_digest": self.source_digest,
            "content_digest": self.content_digest,
            # left out where it is not known: readers of before refuse fields that they do not know
            **({} if self.whiteouts is None else {"whiteouts": self.whiteouts}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A pack: ``image`` is a file name beside the manifest; ``layers`` are topmost first."""

    image: str
    size_bytes: int
    alignment_bytes: int
    layers: tuple[ManifestLayer, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.image or "/" in self.image or "\0" in self.image or self.image in (".", ".."):
            raise FieldError("image", f"{self.image!r} is no file name")
        _check_number("size_bytes", self.size_bytes, 0, _MAX_BYTES, IMAGE_STEP_BYTES)
        _check_number(
            "alignment_bytes", self.alignment_bytes, 4096, _MAX_ALIGNMENT_BYTES, SECTOR_BYTES
        )
        if self.alignment_bytes & (self.alignment_bytes - 1):
            raise FieldError("alignment_bytes", f"{self.alignment_bytes} is no power of two")
        seen: dict[str, int] = {}
        for index, layer in enumerate(self.layers):
            first = seen.setdefault(layer.layer_id, index)
            if first != index:
                raise FieldError(f"layers[{index}].id", f"the same as layers[{first}].id")
            if layer.offset_bytes % self.alignment_bytes:
                problem = f"{layer.offset_bytes} is no multiple of {self.alignment_bytes}"
                raise FieldError(f"layers[{index}].offset_bytes", problem)
            if layer.range.end_bytes > self.size_bytes:
                problem = f"ends at {layer.range.end_bytes}, the image at {self.size_bytes}"
                raise FieldError(f"layers[{index}].size_bytes", problem)
        self._check_overlaps()

    def _check_overlaps(self) -> None:
        for first, second in overlapping(layer.range for layer in self.layers):
            names = [layer.layer_id for layer in self.layers if layer.range in (first, second)]
            raise FieldError("layers", f"{' and '.join(names)} share bytes")

    def find(self, layer_id: str) -> ManifestLayer | None:
        return next((layer for layer in self.layers if layer.layer_id == layer_id), None)

    def to_json(self) -> dict[str, object]:
        return {
            "version": VERSION,
            "image": self.image,
            "size_bytes": self.size_bytes,
            "alignment_bytes": self.alignment_bytes,
            "layers": [layer.to_json() for layer in self.layers],
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
        try:
            raw = _read_file(path)
        except OSError as problem:
            raise from_os_error(problem, step="read the manifest", object=path) from problem
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
        if version != VERSION:
            raise FieldError("version", f"{version} is not {VERSION}")
        layers = top.take("layers")
        if not isinstance(layers, list) or len(layers) > _MAX_LAYERS:
            raise FieldError("layers", f"no list of at most {_MAX_LAYERS} layers")
        fields = {
            "image": top.text("image"),
            "size_bytes": top.number("size_bytes"),
            "alignment_bytes": top.number("alignment_bytes"),
        }
        top.finish()
        parsed = tuple(_layer(layer, f"layers[{index}]") for index, layer in enumerate(layers))
        return cls(**fields, layers=parsed)  # type: ignore[arg-type]  # each is taken by its type


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
            raise FieldError(self.name(str(min(self._left))), "not a field of version 1")


def _layer(value: object, path: str) -> ManifestLayer:
    fields = _Fields(value, path)
    verity = fields.take("verity")
    try:
        layer = ManifestLayer(
            layer_id=fields.text("id"),
            offset_bytes=fields.number("offset_bytes"),
            size_bytes=fields.number("size_bytes"),
            filesystem=fields.text("filesystem"),
            verity=None if verity is None else _verity(verity, f"{path}.verity"),
            source_digest=fields.optional_text("source_digest"),
            content_digest=fields.optional_text("content_digest"),
            whiteouts=fields.optional_text("whiteouts"),
        )
    except FieldError as problem:
        raise _below(path, problem) from None
    fields.finish()
    return layer


def _verity(value: object, path: str) -> VerityParameters:
    fields = _Fields(value, path)
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
    return verity


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


def layer_spec(layer: ManifestLayer, device: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters of ``layer.mount`` for a layer of a pack that is attached as ``device``
    (``{"kind": "pmem", "number": 0}`` and so on; see ``guestagent.api``)."""
    spec: dict[str, object] = {
        "layer_id": layer.layer_id,
        "device": dict(device),
        "mapping": {"offset_bytes": layer.offset_bytes, "size_bytes": layer.size_bytes},
        "filesystem": layer.filesystem,
    }
    if layer.verity is not None:
        spec["verity"] = verity_map(layer.verity)
    return spec


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


def _read_file(path: str | os.PathLike[str]) -> bytes:
    # a pipe must not keep us waiting for a writer
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(22, "not a regular file", os.fspath(path))
        raw = file.read(_MAX_MANIFEST_BYTES + 1)
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise OSError(27, f"over {_MAX_MANIFEST_BYTES} bytes", os.fspath(path))
    return raw
