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
from guestagent.api.inspect import (
    AclReply,
    AclRequest,
    ChecksumReply,
    ChecksumRequest,
    ChecksumsReply,
    ChecksumsRequest,
    DataReply,
    DownloadReply,
    DownloadRequest,
    DuReply,
    ExistsReply,
    FindRequest,
    HeadRequest,
    ListReply,
    MoreReply,
    MoreRequest,
    PathRequest,
    PreadRequest,
    ReadFileRequest,
    ReadlinkReply,
    StatReply,
    StatvfsReply,
    StreamRequest,
    TarOutReply,
    TarOutRequest,
    XattrsReply,
)
from guestagent.api.inspect_devices import (
    AvailableReply,
    AvailableRequest,
    ChecksumDeviceRequest,
    DeviceListReply,
    DeviceRequest,
    FilesystemsReply,
    MountPointsReply,
    ReadonlyReply,
    SizeReply,
    TextReply,
    VersionReply,
)
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
from guestagent.api.observe import (
    CrashesReply,
    CrashesRequest,
    LogReply,
    LogRequest,
    MetricsReply,
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
        ("agent.log", LogRequest, LogReply, True, "list lines of the log, and follow it"),
        ("agent.metrics", Empty, MetricsReply, False, "tell the metrics in Prometheus text"),
        ("agent.crashes", CrashesRequest, CrashesReply, False, "tell how earlier lives ended"),
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
        ("fs.list_devices", Empty, DeviceListReply, False, "list the disks"),
        ("fs.list_partitions", Empty, DeviceListReply, False, "list the partitions of disks"),
        ("fs.list_filesystems", Empty, FilesystemsReply, False, "say what is on each device"),
        ("fs.vfs_type", DeviceRequest, TextReply, False, "name the file system of a device"),
        ("fs.vfs_uuid", DeviceRequest, TextReply, False, "tell the uuid of a file system"),
        ("fs.vfs_label", DeviceRequest, TextReply, False, "tell the label of a file system"),
        ("fs.blockdev_getsize64", DeviceRequest, SizeReply, False, "tell how large a device is"),
        ("fs.blockdev_getro", DeviceRequest, ReadonlyReply, False, "tell if it is read-only"),
        ("fs.checksum_device", ChecksumDeviceRequest, ChecksumReply, False, "hash a device"),
        ("fs.mountpoints", Empty, MountPointsReply, False, "list every mount"),
        ("fs.statvfs", PathRequest, StatvfsReply, False, "tell how full a file system is"),
        ("fs.ls", StreamRequest, ListReply, False, "list the names in a directory"),
        ("fs.readdir", StreamRequest, ListReply, False, "list a directory with the status of each"),
        ("fs.lstat", PathRequest, StatReply, False, "describe a file or a symlink itself"),
        ("fs.readlink", PathRequest, ReadlinkReply, False, "tell where a symlink leads"),
        ("fs.getxattrs", PathRequest, XattrsReply, False, "list extended attributes"),
        ("fs.acl_get_file", AclRequest, AclReply, False, "list an access control list"),
        ("fs.exists", PathRequest, ExistsReply, False, "tell if something is there"),
        ("fs.read_file", ReadFileRequest, DownloadReply, False, "read a file whole"),
        ("fs.pread", PreadRequest, DataReply, False, "read a range of a file"),
        ("fs.head", HeadRequest, DataReply, False, "read the first lines of a file"),
        ("fs.download", DownloadRequest, DownloadReply, False, "read a file of any size"),
        ("fs.find", FindRequest, ListReply, False, "list what is below a directory"),
        ("fs.du", PathRequest, DuReply, False, "add up what a tree takes"),
        ("fs.checksum", ChecksumRequest, ChecksumReply, False, "hash a file"),
        ("fs.checksums", ChecksumsRequest, ChecksumsReply, False, "hash every file of a tree"),
        ("fs.tar_out", TarOutRequest, TarOutReply, False, "read a directory as a tar archive"),
        ("fs.available", AvailableRequest, AvailableReply, False, "tell which features are there"),
        ("fs.version", Empty, VersionReply, False, "tell the versions of agent and kernel"),
    )
    return {
        name: Method(name=name, request=request, reply=reply, quick=quick, summary=summary)
        for name, request, reply, quick, summary in rows
    }


#: Every method of the contract by name.
METHODS = _methods()
