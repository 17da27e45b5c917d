"""After a restart: adopt what is whole, undo what is half, account for every device and mount.

The journal says what was begun and what was finished, the kernel says what is there. An entry is
adopted only if the kernel agrees with it; everything else that is the agent's, by journal or by the
uuid of its dm devices, is taken away. What cannot be taken away becomes a problem in the status.
"""

from collections.abc import Callable
from functools import partial

from guestagent.engine.inventory import LiveLayer, LiveOverlay
from guestagent.engine.journal import WHOLE, LayerEntry, OverlayEntry
from guestagent.engine.operation import Operation
from guestagent.engine.plan import LinearStep, VerityStep
from guestagent.engine.scratch import release_scratch
from guestagent.engine.state import EngineState
from guestagent.engine.takedown import (
    remove_devices,
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.storage.devicemapper import devices
from guestagent.storage.devicemapper.control import DeviceInfo
from guestagent.storage.mountinfo import find_mount, mounts_of_dev
from guestagent.storage.overlayfs import remove_links
from vsock.errors import CallError
from vsock.log import log
from vsock.record import Record

__all__ = ("Recovered", "recover")

UUID_PREFIX = "guestagent-"


class Recovered(Record):
    """Ids of what was adopted, and names of what was undone."""

    layers: tuple[str, ...]
    overlays: tuple[str, ...]
    undone: tuple[str, ...]


def recover(state: EngineState) -> Recovered:
    """Fill an empty inventory from the journal and the kernel. Nothing else may run meanwhile."""
    committed = state.journal.committed_batches()
    undone: list[str] = []
    layer_entries = state.journal.read_layers()
    whole_layers = {
        entry.live.spec.layer_id
        for entry in layer_entries
        if _is_decided(entry, committed) and _layer_is_there(state, entry.live)
    }
    for overlay_entry in state.journal.read_overlays():
        overlay = overlay_entry.live
        complete = whole_layers.issuperset(overlay.spec.layers)
        if _is_decided(overlay_entry, committed) and complete and _overlay_is_there(overlay):
            _adopt_overlay(state, overlay)
        else:
            undone.append(f"overlay {overlay.spec.overlay_id}")
            _try(state, undone[-1], partial(_undo_overlay, state, overlay))
    for entry in layer_entries:
        layer = entry.live
        if layer.spec.layer_id in whole_layers:
            _adopt_layer(state, layer)
        else:
            undone.append(f"layer {layer.spec.layer_id}")
            _try(state, undone[-1], partial(_undo_layer, state, layer))
    for batch in committed:
        state.journal.forget_batch(batch)
    undone += _undo_orphans(state)
    return Recovered(
        layers=tuple(live.spec.layer_id for live in state.inventory.layers()),
        overlays=tuple(live.spec.overlay_id for live in state.inventory.overlays()),
        undone=tuple(undone),
    )


def _is_decided(entry: LayerEntry | OverlayEntry, committed: frozenset[str]) -> bool:
    return entry.state == WHOLE or entry.batch in committed


def _layer_is_there(state: EngineState, live: LiveLayer) -> bool:
    """Return whether the kernel has the mount and every device of a layer, on top of each other."""
    mount = find_mount(live.spec.mount_point)
    if mount is None:
        return False
    steps = [step for step in (live.plan.verity, live.plan.linear) if step is not None]
    infos = [_own_device(state, step) for step in steps]
    devs = [info.dev for info in infos if info is not None]
    if len(devs) < len(steps):
        return False
    return mount.dev == (devs[0] if devs else live.device.dev)


def _own_device(state: EngineState, step: LinearStep | VerityStep) -> DeviceInfo | None:
    info = state.control.find(name=step.name)
    return info if info is not None and info.uuid == step.uuid else None


def _overlay_is_there(live: LiveOverlay) -> bool:
    mount = find_mount(live.spec.mount_point)
    scratch = live.scratch
    if mount is None or mount.filesystem != "overlay":
        return False
    return scratch is None or not scratch.is_mount or find_mount(scratch.path) is not None


def _adopt_layer(state: EngineState, live: LiveLayer) -> None:
    layer_id = live.spec.layer_id
    state.inventory.claim_target(live.spec.mount_point, ("layer", layer_id))
    state.inventory.hold_dm_names(layer_id, live.plan.dm_names)
    for step in (live.plan.verity, live.plan.linear):
        if step is not None:
            # killed between the mount and this, the old agent may not have come to it
            devices.set_deferred_remove(state.control, step.name)
    state.journal.write_layer(live, WHOLE)
    state.inventory.add_layer(live)


def _adopt_overlay(state: EngineState, live: LiveOverlay) -> None:
    overlay_id = live.spec.overlay_id
    state.inventory.claim_target(live.spec.mount_point, ("overlay", overlay_id))
    if live.scratch is not None:
        state.inventory.claim_scratch(live.scratch.dev or live.scratch.path, overlay_id)
    state.journal.write_overlay(live, WHOLE)
    state.inventory.add_overlay(live)


def _try(state: EngineState, what: str, undo: Callable[[], None]) -> None:
    """Undo something; what cannot be undone is told in the status and tried again next time."""
    try:
        undo()
    except (OSError, CallError) as error:
        log.error("cannot undo what was half-made", what=what, error=str(error))
        state.inventory.note_problem(what, f"{what} is half-made and cannot be undone: {error}")


def _undo_overlay(state: EngineState, live: LiveOverlay) -> None:
    target = live.spec.mount_point
    with Operation(undo_deadline(state)) as op:
        mount = find_mount(target)
        if mount is not None and mount.filesystem == "overlay":
            unmount_target(target, op)
        scratch = f"{state.directory}/scratch/{live.spec.overlay_id}"
        unmount_target(scratch, op)
        if live.scratch is not None:
            release_scratch(state, live.scratch)
        remove_directories((scratch,))
        remove_links(f"{state.directory}/links/{live.spec.overlay_id}")
        remove_directories(live.created)
    state.journal.remove("overlay", live.spec.overlay_id)


def _undo_layer(state: EngineState, live: LiveLayer) -> None:
    target = live.spec.mount_point
    own = [
        info
        for step in (live.plan.verity, live.plan.linear)
        if step is not None and (info := _own_device(state, step)) is not None
    ]
    with Operation(undo_deadline(state)) as op:
        mount = find_mount(target)
        if mount is not None and mount.dev in (live.device.dev, *(info.dev for info in own)):
            unmount_target(target, op)
        remove_devices(state, tuple(info.name for info in own), op)
        remove_directories(live.created)
    state.journal.remove("layer", live.spec.layer_id)


def _undo_orphans(state: EngineState) -> list[str]:
    """Remove dm devices that carry our uuid but belong to no layer, with what is mounted on them.

    Verity devices go before the linear ones that they stand on.
    """
    owned = {name for live in state.inventory.layers() for name in live.plan.dm_names}
    orphans = [
        (uuid, name, dev)
        for name, dev, uuid in state.control.list_devices()
        if uuid.startswith(UUID_PREFIX) and name not in owned
    ]
    undone = []
    for _uuid, name, dev in sorted(orphans, reverse=True):
        undone.append(f"dm device {name}")
        _try(state, undone[-1], partial(_undo_orphan, state, name, dev))
    return undone


def _undo_orphan(state: EngineState, name: str, dev: str) -> None:
    with Operation(undo_deadline(state)) as op:
        for mount in mounts_of_dev(dev):
            unmount_target(mount.target, op)
        remove_devices(state, (name,), op)
