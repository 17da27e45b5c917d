"""Listens to the kernel's device events and turns what concerns layers into events and states."""

import os
import threading

from guestagent.engine.state import EngineState
from guestagent.storage.uevents import Uevent, UeventSocket
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log
from vsock.threads import start_thread

__all__ = ("Monitor",)

#: What dm-verity adds to a change event: "0,BLOCK" for data, "1,BLOCK" for metadata.
_VERITY_FIELD = "DM_VERITY_ERR_BLOCK_NR"


class Monitor:
    """A thread of its own, from ``start`` to ``close``."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._until = Deadline()
        self._socket = UeventSocket(is_about_disks=True)
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
            self._look_for_lost_devices()
        elif event.subsystem == "block":
            name = os.path.basename(event.devpath)
            if _VERITY_FIELD in event.fields:
                self._corruption(name, event.fields[_VERITY_FIELD])
            elif event.action == "add" and not name.startswith("dm-"):
                self._state.events.publish("device_appeared", device=f"/dev/{name}")
            elif event.action == "remove" and not name.startswith("dm-"):
                self._vanished(name)

    def _corruption(self, dm_node: str, where: str) -> None:
        kind, _, block = where.partition(",")
        what = "data block" if kind == "0" else "hash block"
        for live in self._state.inventory.layers():
            step = live.plan.verity
            info = self._state.control.find(name=step.name) if step else None
            if info is not None and os.path.basename(info.node) == dm_node:
                self._state.inventory.set_layer_state(live.spec.layer_id, "corrupted")
                self._state.events.publish(
                    "layer_corrupted",
                    layer_id=live.spec.layer_id,
                    device=info.node,
                    block=int(block) if block.isdigit() else None,
                    detail=f"{what} {block} does not verify",
                )

    def _vanished(self, name: str) -> None:
        self._state.events.publish("device_vanished", device=f"/dev/{name}")
        for live in self._state.inventory.layers():
            for device in live.source.devices:
                if device.name == name:
                    self._lost(live.spec.layer_id, device.node)

    def _lost(self, layer_id: str, node: str) -> None:
        if self._state.inventory.set_layer_state(layer_id, "device_lost"):
            log.error("the device of a layer is gone", layer=layer_id, device=node)
            self._state.events.publish("layer_device_lost", layer_id=layer_id, device=node)

    def _look_for_lost_devices(self) -> None:
        for live in self._state.inventory.layers():
            for device in live.source.devices:
                if not os.path.exists(f"/sys/class/block/{device.name}"):
                    self._lost(live.spec.layer_id, device.node)
