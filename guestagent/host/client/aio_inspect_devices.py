"""The asyncio twin of ``guestagent.host.client.inspect_devices``, by scripts/twin."""

from typing import TypeVar

from guestagent.api.agent import Empty
from guestagent.api.inspect import ChecksumReply
from guestagent.api.inspect_devices import (
    AvailableReply,
    AvailableRequest,
    ChecksumDeviceRequest,
    DeviceInfo,
    DeviceListReply,
    DeviceRequest,
    FilesystemsReply,
    MountPoint,
    MountPointsReply,
    ReadonlyReply,
    SizeReply,
    TextReply,
    VersionReply,
)
from guestagent.host.client.aio_streams import AsyncStreams
from guestagent.host.client.entries import nothing
from guestagent.host.client.inspect import STREAM_DEADLINE_MS
from guestagent.host.client.streams import ProgressCallback
from vsock.record import Record

__all__ = ("AsyncDeviceMethods",)
R = TypeVar("R", bound=Record)


class AsyncDeviceMethods:
    """Part of ``AsyncGuestAgent``: block devices by their nodes below /dev, and mounts.

    Errors of all: CallError ``not_found`` (no such device), ``invalid`` (no block device),
    ``integrity`` (the device of a layer that is corrupt) and ``device`` (reading failed).
    """

    _streams: AsyncStreams

    async def call(
        self, method: str, request: Record, *, deadline_ms: int | None = None
    ) -> dict[str, object]:
        """Send a request; see ``AsyncGuestAgent``."""
        raise NotImplementedError

    async def _tell(self, method: str, request: Record, reply: type[R]) -> R:
        return reply.from_wire(await self.call(method, request), "reply")

    async def fs_list_devices(self) -> tuple[DeviceInfo, ...]:
        """Return the whole disks that have a size."""
        return (await self._tell("fs.list_devices", Empty(), DeviceListReply)).devices

    async def fs_list_partitions(self) -> tuple[DeviceInfo, ...]:
        """Return the partitions."""
        return (await self._tell("fs.list_partitions", Empty(), DeviceListReply)).devices

    async def fs_list_filesystems(self) -> dict[str, str]:
        """Return node -> what is at its start: a type, verity, ambiguous or unknown."""
        reply = await self._tell("fs.list_filesystems", Empty(), FilesystemsReply)
        return dict(reply.filesystems)

    async def fs_vfs_type(self, device: str) -> str:
        """Return the type of file system on a device."""
        return (await self._tell("fs.vfs_type", DeviceRequest(device=device), TextReply)).value

    async def fs_vfs_uuid(self, device: str) -> str:
        """Return the uuid of the file system on a device, empty where it has none."""
        return (await self._tell("fs.vfs_uuid", DeviceRequest(device=device), TextReply)).value

    async def fs_vfs_label(self, device: str) -> str:
        """Return the label of the file system on a device, empty where it has none."""
        return (await self._tell("fs.vfs_label", DeviceRequest(device=device), TextReply)).value

    async def fs_blockdev_getsize64(self, device: str) -> int:
        """Return the size of a device in bytes."""
        request = DeviceRequest(device=device)
        return (await self._tell("fs.blockdev_getsize64", request, SizeReply)).size_bytes

    async def fs_blockdev_getro(self, device: str) -> bool:
        """Say whether a device is read-only."""
        request = DeviceRequest(device=device)
        return (await self._tell("fs.blockdev_getro", request, ReadonlyReply)).readonly

    async def fs_checksum_device(
        self,
        device: str,
        *,
        algorithm: str = "sha256",
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> ChecksumReply:
        """Hash a whole device; ``progress`` gets (done_bytes, total_bytes)."""
        request = ChecksumDeviceRequest(device=device, algorithm=algorithm)
        async with await self._streams.start(
            "fs.checksum_device",
            request.to_wire(),
            nothing,
            deadline_ms=deadline_ms,
            progress=progress,
        ) as stream:
            return ChecksumReply.from_wire(await stream.drain(), "reply")

    async def fs_mountpoints(self) -> tuple[MountPoint, ...]:
        """Return every mount that the agent sees."""
        return (await self._tell("fs.mountpoints", Empty(), MountPointsReply)).mounts

    async def fs_available(self, *features: str) -> AvailableReply:
        """Say which of the features are there; their names are those of hello."""
        return await self._tell("fs.available", AvailableRequest(features=features), AvailableReply)

    async def fs_version(self) -> VersionReply:
        """Return the versions of agent, protocol, kernel and interpreter."""
        return await self._tell("fs.version", Empty(), VersionReply)
