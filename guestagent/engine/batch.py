"""Many layers in one request: mounted and unmounted on a few threads, all or nothing.

Each layer is a transaction of its own, whose undos the transaction of the batch takes over. So a
batch that fails anywhere undoes everything in reverse.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from guestagent.api import (
    LayerReport,
    LayersMount,
    LayerSpec,
    LayersUnmount,
    OverlayReport,
    OverlaySpec,
)
from guestagent.api.layers import UnmountReply
from guestagent.api.overlays import LayersMountReply, LayersUnmountReply
from guestagent.engine.inventory import LayerClaim, LiveLayer, LiveOverlay
from guestagent.engine.layers import Layers
from guestagent.engine.overlays import Overlays
from guestagent.engine.parallel import for_each
from guestagent.engine.readback import LayerSeen, ignored_report, report_of, see_layer
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import nothing_to_unmount
from guestagent.engine.transaction import Transaction
from guestagent.storage.mountinfo import mounts_by_target
from vsock.errors import CallError

__all__ = ("Batches",)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    Item = TypeVar("Item")
    Result = TypeVar("Result")


class Batches:
    def __init__(self, state: EngineState, layers: Layers, overlays: Overlays) -> None:
        self._state = state
        self._layers = layers
        self._overlays = overlays

    # --- mount

    def mount(self, request: LayersMount, op: Transaction) -> LayersMountReply:
        """Mount layers in parallel, then the overlay; all or nothing.

        Layers that are there already, with the same specification, are left alone and reported.

        Raises:
            CallError: of the first layer that failed; what the others made is undone.
        """
        begin = time.perf_counter()
        keys = {("layer", spec.layer_id) for spec in request.layers}
        if request.overlay is not None:
            keys.update(self._overlays.keys(request.overlay))
        with self._state.hold(keys, op):
            self._state.gate.batch(request)
            # the name is never used again, so that what was begun is not another batch's
            begun = f"batch-{time.monotonic_ns()}-{request.layers[0].layer_id}"
            missing = [spec for spec in request.layers if not self._layers.is_mounted(spec)]
            with op:
                claims = self._claim(missing, request.overlay, op)
                ignored = [claim for claim in claims if claim.is_ignored]
                claims = [claim for claim in claims if not claim.is_ignored]
                made = self._bring_layers_up(claims, begun, op)
                overlay = self._bring_overlay_up(request, made, op)
                with op.step("read back", f"{len(request.layers)} layers"):
                    there = self._look_at_others(request, made, ignored)
                    overlay_report = self._report_overlay(request, overlay)
                with op.step("commit", begun, code="resource"):
                    if overlay is not None:
                        self._overlays.write(overlay, begun, op)
                    self._state.journal.decide(begun)
                op.commit()
            self._keep(made, overlay)
            for each in made:
                self._layers.announce(each.live, op)
            if overlay is not None:
                self._overlays.announce(overlay, op)
            reports = self._report(made, there)
            for claim in ignored:
                reports[claim.spec.layer_id] = ignored_report(self._state, claim, op.timings_ms)
        op.timings_ms["total"] = round((time.perf_counter() - begin) * 1000, 3)
        return LayersMountReply(
            layers=tuple(reports[spec.layer_id] for spec in request.layers),
            overlay=overlay_report,
            timings_ms=op.timings_ms,
        )

    def _claim(
        self, specs: Sequence[LayerSpec], overlay: OverlaySpec | None, op: Transaction
    ) -> list[LayerClaim]:
        """Claim all layers; every device is there before anything is done to one."""
        reservations = []
        for spec in specs:
            with self._announcing(spec, op):
                reservations.append(self._layers.mounting.reserve(spec, op))
        if overlay is not None and not self._overlays.is_mounted(overlay):
            self._overlays.find_scratch(overlay, op)
        claims = []
        for spec, reservation in zip(specs, reservations, strict=True):
            with self._announcing(spec, op):
                claims.append(self._layers.mounting.claim(spec, reservation, op))
        return claims

    @contextmanager
    def _announcing(self, spec: LayerSpec, op: Transaction) -> Iterator[None]:
        try:
            yield
        except CallError as error:
            self._layers.announce_failure(spec, error, op)
            raise

    def _bring_layers_up(
        self, claims: Sequence[LayerClaim], begun: str, op: Transaction
    ) -> list[LayerSeen]:
        if not claims:
            return []
        self._layers.begin(begun, claims, op)
        what = f"{len(claims)} layers"
        with op.step("layers", what, code="resource"):
            lives = self._make(claims, op)
            with op.step("journal", what, code="resource"):
                self._layers.write(lives, begun, op)
            with op.step("read back", what):
                mounts = mounts_by_target(live.spec.mount_point for live in lives)
                control, tables = self._state.control, op.loaded_tables
                return [see_layer(control, live, mounts, tables) for live in lives]

    def _make(self, claims: Sequence[LayerClaim], op: Transaction) -> list[LiveLayer]:
        """Make the devices and mounts of all claims.

        Raises:
            CallError: of the layer that caused the failure, which it names.
        """

        def make(claim: LayerClaim, child: Transaction) -> LiveLayer:
            spec = claim.spec
            try:
                return self._layers.make(claim, child)
            except CallError as error:
                self._layers.announce_failure(spec, error, op)
                if repr(spec.layer_id) not in error.message:
                    error.message = f"layer {spec.layer_id!r}: {error.message}"
                raise

        return self._in_parallel(claims, make, op, _mount_threads())

    def _bring_overlay_up(
        self, request: LayersMount, made: list[LayerSeen], op: Transaction
    ) -> LiveOverlay | None:
        spec = request.overlay
        if spec is None or self._overlays.is_mounted(spec):
            return None
        fresh = {each.live.spec.layer_id: each.live for each in made}
        try:
            return self._overlays.bring_up(spec, op, fresh)
        except CallError as error:
            self._overlays.announce_failure(spec, error, op)
            raise

    def _look_at_others(
        self, request: LayersMount, made: Sequence[LayerSeen], ignored: Sequence[LayerClaim]
    ) -> list[LayerSeen]:
        """Look at the layers that were there already."""
        new = {each.live.spec.layer_id for each in made}
        new.update(claim.spec.layer_id for claim in ignored)
        ids = (spec.layer_id for spec in request.layers)
        return list(self._layers.look_at([name for name in ids if name not in new]))

    def _report_overlay(
        self, request: LayersMount, overlay: LiveOverlay | None
    ) -> OverlayReport | None:
        if overlay is not None:
            return self._overlays.report(overlay)
        if request.overlay is not None:
            return self._overlays.get(request.overlay.overlay_id, already=True)
        return None

    def _report(
        self, made: Sequence[LayerSeen], there: Sequence[LayerSeen]
    ) -> dict[str, LayerReport]:
        """Report what was seen of each layer, with its overlaps: all are in the inventory now."""
        reports = [report_of(self._state, seen) for seen in made]
        reports += [report_of(self._state, seen, already=True) for seen in there]
        return {report.layer_id: report for report in reports}

    def _keep(self, made: Sequence[LayerSeen], overlay: LiveOverlay | None) -> None:
        """Add what is decided to the inventory; nothing can fail any more."""
        for each in made:
            self._state.inventory.add_layer(each.live)
        if overlay is not None:
            self._state.inventory.add_overlay(overlay)
            overlay_id = overlay.spec.overlay_id
            what = f"what was begun of overlay {overlay_id}"
            self._state.tidy(what, self._overlays.settle, overlay_id)

    # --- unmount

    def unmount(self, request: LayersUnmount, op: Transaction) -> LayersUnmountReply:
        """Take an overlay down, then layers in parallel; all or nothing.

        Raises:
            CallError: of the first that could not go, mostly ``busy``; everything is mounted again.
        """
        begin = time.perf_counter()
        keys = {("layer", layer_id) for layer_id in request.layers}
        if request.overlay is not None:
            keys.add(("overlay", request.overlay))
        inventory = self._state.inventory
        with self._state.hold(keys, op):
            overlay = inventory.overlay(request.overlay) if request.overlay else None
            found = (inventory.layer(layer_id) for layer_id in dict.fromkeys(request.layers))
            layers = [live for live in found if live is not None]
            with op:
                overlay_reply = self._take_overlay_down(overlay, op, force=request.force)
                replies = self._take_layers_down(layers, overlay, op, force=request.force)
                if overlay is not None:
                    self._overlays.take_scratch_down(overlay, op)
                op.commit()
            if overlay is not None:
                self._overlays.forget(overlay, op)
            for live in layers:
                self._layers.forget(live, op)
        op.timings_ms["total"] = round((time.perf_counter() - begin) * 1000, 3)
        gone = {live.spec.layer_id: reply for live, reply in zip(layers, replies, strict=True)}
        return LayersUnmountReply(
            layers={
                layer_id: gone.get(layer_id) or nothing_to_unmount(op)
                for layer_id in request.layers
            },
            overlay=overlay_reply if request.overlay is not None else None,
            timings_ms=op.timings_ms,
        )

    def _take_overlay_down(
        self, overlay: LiveOverlay | None, op: Transaction, *, force: bool
    ) -> UnmountReply:
        if overlay is None:
            return nothing_to_unmount(op)
        return self._overlays.take_down(overlay, op, force=force)

    def _take_layers_down(
        self, layers: list[LiveLayer], overlay: LiveOverlay | None, op: Transaction, *, force: bool
    ) -> list[UnmountReply]:
        ignore = overlay.spec.overlay_id if overlay is not None else None

        def take_down(live: LiveLayer, child: Transaction) -> UnmountReply:
            return self._layers.take_down(live, child, force=force, ignore_user=ignore)

        with op.step("layers", f"{len(layers)} layers"):
            return self._in_parallel(layers, take_down, op, self._unmount_threads())

    def _unmount_threads(self) -> int:
        """Return how many threads unmount: many wait for the kernel at the same time, but on one
        processor their hand-overs take longer than the waits (64 layers in UML: 1.15x singles)."""
        return 1 if os.cpu_count() == 1 else self._state.rules.parallel

    # --- in parallel

    def _in_parallel(
        self,
        items: "Sequence[Item]",
        work: "Callable[[Item, Transaction], Result]",
        op: Transaction,
        threads: int,
    ) -> "list[Result]":
        """Do ``work`` for each item, each under a child of ``op``, which takes over its undos."""
        children = [op.child() for _ in items]
        try:
            return for_each(
                items,
                lambda number, item: work(item, children[number]),
                threads=threads,
            )
        finally:
            for child in children:
                op.adopt(child)


def _mount_threads() -> int:
    """Return how many threads mount: one waits for the kernel while the others run Python."""
    return (os.cpu_count() or 1) + 1
