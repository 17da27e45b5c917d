"""The handle's methods for agent, layers, overlays, devices and private /dev: one for each RPC."""

from typing import TypeVar

from guestagent.api.agent import (
    AgentCancel,
    AgentFeatures,
    AgentShutdown,
    AgentStatus,
    CancelReply,
    FeaturesReply,
    StatusReply,
)
from guestagent.api.devicemapper import (
    DmList,
    DmListReply,
    DmStatus,
    DmStatusReply,
    DmTable,
    DmTableReply,
)
from guestagent.api.devices import Device, DeviceRemove, DeviceRemoveReply
from guestagent.api.devtree import (
    DevAdd,
    DevAttach,
    DevAttachReply,
    DevClosure,
    DevCreate,
    DevDestroy,
    DevList,
    DevPathsReply,
    DevRemove,
    DevRemoveReply,
    DevTree,
)
from guestagent.api.inspect import StreamRequest
from guestagent.api.layers import (
    LayerGet,
    LayerList,
    LayerReport,
    LayerSpec,
    LayerUnmount,
    LayerVerify,
    UnmountReply,
    VerifyReply,
)
from guestagent.api.net import NetConfigure, NetConfigureReply, NetList, NetListReply
from guestagent.api.observe import AgentCrashes, AgentLog, AgentMetrics, CrashesReply, LogReply
from guestagent.api.overlays import (
    LayersMount,
    LayersMountReply,
    LayersUnmount,
    LayersUnmountReply,
    OverlayList,
    OverlayReport,
    OverlaySpec,
    OverlayTrim,
    OverlayUnmount,
    TrimReply,
)
from guestagent.api.policy import PolicyGet, PolicyNarrow, PolicyReply, PolicySet
from guestagent.api.request import Request
from guestagent.api.share import ShareList, ShareMount, ShareReport, ShareUnmount
from guestagent.host.client.streams import FsStream, ProgressCallback
from vsock.record import Record
from vsock.rpc import Limits

__all__ = ("STREAM_DEADLINE_MS", "AgentMethods", "Caller")

#: Reading a whole layer or device gets the longest deadline that an agent accepts.
STREAM_DEADLINE_MS = Limits().max_deadline_ms
R = TypeVar("R", bound=Record)
T = TypeVar("T")


class Caller:
    """What the methods of ``GuestAgent`` are made with."""

    def call(
        self,
        request: Request[R],
        *,
        deadline_ms: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> R:
        """Send a request; see ``GuestAgent``."""
        raise NotImplementedError

    def stream(
        self,
        request: StreamRequest[Record, T],
        *,
        deadline_ms: int = STREAM_DEADLINE_MS,
        progress: ProgressCallback | None = None,
    ) -> FsStream[T]:
        """Send a request whose answer comes in chunks; see ``GuestAgent``."""
        raise NotImplementedError


class AgentMethods(Caller):
    """Part of ``GuestAgent``: the agent itself, layers, overlays, device-mapper, private /dev,
    network."""

    # --- agent

    def status(self) -> StatusReply:
        """Say how the agent is: ready or degraded, with problems, counts and memory."""
        return self.call(AgentStatus())

    def cancel(self, msgid: int) -> CancelReply:
        """Stop a request of this connection that is still waiting; what it made is undone."""
        return self.call(AgentCancel(msgid=msgid))

    def shutdown(self, mode: str = "poweroff", *, force: bool = False) -> None:
        """Unmount everything, then poweroff or reboot the machine, or exit the agent alone.

        Raises:
            CallError: ``busy``, something is in use and stays; ``force`` goes on in spite of it.
        """
        self.call(AgentShutdown(mode=mode, force=force))

    def log(self, since: int = 0, *, level: str = "info") -> LogReply:
        """Return lines of the agent's log after a number (negative: so many from the end).

        There may be more: then ``more`` is true, and ``next`` is the next ``since``.
        """
        return self.call(AgentLog(since=since, level=level))

    def metrics(self) -> str:
        """Return the agent's metrics in the Prometheus text format."""
        return self.call(AgentMetrics()).text

    def features(self) -> FeaturesReply:
        """List every feature of agent and kernel, and why one is not there."""
        return self.call(AgentFeatures())

    def crashes(self, since: int = 0) -> CrashesReply:
        """Return the kept crash reports of agent processes and their threads."""
        return self.call(AgentCrashes(since=since))

    # --- layers

    def layer_mount(self, spec: LayerSpec, *, deadline_ms: int | None = None) -> LayerReport:
        """Mount a layer read-only. The same request again answers the same, with ``already``.

        Raises:
            CallError: ``integrity``, it is not what the root digest says; ``timeout`` at step
                "device", the device is not there; ``conflict``, the id or the target is another's;
                ``device`` or ``mount``, a step failed. Whatever was made is undone.
        """
        return self.call(spec, deadline_ms=deadline_ms)

    def layer_unmount(self, layer_id: str, *, force: bool = False) -> UnmountReply:
        """Unmount a layer and wait until its devices are gone.

        Raises:
            CallError: ``busy``, in use; the hint names the holders. Nothing was changed.
        """
        return self.call(LayerUnmount(layer_id=layer_id, force=force))

    def layer_list(self) -> tuple[LayerReport, ...]:
        """Return every layer as the kernel has it now."""
        return self.call(LayerList()).layers

    def layer_get(self, layer_id: str) -> LayerReport:
        """Return one layer as the kernel has it now; ``not_found`` if there is none."""
        return self.call(LayerGet(layer_id=layer_id))

    def layer_verify(
        self,
        layer_id: str,
        *,
        progress: ProgressCallback | None = None,
        deadline_ms: int | None = None,
    ) -> VerifyReply:
        """Read a whole layer through its verity device and list the blocks that are corrupt.

        ``progress`` gets (done_bytes, total_bytes), on a thread of the handle's.
        """
        request = LayerVerify(layer_id=layer_id)
        return self.call(request, deadline_ms=deadline_ms, progress=progress)

    def layers_mount(
        self, request: LayersMount, *, deadline_ms: int | None = None
    ) -> LayersMountReply:
        """Mount many layers in parallel and an overlay of them: all or nothing."""
        return self.call(request, deadline_ms=deadline_ms)

    def layers_unmount(self, request: LayersUnmount) -> LayersUnmountReply:
        """Unmount an overlay and layers in parallel: all or nothing."""
        return self.call(request)

    # --- overlays

    def overlay_mount(self, spec: OverlaySpec, *, deadline_ms: int | None = None) -> OverlayReport:
        """Overlay mounted layers, topmost first; writable if there is a scratch."""
        return self.call(spec, deadline_ms=deadline_ms)

    def overlay_unmount(self, overlay_id: str, *, force: bool = False) -> UnmountReply:
        """Unmount an overlay and its scratch; its layers stay. ``busy`` names the holders."""
        return self.call(OverlayUnmount(overlay_id=overlay_id, force=force))

    def overlay_trim(self, overlay_id: str, *, deadline_ms: int | None = None) -> TrimReply:
        """Tell the device of a scratch which blocks are unused; ``unsupported`` where it cannot."""
        return self.call(OverlayTrim(overlay_id=overlay_id), deadline_ms=deadline_ms)

    def overlay_list(self) -> tuple[OverlayReport, ...]:
        """Return every overlay as the kernel has it now."""
        return self.call(OverlayList()).overlays

    # --- disks and device-mapper

    def device_remove(self, device: Device) -> DeviceRemoveReply:
        """Have the kernel let go of a SCSI disk, and wait until it is gone.

        Raises:
            CallError: ``busy``, in use; ``unsupported``, no SCSI disk.
        """
        return self.call(DeviceRemove(device=device))

    def dm_list(self) -> DmListReply:
        """Return every device-mapper device of the guest, the agent's and others."""
        return self.call(DmList())

    def dm_table(self, name: str) -> DmTableReply:
        """Return the table lines of a device, as dmsetup prints them."""
        return self.call(DmTable(name=name))

    def dm_status(self, name: str) -> DmStatusReply:
        """Return the status lines of a device, and the device."""
        return self.call(DmStatus(name=name))

    # --- private /dev trees

    def dev_create(self, request: DevCreate) -> DevTree:
        """Make a private /dev. The same request again answers the same, with ``already``."""
        return self.call(request)

    def dev_add(self, request: DevAdd) -> DevPathsReply:
        """Add paths of the guest's /dev to a tree, with what they need: all or nothing."""
        return self.call(request)

    def dev_remove(self, request: DevRemove) -> DevRemoveReply:
        """Take paths out of a tree, with what no other path needs: all or nothing."""
        return self.call(request)

    def dev_closure(self, request: DevClosure) -> DevPathsReply:
        """Say what paths of the guest's /dev need; nothing is made."""
        return self.call(request)

    def dev_list(self, tree_id: str | None = None) -> tuple[DevTree, ...]:
        """Return every tree, or one with all of its files; ``not_found`` if there is none."""
        return self.call(DevList(tree_id=tree_id)).trees

    def dev_attach(self, request: DevAttach) -> DevAttachReply:
        """Mount a tree on a directory of the guest or of a container."""
        return self.call(request)

    def dev_destroy(self, tree_id: str) -> None:
        """Take a tree away; ``busy`` names what still has it."""
        self.call(DevDestroy(tree_id=tree_id))

    # --- policy

    def policy_set(self, document: bytes, *, signature: bytes | None = None) -> PolicyReply:
        """Put a policy in force, once; it stays so until the machine ends."""
        return self.call(PolicySet(document=document, signature=signature))

    def policy_narrow(self, document: bytes) -> PolicyReply:
        """Have a second policy judge as well: from now on both must allow."""
        return self.call(PolicyNarrow(document=document))

    def policy_get(self) -> PolicyReply:
        """Return which policy is in force, and what it has denied."""
        return self.call(PolicyGet())

    # --- shared directories

    def share_mount(self, request: ShareMount) -> ShareReport:
        """Mount a directory of the host. The same request again answers the same, with
        ``already``."""
        return self.call(request)

    def share_unmount(self, share_id: str) -> UnmountReply:
        """Unmount a shared directory; ``busy`` names what still uses it."""
        return self.call(ShareUnmount(share_id=share_id))

    def share_list(self) -> tuple[ShareReport, ...]:
        """Return every shared directory as the kernel has it."""
        return self.call(ShareList()).shares

    # --- network

    def net_configure(
        self, request: NetConfigure, *, deadline_ms: int | None = None
    ) -> NetConfigureReply:
        """Set up interfaces, routes, rules, names and DNS: all or nothing.

        Raises:
            CallError: ``not_found``, the guest has no such interface; ``conflict``, a name, route
                or address is another's; ``invalid``, the kernel cannot have it so. ``object`` names
                the field. Whatever was changed is as it was.
        """
        return self.call(request, deadline_ms=deadline_ms)

    def net_list(self) -> NetListReply:
        """Return the guest's network as its kernel has it."""
        return self.call(NetList())
