"""Listens to the kernel's device events and turns what concerns layers into events and states."""

import os
import threading
from collections.abc import Callable

from guestagent.engine.inventory import LiveLayer
from guestagent.engine.state import EngineState
from guestagent.storage.uevents import Uevent, UeventSocket
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log
from vsock.threads import start_thread

__all__ = ("Monitor",)

#: What dm-verity adds to a change event: "0,BLOCK" for data, "1,BLOCK" for metadata.
_VERITY_FIELD = "DM_VERITY_ERR_BLOCK_NR"
#: dm-verity reports so many errors of a device and no more (DM_VERITY_MAX_CORRUPTED_ERRS).
_MAX_REPORTS = 100


class Monitor:
    """A thread of its own, from ``start`` to ``close``."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._until = Deadline()
        self._socket = UeventSocket(is_about_disks=True)
        #: Layer -> its mount id, and the blocks that the kernel has reported of that mount.
        self._reports: dict[str, tuple[int, list[str]]] = {}
        self._thread = threading.Thread(target=self._run, name="uevents", daemon=True)

    def start(self) -> None:
        start_thread(self._thread)

    def close(self) -> None:
        """End the thread and wait for it. Idempotent."""
        self._until.cancel()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()
        self._until.close()

    def _run(self) -> None:
        while True:
            try:
                self._until.wait([self._socket.fileno()], "watch device events")
            except CallError:
                return
            for event in self._socket.receive():
                self._take(event)

    def _take(self, event: Uevent) -> None:
        if event.action == "lost":
            log.warning("device events were lost; looking for what changed")
            self.note_lost_devices()
        elif event.subsystem == "block":
            name = os.path.basename(event.devpath)
            if _VERITY_FIELD in event.fields:
                self._corruption(name, event.fields[_VERITY_FIELD])
            elif event.action == "add" and not name.startswith("dm-"):
                self._state.events.publish("device_appeared", device=f"/dev/{name}")
            elif event.action == "remove" and not name.startswith("dm-"):
                self._vanished(event)

    def _corruption(self, dm_node: str, where: str) -> None:
        kind, _, block = where.partition(",")
        what = "data block" if kind == "0" else "hash block"
        for live in self._state.inventory.layers():
            step = live.plan.verity
            info = self._state.control.find(name=step.name) if step else None
            if info is not None and os.path.basename(info.node) == dm_node:
                self._note_corruption(live, info.node, what, block)

    def _note_corruption(self, live: LiveLayer, node: str, what: str, block: str) -> None:
        """Publish a corrupt block once; the kernel reports it at each read of it."""
        layer_id, inventory = live.spec.layer_id, self._state.inventory
        mount_id, reports = self._reports.get(layer_id, (0, []))
        if mount_id != live.mount_id:
            kept = {k: v for k, v in self._reports.items() if inventory.layer(k) is not None}
            reports = []
            self._reports = {**kept, layer_id: (live.mount_id, reports)}
        detail = f"{what} {block} does not verify"
        is_known = detail in reports
        reports.append(detail)
        if len(reports) == _MAX_REPORTS:
            detail += "; the kernel reports no more of this layer, layer.verify finds all"
        elif is_known:
            return
        inventory.set_layer_state(layer_id, "corrupted")
        inventory.note_problem(f"layer {layer_id}", f"layer {layer_id!r} is corrupted: {detail}")
        self._state.events.publish(
            "layer_corrupted",
            layer_id=layer_id,
            device=node,
            block=int(block) if block.isdigit() else None,
            detail=detail,
        )

    def _vanished(self, event: Uevent) -> None:
        node = f"/dev/{os.path.basename(event.devpath)}"
        self._state.events.publish("device_vanished", device=node)
        # by number: the next disk may have the same name
        gone = f"{event.fields.get('MAJOR')}:{event.fields.get('MINOR')}"
        self._note_lost(lambda dev: dev == gone)

    def note_lost_devices(self) -> None:
        """Find the disks of layers and overlays that are gone, also those of an earlier agent."""
        self._note_lost(lambda dev: not os.path.exists(f"/sys/dev/block/{dev}"))

    def _note_lost(self, is_gone: Callable[[str], bool]) -> None:
        inventory = self._state.inventory
        for layer in inventory.layers():
            layer_id = layer.spec.layer_id
            gone = [device.node for device in layer.source.devices if is_gone(device.dev)]
            if gone and inventory.set_layer_state(layer_id, "device_lost"):
                self._tell("layer", layer_id, gone[0])
                self._state.events.publish("layer_device_lost", layer_id=layer_id, device=gone[0])
        for overlay in inventory.overlays():
            overlay_id = overlay.spec.overlay_id
            disk = overlay.scratch.disk if overlay.scratch is not None else None
            dev = disk.dev if disk is not None else ""
            if dev and is_gone(dev) and inventory.set_overlay_state(overlay_id, "device_lost"):
                self._tell("overlay", overlay_id, dev)
                self._state.events.publish("overlay_device_lost", overlay_id=overlay_id, device=dev)

    def _tell(self, kind: str, name: str, dev: str) -> None:
        text = f"the disk {dev} of {kind} {name!r} is gone"
        log.error("a disk is gone", kind=kind, name=name, device=dev)
        self._state.inventory.note_problem(f"{kind} {name}", text)
