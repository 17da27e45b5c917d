"""After a restart: adopt what is whole, undo what is half, account for every device and mount.

The journal says what was begun and what was finished, the kernel says what is there. An entry is
adopted only if the kernel agrees with it; everything else that is the agent's, by journal or by the
uuid of its dm devices, is taken away. What cannot be taken away becomes a problem in the status.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial

from guestagent.engine.inventory import LayerTraces, LiveLayer, LiveOverlay, Reservation
from guestagent.engine.journal import Written
from guestagent.engine.parallel import for_each
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import (
    remove_devices,
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from guestagent.storage import syscalls
from guestagent.storage.holders import find_holders
from guestagent.storage.mountinfo import Mount, is_reused, mounts_by_target, mounts_of_dev
from guestagent.storage.overlayfs import remove_links
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log
from vsock.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    Live = TypeVar("Live", LiveLayer, LiveOverlay)

__all__ = (
    "KernelView",
    "Recovered",
    "layer_is_there",
    "overlay_is_there",
    "recover",
    "undo_layer",
    "undo_orphan",
    "undo_overlay",
)

#: Looking for the holders of an overlay reads all of /proc.
_HOLDER_SECONDS = 2.0


class Recovered(Record):
    """Ids of what was adopted, and names of what was undone."""

    layers: tuple[str, ...]
    overlays: tuple[str, ...]
    undone: tuple[str, ...]


class KernelView(Record):
    """What the kernel has now: mounts by target, dm devices by name as (dev, uuid)."""

    mounts: dict[str, Mount]
    devices: dict[str, tuple[str, str]]

    @classmethod
    def look(cls, state: EngineState) -> "KernelView":
        devices = {name: (dev, uuid) for name, dev, uuid in state.control.list_devices()}
        return cls(mounts=mounts_by_target(), devices=devices)

    def own_devices(self, traces: LayerTraces) -> tuple[tuple[str, str], ...]:
        """Return (name, dev) of those of a layer's devices that are there, topmost first."""
        found = []
        for name, ours in traces.dm.items():
            dev, uuid = self.devices.get(name, ("", ""))
            if uuid == ours:
                found.append((name, dev))
        return tuple(found)


def recover(state: EngineState) -> Recovered:
    """Fill an empty inventory from the journal and the kernel. Nothing else may run meanwhile."""
    kernel = KernelView.look(state)
    written = state.journal.read()
    half = list(written.begun_layers)
    whole = []
    for live in written.layers:
        if layer_is_there(kernel, live):
            whole.append(live)
        else:
            half.append(live.traces)
    undone = _recover_overlays(state, kernel, written, {live.spec.layer_id for live in whole})
    for live in whole:
        _adopt_layer(state, _as_mounted(kernel, live))
    undone += _undo_layers(state, kernel, half)
    undone += _undo_orphans(state, f"{state.uuid_prefix}verity-")
    undone += _undo_orphans(state, state.uuid_prefix)
    state.note_damaged()
    return Recovered(
        layers=tuple(live.spec.layer_id for live in state.inventory.layers()),
        overlays=tuple(live.spec.overlay_id for live in state.inventory.overlays()),
        undone=tuple(undone),
    )


def _undo_layers(state: EngineState, kernel: KernelView, half: Sequence[LayerTraces]) -> list[str]:
    targets = {live.spec.mount_point for live in state.inventory.layers()}
    undos: list[tuple[str, Callable[[], None]]] = []
    for traces in half:
        # what an undoing that failed once has left noted, another may have come to use since
        if traces.mount_point in targets:
            state.journal.strike_layer(traces.layer_id)
        else:
            undo = partial(undo_layer, state, kernel, traces)
            undos.append((f"layer {traces.layer_id}", undo))
    return _undo_all(state, undos)


def _recover_overlays(
    state: EngineState, kernel: KernelView, written: Written, whole_layers: set[str]
) -> list[str]:
    half = list(written.begun_overlays)
    targets = {overlay.spec.mount_point for overlay in (*written.overlays, *half)}
    for overlay in written.overlays:
        if whole_layers.issuperset(overlay.spec.layers) and overlay_is_there(kernel, overlay):
            _adopt_overlay(state, _as_mounted(kernel, overlay))
        elif _is_held(kernel, overlay, others=targets - {overlay.spec.mount_point}):
            _adopt_overlay(state, overlay)
        else:
            half.append(overlay)
    undos = [
        (f"overlay {live.spec.overlay_id}", partial(undo_overlay, state, kernel, live))
        for live in half
    ]
    return _undo_all(state, undos)


def layer_is_there(kernel: KernelView, live: LiveLayer) -> bool:
    """Return whether the kernel has the mount and every device of a layer, on top of each other."""
    mount = kernel.mounts.get(live.spec.mount_point)
    own = kernel.own_devices(live.traces)
    if mount is None or mount.dev != live.dev or mount.root != "/":
        return False
    if len(own) < len(live.plan.dm_names):
        return False
    return live.dev == (own[0][1] if own else live.source.dev)


def overlay_is_there(kernel: KernelView, live: LiveOverlay) -> bool:
    """Return whether the kernel has the mount of an overlay, and that of its scratch."""
    mount = kernel.mounts.get(live.spec.mount_point)
    if mount is None or mount.dev != live.dev or mount.root != "/":
        return False
    if live.scratch is None or live.scratch.mount is None:
        return True
    path, dev = live.scratch.mount
    return path in kernel.mounts and kernel.mounts[path].dev == dev


def _as_mounted(kernel: KernelView, live: "Live") -> "Live":
    """Return what is adopted with the mount id that it has now: an undo that was interrupted may
    have mounted it again."""
    return live.replace(mount_id=kernel.mounts[live.spec.mount_point].mount_id)


def _is_held(kernel: KernelView, live: LiveOverlay, *, others: set[str]) -> bool:
    """Return whether an overlay that is not mounted any more is still in use, by a process inside
    or by another mount namespace: its scratch is not free until it is unmounted here as well.

    A number that is in use is not enough: it may be another file system's by now, and it must have
    a holder.
    """
    if live.spec.mount_point in kernel.mounts or not live.dev:
        return False
    if is_reused(live.dev, "overlay", others.__contains__):
        return False
    if syscalls.has_superblock(live.dev) is not True:
        return False
    with Deadline(_HOLDER_SECONDS) as deadline:
        return bool(find_holders(live.dev, deadline))


def _adopt_layer(state: EngineState, live: LiveLayer) -> None:
    layer_id = live.spec.layer_id
    state.inventory.adopt(
        ("layer", layer_id),
        Reservation(
            target=live.spec.mount_point, directories=live.created, dm_names=live.plan.dm_names
        ),
    )
    for device in live.source.devices if live.spec.readonly_policy != "write" else ():
        made = device.dev in live.source.made_readonly
        state.inventory.keep_readonly(device.dev, layer_id, made)
    state.inventory.add_layer(live)


def _adopt_overlay(state: EngineState, live: LiveOverlay) -> None:
    overlay_id = live.spec.overlay_id
    owner = ("overlay", overlay_id)
    reservation = Reservation(target=live.spec.mount_point, directories=live.created)
    state.inventory.adopt(owner, reservation)
    scratch = live.scratch
    # a tmpfs and a volume that is not encrypted are of one overlay
    if scratch is not None and (scratch.disk or scratch.kind not in ("tmpfs", "thin")):
        is_shared = scratch.disk is not None and scratch.disk.shared
        state.inventory.reserve_scratch(owner, scratch.key, is_shared=is_shared)
        if scratch.disk is not None:
            state.inventory.add_disk(scratch.disk)
    state.inventory.add_overlay(live)


def _undo_all(state: EngineState, undos: Sequence[tuple[str, Callable[[], None]]]) -> list[str]:
    """Undo everything listed on a few threads: each undo waits for the kernel.

    What cannot be undone is told in the status and tried again next time.
    """

    def attempt(_number: int, item: tuple[str, Callable[[], None]]) -> None:
        what, undo = item
        try:
            undo()
        except (OSError, CallError) as error:
            log.error("cannot undo what was half-made", what=what, error=str(error))
            state.inventory.note_problem(what, f"{what} is half-made and cannot be undone: {error}")

    for_each(undos, attempt, threads=state.rules.parallel)
    return [what for what, _ in undos]


def undo_overlay(state: EngineState, kernel: KernelView, live: LiveOverlay) -> None:
    """Take away what there is of an overlay, then its journal entry."""
    target = live.spec.mount_point
    with undo_deadline(state) as deadline, Transaction(deadline) as op:
        mount = kernel.mounts.get(target)
        if mount is not None and mount.filesystem == "overlay":
            unmount_target(target, op, dev=mount.dev)
        scratch = f"{state.directory}/scratch/{live.spec.overlay_id}"
        unmount_target(scratch, op)
        remove_directories((scratch,))
        for dev in _mounted_disks(state):
            from guestagent.engine.scratchdisk import remove_unused_disk  # not at each restart

            remove_unused_disk(state, dev, op)
        remove_links(f"{state.directory}/links/{live.spec.overlay_id}")
        remove_directories(live.created)
    state.journal.strike_overlay(live.spec.overlay_id)


def _mounted_disks(state: EngineState) -> tuple[str, ...]:
    """Return the scratch devices (MAJOR:MINOR) that have a mount point; an id has no colon."""
    directory = f"{state.directory}/scratch"
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return tuple(name for name in names if ":" in name)


def undo_layer(state: EngineState, kernel: KernelView, traces: LayerTraces) -> None:
    """Take away what there is of a layer, whole or half made, then what the journal says of it.

    Raises:
        CallError: ``busy``, ``timeout`` or ``conflict``; OSError: something stays.
    """
    target = traces.mount_point
    own = kernel.own_devices(traces)
    with undo_deadline(state) as deadline, Transaction(deadline) as op:
        mount = kernel.mounts.get(target)
        if mount is not None and mount.dev in (traces.dev, *(dev for _, dev in own)):
            unmount_target(target, op, dev=mount.dev)
        remove_devices(state, tuple(name for name, _ in own), op)
        remove_directories(traces.created)
    state.journal.strike_layer(traces.layer_id)


def _undo_orphans(state: EngineState, prefix: str) -> list[str]:
    """Remove dm devices whose uuid begins with ``prefix``, the agent's own, but that belong to no
    layer and no scratch, with what is mounted on them. Verity devices stand on linear ones and must
    go first."""
    owned = state.inventory.dm_devices()
    orphans = [
        (f"dm device {name}", partial(undo_orphan, state, name, dev))
        for name, dev, uuid in state.control.list_devices()
        if uuid.startswith(prefix) and name not in owned
    ]
    return _undo_all(state, orphans)


def undo_orphan(state: EngineState, name: str, dev: str) -> None:
    """Remove a dm device, and first what is mounted on it."""
    with undo_deadline(state) as deadline, Transaction(deadline) as op:
        for mount in mounts_of_dev(dev):
            unmount_target(mount.target, op)
        remove_devices(state, (name,), op)
