"""The host's handle on one agent: typed methods, one for each RPC.

    with GuestAgent("hybrid:///run/vm.vsock:1024") as guest:
        guest.layer_mount(LayerSpec(layer_id="base", device=PmemDevice(number=0), ...))

Requests and replies are the records of ``guestagent.api``. A call that fails raises ``CallError``
with the agent's code, errno, step, object and hint; a connection that ends raises
``ConnectionClosed``; a handle that was closed raises ``ClosedHandleError``. Thread-safe: calls from
several threads are in flight at once. Nothing reconnects by itself.
"""

from collections.abc import Callable

from guestagent import __version__
from guestagent.api import (
    PROTOCOL_VERSIONS,
    CancelReply,
    CancelRequest,
    DmListReply,
    DmName,
    DmStatusReply,
    DmTableReply,
    Empty,
    Event,
    EventsReply,
    EventsRequest,
    HelloReply,
    HelloRequest,
    LayerId,
    LayerListReply,
    LayerReport,
    LayersMountReply,
    LayersMountRequest,
    LayerSpec,
    LayersUnmountReply,
    LayersUnmountRequest,
    LayerUnmountRequest,
    OverlayListReply,
    OverlayReport,
    OverlaySpec,
    OverlayUnmountRequest,
    ShutdownRequest,
    StatusReply,
    SubscribeReply,
    UnmountReply,
    VerifyReply,
    VerifyRequest,
)
from guestagent.client.inspect import InspectMethods
from guestagent.client.inspect_devices import DeviceMethods
from guestagent.client.streams import Streams
from vsock.address import Address
from vsock.client import Client
from vsock.record import Record

__all__ = ("GuestAgent",)

EventCallback = Callable[[Event], None]
ProgressCallback = Callable[[int, int], None]


class GuestAgent(InspectMethods, DeviceMethods):
    """A connection to an agent that has said hello. A context manager.

    Args:
        address: text as ``vsock.address.parse_address`` reads it, or an ``Address``.
        connect_seconds: how long to try while the machine boots.
        deadline_ms: the deadline of each request that names none itself; the agent holds it.
    """

    def __init__(
        self,
        address: str | Address,
        *,
        connect_seconds: float = 10.0,
        deadline_ms: int = 60_000,
        name: str = f"guestctl/{__version__}",
    ) -> None:
        self._deadline_ms = deadline_ms
        self._on_event: list[EventCallback] = []
        self._on_progress: dict[int, ProgressCallback] = {}
        self._client = Client(
            address, connect_seconds=connect_seconds, on_notification=self._notified
        )
        self._streams = Streams(self._client)
        try:
            #: What the agent answered to hello: version, features, limits, boot.
            self.hello = self._hello(name)
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> "GuestAgent":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; calls in flight raise ``ConnectionClosed``. Idempotent."""
        self._client.close()

    def call(
        self, method: str, request: Record, *, deadline_ms: int | None = None
    ) -> dict[str, object]:
        """Send any request of the contract and return the reply as a plain map."""
        reply = self._client.call(
            method, request.to_wire(), deadline_ms=deadline_ms or self._deadline_ms
        )
        assert isinstance(reply, dict)
        return reply

    # --- agent

    def status(self) -> StatusReply:
        """Say how the agent is: problems, counts, memory."""
        return StatusReply.from_wire(self.call("agent.status", Empty()), "reply")

    def cancel(self, msgid: int) -> CancelReply:
        """Stop a request of this connection that is still waiting."""
        return CancelReply.from_wire(self.call("agent.cancel", CancelRequest(msgid=msgid)), "reply")

    def shutdown(self, mode: str = "poweroff", *, force: bool = False) -> None:
        """Unmount everything, then power off, reboot, or exit the agent alone."""
        self.call("agent.shutdown", ShutdownRequest(mode=mode, force=force))

    def subscribe(self, callback: EventCallback) -> SubscribeReply:
        """Call ``callback`` with each event from now on, on a thread of the client's own."""
        self._on_event.append(callback)
        return SubscribeReply.from_wire(self.call("agent.subscribe", Empty()), "reply")

    def events(self, since: int = 0) -> EventsReply:
        """Return the kept events after a sequence number."""
        request = EventsRequest(since=since)
        return EventsReply.from_wire(self.call("agent.events", request), "reply")

    # --- layers

    def layer_mount(self, spec: LayerSpec, *, deadline_ms: int | None = None) -> LayerReport:
        """Mount a layer. The same request again answers the same, with ``already``."""
        reply = self.call("layer.mount", spec, deadline_ms=deadline_ms)
        return LayerReport.from_wire(reply, "reply")

    def layer_unmount(self, layer_id: str, *, force: bool = False) -> UnmountReply:
        """Unmount a layer and wait until its devices are gone; ``busy`` names the holders."""
        request = LayerUnmountRequest(layer_id=layer_id, force=force)
        return UnmountReply.from_wire(self.call("layer.unmount", request), "reply")

    def layer_list(self) -> tuple[LayerReport, ...]:
        """Return every layer as the kernel has it now."""
        return LayerListReply.from_wire(self.call("layer.list", Empty()), "reply").layers

    def layer_get(self, layer_id: str) -> LayerReport:
        """Return one layer as the kernel has it now."""
        reply = self.call("layer.get", LayerId(layer_id=layer_id))
        return LayerReport.from_wire(reply, "reply")

    def layer_verify(
        self,
        layer_id: str,
        *,
        progress: ProgressCallback | None = None,
        deadline_ms: int | None = None,
    ) -> VerifyReply:
        """Read a whole layer through its verity device.

        ``progress`` gets (done_bytes, total_bytes).
        """
        params = VerifyRequest(layer_id=layer_id).to_wire()
        pending = self._client.start_call(
            "layer.verify", params, deadline_ms=deadline_ms or self._deadline_ms
        )
        if progress is not None:
            self._on_progress[pending.msgid] = progress
        try:
            return VerifyReply.from_wire(pending.result(), "reply")
        finally:
            self._on_progress.pop(pending.msgid, None)

    def layers_mount(
        self, request: LayersMountRequest, *, deadline_ms: int | None = None
    ) -> LayersMountReply:
        """Mount many layers in parallel and an overlay of them: all or nothing."""
        reply = self.call("layers.mount", request, deadline_ms=deadline_ms)
        return LayersMountReply.from_wire(reply, "reply")

    def layers_unmount(self, request: LayersUnmountRequest) -> LayersUnmountReply:
        """Unmount an overlay and layers in parallel."""
        return LayersUnmountReply.from_wire(self.call("layers.unmount", request), "reply")

    # --- overlays

    def overlay_mount(self, spec: OverlaySpec, *, deadline_ms: int | None = None) -> OverlayReport:
        """Overlay mounted layers, topmost first."""
        reply = self.call("overlay.mount", spec, deadline_ms=deadline_ms)
        return OverlayReport.from_wire(reply, "reply")

    def overlay_unmount(self, overlay_id: str, *, force: bool = False) -> UnmountReply:
        """Unmount an overlay and its scratch; its layers stay."""
        request = OverlayUnmountRequest(overlay_id=overlay_id, force=force)
        return UnmountReply.from_wire(self.call("overlay.unmount", request), "reply")

    def overlay_list(self) -> tuple[OverlayReport, ...]:
        """Return every overlay as the kernel has it now."""
        return OverlayListReply.from_wire(self.call("overlay.list", Empty()), "reply").overlays

    # --- device-mapper

    def dm_list(self) -> DmListReply:
        """Return every device-mapper device of the guest, the agent's and others."""
        return DmListReply.from_wire(self.call("dm.list", Empty()), "reply")

    def dm_table(self, name: str) -> DmTableReply:
        """Return the table lines of a device."""
        return DmTableReply.from_wire(self.call("dm.table", DmName(name=name)), "reply")

    def dm_status(self, name: str) -> DmStatusReply:
        """Return the status lines of a device, and the device."""
        return DmStatusReply.from_wire(self.call("dm.status", DmName(name=name)), "reply")

    # --- inside

    def _hello(self, name: str) -> HelloReply:
        request = HelloRequest(versions=PROTOCOL_VERSIONS, client=name)
        return HelloReply.from_wire(self.call("agent.hello", request), "reply")

    def _notified(self, method: str, params: object) -> None:
        if not isinstance(params, dict):
            return
        if method == "agent.event":
            event = Event.from_wire(params, "event")
            for callback in list(self._on_event):
                callback(event)
        elif method == "agent.chunk":
            self._streams.chunk(params)
        elif method == "agent.progress":
            self._streams.progress(params)
            progress = self._on_progress.get(params["msgid"])
            if progress is not None:
                progress(params["done_bytes"], params["total_bytes"])
