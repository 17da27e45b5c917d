"""What is live: layers, overlays, who uses whom, and which names and targets are spoken for.

The inventory is memory only. It is filled by requests and by recovery, and guarded by one mutex
that is never held across a system call.
"""

import threading
from collections.abc import Callable, Container, Mapping

from guestagent.api import LayerSpec, OverlaySpec
from guestagent.api.layers import Holder
from guestagent.engine.claims import Owner, PathClaims, SharedRanges, parent_of
from guestagent.engine.plan import LayerPlan, Source, dm_uuid
from vsock.errors import CallError
from vsock.record import Record

__all__ = (
    "Inventory",
    "LayerClaim",
    "LayerTraces",
    "LiveLayer",
    "LiveOverlay",
    "LiveScratch",
    "Owner",
    "refuse_other_spec",
)


class LayerTraces(Record):
    """What there may be of a layer, whole or not, and so what its undoing has to look for.

    ``dm`` is the uuid of each of its dm devices by name, topmost first; ``dev`` (MAJOR:MINOR) the
    device below them. ``created`` is as in ``LiveLayer``.
    """

    layer_id: str
    mount_point: str
    dev: str
    dm: Mapping[str, str]
    created: tuple[str, ...]


class LayerClaim(Record):
    """A layer that is to be: its device found, its range checked, its names and target reserved.

    ``names`` are those of the linear and the verity device, should it have them.
    """

    spec: LayerSpec
    source: Source
    names: tuple[str, str]
    created: tuple[str, ...]

    @property
    def traces(self) -> LayerTraces:
        spec = self.spec
        linear, verity = self.names
        dm = {}
        if spec.verity is not None:
            dm[verity] = dm_uuid("verity", spec.layer_id)
        if spec.mapping is not None:
            dm[linear] = dm_uuid("linear", spec.layer_id)
        return LayerTraces(
            layer_id=spec.layer_id,
            mount_point=spec.mount_point,
            dev=self.source.dev,
            dm=dm,
            created=self.created,
        )


class LiveLayer(Record):
    """A mounted layer. ``dev`` (MAJOR:MINOR) is what is mounted, empty until it is known.

    ``created`` are the directories on the way to its target that the agent has made, for this or
    for another, outermost first.
    """

    spec: LayerSpec
    source: Source
    plan: LayerPlan
    created: tuple[str, ...]
    timings_ms: dict[str, float]
    dev: str = ""
    state: str = "mounted"

    @property
    def traces(self) -> LayerTraces:
        steps = (step for step in (self.plan.verity, self.plan.linear) if step is not None)
        return LayerTraces(
            layer_id=self.spec.layer_id,
            mount_point=self.spec.mount_point,
            dev=self.source.dev,
            dm={step.name: step.uuid for step in steps},
            created=self.created,
        )


class LiveScratch(Record):
    """Where an overlay's changes go: ``path`` holds the directories ``upper`` and ``work``.

    ``is_mount`` says that a file system was mounted at ``path`` for this, which goes with it;
    ``mount_dev`` is that file system's number and ``dev`` that of the device, if there is one.
    ``created`` are the directories that were made, outermost first.
    """

    kind: str
    path: str
    is_mount: bool
    dev: str
    filesystem: str
    formatted: bool
    created: tuple[str, ...]
    mount_dev: str = ""

    @property
    def key(self) -> str:
        """What two overlays must not share."""
        return self.dev or self.path


class LiveOverlay(Record):
    """A mounted overlay. ``links`` is the directory of short names for its layers, if any; ``dev``
    and ``created`` are as a layer's."""

    spec: OverlaySpec
    lowerdirs: tuple[str, ...]
    method: str
    links: str | None
    scratch: LiveScratch | None
    created: tuple[str, ...]
    timings_ms: dict[str, float] = {}
    dev: str = ""

    @property
    def scratch_path(self) -> str | None:
        return None if self.scratch is None else self.scratch.path


def refuse_other_spec(kind: str, name: str, wanted: Record, has: Record) -> None:
    """See that what is there under an id is what is asked for.

    Raises:
        CallError: ``conflict``, naming the fields that differ.
    """
    asked, there = wanted.as_dict(), has.as_dict()
    differing = [field for field in asked if asked[field] != there[field]]
    if differing:
        raise CallError(
            "conflict",
            f"{kind} {name!r} is mounted with another {', '.join(differing)}",
            step="claim",
            object=name,
            hint=f"unmount it first, or use another {kind}_id",
        )


class Inventory:
    """Every method is atomic."""

    def __init__(self, reserved: str) -> None:
        """``reserved`` is the agent's own directory, where nothing may be mounted."""
        self._lock = threading.Lock()
        self._layers: dict[str, LiveLayer] = {}
        self._overlays: dict[str, LiveOverlay] = {}
        #: Of each device (MAJOR:MINOR) that layers are on.
        self._ranges: dict[str, SharedRanges] = {}
        self._targets = PathClaims()
        self._targets.add(reserved, ("agent", "state"))
        self._directories: dict[Owner, tuple[str, ...]] = {}
        #: How many owners need a directory that the agent made.
        self._made: dict[str, int] = {}
        self._dm_names: dict[str, str] = {}
        self._scratch = PathClaims()
        #: Of each device (MAJOR:MINOR) that layers keep read-only: whether the agent made it so.
        self._readonly: dict[str, tuple[bool, frozenset[str]]] = {}
        self._problems: dict[str, str] = {}

    # --- layers and overlays

    def layer(self, layer_id: str) -> LiveLayer | None:
        with self._lock:
            return self._layers.get(layer_id)

    def layers(self) -> tuple[LiveLayer, ...]:
        with self._lock:
            return tuple(self._layers.values())

    def overlay(self, overlay_id: str) -> LiveOverlay | None:
        with self._lock:
            return self._overlays.get(overlay_id)

    def overlays(self) -> tuple[LiveOverlay, ...]:
        with self._lock:
            return tuple(self._overlays.values())

    def add_layer(self, live: LiveLayer) -> None:
        layer_id = live.spec.layer_id
        with self._lock:
            self._drop_range(layer_id)
            self._layers[layer_id] = live
            self._ranges.setdefault(live.source.dev, SharedRanges()).add(
                live.source.range, layer_id
            )

    def set_layer_state(self, layer_id: str, state: str) -> bool:
        """Note what became of a layer; return whether that is news."""
        with self._lock:
            live = self._layers.get(layer_id)
            if live is None or live.state == state:
                return False
            self._layers[layer_id] = live.replace(state=state)
            return True

    def add_overlay(self, live: LiveOverlay) -> None:
        with self._lock:
            self._overlays[live.spec.overlay_id] = live

    def drop_layer(self, layer_id: str) -> None:
        with self._lock:
            self._drop_range(layer_id)
            self._layers.pop(layer_id, None)

    def _drop_range(self, layer_id: str) -> None:
        live = self._layers.get(layer_id)
        if live is None:
            return
        ranges = self._ranges[live.source.dev]
        ranges.drop(live.source.range, layer_id)
        if not ranges:
            del self._ranges[live.source.dev]

    def drop_overlay(self, overlay_id: str) -> None:
        with self._lock:
            self._overlays.pop(overlay_id, None)

    def users_of(self, layer_id: str) -> tuple[str, ...]:
        """Return the ids of the overlays that a layer is part of."""
        with self._lock:
            return tuple(
                overlay_id
                for overlay_id, live in self._overlays.items()
                if layer_id in live.spec.layers
            )

    def overlapping(self, live: LiveLayer) -> tuple[str, ...]:
        """Return the other layers whose ranges share bytes with that of this one."""
        layer_id = live.spec.layer_id
        with self._lock:
            ranges = self._ranges.get(live.source.dev)
            sharing = ranges.sharing(live.source.range) if ranges is not None else ()
            return tuple(other_id for other_id in sharing if other_id != layer_id)

    def layers_on(self, dev: str) -> tuple[str, ...]:
        """Return the layers whose data or hash tree is on a device (MAJOR:MINOR)."""
        with self._lock:
            return tuple(
                layer_id
                for layer_id, live in self._layers.items()
                if dev in [device.dev for device in live.source.devices]
            )

    # --- devices that are read-only because layers are on them

    def is_kept_readonly(self, dev: str) -> bool:
        with self._lock:
            return dev in self._readonly

    def keep_readonly(self, dev: str, layer_id: str, was_writable: bool) -> bool:
        """Note that a layer needs a device (MAJOR:MINOR) read-only. Return whether the agent made
        it so, for this layer or for an earlier one."""
        with self._lock:
            made, layers = self._readonly.get(dev, (False, frozenset()))
            self._readonly[dev] = (made or was_writable, layers | {layer_id})
            return made or was_writable

    def release_readonly(self, dev: str, layer_id: str) -> bool:
        """Note that a layer does not need a device any more. Return whether it was the last, and
        the agent made the device read-only."""
        with self._lock:
            made, layers = self._readonly.get(dev, (False, frozenset()))
            layers -= {layer_id}
            if layers:
                self._readonly[dev] = (made, layers)
                return False
            return self._readonly.pop(dev, None) is not None and made

    # --- claims

    def _refuse_taken(self, what: str, path: str) -> None:
        for claims, use in ((self._targets, "target"), (self._scratch, "scratch")):
            taken = claims.conflicting_path(path)
            if taken is not None:
                other, (kind, name) = taken
                raise _taken(what, path, other, f"the {use} of {kind} {name!r}")

    def claim_target(self, target: str, owner: Owner) -> None:
        """Reserve a mount point; it may lie neither on, in nor above another's, nor a scratch.

        Raises:
            CallError: ``conflict``, naming the other.
        """
        with self._lock:
            self._refuse_taken("target", target)
            self._targets.add(target, owner)

    def release_target(self, target: str) -> None:
        with self._lock:
            self._targets.drop(target)

    def claim_directories(self, owner: Owner, target: str, missing: Container[str]) -> list[str]:
        """Note which directories on the way to ``target`` go when nobody needs them any more.

        Those are the ``missing`` ones, which the owner will make, and those that the agent made
        for others: whoever of them is the last takes the directory away.
        """
        with self._lock:
            claimed, path = [], target
            while path:
                if path in missing or path in self._made:
                    claimed.append(path)
                path = parent_of(path)
            claimed.reverse()
            self._hold_directories(owner, tuple(claimed))
            return claimed

    def hold_directories(self, owner: Owner, paths: tuple[str, ...]) -> None:
        """Note the directories that an adopted layer or overlay has."""
        with self._lock:
            self._hold_directories(owner, paths)

    def _hold_directories(self, owner: Owner, paths: tuple[str, ...]) -> None:
        self._drop_directories(owner)
        self._directories[owner] = paths
        for path in paths:
            self._made[path] = self._made.get(path, 0) + 1

    def _drop_directories(self, owner: Owner) -> None:
        for path in self._directories.pop(owner, ()):
            self._made[path] -= 1
            if not self._made[path]:
                del self._made[path]

    def release_directories(self, owner: Owner) -> None:
        with self._lock:
            self._drop_directories(owner)

    def claim_dm_names(
        self, layer_id: str, preferred: tuple[str, str], unique: Callable[[], tuple[str, str]]
    ) -> tuple[str, str]:
        """Reserve a pair of dm names: the preferred ones, or, where another layer has one of them,
        what ``unique`` returns."""
        with self._lock:
            taken = any(self._dm_names.get(name, layer_id) != layer_id for name in preferred)
            names = unique() if taken else preferred
            for name in names:
                self._dm_names[name] = layer_id
            return names

    def hold_dm_names(self, layer_id: str, names: tuple[str, ...]) -> None:
        """Note the names that an adopted layer has."""
        with self._lock:
            for name in names:
                self._dm_names[name] = layer_id

    def release_dm_names(self, layer_id: str) -> None:
        with self._lock:
            for name in [name for name, owner in self._dm_names.items() if owner == layer_id]:
                del self._dm_names[name]

    def claim_scratch(self, key: str, overlay_id: str) -> None:
        """Reserve a scratch device (MAJOR:MINOR) or directory.

        A directory may neither nest with another's nor with the target of anything.

        Raises:
            CallError: ``conflict``, naming the other.
        """
        with self._lock:
            self._refuse_taken("scratch", key)
            self._scratch.add(key, ("overlay", overlay_id))

    def release_scratch(self, key: str) -> None:
        with self._lock:
            self._scratch.drop(key)

    def scratch_owner(self, key: str) -> str | None:
        """Return the overlay whose scratch a device (MAJOR:MINOR) or directory is."""
        with self._lock:
            owner = self._scratch.get(key)
            return None if owner is None else owner[1]

    # --- problems

    def note_problem(self, key: str, text: str) -> None:
        """Remember something that is not as it should be; ``agent.status`` shows it."""
        with self._lock:
            self._problems[key] = text

    def settle_problem(self, key: str) -> None:
        """Forget a problem that is none any more."""
        with self._lock:
            self._problems.pop(key, None)

    def problems(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._problems.values())

    def holders_of_layer(self, layer_id: str) -> tuple[Holder, ...]:
        """Return the overlays that keep a layer busy, as holders."""
        return tuple(
            Holder(kind="overlay", name=overlay_id, detail="uses the layer")
            for overlay_id in self.users_of(layer_id)
        )


def _taken(what: str, path: str, other: str, whose: str) -> CallError:
    how = "is" if path == other else "lies in or above"
    return CallError(
        "conflict", f"{what} {path!r} {how} {other!r}, {whose}", step="claim", object=path
    )
