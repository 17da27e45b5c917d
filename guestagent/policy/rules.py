"""The rules of a policy over what is asked: pure, and total over everything that is typed.

An action holds what is resolved, as far as it is known when it is judged: what a request says
before anything is done, and what was read of the device before the first dm device is made.
"""

from collections.abc import Mapping

from guestagent.api import DirectoryScratch, LayerSpec, OverlaySpec, ThinScratch, TmpfsScratch
from guestagent.api.devices import TREE_FIELDS, VerityTerms
from guestagent.api.overlays import Scratch
from guestagent.policy.document import (
    Chain,
    NoScratch,
    Policy,
    PolicyLayer,
    ScratchOnDevice,
    ScratchOnTmpfs,
    ScratchOnVolume,
    ScratchRule,
    is_target,
)
from guestagent.policy.table import LISTED_RULES, METHOD_RULES
from vsock.record import Record

__all__ = (
    "Action",
    "BatchAction",
    "ConsoleAction",
    "LayerAction",
    "OverlayAction",
    "RequestAction",
    "Rules",
    "State",
    "tree_of",
)

_TREE = (*TREE_FIELDS, "root_digest", "hash_offset_bytes", "superblock")
#: How the nodes of disks that the host has attached are called: their content the host knows.
_RAW_DISKS = ("pmem", "sd", "vd")


class LayerAction(Record):
    """Make the devices and the mount of a layer.

    ``verity`` is what the request says, or what it and the superblock said together.
    ``size_bytes`` are those of the mapping or of the device, None where that is not known yet.
    """

    spec: LayerSpec
    verity: VerityTerms | None
    size_bytes: int | None = None


class OverlayAction(Record):
    """Mount an overlay. ``layers`` are those that it names, in its order, as they are mounted.

    ``scratch_bytes`` is the size of the device of the scratch, None where that is not known yet.
    """

    spec: OverlaySpec
    layers: tuple[LayerAction, ...]
    scratch_bytes: int | None = None


class BatchAction(Record):
    """Mount layers, and an overlay of them or of layers that are there."""

    layers: tuple[LayerAction, ...]
    overlay: OverlaySpec | None


class RequestAction(Record):
    """Answer a request, in so far as its method and its parameters alone decide."""

    method: str
    request: Record


class ConsoleAction(Record):
    """Run a command of the console."""

    command: str


Action = LayerAction | OverlayAction | BatchAction | RequestAction | ConsoleAction


class State(Record):
    """What is mounted: layers by their ids, and overlays by theirs."""

    layers: Mapping[str, LayerAction] = {}
    overlays: Mapping[str, OverlaySpec] = {}


def tree_of(verity: VerityTerms | None) -> tuple[object, ...] | None:
    """Return the whole tuple of what defines a hash tree; None: a part of it is not said."""
    if verity is None:
        return None
    tree = tuple(getattr(verity, name) for name in _TREE)
    return None if None in tree else tree


class Rules:
    """A policy, with its layers by their hash trees."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._layers = {tree_of(layer.verity): layer for layer in policy.layers}
        self._exact = tuple(exact.request() for exact in policy.exact)
        self._methods = frozenset(policy.expose.methods)

    def find_denial(self, state: State, action: Action) -> tuple[str, str] | None:
        """Return the rule that denies ``action`` and the reason, for the guest's own log; None: it
        is allowed."""
        match action:
            case LayerAction():
                return self._layer(state, action)
            case OverlayAction():
                return self._overlay(state, action)
            case BatchAction():
                return self._batch(state, action)
            case RequestAction():
                return self._request(state, action)
            case ConsoleAction():
                return self._console(action)

    def layer_id(self, layer: LayerAction | None) -> str | None:
        """Return the policy's id of a layer's content; None: it is no layer of the policy."""
        known = None if layer is None else self._known(layer)
        return None if known is None else known.id

    def _known(self, layer: LayerAction) -> PolicyLayer | None:
        tree = tree_of(layer.verity)
        return None if tree is None else self._layers.get(tree)

    # --- layers

    def _layer(self, state: State, action: LayerAction) -> tuple[str, str] | None:
        spec, known = action.spec, self._known(action)
        if spec.verity is None:
            return "layers.verity", "the layer is not verified"
        if known is None:
            return "layers.tree", f"no layer has the tree {tree_of(action.verity)}"
        if spec.verity.allow_sha1:
            return "layers.algorithm", "the request would take sha1"
        if spec.filesystem != known.filesystem:
            return "layers.filesystem", f"{spec.filesystem} is not {known.filesystem}"
        if None not in (action.size_bytes, known.size_bytes) and (
            action.size_bytes != known.size_bytes
        ):
            return "layers.size_bytes", f"{action.size_bytes} is not {known.size_bytes}"
        if spec.whiteouts not in (None, known.whiteouts):
            return "layers.whiteouts", f"{spec.whiteouts} is not {known.whiteouts}"
        if not is_target(known.targets, spec.mount_point, spec.layer_id):
            return "layers.targets", f"{spec.mount_point} is no target of {known.id}"
        denial = self._devices(spec)
        if denial is not None:
            return denial
        others = [other for name, other in state.layers.items() if name != spec.layer_id]
        same = (
            other
            for other in others
            if other.verity is not None
            and other.verity.root_digest == known.verity.root_digest
            and self._known(other) is known
        )
        if sum(1 for _ in same) >= known.max_instances:
            return "layers.max_instances", f"{known.id} is mounted {known.max_instances} times"
        if len(others) >= self.policy.run.max_layers:
            return "run.max_layers", f"{len(others)} layers are mounted"
        return None

    def _devices(self, spec: LayerSpec) -> tuple[str, str] | None:
        rules, verity = self.policy.devices, spec.verity
        if spec.device.kind not in rules.kinds:
            return "devices.kinds", f"a device of the kind {spec.device.kind}"
        if spec.readonly_policy not in rules.readonly_policies:
            return "devices.readonly_policies", spec.readonly_policy
        if not set(rules.options).issuperset(spec.options):
            return "devices.options", ",".join(spec.options)
        if verity is None:
            return "layers.verity", "the layer is not verified"
        if verity.preset not in rules.presets:
            return "devices.presets", verity.preset
        if rules.signed and verity.signature is None:
            return "devices.signed", "the root digest has no signature"
        if verity.hash_device is not None and (
            not rules.hash_device or verity.hash_device.kind not in rules.kinds
        ):
            return "devices.hash_device", f"a hash device of the kind {verity.hash_device.kind}"
        return None

    # --- overlays

    def _overlay(self, state: State, action: OverlayAction) -> tuple[str, str] | None:
        spec = action.spec
        if tuple(layer.spec.layer_id for layer in action.layers) != spec.layers:
            return "chains.layers", "a layer is not mounted"
        names = tuple(self.layer_id(layer) for layer in action.layers)
        chains = [chain for chain in self.policy.chains if chain.layers == names]
        if not chains:
            return "chains.layers", f"no chain is {names}"
        others = {name: other for name, other in state.overlays.items() if name != spec.overlay_id}
        if len(others) >= self.policy.run.max_overlays:
            return "run.max_overlays", f"{len(others)} overlays are mounted"
        same = sum(self._names(state, other) == names for other in others.values())
        denials = [self._chain(chain, action, same) for chain in chains]
        return None if None in denials else denials[0]

    def _names(self, state: State, overlay: OverlaySpec) -> tuple[str | None, ...]:
        return tuple(self.layer_id(state.layers.get(layer_id)) for layer_id in overlay.layers)

    def _chain(self, chain: Chain, action: OverlayAction, same: int) -> tuple[str, str] | None:
        spec = action.spec
        if spec.options != chain.options:
            return "chains.options", f"{spec.options} is not {chain.options}"
        if not is_target(chain.targets, spec.mount_point, spec.overlay_id):
            return "chains.targets", f"{spec.mount_point} is no target of {chain.name}"
        fits = (self._fits(rule, spec.scratch, action.scratch_bytes) for rule in chain.scratch)
        if not any(fits):
            return "chains.scratch", f"{spec.scratch} is no scratch of {chain.name}"
        if same >= chain.max_instances:
            return "chains.max_instances", f"{chain.name} is mounted {same} times"
        return None

    def _fits(self, rule: ScratchRule, scratch: Scratch | None, device_bytes: int | None) -> bool:
        """Say whether a rule allows a scratch. Directories no rule allows."""
        if scratch is None:
            return isinstance(rule, NoScratch)
        if isinstance(scratch, DirectoryScratch):
            return False
        if isinstance(scratch, TmpfsScratch):
            return isinstance(rule, ScratchOnTmpfs) and scratch.size_bytes <= rule.max_bytes
        if isinstance(scratch, ThinScratch):
            return (
                isinstance(rule, ScratchOnVolume)
                and scratch.pool_id in rule.pools
                and scratch.size_bytes <= rule.max_bytes
                and scratch.filesystem in rule.filesystems
                and (scratch.encrypted or not rule.encrypted)
            )
        return (
            isinstance(rule, ScratchOnDevice)
            and scratch.device.kind in self.policy.devices.kinds
            and (device_bytes is None or device_bytes <= rule.max_bytes)
            and scratch.filesystem in rule.filesystems
            and scratch.existing in rule.existing
            and (scratch.encrypted or not rule.encrypted)
            and (rule.shared or not scratch.shared)
            and (rule.discard or not scratch.discard)
        )

    def _batch(self, state: State, action: BatchAction) -> tuple[str, str] | None:
        layers = dict(state.layers)
        for layer in action.layers:
            denial = self._layer(state.replace(layers=layers), layer)
            if denial is not None:
                return denial
            layers[layer.spec.layer_id] = layer
        if action.overlay is None:
            return None
        members = (layers.get(layer_id) for layer_id in action.overlay.layers)
        found = tuple(layer for layer in members if layer is not None)
        overlay = OverlayAction(spec=action.overlay, layers=found)
        return self._overlay(state.replace(layers=layers), overlay)

    # --- requests and commands

    def _request(self, state: State, action: RequestAction) -> tuple[str, str] | None:
        method, request, expose = action.method, action.request, self.policy.expose
        rule = METHOD_RULES.get(method)
        if rule is None or (rule in LISTED_RULES and method not in self._methods):
            return "expose.methods", "the method is not listed"
        if getattr(request, "force", False) and not self.policy.run.force:
            return "run.force", "force is not allowed"
        if rule == "shutdown" and getattr(request, "mode", None) not in self.policy.run.shutdown:
            return "run.shutdown", f"mode {getattr(request, 'mode', None)}"
        if rule == "exact" and request not in self._exact:
            return "exact", "the policy does not have the request word for word"
        if rule == "dm" and expose.dm != "tables" and (expose.dm, method) != ("names", "dm.list"):
            return "expose.dm", f"{expose.dm} is exposed"
        if rule == "devices" and not _is_raw_disk(getattr(request, "device", None)):
            return "expose.devices", "the device could be one that decrypts"
        if rule == "place" and not self._may_inspect(state, request):
            return "expose.inspect", "the place is not exposed"
        return None

    def _may_inspect(self, state: State, request: Record) -> bool:
        layer_id = getattr(request, "layer_id", None)
        if getattr(request, "overlay_id", None) is not None or layer_id is None:
            return layer_id is None and self.policy.expose.inspect.overlays
        known = self.layer_id(state.layers.get(layer_id))
        return known is not None and known in self.policy.expose.inspect.layers

    def _console(self, action: ConsoleAction) -> tuple[str, str] | None:
        expose = self.policy.expose
        if action.command not in expose.console:
            return "expose.console", f"the command {action.command!r} is not listed"
        if action.command == "sh" and not expose.shell:
            return "expose.shell", "a shell is not allowed"
        return None


def _is_raw_disk(device: object) -> bool:
    """Say whether a request names no device, or a disk as the host has attached it."""
    if device is None:
        return True
    name = str(device).removeprefix("/dev/")
    return name.isalnum() and name.startswith(_RAW_DISKS)
