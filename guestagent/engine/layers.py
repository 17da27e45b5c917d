"""Mounting and unmounting layers: each request holds its lock and is one transaction."""

from collections.abc import Iterator, Sequence
from functools import partial

from guestagent.api import LayerReport, LayerSpec
from guestagent.api.layers import UnmountReply, VerifyReply
from guestagent.engine.inventory import LayerClaim, LiveLayer, refuse_other_spec
from guestagent.engine.journal import Begun
from guestagent.engine.layermount import LayerMount
from guestagent.engine.protection import release
from guestagent.engine.readback import (
    LayerSeen,
    absent_report,
    ignored_report,
    report_of,
    see_layer,
    table_problem,
)
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import (
    busy_error,
    nothing_to_unmount,
    refuse_held,
    refuse_other_mounts,
    refuse_shared_devices,
    remove_devices,
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from guestagent.engine.verity import Progress, verify_layer
from guestagent.storage.mountinfo import mounts_by_target
from vsock.errors import CallError

__all__ = ("Layers",)


class Layers:
    """Mounts and unmounts single layers. Thread-safe: requests for other layers run beside."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        #: Claims and makes, for a request that holds the locks of its layers.
        self.mounting = LayerMount(state)

    # --- mount

    def mount(self, spec: LayerSpec, op: Transaction) -> LayerReport:
        """Mount a layer, or say that it is mounted already.

        Raises:
            CallError: any code of the contract; nothing is left behind.
        """
        with self._state.hold([("layer", spec.layer_id)], op):
            self._state.gate.layer(spec, spec.verity)
            if self.is_mounted(spec):
                return self.get(spec.layer_id, already=True)
            try:
                with op:
                    begun = f"layer-{spec.layer_id}"
                    claim = self.mounting.claim(spec, self.mounting.reserve(spec, op), op)
                    if claim.is_ignored:
                        return ignored_report(self._state, claim, op.timings_ms)
                    self.begin(begun, (claim,), op)
                    live = self.make(claim, op)
                    with op.step("read back", spec.mount_point):
                        seen = see_layer(self._state.control, live, tables=op.loaded_tables)
                    with op.step("commit", spec.layer_id, code="resource"):
                        self.write((live,), begun, op)
                        self._state.journal.decide(begun)
                    op.commit()
                self._state.inventory.add_layer(live)
            except CallError as error:
                self.announce_failure(spec, error, op)
                raise
            report = report_of(self._state, seen, timings_ms=op.timings_ms)
        self.announce(live, op)
        return report

    def is_mounted(self, spec: LayerSpec) -> bool:
        """Return whether exactly this layer is there.

        Raises:
            CallError: ``conflict``, the id is taken by a layer of another specification.
        """
        live = self._state.inventory.layer(spec.layer_id)
        if live is None:
            return False
        refuse_other_spec("layer", spec.layer_id, spec, live.spec)
        return True

    def begin(self, begun: str, claims: Sequence[LayerClaim], op: Transaction) -> None:
        """Write down what is about to be made, so that a restart can undo it."""
        self._state.begin(begun, Begun(layers=tuple(claim.traces for claim in claims)), op)

    def make(self, claim: LayerClaim, op: Transaction) -> LiveLayer:
        """Make what is claimed and begun: the devices and the mount."""
        return self.mounting.make(self.mounting.plan(claim, op), op)

    def write(self, lives: Sequence[LiveLayer], begun: str, op: Transaction) -> None:
        """Write the entries of layers that are made; each counts once ``begun`` is decided.

        Raises:
            OSError: they cannot be written.
        """
        journal = self._state.journal
        for live in lives:
            # they must be gone before what was begun is forgotten, or they would count
            op.on_rollback("journal entry", partial(journal.remove_layer, live.spec.layer_id))
        journal.write_layers(lives, begun)

    def announce(self, live: LiveLayer, op: Transaction) -> None:
        self._state.events.publish(
            "layer_mounted",
            layer_id=live.spec.layer_id,
            device=live.source.node,
            detail=live.spec.mount_point,
            traceparent=op.traceparent,
        )

    def announce_failure(self, spec: LayerSpec, error: CallError, op: Transaction) -> None:
        self._state.events.publish(
            "layer_failed",
            layer_id=spec.layer_id,
            detail=str(error),
            traceparent=op.traceparent,
        )

    # --- unmount

    def unmount(self, layer_id: str, op: Transaction, *, force: bool = False) -> UnmountReply:
        """Unmount a layer and see its devices gone.

        ``force`` also cleans up a layer that another program unmounted or whose device is lost.

        Raises:
            CallError: ``busy``, naming the holders; the layer stays as it was.
        """
        with self._state.hold([("layer", layer_id)], op):
            live = self._state.inventory.layer(layer_id)
            if live is None:
                return nothing_to_unmount(op)
            with op:
                reply = self.take_down(live, op, force=force)
                op.commit()
            self.forget(live, op)
        return reply

    def take_down(
        self, live: LiveLayer, op: Transaction, *, force: bool, ignore_user: str | None = None
    ) -> UnmountReply:
        """Do every step of an unmount but ``forget``; the caller holds the lock and commits.

        The undo mounts the layer again, so that an unmount, too, is all or nothing.
        ``ignore_user`` is an overlay that the same request has just unmounted.
        """
        layer_id, target = live.spec.layer_id, live.spec.mount_point
        users = self._state.inventory.users_of(layer_id)
        if any(user != ignore_user for user in users):
            raise busy_error(target, "", op, self._state.inventory.holders_of_layer(layer_id))
        names = live.plan.dm_names
        with op.step("look", target):
            mountinfo = refuse_other_mounts(self._state, live.dev, target, op)
            refuse_shared_devices(self._state, names, target, op)
        was_mounted = unmount_target(target, op, dev=live.dev, mountinfo=mountinfo)
        if was_mounted and not (force and live.state == "device_lost"):
            op.on_rollback(f"unmount of {target}", lambda: self._restore(live))
        refuse_held(
            self._state,
            live.dev,
            target,
            op,
            filesystem=live.plan.mount.filesystem,
            name=names[0] if names else None,
        )
        removed = remove_devices(self._state, names, op)
        return UnmountReply(
            unmounted=(target,) if was_mounted else (),
            removed_devices=removed,
            timings_ms=op.timings_ms,
            already=False,
        )

    def forget(self, live: LiveLayer, op: Transaction) -> None:
        """Drop an unmounted layer from inventory and journal; what stays becomes a problem."""
        layer_id = live.spec.layer_id
        inventory = self._state.inventory
        inventory.drop_layer(layer_id)
        inventory.settle_problem(table_problem(layer_id))
        release(self._state, live)
        self._state.tidy(f"the directories of layer {layer_id}", remove_directories, live.created)
        what = f"the journal of layer {layer_id}"
        self._state.tidy(what, self._state.journal.remove_layer, layer_id)
        inventory.release(("layer", layer_id))
        inventory.settle_problem(f"layer {layer_id}")
        self._state.events.publish(
            "layer_unmounted",
            layer_id=layer_id,
            detail=live.spec.mount_point,
            traceparent=op.traceparent,
        )

    def _restore(self, live: LiveLayer) -> None:
        """Mount a layer again whose unmount failed half-way; its device numbers may be new."""
        with undo_deadline(self._state) as deadline, Transaction(deadline) as op:
            again = self.mounting.make(live, op)
            self._state.journal.write_layers((again,), begun="")
            self._state.inventory.add_layer(again)
            op.commit()

    # --- look

    def get(self, layer_id: str, *, already: bool = False) -> LayerReport:
        """Describe a layer as the kernel has it.

        Raises:
            CallError: ``not_found``.
        """
        seen = see_layer(self._state.control, self._live(layer_id))
        return report_of(self._state, seen, already=already)

    def look_at(self, layer_ids: Sequence[str]) -> Iterator[LayerSeen]:
        """Look at layers that a request found mounted already.

        Raises:
            CallError: ``not_found``.
        """
        lives = [self._live(layer_id) for layer_id in layer_ids]
        mounts = mounts_by_target(live.spec.mount_point for live in lives) if lives else {}
        for live in lives:
            yield see_layer(self._state.control, live, mounts)

    def _live(self, layer_id: str) -> LiveLayer:
        live = self._state.inventory.layer(layer_id)
        if live is None:
            raise CallError("not_found", f"there is no layer {layer_id!r}", object=layer_id)
        return live

    def list(self) -> tuple[LayerReport, ...]:
        """Describe all layers. A layer that is being mounted or unmounted may be left out.

        A layer that is not as it was mounted has the state ``unmounted``, where its mount is gone,
        moved or covered, or ``damaged``, where its devices are not its own any more.
        """
        reports = []
        inventory = self._state.inventory
        mounts = mounts_by_target()
        for live in inventory.layers():
            layer_id = live.spec.layer_id
            try:
                seen = see_layer(self._state.control, live, mounts)
            except (CallError, OSError, ValueError) as error:
                if self._state.locks.is_held(("layer", layer_id)):
                    continue
                if inventory.layer(layer_id) is not live:
                    continue
                inventory.note_problem(f"layer {layer_id}", str(error))
                mount = mounts.get(live.spec.mount_point)
                is_there = mount is not None and mount.mount_id == live.mount_id
                state = "damaged" if is_there else "unmounted"
                reports.append(absent_report(self._state, live, state))
            else:
                if live.state == "mounted":
                    inventory.settle_problem(f"layer {layer_id}")
                reports.append(report_of(self._state, seen))
        return tuple(reports)

    def verify(self, layer_id: str, op: Transaction, progress: Progress) -> VerifyReply:
        """Read a whole layer through verity; ``progress`` gets (done_bytes, total_bytes)."""
        return verify_layer(self._state, self._live(layer_id), op, progress)
