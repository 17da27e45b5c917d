"""The asyncio twin of ``guestagent.host.client.inspect``, by scripts/twin."""

import os
from typing import BinaryIO, TypeVar

from guestagent.api.inspect import (
    REPLY_DATA_BYTES,
    AclReply,
    AclRequest,
    ChecksumReply,
    ChecksumRequest,
    ChecksumsRequest,
    DataReply,
    DownloadReply,
    DownloadRequest,
    DuReply,
    ExistsReply,
    FindRequest,
    HeadRequest,
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
from guestagent.host.client.aio_streams import AsyncFsStream, AsyncStreams, save
from guestagent.host.client.entries import (
    Checksum,
    DirectoryEntry,
    FoundEntry,
    checksums,
    data,
    directory_entries,
    found_entries,
    names,
    nothing,
)
from guestagent.host.client.streams import ProgressCallback
from vsock.record import Record

__all__ = ("STREAM_DEADLINE_MS", "AsyncInspectMethods")
STREAM_DEADLINE_MS = 3600000
R = TypeVar("R", bound=Record)
PathLike = str | bytes


class AsyncInspectMethods:
    """Part of ``AsyncGuestAgent``: looking into layers and overlays, read-only.

    Exactly one of ``layer_id`` and ``overlay_id`` says where. Paths are text or bytes, start at the
    root there, and cannot leave it: symlinks and ``..`` stay inside. Names come as bytes.

    Errors of all: CallError ``not_found`` (no such layer, overlay or path), ``invalid`` (not the
    file, directory or symlink that it must be), ``denied``, ``integrity`` (a layer is corrupt: the
    message says where), ``device`` (reading failed), ``busy`` (too many long answers at once),
    ``timeout`` and ``cancelled``. ``progress`` gets (done_bytes, total_bytes), where 0 in all means
    unknown, on a thread of the client's.
    """

    _streams: AsyncStreams

    async def call(
        self, method: str, request: Record, *, deadline_ms: int | None = None
    ) -> dict[str, object]:
        """Send a request; see ``AsyncGuestAgent``."""
        raise NotImplementedError

    async def _ask(self, method: str, request: Record, reply: type[R]) -> R:
        return reply.from_wire(await self.call(method, request), "reply")

    async def fs_exists(
        self, path: PathLike, *, layer_id: str | None = None, overlay_id: str | None = None
    ) -> bool:
        """Say whether something is at ``path``, symlinks followed."""
        request = PathRequest(layer_id=layer_id, overlay_id=overlay_id, path=path)
        return (await self._ask("fs.exists", request, ExistsReply)).exists

    async def fs_lstat(
        self, path: PathLike, *, layer_id: str | None = None, overlay_id: str | None = None
    ) -> StatReply:
        """Describe what is at ``path``, a symlink itself."""
        request = PathRequest(layer_id=layer_id, overlay_id=overlay_id, path=path)
        return await self._ask("fs.lstat", request, StatReply)

    async def fs_readlink(
        self, path: PathLike, *, layer_id: str | None = None, overlay_id: str | None = None
    ) -> bytes:
        """Return where a symlink leads, as it is written there."""
        request = PathRequest(layer_id=layer_id, overlay_id=overlay_id, path=path)
        return (await self._ask("fs.readlink", request, ReadlinkReply)).target

    async def fs_getxattrs(
        self, path: PathLike, *, layer_id: str | None = None, overlay_id: str | None = None
    ) -> dict[bytes, bytes]:
        """Return the extended attributes of what is at ``path``, a symlink itself."""
        request = PathRequest(layer_id=layer_id, overlay_id=overlay_id, path=path)
        reply = await self._ask("fs.getxattrs", request, XattrsReply)
        return {xattr.name: xattr.value for xattr in reply.xattrs}

    async def fs_acl_get_file(
        self,
        path: PathLike,
        acl: str = "access",
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
    ) -> AclReply:
        """Return the access control list (``acl`` "access" or "default"), ids as numbers."""
        request = AclRequest(layer_id=layer_id, overlay_id=overlay_id, path=path, acl=acl)
        return await self._ask("fs.acl_get_file", request, AclReply)

    async def fs_statvfs(
        self, path: PathLike = "/", *, layer_id: str | None = None, overlay_id: str | None = None
    ) -> StatvfsReply:
        """Say how large and how full the file system below ``path`` is."""
        request = PathRequest(layer_id=layer_id, overlay_id=overlay_id, path=path)
        return await self._ask("fs.statvfs", request, StatvfsReply)

    async def fs_pread(
        self,
        path: PathLike,
        offset_bytes: int = 0,
        size_bytes: int = REPLY_DATA_BYTES,
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
    ) -> bytes:
        """Return at most 32 KiB of a file; fewer bytes than asked for at its end.

        Raises:
            ValueError: ``size_bytes`` is over 32 KiB.
        """
        request = PreadRequest(
            layer_id=layer_id,
            overlay_id=overlay_id,
            path=path,
            offset_bytes=offset_bytes,
            size_bytes=size_bytes,
        )
        return (await self._ask("fs.pread", request, DataReply)).data

    async def fs_head(
        self,
        path: PathLike,
        lines: int = 10,
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
    ) -> DataReply:
        """Return the first lines of a file, at most 32 KiB; ``is_whole`` says if it was cut."""
        request = HeadRequest(layer_id=layer_id, overlay_id=overlay_id, path=path, lines=lines)
        return await self._ask("fs.head", request, DataReply)

    async def fs_read_file(
        self,
        path: PathLike,
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        max_bytes: int = 4 * 1024 * 1024,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> bytes:
        """Return a whole file; ``resource`` if it is longer than ``max_bytes``."""
        request = ReadFileRequest(
            layer_id=layer_id, overlay_id=overlay_id, path=path, max_bytes=max_bytes
        )
        async with await self._streams.start(
            "fs.read_file", request.to_wire(), data, deadline_ms=deadline_ms
        ) as pieces:
            return b"".join([piece async for piece in pieces])

    async def fs_download_stream(
        self,
        path: PathLike,
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        offset_bytes: int = 0,
        size_bytes: int | None = None,
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> AsyncFsStream[bytes]:
        """Iterate over a file of any size, or a range of it."""
        request = DownloadRequest(
            layer_id=layer_id,
            overlay_id=overlay_id,
            path=path,
            offset_bytes=offset_bytes,
            size_bytes=size_bytes,
        )
        return await self._streams.start(
            "fs.download", request.to_wire(), data, deadline_ms=deadline_ms, progress=progress
        )

    async def fs_download(
        self,
        path: PathLike,
        target: "str | os.PathLike[str] | BinaryIO",
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        offset_bytes: int = 0,
        size_bytes: int | None = None,
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> DownloadReply:
        """Copy a file, or a range of it, to ``target``: an open file, or a path, where it appears
        only once it is whole."""
        stream = await self.fs_download_stream(
            path,
            layer_id=layer_id,
            overlay_id=overlay_id,
            offset_bytes=offset_bytes,
            size_bytes=size_bytes,
            progress=progress,
            deadline_ms=deadline_ms,
        )
        return DownloadReply.from_wire(await save(stream, target), "reply")

    async def fs_checksum(
        self,
        path: PathLike,
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        algorithm: str = "sha256",
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> ChecksumReply:
        """Hash a file: sha256, sha512 or sha1."""
        request = ChecksumRequest(
            layer_id=layer_id, overlay_id=overlay_id, path=path, algorithm=algorithm
        )
        return await self._wait("fs.checksum", request, ChecksumReply, progress, deadline_ms)

    async def fs_ls(
        self,
        path: PathLike = "/",
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> AsyncFsStream[bytes]:
        """Iterate over the names in a directory, in no order."""
        request = StreamRequest(layer_id=layer_id, overlay_id=overlay_id, path=path)
        return await self._streams.start("fs.ls", request.to_wire(), names, deadline_ms=deadline_ms)

    async def fs_readdir(
        self,
        path: PathLike = "/",
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> AsyncFsStream[DirectoryEntry]:
        """Iterate over a directory, with the status of each entry."""
        request = StreamRequest(layer_id=layer_id, overlay_id=overlay_id, path=path)
        return await self._streams.start(
            "fs.readdir", request.to_wire(), directory_entries, deadline_ms=deadline_ms
        )

    async def fs_find(
        self,
        path: PathLike = "/",
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        name: PathLike | None = None,
        kind: str | None = None,
        max_depth: int | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> AsyncFsStream[FoundEntry]:
        """Iterate over everything below a directory; ``name`` may hold ``*`` and ``?``, ``kind`` is
        a letter of ``api.inspect.ENTRY_TYPES``."""
        request = FindRequest(
            layer_id=layer_id,
            overlay_id=overlay_id,
            path=path,
            name=name,
            kind=kind,
            max_depth=max_depth,
        )
        return await self._streams.start(
            "fs.find", request.to_wire(), found_entries, deadline_ms=deadline_ms
        )

    async def fs_du(
        self,
        path: PathLike = "/",
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> DuReply:
        """Add up what a tree takes."""
        request = PathRequest(layer_id=layer_id, overlay_id=overlay_id, path=path)
        return await self._wait("fs.du", request, DuReply, progress, deadline_ms)

    async def fs_checksums(
        self,
        path: PathLike = "/",
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        algorithm: str = "sha256",
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> dict[bytes, Checksum]:
        """Hash every regular file below a directory; return path (relative to it) -> entry."""
        request = ChecksumsRequest(
            layer_id=layer_id, overlay_id=overlay_id, path=path, algorithm=algorithm
        )
        async with await self._streams.start(
            "fs.checksums", request.to_wire(), checksums, deadline_ms=deadline_ms, progress=progress
        ) as entries:
            return {entry.path: entry async for entry in entries}

    async def fs_tar_out_stream(
        self,
        path: PathLike = "/",
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        xattrs: bool = True,
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> AsyncFsStream[bytes]:
        """Iterate over the bytes of a tar archive of a directory (POSIX pax)."""
        request = TarOutRequest(layer_id=layer_id, overlay_id=overlay_id, path=path, xattrs=xattrs)
        return await self._streams.start(
            "fs.tar_out", request.to_wire(), data, deadline_ms=deadline_ms, progress=progress
        )

    async def fs_tar_out(
        self,
        path: PathLike,
        target: "str | os.PathLike[str] | BinaryIO",
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        xattrs: bool = True,
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> TarOutReply:
        """Write a directory as a tar archive to ``target``, as ``fs_download`` does."""
        stream = await self.fs_tar_out_stream(
            path,
            layer_id=layer_id,
            overlay_id=overlay_id,
            xattrs=xattrs,
            progress=progress,
            deadline_ms=deadline_ms,
        )
        return TarOutReply.from_wire(await save(stream, target), "reply")

    async def _wait(
        self,
        method: str,
        request: Record,
        reply: type[R],
        progress: ProgressCallback | None,
        deadline_ms: int,
    ) -> R:
        """Wait for a long answer; an exception meanwhile cancels it."""
        async with await self._streams.start(
            method, request.to_wire(), nothing, deadline_ms=deadline_ms, progress=progress
        ) as stream:
            return reply.from_wire(await stream.drain(), "reply")
