"""The document of a policy: typed records, and the one form of bytes that they are read from.

A policy is a JSON object in canonical form: UTF-8, names sorted by code points, no white space,
strings escaped only where JSON demands it, integers only. ``docs/policy.schema.json`` describes it.
What a policy does not allow is denied, so every default here allows nothing, or the least.

A layer is known by the whole tuple of its verity parameters, never by the id in a request: a root
digest alone does not say which file system is seen.
"""

import functools
from collections.abc import Collection, Mapping

from guestagent.api import METHODS
from guestagent.api.agent import EVENT_KINDS
from guestagent.api.checks import (
    MAX_BYTES,
    FieldError,
    check_choice,
    check_path,
    check_range,
    check_word,
)
from guestagent.api.devices import VERITY_PRESETS, WholeVerityTerms
from guestagent.api.layers import LAYER_FILESYSTEMS, MOUNT_OPTIONS, WHITEOUT_KINDS
from guestagent.api.overlays import DEVICE_EXISTING, SCRATCH_FILESYSTEMS, OverlayOptions
from guestagent.policy.table import CONSOLE_COMMANDS, LISTED_RULES, METHOD_RULES
from vsock.errors import CallError
from vsock.record import Record

__all__ = (
    "DOCUMENT_TYPE",
    "FEATURES",
    "MAX_POLICY_BYTES",
    "Chain",
    "DeviceRules",
    "ExactRequest",
    "ExposedEvents",
    "Exposure",
    "Inspection",
    "LayerTree",
    "NoScratch",
    "Policy",
    "PolicyLayer",
    "RunLimits",
    "ScratchOnDevice",
    "ScratchOnTmpfs",
    "ScratchOnVolume",
    "ScratchRule",
    "canonical_policy",
    "is_target",
    "read_policy",
)

#: Separates what is signed, or whose digest is compared, from every other kind of document.
DOCUMENT_TYPE = "guestagent.policy"
VERSION = 1
#: What a policy may name in ``requires``, so that an agent without it refuses the policy.
FEATURES: frozenset[str] = frozenset()
MAX_POLICY_BYTES = 1024 * 1024
_MAX_DEPTH = 16
_MAX_LAYERS, _MAX_CHAINS, _MAX_ITEMS = 4096, 1024, 1024
#: The last component of a target that stands for the id in the request.
_ID = "{id}"
#: Fields of an event that a policy may expose; the others number it and say its kind.
EVENT_FIELDS = (
    *("layer_id", "overlay_id", "pool_id", "volume_id", "device", "block", "detail"),
    "traceparent",
)
DEVICE_KINDS = ("pmem", "virtio-blk", "label", "scsi", "vmbus-scsi", "path")


def _check_words(name: str, words: tuple[str, ...], choices: Collection[str]) -> None:
    _check_distinct(name, words)
    for word in words:
        check_choice(name, word, choices)


def _check_distinct(name: str, words: tuple[str, ...]) -> None:
    if len(words) > _MAX_LAYERS:
        raise ValueError(f"{name} has {len(words)} entries, at most {_MAX_LAYERS}")
    if len(set(words)) != len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise ValueError(f"{name} has {twice[:64]!r} twice")


@functools.lru_cache(maxsize=64)
def _check_targets(targets: tuple[str, ...]) -> None:
    if not targets:
        raise ValueError("targets is empty")
    _check_distinct("targets", targets)
    for target in targets:
        parent, _, last = target.rpartition("/")
        check_path("targets", f"{parent}/id" if last == _ID else target)
        if target == "/":
            raise ValueError("targets has the root")


class LayerTree(WholeVerityTerms):
    """All that defines the hash tree of a layer, by an algorithm that proves something."""

    def check(self) -> None:
        super().check()
        if self.algorithm == "sha1":
            raise FieldError("algorithm", "sha1 is no proof any more")


class PolicyLayer(Record):
    """A layer that may be mounted. ``id`` names it in this document, and nowhere else.

    ``size_bytes``: the bytes that the mapping must have, or the device without one; None: any.
    ``whiteouts`` is what a request may say of them, as in ``layer.mount``. ``targets``: see
    ``is_target``. ``max_instances`` layers of this content may be mounted at the same time.
    """

    id: str
    verity: LayerTree
    filesystem: str
    size_bytes: int | None = None
    whiteouts: str | None = None
    targets: tuple[str, ...] = (f"/run/layers/{_ID}",)
    max_instances: int = 1

    def check(self) -> None:
        check_word("id", self.id)
        check_choice("filesystem", self.filesystem, LAYER_FILESYSTEMS)
        check_range("size_bytes", self.size_bytes, 512, MAX_BYTES)
        check_choice("whiteouts", self.whiteouts, WHITEOUT_KINDS)
        check_range("max_instances", self.max_instances, 1, 4096)
        _check_targets(self.targets)


class NoScratch(Record):
    """The overlay may be mounted read-only."""

    kind: str = "none"


class ScratchOnTmpfs(Record):
    kind: str = "tmpfs"
    max_bytes: int

    def check(self) -> None:
        check_range("max_bytes", self.max_bytes, 4096, MAX_BYTES)


class ScratchOnDevice(Record):
    """A scratch on a block device of at most ``max_bytes``.

    It must be ``encrypted`` unless that is false. ``existing``, ``shared`` and ``discard`` are what
    a request may ask for, as in ``overlay.mount``.
    """

    kind: str = "device"
    max_bytes: int = MAX_BYTES
    encrypted: bool = True
    filesystems: tuple[str, ...] = ("ext4",)
    existing: tuple[str, ...] = ("fresh", "refuse")
    shared: bool = False
    discard: bool = False

    def check(self) -> None:
        check_range("max_bytes", self.max_bytes, 4096, MAX_BYTES)
        _check_words("filesystems", self.filesystems, SCRATCH_FILESYSTEMS)
        _check_words("existing", self.existing, DEVICE_EXISTING)


class ScratchOnVolume(Record):
    """A scratch on a volume of at most ``max_bytes`` of one of ``pools``."""

    kind: str = "thin"
    pools: tuple[str, ...]
    max_bytes: int = MAX_BYTES
    encrypted: bool = True
    filesystems: tuple[str, ...] = ("ext4",)

    def check(self) -> None:
        check_range("max_bytes", self.max_bytes, 1024**2, MAX_BYTES)
        _check_words("filesystems", self.filesystems, SCRATCH_FILESYSTEMS)
        for pool_id in self.pools:
            check_word("pools", pool_id)


ScratchRule = NoScratch | ScratchOnTmpfs | ScratchOnDevice | ScratchOnVolume


class Chain(Record):
    """An overlay that may be mounted: exactly these ``layers`` (by their ids in this document,
    topmost first), exactly these ``options``, and one of these scratches.

    ``max_instances`` overlays of this chain may be mounted at the same time.
    """

    name: str
    layers: tuple[str, ...]
    options: OverlayOptions = OverlayOptions()
    targets: tuple[str, ...] = (f"/run/overlays/{_ID}",)
    scratch: tuple[ScratchRule, ...] = (NoScratch(),)
    max_instances: int = 1

    def check(self) -> None:
        check_word("name", self.name)
        check_range("length of layers", len(self.layers), 1, 500)
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers names a layer twice")
        _check_targets(self.targets)
        check_range("length of scratch", len(self.scratch), 1, _MAX_ITEMS)
        check_range("max_instances", self.max_instances, 1, 4096)


class DeviceRules(Record):
    """How the device of a layer may be named, and what else a mount of one may ask for.

    ``readonly_policies`` are those of ``layer.mount``; ``ignore``, which leaves a layer out, is
    never allowed. ``hash_device`` allows a hash tree on a device of its own.
    """

    kinds: tuple[str, ...] = ()
    readonly_policies: tuple[str, ...] = ("error", "read")
    hash_device: bool = False
    presets: tuple[str, ...] = ("default", "strict")
    signed: bool = False
    options: tuple[str, ...] = ("noexec", "noatime", "nodiratime")

    def check(self) -> None:
        _check_words("kinds", self.kinds, DEVICE_KINDS)
        _check_words("readonly_policies", self.readonly_policies, ("error", "read", "write"))
        _check_words("presets", self.presets, VERITY_PRESETS)
        _check_words("options", self.options, MOUNT_OPTIONS)


class ExposedEvents(Record):
    """Which events the host is told of, and which of their fields. A ``detail`` that is not among
    ``fields`` is left empty."""

    kinds: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def check(self) -> None:
        _check_words("kinds", self.kinds, EVENT_KINDS)
        _check_words("fields", self.fields, EVENT_FIELDS)


class Inspection(Record):
    """What ``fs.*`` may look into: layers by their ids in this document, and overlays at all, whose
    upper directories hold what the guest has written."""

    layers: tuple[str, ...] = ()
    overlays: bool = False


class Exposure(Record):
    """What the host may see.

    ``methods`` lists what may be called besides what every policy answers and what ``exact`` has.
    ``log``: nothing, lines with their codes and no free text, or all. ``crashes``: nothing, how
    many, or all. ``metrics`` are names. ``errors``: the text of an error, or its code alone.
    ``console`` are commands; ``shell`` is a second permission besides ``sh``. ``dm``: nothing, the
    names of devices, or tables too, never those with keys.
    """

    methods: tuple[str, ...] = ()
    events: ExposedEvents = ExposedEvents()
    log: str = "none"
    crashes: str = "none"
    metrics: tuple[str, ...] = ()
    errors: str = "codes"
    inspect: Inspection = Inspection()
    console: tuple[str, ...] = ()
    shell: bool = False
    dm: str = "none"

    def check(self) -> None:
        _check_distinct("methods", self.methods)
        for method in self.methods:
            if METHOD_RULES.get(method) not in LISTED_RULES:
                raise ValueError(f"methods: {method!r} is no method that a policy lists here")
        check_choice("log", self.log, ("none", "codes", "full"))
        check_choice("crashes", self.crashes, ("none", "count", "full"))
        _check_distinct("metrics", self.metrics)
        check_choice("errors", self.errors, ("codes", "text"))
        _check_words("console", self.console, CONSOLE_COMMANDS)
        if self.shell and "sh" not in self.console:
            raise ValueError("shell needs the console command sh")
        check_choice("dm", self.dm, ("none", "names", "tables"))


class RunLimits(Record):
    """How the agent may be ended, and how much it may be asked for.

    ``force`` allows it in requests that unmount, and in ``agent.shutdown``. Ending the agent alone,
    so that another could take its place without a policy, is never allowed.
    """

    shutdown: tuple[str, ...] = ("poweroff",)
    force: bool = False
    max_deadline_ms: int = 600_000
    max_layers: int = 500
    max_overlays: int = 64

    def check(self) -> None:
        _check_words("shutdown", self.shutdown, ("poweroff", "reboot"))
        check_range("max_deadline_ms", self.max_deadline_ms, 1, 86_400_000)
        check_range("max_layers", self.max_layers, 0, _MAX_LAYERS)
        check_range("max_overlays", self.max_overlays, 0, _MAX_CHAINS)


class ExactRequest(Record):
    """A request that is allowed as it is here and in no other form: of the network, of shares,
    pools, volumes, private /dev trees, and ``device.remove``. ``params`` may leave out defaults."""

    method: str
    params: Mapping[str, object] = {}

    def check(self) -> None:
        if METHOD_RULES.get(self.method) != "exact":
            raise ValueError(f"method: {self.method!r} is no method that is allowed word for word")
        self.request()

    def request(self) -> Record:
        """Return the typed request.

        Raises:
            ValueError: it is not valid.
        """
        try:
            return METHODS[self.method].from_wire(self.params)
        except CallError as error:
            raise ValueError(error.message) from None


class Policy(Record):
    """``svn`` is the security version: a later, stricter policy has a higher one. ``requires``
    names what an agent must know to hold the policy."""

    type: str = DOCUMENT_TYPE
    version: int = VERSION
    name: str
    svn: int
    requires: tuple[str, ...] = ()
    layers: tuple[PolicyLayer, ...] = ()
    chains: tuple[Chain, ...] = ()
    devices: DeviceRules = DeviceRules()
    exact: tuple[ExactRequest, ...] = ()
    expose: Exposure = Exposure()
    run: RunLimits = RunLimits()

    def check(self) -> None:
        if self.type != DOCUMENT_TYPE:
            raise ValueError(f"type must be {DOCUMENT_TYPE}, got {self.type!r}")
        check_word("name", self.name)
        check_range("svn", self.svn, 0, (1 << 63) - 1)
        check_range("length of layers", len(self.layers), 0, _MAX_LAYERS)
        check_range("length of chains", len(self.chains), 0, _MAX_CHAINS)
        check_range("length of exact", len(self.exact), 0, _MAX_ITEMS)
        layers = {layer.id: layer for layer in self.layers}
        _check_distinct("layers", tuple(layer.id for layer in self.layers))
        _check_distinct("chains", tuple(chain.name for chain in self.chains))
        if len({layer.verity for layer in self.layers}) != len(self.layers):
            raise ValueError("layers has the same hash tree twice")
        for chain in self.chains:
            for layer_id in chain.layers:
                self._check_member(chain, layers.get(layer_id), layer_id)
        for layer_id in self.expose.inspect.layers:
            if layer_id not in layers:
                raise ValueError(f"expose.inspect.layers: there is no layer {layer_id!r}")

    def _check_member(self, chain: Chain, layer: PolicyLayer | None, layer_id: str) -> None:
        where = f"chain {chain.name!r}"
        if layer is None:
            raise ValueError(f"{where}: there is no layer {layer_id!r}")
        hidden = ("both", "trusted" if chain.options.userxattr else "user")
        if layer.whiteouts in hidden:
            raise ValueError(f"{where} does not see all whiteouts of layer {layer_id!r}")


def is_target(rules: Collection[str], target: str, name: str) -> bool:
    """Say whether ``target`` is one of ``rules``: a path, or a path whose last component ``{id}``
    stands for the id of the layer or overlay, ``name``."""
    parent, _, last = target.rpartition("/")
    return target in rules or (last == name and f"{parent}/{_ID}" in rules)


def canonical_policy(document: Mapping[str, object]) -> bytes:
    """Return the one form of a policy's bytes, of its JSON object."""
    import json

    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8")


def read_policy(raw: bytes) -> Policy:
    """Read the bytes of a policy.

    Raises:
        CallError: ``invalid``, they are no policy in canonical form; ``unsupported``, a policy of
            another version or one that requires what this agent does not know.
    """
    if len(raw) > MAX_POLICY_BYTES:
        raise _unread(f"it has {len(raw)} bytes, at most {MAX_POLICY_BYTES}")
    document = _parse(raw)
    if document.get("type") != DOCUMENT_TYPE:
        raise _unread(f"its type is not {DOCUMENT_TYPE}")
    if document.get("version") != VERSION or type(document["version"]) is not int:
        raise _unread(f"its version is not {VERSION}", code="unsupported")
    policy = Policy.from_wire(document, "policy")
    unknown = sorted(set(policy.requires) - FEATURES)
    if unknown:
        raise _unread(f"it requires {unknown[0]!r}, which this agent does not know", "unsupported")
    return policy


def _parse(raw: bytes) -> dict[str, object]:
    import json

    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_no_integer,
            parse_constant=_no_integer,
        )
        _check_depth(document, 0)
        if not isinstance(document, dict):
            raise ValueError("it is no object")
        canonical = canonical_policy(document)
    except RecursionError:
        raise _unread("it is nested too deeply") from None
    except ValueError as problem:  # UnicodeError and JSONDecodeError are such
        raise _unread(str(problem)) from None
    if canonical != raw:
        raise _unread("its bytes are not in canonical form")
    return document


def _check_depth(value: object, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {_MAX_DEPTH}")
    members = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list)):
        for member in members:  # type: ignore[attr-defined]  # of one of the two
            if isinstance(member, (dict, list)):
                _check_depth(member, depth + 1)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name is there twice in one object")
    return members


def _no_integer(text: str) -> object:
    raise ValueError(f"the number {text[:32]} is no integer")


def _unread(problem: str, code: str = "invalid") -> CallError:
    return CallError(code, f"the policy cannot be used: {problem}", step="policy", object="policy")
