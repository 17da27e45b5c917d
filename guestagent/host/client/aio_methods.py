"""The asyncio twin of ``guestagent.host.client.methods``, by scripts/twin."""

from typing import TypeVar

from guestagent.api import (
    CancelReply,
    CancelRequest,
    DmListReply,
    DmName,
    DmStatusReply,
    DmTableReply,
    Empty,
    EventsReply,
    EventsRequest,
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
    UnmountReply,
    VerifyReply,
    VerifyRequest,
)
from guestagent.api.observe import CrashesReply, CrashesRequest, LogReply, LogRequest, MetricsReply
from guestagent.host.client.aio_streams import AsyncStreams
from guestagent.host.client.entries import nothing
from guestagent.host.client.streams import ProgressCallback
from vsock.record import Record

__all__ = ("AsyncAgentMethods",)
R = TypeVar("R", bound=Record)


class AsyncAgentMethods:
    """Part of ``AsyncGuestAgent``: the agent itself, layers, overlays, device-mapper."""

    _streams: AsyncStreams
    _deadline_ms: int

    async def call(
        self, method: str, request: Record, *, deadline_ms: int | None = None
    ) -> dict[str, object]:
        """Send a request; see ``AsyncGuestAgent``."""
        raise NotImplementedError

    async def _get(
        self, method: str, request: Record, reply: type[R], deadline_ms: int | None = None
    ) -> R:
        return reply.from_wire(await self.call(method, request, deadline_ms=deadline_ms), "reply")

    async def status(self) -> StatusReply:
        """Say how the agent is: ready or degraded, with problems, counts and memory."""
        return await self._get("agent.status", Empty(), StatusReply)

    async def cancel(self, msgid: int) -> CancelReply:
        """Stop a request of this connection that is still waiting; what it made is undone."""
        return await self._get("agent.cancel", CancelRequest(msgid=msgid), CancelReply)

    async def shutdown(self, mode: str = "poweroff", *, force: bool = False) -> None:
        """Unmount everything, then poweroff or reboot the machine, or exit the agent alone.

        Raises:
            CallError: ``busy``, something is in use and stays; ``force`` goes on in spite of it.
        """
        await self.call("agent.shutdown", ShutdownRequest(mode=mode, force=force))

    async def events(self, since: int = 0) -> EventsReply:
        """Return the kept events after a sequence number, and how many are no longer kept."""
        return await self._get("agent.events", EventsRequest(since=since), EventsReply)

    async def log(self, since: int = 0, *, level: str = "info") -> LogReply:
        """Return lines of the agent's log after a number (negative: so many from the end).

        There may be more: then ``more`` is true, and ``next`` is the next ``since``.
        """
        return await self._get("agent.log", LogRequest(since=since, level=level), LogReply)

    async def metrics(self) -> str:
        """Return the agent's metrics in the Prometheus text format."""
        return (await self._get("agent.metrics", Empty(), MetricsReply)).text

    async def crashes(self, since: int = 0) -> CrashesReply:
        """Return the kept reports of how lives of the agent, or threads of it, ended."""
        return await self._get("agent.crashes", CrashesRequest(since=since), CrashesReply)

    async def layer_mount(self, spec: LayerSpec, *, deadline_ms: int | None = None) -> LayerReport:
        """Mount a layer read-only. The same request again answers the same, with ``already``.

        Raises:
            CallError: ``integrity``, it is not what the root digest says; ``timeout`` at step
                "device", the device is not there; ``conflict``, the id or the target is another's;
                ``device`` or ``mount``, a step failed. Whatever was made is undone.
        """
        return await self._get("layer.mount", spec, LayerReport, deadline_ms)

    async def layer_unmount(self, layer_id: str, *, force: bool = False) -> UnmountReply:
        """Unmount a layer and wait until its devices are gone.

        Raises:
            CallError: ``busy``, in use; the hint names the holders. Nothing was changed.
        """
        request = LayerUnmountRequest(layer_id=layer_id, force=force)
        return await self._get("layer.unmount", request, UnmountReply)

    async def layer_list(self) -> tuple[LayerReport, ...]:
        """Return every layer as the kernel has it now."""
        return (await self._get("layer.list", Empty(), LayerListReply)).layers

    async def layer_get(self, layer_id: str) -> LayerReport:
        """Return one layer as the kernel has it now; ``not_found`` if there is none."""
        return await self._get("layer.get", LayerId(layer_id=layer_id), LayerReport)

    async def layer_verify(
        self,
        layer_id: str,
        *,
        progress: ProgressCallback | None = None,
        deadline_ms: int | None = None,
    ) -> VerifyReply:
        """Read a whole layer through its verity device and list the blocks that are corrupt.

        ``progress`` gets (done_bytes, total_bytes), on a thread of the handle's.
        """
        async with await self._streams.start(
            "layer.verify",
            VerifyRequest(layer_id=layer_id).to_wire(),
            nothing,
            deadline_ms=deadline_ms or self._deadline_ms,
            progress=progress,
        ) as stream:
            return VerifyReply.from_wire(await stream.drain(), "reply")

    async def layers_mount(
        self, request: LayersMountRequest, *, deadline_ms: int | None = None
    ) -> LayersMountReply:
        """Mount many layers in parallel and an overlay of them: all or nothing."""
        return await self._get("layers.mount", request, LayersMountReply, deadline_ms)

    async def layers_unmount(self, request: LayersUnmountRequest) -> LayersUnmountReply:
        """Unmount an overlay and layers in parallel: all or nothing."""
        return await self._get("layers.unmount", request, LayersUnmountReply)

    async def overlay_mount(
        self, spec: OverlaySpec, *, deadline_ms: int | None = None
    ) -> OverlayReport:
        """Overlay mounted layers, topmost first; writable if there is a scratch."""
        return await self._get("overlay.mount", spec, OverlayReport, deadline_ms)

    async def overlay_unmount(self, overlay_id: str, *, force: bool = False) -> UnmountReply:
        """Unmount an overlay and its scratch; its layers stay. ``busy`` names the holders."""
        request = OverlayUnmountRequest(overlay_id=overlay_id, force=force)
        return await self._get("overlay.unmount", request, UnmountReply)

    async def overlay_list(self) -> tuple[OverlayReport, ...]:
        """Return every overlay as the kernel has it now."""
        return (await self._get("overlay.list", Empty(), OverlayListReply)).overlays

    async def dm_list(self) -> DmListReply:
        """Return every device-mapper device of the guest, the agent's and others."""
        return await self._get("dm.list", Empty(), DmListReply)

    async def dm_table(self, name: str) -> DmTableReply:
        """Return the table lines of a device, as dmsetup prints them."""
        return await self._get("dm.table", DmName(name=name), DmTableReply)

    async def dm_status(self, name: str) -> DmStatusReply:
        """Return the status lines of a device, and the device."""
        return await self._get("dm.status", DmName(name=name), DmStatusReply)
