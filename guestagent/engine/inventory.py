"""What is live: layers, overlays, who uses whom, and which names and targets are spoken for.

The inventory is memory only. It is filled by requests and by recovery, and guarded by one mutex
that is never held across a system call.
"""

import threading

from guestagent.api import ByteRange, Holder, LayerSpec, OverlaySpec
from guestagent.engine.plan import LayerPlan, VerityOptions
from guestagent.storage.blockdev import BlockDevice
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("Inventory", "LiveLayer", "LiveOverlay", "LiveScratch")


class LiveLayer(Record):
    """A mounted layer. ``created`` are the directories that the mount made, outermost first."""

    spec: LayerSpec
    device: BlockDevice
    range: ByteRange
    plan: LayerPlan
    verity_source: str
    verity_options: VerityOptions
    created: tuple[str, ...]
    timings_ms: dict[str, float]
    state: str = "mounted"


class LiveScratch(Record):
    """Where an overlay's changes go: ``path`` holds the directories ``upper`` and ``work``.

    ``is_mount`` says that a file system was mounted at ``path`` for this, which goes with it.
    ``created`` are the directories that were made, outermost first.
    """

    kind: str
    path: str
    is_mount: bool
    dev: str
    filesystem: str
    formatted: bool
    created: tuple[str, ...]


class LiveOverlay(Record):
    """A mounted overlay. ``links`` is the directory of short names for its layers, if any."""

    spec: OverlaySpec
    lowerdirs: tuple[str, ...]
    method: str
    links: str | None
    scratch: LiveScratch | None
    created: tuple[str, ...]
    timings_ms: dict[str, float] = {}


class Inventory:
    """Every method is atomic. Owners of claims are (kind, id) pairs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: dict[str, LiveLayer] = {}
        self._overlays: dict[str, LiveOverlay] = {}
        self._targets: dict[str, tuple[str, str]] = {}
        self._dm_names: dict[str, str] = {}
        self._scratch: dict[str, str] = {}
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
            self._layers.pop(layer_id, None)

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

    def overlapping(self, layer_id: str, dev: str, mapping: ByteRange) -> tuple[str, ...]:
        """Return the other layers whose ranges on the device ``dev`` share bytes with this one."""
        end_bytes = mapping.offset_bytes + mapping.size_bytes
        with self._lock:
            return tuple(
                other_id
                for other_id, live in self._layers.items()
                if other_id != layer_id
                and live.device.dev == dev
                and live.range.offset_bytes < end_bytes
                and mapping.offset_bytes < live.range.offset_bytes + live.range.size_bytes
            )

    def layers_on(self, dev: str) -> tuple[str, ...]:
        """Return the layers that are on a device (MAJOR:MINOR)."""
        with self._lock:
            return tuple(
                layer_id for layer_id, live in self._layers.items() if live.device.dev == dev
            )

    # --- claims

    def claim_target(self, target: str, owner: tuple[str, str]) -> None:
        """Reserve a mount point; it may lie neither on, in nor above another's.

        Raises:
            CallError: ``conflict``, naming the other.
        """
        with self._lock:
            for other, (kind, name) in self._targets.items():
                inside = target.startswith(other + "/") or other.startswith(target + "/")
                if target == other or inside:
                    how = "lies in or above" if inside else "is"
                    raise CallError(
                        "conflict",
                        f"target {target!r} {how} {other!r}, the target of {kind} {name!r}",
                        step="claim",
                        object=target,
                    )
            self._targets[target] = owner

    def release_target(self, target: str) -> None:
        with self._lock:
            self._targets.pop(target, None)

    def claim_dm_names(
        self, layer_id: str, preferred: tuple[str, str], unique: tuple[str, str]
    ) -> tuple[str, str]:
        """Reserve a pair of dm names: the preferred ones unless another layer has one of them."""
        with self._lock:
            taken = any(self._dm_names.get(name, layer_id) != layer_id for name in preferred)
            names = unique if taken else preferred
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
        """Reserve a scratch device (MAJOR:MINOR) or directory; directories must not nest.

        Raises:
            CallError: ``conflict``, naming the other overlay.
        """
        with self._lock:
            for other, owner in self._scratch.items():
                nested = key.startswith(other + "/") or other.startswith(key + "/")
                if key == other or nested:
                    raise CallError(
                        "conflict",
                        f"scratch {key!r} overlaps that of overlay {owner!r}",
                        step="claim",
                        object=key,
                    )
            self._scratch[key] = overlay_id

    def release_scratch(self, key: str) -> None:
        with self._lock:
            self._scratch.pop(key, None)

    # --- problems

    def note_problem(self, key: str, text: str) -> None:
        """Remember something that is not as it should be; ``agent.status`` shows it."""
        with self._lock:
            self._problems[key] = text

    def clear_problem(self, key: str) -> None:
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
