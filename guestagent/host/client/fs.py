"""The handle's methods for looking into layers, overlays and block devices: one for each RPC."""

from typing import TypedDict, Unpack

from guestagent.api import inspect, inspect_devices
from guestagent.api.inspect import (
    REPLY_DATA_BYTES,
    AclReply,
    Checksum,
    ChecksumReply,
    DataReply,
    DirectoryEntry,
    DownloadReply,
    DuReply,
    FoundEntry,
    StatReply,
    StatvfsReply,
    TarOutReply,
)
from guestagent.api.inspect_devices import AvailableReply, DeviceInfo, MountPoint, VersionReply
from guestagent.host.client.methods import STREAM_DEADLINE_MS, Caller
from guestagent.host.client.streams import ByteTarget, FsStream, ProgressCallback

__all__ = ("FsMethods", "Place")

PathLike = str | bytes


class Place(TypedDict, total=False):
    """A layer or an overlay: exactly one of them."""

    layer_id: str | None
    overlay_id: str | None


class FsMethods(Caller):
    """Part of ``GuestAgent``: looking into layers and overlays, and at block devices, read-only.

    Exactly one of the keywords ``layer_id`` and ``overlay_id`` says where. Paths are text or bytes,
    start at the root there, and cannot leave it: symlinks and ``..`` stay inside. Names come as
    bytes. Block devices are named by their nodes below /dev.

    Errors of all: CallError ``not_found`` (no such layer, overlay, path or device), ``invalid``
    (not the file, directory, symlink or block device that it must be), ``denied``, ``integrity``
    (a layer is corrupt: the message says where), ``device`` (reading failed), ``busy`` (too many
    long answers at once), ``timeout`` and ``cancelled``. ``progress`` gets (done_bytes,
    total_bytes), where 0 in all means unknown, on a thread of the client's.
    """

    # --- one path

    def fs_exists(self, path: PathLike, **place: Unpack[Place]) -> bool:
        """Say whether something is at ``path``, symlinks followed."""
        return self.call(inspect.FsExists(path=path, **place)).exists

    def fs_lstat(self, path: PathLike, **place: Unpack[Place]) -> StatReply:
        """Describe what is at ``path``, a symlink itself."""
        return self.call(inspect.FsLstat(path=path, **place))

    def fs_readlink(self, path: PathLike, **place: Unpack[Place]) -> bytes:
        """Return where a symlink leads, as it is written there."""
        return self.call(inspect.FsReadlink(path=path, **place)).target

    def fs_getxattrs(self, path: PathLike, **place: Unpack[Place]) -> dict[bytes, bytes]:
        """Return the extended attributes of what is at ``path``, a symlink itself."""
        reply = self.call(inspect.FsGetxattrs(path=path, **place))
        return {xattr.name: xattr.value for xattr in reply.xattrs}

    def fs_acl_get_file(
        self, path: PathLike, acl: str = "access", **place: Unpack[Place]
    ) -> AclReply:
        """Return the access control list (``acl`` "access" or "default"), ids as numbers."""
        return self.call(inspect.FsAclGetFile(path=path, acl=acl, **place))

    def fs_statvfs(self, path: PathLike = "/", **place: Unpack[Place]) -> StatvfsReply:
        """Say how large and how full the file system below ``path`` is."""
        return self.call(inspect.FsStatvfs(path=path, **place))

    # --- content

    def fs_pread(
        self,
        path: PathLike,
        offset_bytes: int = 0,
        size_bytes: int = REPLY_DATA_BYTES,
        **place: Unpack[Place],
    ) -> bytes:
        """Return at most 32 KiB of a file; fewer bytes than asked for at its end.

        Raises:
            ValueError: ``size_bytes`` is over 32 KiB.
        """
        request = inspect.FsPread(
            path=path, offset_bytes=offset_bytes, size_bytes=size_bytes, **place
        )
        return self.call(request).data

    def fs_head(self, path: PathLike, lines: int = 10, **place: Unpack[Place]) -> DataReply:
        """Return the first lines of a file, at most 32 KiB; ``is_whole`` says if it was cut."""
        return self.call(inspect.FsHead(path=path, lines=lines, **place))

    def fs_read_file(
        self,
        path: PathLike,
        *,
        max_bytes: int = 4 * 1024 * 1024,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> bytes:
        """Return a whole file; ``resource`` if it is longer than ``max_bytes``."""
        request = inspect.FsReadFile(path=path, max_bytes=max_bytes, **place)
        with self.stream(request, deadline_ms=deadline_ms) as pieces:
            return b"".join(pieces)

    def fs_download_stream(
        self,
        path: PathLike,
        *,
        offset_bytes: int = 0,
        size_bytes: int | None = None,
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> FsStream[bytes]:
        """Iterate over a file of any size, or a range of it."""
        request = inspect.FsDownload(
            path=path, offset_bytes=offset_bytes, size_bytes=size_bytes, **place
        )
        return self.stream(request, deadline_ms=deadline_ms, progress=progress)

    def fs_download(
        self,
        path: PathLike,
        target: ByteTarget,
        *,
        offset_bytes: int = 0,
        size_bytes: int | None = None,
        max_bytes: int | None = None,
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> DownloadReply:
        """Copy a file, or a range of it, to ``target``: an open file, or a path, where it appears
        only once it is whole; ``resource`` if the agent sends more than ``max_bytes``."""
        request = inspect.FsDownload(
            path=path, offset_bytes=offset_bytes, size_bytes=size_bytes, **place
        )
        stream = self.stream(request, deadline_ms=deadline_ms, progress=progress)
        return request.read_reply(stream.save(target, max_bytes=max_bytes))

    def fs_checksum(
        self,
        path: PathLike,
        *,
        algorithm: str = "sha256",
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> ChecksumReply:
        """Hash a file: sha256, sha512 or sha1."""
        request = inspect.FsChecksum(path=path, algorithm=algorithm, **place)
        return self.call(request, deadline_ms=deadline_ms, progress=progress)

    # --- directories and trees

    def fs_ls(
        self,
        path: PathLike = "/",
        *,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> FsStream[bytes]:
        """Iterate over the names in a directory, in no order."""
        return self.stream(inspect.FsLs(path=path, **place), deadline_ms=deadline_ms)

    def fs_readdir(
        self,
        path: PathLike = "/",
        *,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> FsStream[DirectoryEntry]:
        """Iterate over a directory, with the status of each entry."""
        return self.stream(inspect.FsReaddir(path=path, **place), deadline_ms=deadline_ms)

    def fs_find(
        self,
        path: PathLike = "/",
        *,
        name: PathLike | None = None,
        kind: str | None = None,
        max_depth: int | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> FsStream[FoundEntry]:
        """Iterate over everything below a directory; ``name`` may hold ``*`` and ``?``, ``kind`` is
        a letter of ``api.inspect.ENTRY_TYPES``."""
        request = inspect.FsFind(path=path, name=name, kind=kind, max_depth=max_depth, **place)
        return self.stream(request, deadline_ms=deadline_ms)

    def fs_du(
        self,
        path: PathLike = "/",
        *,
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> DuReply:
        """Add up what a tree takes."""
        request = inspect.FsDu(path=path, **place)
        return self.call(request, deadline_ms=deadline_ms, progress=progress)

    def fs_checksums(
        self,
        path: PathLike = "/",
        *,
        algorithm: str = "sha256",
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> dict[bytes, Checksum]:
        """Hash every regular file below a directory; return path (relative to it) -> entry."""
        request = inspect.FsChecksums(path=path, algorithm=algorithm, **place)
        with self.stream(request, deadline_ms=deadline_ms, progress=progress) as entries:
            return {entry.path: entry for entry in entries}

    def fs_tar_out_stream(
        self,
        path: PathLike = "/",
        *,
        xattrs: bool = True,
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> FsStream[bytes]:
        """Iterate over the bytes of a tar archive of a directory (POSIX pax)."""
        request = inspect.FsTarOut(path=path, xattrs=xattrs, **place)
        return self.stream(request, deadline_ms=deadline_ms, progress=progress)

    def fs_tar_out(
        self,
        path: PathLike,
        target: ByteTarget,
        *,
        xattrs: bool = True,
        max_bytes: int | None = None,
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
        **place: Unpack[Place],
    ) -> TarOutReply:
        """Write a directory as a tar archive to ``target``, as ``fs_download`` writes a file."""
        request = inspect.FsTarOut(path=path, xattrs=xattrs, **place)
        stream = self.stream(request, deadline_ms=deadline_ms, progress=progress)
        return request.read_reply(stream.save(target, max_bytes=max_bytes))

    # --- block devices and mounts

    def fs_list_devices(self) -> tuple[DeviceInfo, ...]:
        """Return the whole disks that have a size."""
        return self.call(inspect_devices.FsListDevices()).devices

    def fs_list_partitions(self) -> tuple[DeviceInfo, ...]:
        """Return the partitions."""
        return self.call(inspect_devices.FsListPartitions()).devices

    def fs_list_filesystems(self) -> dict[str, str]:
        """Return node -> what is at its start: a type, verity, ambiguous or unknown."""
        return dict(self.call(inspect_devices.FsListFilesystems()).filesystems)

    def fs_vfs_type(self, device: str) -> str:
        """Return the type of file system on a device."""
        return self.call(inspect_devices.FsVfsType(device=device)).value

    def fs_vfs_uuid(self, device: str) -> str:
        """Return the uuid of the file system on a device, empty where it has none."""
        return self.call(inspect_devices.FsVfsUuid(device=device)).value

    def fs_vfs_label(self, device: str) -> str:
        """Return the label of the file system on a device, empty where it has none."""
        return self.call(inspect_devices.FsVfsLabel(device=device)).value

    def fs_blockdev_getsize64(self, device: str) -> int:
        """Return the size of a device in bytes."""
        return self.call(inspect_devices.FsBlockdevGetsize64(device=device)).size_bytes

    def fs_blockdev_getro(self, device: str) -> bool:
        """Say whether a device is read-only."""
        return self.call(inspect_devices.FsBlockdevGetro(device=device)).readonly

    def fs_checksum_device(
        self,
        device: str,
        *,
        algorithm: str = "sha256",
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> ChecksumReply:
        """Hash a whole device; ``progress`` gets (done_bytes, total_bytes)."""
        request = inspect_devices.FsChecksumDevice(device=device, algorithm=algorithm)
        return self.call(request, deadline_ms=deadline_ms, progress=progress)

    def fs_mountpoints(self) -> tuple[MountPoint, ...]:
        """Return every mount that the agent sees."""
        return self.call(inspect_devices.FsMountpoints()).mounts

    def fs_available(self, *features: str) -> AvailableReply:
        """Say which of the features are there; their names are those of hello."""
        return self.call(inspect_devices.FsAvailable(features=features))

    def fs_version(self) -> VersionReply:
        """Return the versions of agent, protocol, kernel and interpreter."""
        return self.call(inspect_devices.FsVersion())
