"""Layers, overlays of them, and batches of both."""

from guestagent.api.layers import (
    LayerGet,
    LayerList,
    LayerListReply,
    LayerReport,
    LayerSpec,
    LayerUnmount,
    LayerVerify,
    UnmountReply,
    VerifyReply,
)
from guestagent.api.overlays import (
    LayersMount,
    LayersMountReply,
    LayersUnmount,
    LayersUnmountReply,
    OverlayList,
    OverlayListReply,
    OverlayReport,
    OverlaySpec,
    OverlayTrim,
    OverlayUnmount,
    TrimReply,
)
from guestagent.api.request import handles
from guestagent.engine.engine import Engine
from guestagent.engine.locks import KeyLocks
from guestagent.engine.transaction import Transaction
from guestagent.service.context import Context

__all__ = ("LayerHandlers",)


class LayerHandlers:
    """Every handler hands its request to the part of the engine that knows it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lists = KeyLocks()

    def _mount_operation(self, call: Context) -> Transaction:
        """Begin an operation that holds no thread while its devices are not there.

        The time that it has waited so is told with the step that waits.
        """
        operation = self._engine.operation(
            call.deadline, traceparent=call.traceparent, may_be_left=call.call is not None
        )
        if call.waited_seconds:
            operation.timings_ms["device"] = round(call.waited_seconds * 1000, 3)
        return operation

    @handles(LayerSpec)
    def mount(self, request: LayerSpec, call: Context) -> LayerReport:
        """Mount a layer."""
        return self._engine.layers.mount(request, self._mount_operation(call))

    @handles(LayerUnmount)
    def unmount(self, request: LayerUnmount, call: Context) -> UnmountReply:
        """Unmount a layer."""
        operation = call.begin(self._engine)
        return self._engine.layers.unmount(request.layer_id, operation, force=request.force)

    @handles(LayerList)
    def list(self, _request: LayerList, call: Context) -> LayerListReply:
        """Report every layer. One list at a time: each of a thousand layers holds megabytes."""
        with self._lists.hold([("list", "layers")], call.deadline):
            return LayerListReply(layers=self._engine.layers.list())

    @handles(LayerGet)
    def get(self, request: LayerGet, _call: Context) -> LayerReport:
        """Report one layer."""
        return self._engine.layers.get(request.layer_id)

    @handles(LayerVerify)
    def verify(self, request: LayerVerify, call: Context) -> VerifyReply:
        """Read a layer through verity, with notifications of the progress."""

        def progress(done_bytes: int, total_bytes: int) -> None:
            place = {"msgid": call.msgid, "done_bytes": done_bytes, "total_bytes": total_bytes}
            call.notify("agent.progress", place)

        return self._engine.layers.verify(request.layer_id, call.begin(self._engine), progress)

    @handles(LayersMount)
    def mount_many(self, request: LayersMount, call: Context) -> LayersMountReply:
        """Mount layers and an overlay, all or nothing."""
        return self._engine.batches.mount(request, self._mount_operation(call))

    @handles(LayersUnmount)
    def unmount_many(self, request: LayersUnmount, call: Context) -> LayersUnmountReply:
        """Unmount layers and an overlay, all or nothing."""
        return self._engine.batches.unmount(request, call.begin(self._engine))

    @handles(OverlaySpec)
    def mount_overlay(self, request: OverlaySpec, call: Context) -> OverlayReport:
        """Mount an overlay of layers."""
        return self._engine.overlays.mount(request, self._mount_operation(call))

    @handles(OverlayUnmount)
    def unmount_overlay(self, request: OverlayUnmount, call: Context) -> UnmountReply:
        """Unmount an overlay."""
        operation = call.begin(self._engine)
        return self._engine.overlays.unmount(request.overlay_id, operation, force=request.force)

    @handles(OverlayTrim)
    def trim_overlay(self, request: OverlayTrim, call: Context) -> TrimReply:
        """Discard what is unused on the scratch device of an overlay."""
        return self._engine.overlays.trim(request.overlay_id, call.begin(self._engine))

    @handles(OverlayList)
    def list_overlays(self, _request: OverlayList, _call: Context) -> OverlayListReply:
        """Report every overlay."""
        return OverlayListReply(overlays=self._engine.overlays.list())
