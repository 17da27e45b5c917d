"""Layer lists in policies of other guests, as far as they say what a policy here must.

hcsshim: ``containers`` of its Rego, or of its older JSON; each has ``layers``, root digests alone,
the lowest first. Kata Containers: ``policy_data`` of its Rego; each container has ``storages``, of
which those for layers have the options ``X-kata.dmverity.*``. What their agents leave to defaults
is filled in as they do (src/libs/kata-types/src/dmverity.rs): sha256, blocks of 4096 bytes, hash
type 1, a superblock, and as many data blocks as lie before the hash area. The salt has no default.

Nothing of these files is executed. Of Rego only constants are read.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from guestagent.policy.document import LayerTree, PolicyLayer
from rootfs.policy.generate import StackedLayers
from vsock.errors import CallError

__all__ = ("MAX_FOREIGN_BYTES", "ImportedLayers", "import_layers")

MAX_FOREIGN_BYTES = 16 << 20
_STRING = r'"(?:[^"\\\n]|\\.)*"'
_NOT_JSON = re.compile(_STRING + r"|`[^`]*`|#[^\n]*|[\"`]")
_LAST_COMMA = re.compile(_STRING + r"|,(?=\s*[\]}])")
_CONSTANT = re.compile(r"^(\w+)\s*:=\s*", re.MULTILINE | re.ASCII)
_VERITY = "X-kata.dmverity."
_ENABLED, _LOWER = "X-kata.dmverity-enabled", "X-kata.overlay-lower"
_NUMBER = "X-kata.partition-number"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedLayers:
    """What was read: the layers of each container, and in words what the other policy says beside,
    which is not taken over."""

    stacks: tuple[StackedLayers, ...]
    left_out: tuple[str, ...]


def import_layers(raw: bytes, name: str, known: Collection[PolicyLayer]) -> ImportedLayers:
    """Read the layer lists of the file ``name``; ``known`` are layers of packs that are at hand,
    from which comes what the file does not say.

    Raises:
        CallError: ``invalid``, no such file; ``unsupported``, it does not say enough of a layer;
            ``conflict``, packs have different hash trees of one root digest. ``object`` is the
            field.
    """
    layers: dict[bytes, PolicyLayer] = {}
    for layer in known:
        other = layers.setdefault(layer.verity.root_digest, layer)
        if (other.verity, other.filesystem) != (layer.verity, layer.filesystem):
            text = f"layers {other.id} and {layer.id} of packs have one root digest and differ"
            raise CallError("conflict", text, step="import", object=layer.id)
    reader = _Reader(name, layers)
    value = reader.parse(raw)
    containers = reader.members(value, "containers")
    if any("storages" in container for container in containers):
        return reader.read(containers, reader.kata_layers, ("storages",))
    return reader.read(containers, reader.hcsshim_layers, ("layers",))


class _Reader:
    """Reads one file; every error names it, and the field."""

    def __init__(self, name: str, known: Mapping[bytes, PolicyLayer]) -> None:
        self._name = name
        self._known = known
        self._left_out: list[str] = []

    def read(
        self,
        containers: Sequence[Mapping[str, object]],
        layers_of: Callable[[Mapping[str, object], str], tuple[PolicyLayer, ...]],
        taken: Collection[str],
    ) -> ImportedLayers:
        stacks = []
        for index, container in enumerate(containers):
            where = f"containers[{index}]"
            layers = layers_of(container, where)
            if layers:
                stacks.append(StackedLayers(name=f"container-{index}", layers=layers))
            else:
                self._left_out.append(f"{where}: it has no verified layers")
            rest = sorted(set(container) - set(taken))
            if rest:
                self._left_out.append(f"{where}: {', '.join(rest)}")
        if not stacks:
            raise self._error("containers", "there is no container with verified layers")
        return ImportedLayers(stacks=tuple(stacks), left_out=tuple(self._left_out))

    # --- hcsshim

    def hcsshim_layers(
        self, container: Mapping[str, object], where: str
    ) -> tuple[PolicyLayer, ...]:
        """Return the layers of a container, topmost first."""
        found = []
        for index, digest in enumerate(self._items(container.get("layers"), f"{where}.layers")):
            place = f"{where}.layers[{index}]"
            layer = self._known.get(self._octets(digest, place))
            if layer is None:
                raise self._too_little(place, "it is a root digest without salt and sizes")
            found.append(layer)
        return tuple(reversed(found))

    # --- Kata Containers

    def kata_layers(self, container: Mapping[str, object], where: str) -> tuple[PolicyLayer, ...]:
        """Return the layers of a container, topmost first: by the numbers of their partitions, or
        else as they are listed."""
        found: list[tuple[int | None, PolicyLayer]] = []
        for index, storage in enumerate(self.members(container, "storages", where)):
            place = f"{where}.storages[{index}]"
            self._refuse_guest_pull(storage, place)
            options = self._options(storage, place)
            if _LOWER in options or any(option.startswith(_VERITY) for option in options):
                number = self._number(options, _NUMBER, place) if _NUMBER in options else None
                found.append((number, self._kata_layer(storage, options, place)))
            else:
                self._left_out.append(f"{place}: driver {str(storage.get('driver'))[:64]}")
        numbers = [number for number, _ in found]
        if any(number is not None for number in numbers):
            if None in numbers or len(set(numbers)) != len(numbers):
                raise self._error(f"{where}.storages", f"not each has a {_NUMBER} of its own")
            found.sort(key=lambda each: each[0] or 0)
        return tuple(layer for _, layer in found)

    def _refuse_guest_pull(self, storage: Mapping[str, object], place: str) -> None:
        options = self._items(storage.get("driver_options", []), f"{place}.driver_options")
        texts = (storage.get("driver"), *options)
        if any(str(text).startswith("image_guest_pull") for text in texts):
            problem = "the guest pulls this image itself, so nothing is said of its layers"
            raise self._too_little(f"{place}.driver", problem)

    def _options(self, storage: Mapping[str, object], place: str) -> dict[str, str]:
        options: dict[str, str] = {}
        for option in self._items(storage.get("options", []), f"{place}.options"):
            name, _, value = str(option).partition("=")
            if name in options:
                raise self._error(f"{place}.options", f"{name[:64]!r} is there twice")
            options[name] = value
        return options

    def _kata_layer(
        self, storage: Mapping[str, object], options: Mapping[str, str], place: str
    ) -> PolicyLayer:
        if f"{_VERITY}roothash" not in options or options.get(_ENABLED, "true") != "true":
            raise self._too_little(f"{place}.options", "the layer is not verified")
        root_digest = self._octets(options[f"{_VERITY}roothash"], f"{place}.options")
        known = self._known.get(root_digest)
        missing = [n for n in ("salt", "hashoffset") if _VERITY + n not in options]
        if missing and known is None:
            raise self._too_little(f"{place}.options", f"there is no {_VERITY}{missing[0]}")
        said = self._kata_tree(options, place, root_digest)
        if known is not None:
            for name, value in said.items():
                if value != getattr(known.verity, name):
                    problem = f"{name} is not that of layer {known.id} of the pack"
                    raise self._error(f"{place}.options", problem)
            return known
        filesystem = str(storage.get("fstype", storage.get("fs_type")))
        try:
            tree = LayerTree(**said)  # type: ignore[arg-type]  # each is made by its type
            layer_id = root_digest.hex()[:32]
            return PolicyLayer(id=layer_id, verity=tree, filesystem=filesystem)
        except ValueError as problem:
            raise self._error(f"{place}.options", str(problem)) from None

    def _kata_tree(
        self, options: Mapping[str, str], place: str, root_digest: bytes
    ) -> dict[str, object]:
        """Return the fields of a tree that the options say, with the defaults of Kata's agent."""

        def number(name: str, default: int) -> int:
            full = _VERITY + name
            return self._number(options, full, place) if full in options else default

        tree: dict[str, object] = {
            "root_digest": root_digest,
            "algorithm": options.get(f"{_VERITY}algorithm", "sha256"),
            "hash_type": number("hashtype", 1),
            "data_block_size": number("blocksize", 4096),
            "hash_block_size": number("hashsize", 4096),
            "superblock": options.get(f"{_VERITY}no-superblock", "false") == "false",
        }
        if f"{_VERITY}salt" in options:
            tree["salt"] = self._octets(options[f"{_VERITY}salt"], f"{place}.options")
        if f"{_VERITY}hashoffset" in options:
            offset_bytes = number("hashoffset", 0)
            block_size = number("blocksize", 4096)
            if not block_size or offset_bytes % block_size:
                problem = f"{_VERITY}hashoffset is no multiple of the block size"
                raise self._error(f"{place}.options", problem)
            tree |= {"hash_offset_bytes": offset_bytes, "data_blocks": offset_bytes // block_size}
        return tree

    # --- values

    def parse(self, raw: bytes) -> Mapping[str, object]:
        """Return the object that has the containers, of JSON or of constants in Rego."""
        try:
            text = _as_json(raw.decode("utf-8"))
            constants = list(_CONSTANT.finditer(text))
            names = [each for each in constants if each[1] in ("containers", "policy_data")]
            if text.lstrip().startswith("{"):
                value, _ = _DECODER.raw_decode(text.lstrip())
            elif len(names) == 1:
                value, _ = _DECODER.raw_decode(text, names[0].end())
                value = {"containers": value} if names[0][1] == "containers" else value
            else:
                raise ValueError(f"it has {len(names)} constants containers or policy_data, not 1")
        except RecursionError:
            raise self._error("file", "it is nested too deeply") from None
        except ValueError as problem:  # UnicodeError and JSONDecodeError are such
            raise self._error("file", str(problem)) from None
        if not isinstance(value, dict):
            raise self._error("file", "it is no object")
        rest = {each[1] for each in constants if each not in names} | set(value) - {"containers"}
        if rest:
            self._left_out.append(", ".join(sorted(rest)))
        return value

    def members(
        self, value: Mapping[str, object], name: str, where: str = ""
    ) -> tuple[Mapping[str, object], ...]:
        """Return the objects of an array that a field is."""
        path = f"{where}.{name}" if where else name
        members = []
        for index, member in enumerate(self._items(value.get(name, []), path)):
            if not isinstance(member, dict):
                raise self._error(f"{path}[{index}]", "it is no object")
            members.append(member)
        return tuple(members)

    def _items(self, value: object, where: str) -> tuple[object, ...]:
        """Return what an array holds, also one as a map of numbers, as hcsshim's JSON has it."""
        if isinstance(value, dict) and isinstance(value.get("elements"), dict):
            elements = value["elements"]
            if sorted(elements) != sorted(map(str, range(len(elements)))):
                raise self._error(f"{where}.elements", "its names are not the numbers from 0")
            return tuple(elements[str(index)] for index in range(len(elements)))
        if not isinstance(value, list):
            raise self._error(where, "it is no array")
        return tuple(value)

    def _octets(self, value: object, where: str) -> bytes:
        if isinstance(value, str) and re.fullmatch(r"([0-9a-fA-F]{2}){0,512}", value, re.ASCII):
            return bytes.fromhex(value)
        raise self._error(where, f"{str(value)[:64]!r} is no hexadecimal text")

    def _number(self, options: Mapping[str, str], name: str, place: str) -> int:
        if re.fullmatch(r"[0-9]{1,18}", options[name], re.ASCII):
            return int(options[name])
        raise self._error(f"{place}.options", f"{name}={options[name][:64]} is no number")

    def _error(self, where: str, problem: str) -> CallError:
        text = f"cannot import {self._name!r}: {where}: {problem}"
        return CallError("invalid", text, step="import", object=where)

    def _too_little(self, where: str, problem: str) -> CallError:
        return CallError(
            "unsupported",
            f"cannot import {self._name!r}: {where}: {problem}, and a policy has the whole hash "
            "tree of each layer",
            step="import",
            object=where,
            hint="put the layer into a pack (`guestctl pack add`) and give the pack by --pack",
        )


def _as_json(rego: str) -> str:
    """Return the text with what constants of Rego have beside JSON made JSON: without comments and
    without commas behind last members, and with raw strings as strings."""

    def token(match: re.Match[str]) -> str:
        if match[0] in ('"', "`"):
            raise ValueError(f"a string that begins at character {match.start()} does not end")
        if match[0].startswith("`"):
            return json.dumps(match[0][1:-1])
        return "" if match[0].startswith(("#", ",")) else match[0]

    return _LAST_COMMA.sub(token, _NOT_JSON.sub(token, rego))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name is there twice in one object")
    return members


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
