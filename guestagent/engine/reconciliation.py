"""Comparing journal and inventory with the kernel while the agent runs.

Recovery does so once at the start; this is for a person at the console. Requests go on meanwhile:
whatever looks unaccounted for is looked at again under the lock of its id, so that what a request
is just making, or taking away, is left to it.
"""

from guestagent.engine.inventory import LayerTraces, LiveOverlay
from guestagent.engine.journal import Written
from guestagent.engine.layers import Layers
from guestagent.engine.overlays import Overlays
from guestagent.engine.recovery import (
    KernelView,
    layer_is_there,
    overlay_is_there,
    undo_layer,
    undo_orphan,
    undo_overlay,
)
from guestagent.engine.state import EngineState
from guestagent.engine.transaction import Transaction
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("Finding", "Outcome", "Reconciliation")

#: A request that holds an id for longer accounts for it by that.
_LOCK_SECONDS = 2.0
_IN_ORDER = "it is in order now"


class Finding(Record):
    """A difference between journal, inventory and kernel.

    ``kind`` is ``dm device``, ``layer``, ``overlay`` or ``journal``; ``owner`` is whose lock guards
    it. ``action`` says how it is undone, empty where nothing can be done about it.
    """

    kind: str
    name: str
    owner: tuple[str, ...]
    problem: str
    action: str


class Outcome(Record):
    """What became of a finding: ``undone``, ``left`` or ``failed``, and why."""

    finding: Finding
    result: str
    detail: str = ""


class _Snapshot(Record):
    """The journal and the kernel at one moment."""

    kernel: KernelView
    written: Written
    uuids: dict[str, str]

    def layers(self) -> dict[str, tuple[LayerTraces, str]]:
        """Return what the journal says of each layer, and whether it is whole or begun."""
        begun = {traces.layer_id: (traces, "begun") for traces in self.written.begun_layers}
        whole = {live.spec.layer_id: (live.traces, "whole") for live in self.written.layers}
        return begun | whole

    def overlays(self) -> dict[str, tuple[LiveOverlay, str]]:
        """As ``layers``, of overlays."""
        begun = {live.spec.overlay_id: (live, "begun") for live in self.written.begun_overlays}
        whole = {live.spec.overlay_id: (live, "whole") for live in self.written.overlays}
        return begun | whole


class Reconciliation:
    """``look`` changes nothing; ``settle`` undoes one finding."""

    def __init__(self, state: EngineState, layers: Layers, overlays: Overlays) -> None:
        self._state = state
        self._layers = layers
        self._overlays = overlays

    def look(self, op: Transaction) -> tuple[Finding, ...]:
        """Return what nothing accounts for.

        Raises:
            CallError: ``cancelled``; ``mount`` or ``device``, the kernel could not be asked.
        """
        with op.step("look", "journal, inventory, kernel"):
            suspects = self._scan(self._read())
        return tuple(finding for finding in suspects if self._confirm(finding, op) is None)

    def settle(self, finding: Finding, op: Transaction) -> Outcome:
        """Undo a finding, if it still holds."""
        if not finding.action:
            return Outcome(finding=finding, result="left", detail="nothing can be done about it")
        try:
            detail = self._undo(finding, op)
        except (OSError, CallError) as error:
            return Outcome(finding=finding, result="failed", detail=str(error))
        if detail is not None:
            return Outcome(finding=finding, result="left", detail=detail)
        self._state.inventory.settle_problem(f"{finding.kind} {finding.name}")
        return Outcome(finding=finding, result="undone")

    # --- looking

    def _read(self) -> _Snapshot:
        kernel = KernelView.look(self._state)
        return _Snapshot(
            kernel=kernel,
            written=self._state.journal.read(),
            uuids={name: uuid for name, (_, uuid) in kernel.devices.items()},
        )

    def _scan(self, snapshot: _Snapshot) -> tuple[Finding, ...]:
        return (
            *self._orphan_devices(snapshot),
            *self._layer_findings(snapshot),
            *self._overlay_findings(snapshot),
            *(
                Finding(
                    kind="journal",
                    name=path,
                    owner=(),
                    problem="could not be read and was put aside",
                    action="",
                )
                for path in self._state.journal.damaged()
            ),
        )

    def _orphan_devices(self, snapshot: _Snapshot) -> list[Finding]:
        owned = self._state.inventory.dm_devices()
        # of one in the journal the entry is the finding, and takes its devices with it
        owned |= {
            name
            for layer_id, (traces, _) in snapshot.layers().items()
            if self._state.inventory.layer(layer_id) is None
            for name, _ in snapshot.kernel.own_devices(traces)
        }
        # verity devices first, as they stand on the linear ones
        prefix = self._state.uuid_prefix
        orphans = sorted(
            ((uuid, name) for name, uuid in snapshot.uuids.items() if uuid.startswith(prefix)),
            reverse=True,
        )
        return [
            Finding(
                kind="dm device",
                name=name,
                owner=_owner_of(uuid.removeprefix(prefix)),
                problem="is the agent's and belongs to no layer and no scratch",
                action="unmount what is on it and remove it",
            )
            for uuid, name in orphans
            if name not in owned
        ]

    def _layer_findings(self, snapshot: _Snapshot) -> list[Finding]:
        inventory = self._state.inventory
        found = []
        entries = snapshot.layers()
        for layer_id, (_, state) in entries.items():
            if inventory.layer(layer_id) is None:
                problem = f"is in the journal ({state}) and not in the inventory"
                found.append(_finding("layer", layer_id, problem, "take down what there is of it"))
        for live in inventory.layers():
            layer_id = live.spec.layer_id
            if not layer_is_there(snapshot.kernel, live):
                problem = f"is not whole in the kernel (at {live.spec.mount_point})"
                found.append(_finding("layer", layer_id, problem, "unmount it by force"))
            elif layer_id not in entries:
                problem = "is mounted and not in the journal"
                found.append(_finding("layer", layer_id, problem, "write its journal entry"))
        return found

    def _overlay_findings(self, snapshot: _Snapshot) -> list[Finding]:
        inventory = self._state.inventory
        found = []
        entries = snapshot.overlays()
        for overlay_id, (_, state) in entries.items():
            if inventory.overlay(overlay_id) is None:
                problem = f"is in the journal ({state}) and not in the inventory"
                action = "take down what there is of it"
                found.append(_finding("overlay", overlay_id, problem, action))
        for live in inventory.overlays():
            overlay_id = live.spec.overlay_id
            if not overlay_is_there(snapshot.kernel, live):
                problem = f"is not whole in the kernel (at {live.spec.mount_point})"
                found.append(_finding("overlay", overlay_id, problem, "unmount it by force"))
            elif overlay_id not in entries:
                problem = "is mounted and not in the journal"
                found.append(_finding("overlay", overlay_id, problem, "write its journal entry"))
        return found

    def _confirm(self, finding: Finding, op: Transaction) -> str | None:
        """Look again while no request has the id; return why it is none after all."""
        if not finding.owner:
            return None
        try:
            with op.deadline.part(_LOCK_SECONDS) as limit:
                kind, name = finding.owner
                with self._state.locks.hold([(kind, name)], limit):
                    return None if finding in self._scan(self._read()) else _IN_ORDER
        except CallError as error:
            if error.code != "timeout" or op.deadline.expired:
                raise
            return "a request is at it"

    # --- undoing

    def _undo(self, finding: Finding, op: Transaction) -> str | None:
        """Do it; return why it was left."""
        if finding.action == "unmount it by force":
            return self._unmount(finding, op)
        with op.deadline.part(_LOCK_SECONDS) as limit:
            kind, name = finding.owner
            with self._state.locks.hold([(kind, name)], limit):
                snapshot = self._read()
                if finding not in self._scan(snapshot):
                    return _IN_ORDER
                self._undo_locked(finding, snapshot)
        return None

    def _unmount(self, finding: Finding, op: Transaction) -> str | None:
        left = self._confirm(finding, op)
        if left is not None:
            return left
        parts = self._layers if finding.kind == "layer" else self._overlays
        parts.unmount(finding.name, op, force=True)
        return None

    def _undo_locked(self, finding: Finding, snapshot: _Snapshot) -> None:
        name = finding.name
        if finding.kind == "dm device":
            undo_orphan(self._state, name, snapshot.kernel.devices[name][0])
        elif finding.kind == "layer":
            self._settle_layer(name, snapshot)
        else:
            self._settle_overlay(name, snapshot)

    def _settle_layer(self, layer_id: str, snapshot: _Snapshot) -> None:
        live = self._state.inventory.layer(layer_id)
        if live is not None:
            self._state.journal.write_layers((live,), begun="")
            return
        gone, _ = snapshot.layers()[layer_id]
        own = snapshot.kernel.own_devices(gone)
        in_use = self._state.inventory.dm_devices()
        if not self._is_taken(gone.mount_point) and in_use.isdisjoint(name for name, _ in own):
            undo_layer(self._state, snapshot.kernel, gone)
            return
        # what it had is another's by now, and stays
        for name, dev in own:
            if name not in in_use:
                undo_orphan(self._state, name, dev)
        self._state.journal.strike_layer(layer_id)

    def _settle_overlay(self, overlay_id: str, snapshot: _Snapshot) -> None:
        live = self._state.inventory.overlay(overlay_id)
        if live is not None:
            self._state.journal.write_overlay(live, begun="")
            return
        gone, _ = snapshot.overlays()[overlay_id]
        if self._is_taken(gone.spec.mount_point):
            self._state.journal.strike_overlay(overlay_id)
        else:
            undo_overlay(self._state, snapshot.kernel, gone)

    def _is_taken(self, target: str) -> bool:
        inventory = self._state.inventory
        targets = {live.spec.mount_point for live in inventory.layers()}
        targets |= {live.spec.mount_point for live in inventory.overlays()}
        return target in targets


def _finding(kind: str, name: str, problem: str, action: str) -> Finding:
    return Finding(kind=kind, name=name, owner=(kind, name), problem=problem, action=action)


def _owner_of(name: str) -> tuple[str, str]:
    """Return whose lock guards a dm device, by its uuid without the agent's prefix."""
    kind, _, owner = name.partition("-")
    return ("scratch" if kind == "crypt" else "layer", owner)
