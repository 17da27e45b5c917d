"""The mounted layers and overlays, and the targets, dm names and scratches that are reserved.

The inventory is memory only. Requests and recovery fill it. One mutex guards it, which is held
across no system call but the look for the directories of a target.
"""

import threading
from collections.abc import Callable, Mapping

from guestagent.api import LayerSpec, OverlaySpec
from guestagent.api.layers import Holder
from guestagent.engine.claims import Owner, PathClaims, parent_of
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
    "Reservation",
    "ScratchDisk",
    "refuse_other_spec",
)


class Reservation(Record):
    """What a layer or an overlay has to itself: its target and, for a layer, the names of its
    linear and its verity device.

    ``directories`` are those on the way to the target that go with the last that needs them,
    outermost first: missing ones, and those that the agent has made for others.
    """

    target: str
    directories: tuple[str, ...] = ()
    dm_names: tuple[str, ...] = ()


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
    """A layer that is to be mounted: its device found, its range checked, its names reserved."""

    spec: LayerSpec
    source: Source
    reservation: Reservation
    uuid_prefix: str = "guestagent-"
    #: Its policy leaves it out; nothing is reserved then.
    is_ignored: bool = False

    @property
    def traces(self) -> LayerTraces:
        spec = self.spec
        linear, verity = self.reservation.dm_names
        dm = {}
        if spec.verity is not None:
            dm[verity] = dm_uuid("verity", spec.layer_id, self.uuid_prefix)
        if spec.mapping is not None:
            dm[linear] = dm_uuid("linear", spec.layer_id, self.uuid_prefix)
        return LayerTraces(
            layer_id=spec.layer_id,
            mount_point=spec.mount_point,
            dev=self.source.dev,
            dm=dm,
            created=self.reservation.directories,
        )


class LiveLayer(Record):
    """A mounted layer. ``dev`` (MAJOR:MINOR) is what is mounted and ``mount_id`` the mount itself;
    both are unknown before.

    ``created`` are the directories on the way to its target that the agent has made, for this or
    for another, outermost first.
    """

    spec: LayerSpec
    source: Source
    plan: LayerPlan
    created: tuple[str, ...]
    timings_ms: dict[str, float]
    dev: str = ""
    mount_id: int = 0
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


class ScratchDisk(Record):
    """A device whose file system is mounted for the scratches of one overlay or, ``shared``, more;
    also the volume under an encrypted scratch.

    ``mount_dev`` is the file system at ``mount_point``, ``dev`` the device (MAJOR:MINOR): they
    differ where ``crypt`` names a dm device over it. ``created`` is as in ``LiveScratch``.
    """

    dev: str
    filesystem: str
    formatted: bool
    shared: bool
    discard: bool
    mount_point: str
    created: tuple[str, ...]
    crypt: str = ""
    mount_dev: str = ""


class LiveScratch(Record):
    """Where an overlay's changes go: ``path`` holds the directories ``upper`` and ``work``.

    ``mount_dev`` is the number of a tmpfs at ``path``, for which ``created`` were made, outermost
    first. ``disk`` is what the scratch is on, if that is a device.
    """

    kind: str
    path: str
    filesystem: str
    created: tuple[str, ...] = ()
    mount_dev: str = ""
    disk: ScratchDisk | None = None

    @property
    def key(self) -> str:
        """What two overlays must not share, but for a shared disk."""
        return self.disk.dev if self.disk else self.path

    @property
    def mount(self) -> tuple[str, str] | None:
        """The mount point and the number of the file system that the agent mounted for this."""
        at = self.disk
        path, dev = (at.mount_point, at.mount_dev) if at else (self.path, self.mount_dev)
        return (path, dev) if dev else None


class LiveOverlay(Record):
    """A mounted overlay. ``links`` is the directory of short names for its layers, if any; ``dev``,
    ``mount_id`` and ``created`` are as a layer's."""

    spec: OverlaySpec
    lowerdirs: tuple[str, ...]
    method: str
    links: str | None
    scratch: LiveScratch | None
    created: tuple[str, ...]
    timings_ms: dict[str, float] = {}
    dev: str = ""
    mount_id: int = 0
    state: str = "mounted"

    @property
    def scratch_path(self) -> str | None:
        return None if self.scratch is None else self.scratch.path


def refuse_other_spec(
    kind: str, name: str, wanted: Record, has: Record, *, state: str = "mounted"
) -> None:
    """See that what is there under an id is what is asked for.

    Raises:
        CallError: ``conflict``, naming the fields that differ.
    """
    asked, there = wanted.as_dict(), has.as_dict()
    differing = [field for field in asked if asked[field] != there[field]]
    if differing:
        undo = "unmount" if state == "mounted" else "close"
        raise CallError(
            "conflict",
            f"{kind} {name!r} is {state} with another {', '.join(differing)}",
            step="claim",
            object=name,
            hint=f"{undo} it first, or use another {kind}_id",
        )


#: (begin, end) of disjoint parts of a device in bytes, in order.
_Areas = tuple[tuple[int, int], ...]


def _areas_of(live: LiveLayer) -> _Areas:
    ranges = live.spec.ranges
    if not ranges:
        return ((0, live.source.device.size_bytes),)
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((part.offset_bytes, part.end_bytes) for part in ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return tuple(merged)


def _share_bytes(some: _Areas, others: _Areas) -> bool:
    at = other_at = 0
    while at < len(some) and other_at < len(others):
        (begin, end), (other_begin, other_end) = some[at], others[other_at]
        if begin < other_end and other_begin < end:
            return True
        if end <= other_end:
            at += 1
        else:
            other_at += 1
    return False


class Inventory:
    """Every method is atomic."""

    def __init__(self, reserved: str) -> None:
        """``reserved`` is the agent's own directory, where nothing may be mounted."""
        self._lock = threading.Lock()
        self._layers: dict[str, LiveLayer] = {}
        self._overlays: dict[str, LiveOverlay] = {}
        #: The bytes that each layer takes of its device.
        self._areas: dict[str, _Areas] = {}
        self._reservations: dict[Owner, Reservation] = {}
        self._paths = PathClaims()
        self._paths.add(reserved, "target", ("agent", "state"))
        #: The scratch (device or directory) of an overlay, by owner.
        self._scratches: dict[Owner, str] = {}
        #: By MAJOR:MINOR: devices reserved as shared by all owners; scratch devices mounted.
        self._shared: set[str] = set()
        self._disks: dict[str, ScratchDisk] = {}
        #: How many owners need a directory that the agent made.
        self._made: dict[str, int] = {}
        #: Of each device (MAJOR:MINOR) that layers keep read-only: whether the agent made it so.
        self._readonly: dict[str, tuple[bool, frozenset[str]]] = {}
        self._dm_names: dict[str, Owner] = {}
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
        with self._lock:
            self._layers[live.spec.layer_id] = live
            self._areas[live.spec.layer_id] = _areas_of(live)

    def set_layer_state(self, layer_id: str, state: str) -> bool:
        """Note what became of a layer; return whether that is news."""
        with self._lock:
            live = self._layers.get(layer_id)
            if live is None or live.state == state:
                return False
            self._layers[layer_id] = live.replace(state=state)
            return True

    def set_overlay_state(self, overlay_id: str, state: str) -> bool:
        """Note what became of an overlay; return whether that is news."""
        with self._lock:
            live = self._overlays.get(overlay_id)
            if live is None or live.state == state:
                return False
            self._overlays[overlay_id] = live.replace(state=state)
            return True

    def add_overlay(self, live: LiveOverlay) -> None:
        with self._lock:
            self._overlays[live.spec.overlay_id] = live

    def drop_layer(self, layer_id: str) -> None:
        with self._lock:
            self._layers.pop(layer_id, None)
            self._areas.pop(layer_id, None)

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
        layer_id, dev = live.spec.layer_id, live.source.dev
        with self._lock:
            areas = self._areas.get(layer_id) or _areas_of(live)
            begin, end = areas[0][0], areas[-1][1]
            return tuple(
                other_id
                for other_id, others in self._areas.items()
                if others[0][0] < end
                and begin < others[-1][1]
                and self._layers[other_id].source.dev == dev
                and other_id != layer_id
                and _share_bytes(areas, others)
            )

    def layers_on(self, dev: str) -> tuple[str, ...]:
        """Return the layers whose data or hash tree is on a device (MAJOR:MINOR)."""
        with self._lock:
            return tuple(
                layer_id
                for layer_id, live in self._layers.items()
                if dev in [device.dev for device in live.source.devices]
            )

    def targets_on(self, dev: str) -> set[str]:
        """Return the targets of the layers and overlays whose file system is on ``dev``."""
        with self._lock:
            found = {live.spec.mount_point for live in self._layers.values() if live.dev == dev}
            mounts = self._overlays.values()
            return found | {live.spec.mount_point for live in mounts if live.dev == dev}

    def is_target(self, path: str) -> bool:
        """Return whether a path is reserved as a target."""
        with self._lock:
            use, _ = self._paths.get(path) or ("", None)
            return use == "target"

    # --- devices that are read-only because layers are on them

    def is_kept_readonly(self, dev: str) -> bool:
        with self._lock:
            return dev in self._readonly

    def is_made_readonly(self, dev: str) -> bool:
        """Return whether a device (MAJOR:MINOR) would be writable without the layers on it."""
        with self._lock:
            return self._readonly.get(dev, (False,))[0]

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

    # --- reservations

    def reserve(
        self,
        owner: Owner,
        target: str,
        *,
        exists: Callable[[str], bool] = lambda path: True,
        dm_names: tuple[str, ...] = (),
        unique_dm_names: tuple[str, ...] = (),
    ) -> Reservation:
        """Reserve all that a layer or an overlay needs to itself, until it is released.

        Args:
            exists: says whether a directory on the way to ``target`` is there; the owner makes the
                others. It is asked here, because another request may remove one meanwhile.
            dm_names: those that are wanted; ``unique_dm_names`` if another layer has one of them.

        Raises:
            CallError: ``conflict``, ``target`` lies on, in or above another target or a scratch.
        """
        with self._lock:
            self._paths.add(target, "target", owner)
            taken = any(name in self._dm_names for name in dm_names)
            reservation = Reservation(
                target=target,
                directories=self._directories_to(target, exists),
                dm_names=unique_dm_names if taken else dm_names,
            )
            self._hold(owner, reservation)
            return reservation

    def refuse_hiding(self, path: str) -> None:
        """See that a mount at ``path`` hides nothing that is in use, as ``PathClaims`` does."""
        with self._lock:
            self._paths.refuse_hiding(path)

    def adopt(self, owner: Owner, reservation: Reservation) -> None:
        """Reserve what a layer or an overlay of an earlier agent has.

        Raises:
            CallError: ``conflict``, another has its target.
        """
        with self._lock:
            self._paths.add(reservation.target, "target", owner)
            self._hold(owner, reservation)

    def release(self, owner: Owner) -> None:
        """Release all that an owner has reserved, its scratch, too. Idempotent."""
        with self._lock:
            self._release_scratch(owner)
            reservation = self._reservations.pop(owner, None)
            if reservation is None:
                return
            self._paths.drop(reservation.target)
            for name in reservation.dm_names:
                del self._dm_names[name]
            for path in reservation.directories:
                self._made[path] -= 1
                if not self._made[path]:
                    del self._made[path]

    def reserve_scratch(self, owner: Owner, key: str, *, is_shared: bool = False) -> None:
        """Reserve a scratch device (MAJOR:MINOR) or directory, until the owner is released.

        A device may be reserved by several owners if all of them reserve it as shared.

        Raises:
            CallError: ``conflict``, it lies on, in or above another scratch or a target.
        """
        with self._lock:
            if not (is_shared and key in self._shared):
                self._paths.add(key, "scratch", owner)
            if is_shared:
                self._shared.add(key)
            self._scratches[owner] = key

    def leave_scratch(self, owner: Owner) -> None:
        """Release no more than an owner's scratch. Idempotent."""
        with self._lock:
            self._release_scratch(owner)

    def _release_scratch(self, owner: Owner) -> None:
        self._paths.drop(key := self._scratches.pop(owner, ""))
        others = [other for other, theirs in self._scratches.items() if theirs == key]
        if others:
            self._paths.add(key, "scratch", others[0])
        else:
            self._shared.discard(key)
            self._disks.pop(key, None)

    def users_of_scratch(self, key: str) -> tuple[str, ...]:
        """Return the overlays that have reserved a scratch device (MAJOR:MINOR) or directory."""
        with self._lock:
            return tuple(name for (_, name), other in self._scratches.items() if other == key)

    def scratch_owner(self, key: str) -> str | None:
        """Return the overlay whose scratch a device (MAJOR:MINOR) or directory is."""
        with self._lock:
            use, (_, name) = self._paths.get(key) or ("", ("", ""))
            return name if use == "scratch" else None

    # --- scratch devices that are mounted, each until the last that has reserved it is released

    def disk(self, dev: str) -> ScratchDisk | None:
        with self._lock:
            return self._disks.get(dev)

    def dm_devices(self) -> set[str]:
        """Return the names of the dm devices of all layers and scratches."""
        with self._lock:
            layers = {name for live in self._layers.values() for name in live.plan.dm_names}
            return layers | {disk.crypt for disk in self._disks.values() if disk.crypt}

    def add_disk(self, disk: ScratchDisk) -> None:
        with self._lock:
            self._disks[disk.dev] = disk

    def _directories_to(self, target: str, exists: Callable[[str], bool]) -> tuple[str, ...]:
        found, path, is_there = [], target, False
        while path:
            is_made = path in self._made
            is_there = is_there or (not is_made and exists(path))
            if is_made or not is_there:
                found.append(path)
            path = parent_of(path)
        return tuple(reversed(found))

    def _hold(self, owner: Owner, reservation: Reservation) -> None:
        self._reservations[owner] = reservation
        for name in reservation.dm_names:
            self._dm_names[name] = owner
        for path in reservation.directories:
            self._made[path] = self._made.get(path, 0) + 1

    # --- problems

    def note_problem(self, key: str, text: str) -> None:
        """Remember something that is not as it should be; ``agent.status`` shows it."""
        with self._lock:
            self._problems[key] = text

    def settle_problem(self, key: str) -> None:
        """Forget a problem that is none any more."""
        if key not in self._problems:
            return
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
