"""Every method by name: its request, its reply, and whether it may wait."""

from guestagent.api.agent import (
    CancelReply,
    CancelRequest,
    DmListReply,
    DmName,
    DmStatusReply,
    DmTableReply,
    Empty,
    EventsReply,
    EventsRequest,
    HelloReply,
    HelloRequest,
    ShutdownRequest,
    StatusReply,
    SubscribeReply,
)
from guestagent.api.inspect import ChecksumsReply, ChecksumsRequest, MoreReply, MoreRequest
from guestagent.api.layers import (
    LayerId,
    LayerListReply,
    LayerReport,
    LayerSpec,
    LayerUnmountRequest,
    UnmountReply,
    VerifyReply,
    VerifyRequest,
)
from guestagent.api.overlays import (
    LayersMountReply,
    LayersMountRequest,
    LayersUnmountReply,
    LayersUnmountRequest,
    OverlayListReply,
    OverlayReport,
    OverlaySpec,
    OverlayUnmountRequest,
)
from vsock.record import Record


class Method(Record):
    """One row of the contract. ``quick`` methods never wait and are answered at once."""

    name: str
    request: type[Record]
    reply: type[Record]
    quick: bool
    summary: str


def _methods() -> dict[str, Method]:
    rows = (
        ("agent.hello", HelloRequest, HelloReply, True, "agree on a version"),
        ("agent.status", Empty, StatusReply, True, "say how the agent is"),
        ("agent.cancel", CancelRequest, CancelReply, True, "stop a waiting request"),
        ("agent.shutdown", ShutdownRequest, Empty, False, "unmount all, then end"),
        ("agent.subscribe", Empty, SubscribeReply, True, "send events to this connection"),
        ("agent.events", EventsRequest, EventsReply, True, "list events since a sequence number"),
        ("agent.more", MoreRequest, MoreReply, True, "ask for more chunks of an answer"),
        ("layer.mount", LayerSpec, LayerReport, False, "mount a read-only layer"),
        ("layer.unmount", LayerUnmountRequest, UnmountReply, False, "unmount a layer"),
        ("layer.list", Empty, LayerListReply, False, "list the layers, read back from the kernel"),
        ("layer.get", LayerId, LayerReport, False, "describe one layer"),
        ("layer.verify", VerifyRequest, VerifyReply, False, "read a layer through verity"),
        ("layers.mount", LayersMountRequest, LayersMountReply, False, "mount many, all or nothing"),
        ("layers.unmount", LayersUnmountRequest, LayersUnmountReply, False, "unmount many"),
        ("overlay.mount", OverlaySpec, OverlayReport, False, "overlay mounted layers"),
        ("overlay.unmount", OverlayUnmountRequest, UnmountReply, False, "unmount an overlay"),
        ("overlay.list", Empty, OverlayListReply, False, "list the overlays"),
        ("dm.list", Empty, DmListReply, False, "list every device-mapper device"),
        ("dm.table", DmName, DmTableReply, False, "print a device's table"),
        ("dm.status", DmName, DmStatusReply, False, "print a device's status"),
        ("fs.checksums", ChecksumsRequest, ChecksumsReply, False, "hash every file of a tree"),
    )
    return {
        name: Method(name=name, request=request, reply=reply, quick=quick, summary=summary)
        for name, request, reply, quick, summary in rows
    }


#: Every method of the contract by name.
METHODS = _methods()
