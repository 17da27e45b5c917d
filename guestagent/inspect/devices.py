"""Block devices and mounts as the kernel shows them."""

import errno
import os
import stat

from guestagent.api.devices import PathDevice
from guestagent.api.inspect import ChecksumReply
from guestagent.api.inspect_devices import (
    DeviceInfo,
    DeviceListReply,
    DeviceRequest,
    FilesystemsReply,
    FsChecksumDevice,
    MountPoint,
    MountPointsReply,
    ReadonlyReply,
    SizeReply,
    TextReply,
)
from guestagent.engine.state import EngineState
from guestagent.engine.transaction import Transaction
from guestagent.inspect.reading import Meter, Reader
from guestagent.inspect.sink import Sink
from guestagent.storage import blockdev
from guestagent.storage.filesystems import HEAD_BYTES, detect, label_of, uuid_of
from guestagent.storage.mountinfo import read_mounts
from vsock.errors import CallError, errno_name

__all__ = ("Devices",)

_UNKNOWN = "unknown"
_VERITY_MAGIC = b"verity\0\0"


class Devices:
    """Every method may be called from many threads at once."""

    def __init__(self, state: EngineState) -> None:
        self._state = state

    def list_devices(self) -> DeviceListReply:
        """Return the whole disks that have a size."""
        return DeviceListReply(devices=tuple(info for info in _infos() if info.partition is None))

    def list_partitions(self) -> DeviceListReply:
        """Return the partitions."""
        return DeviceListReply(
            devices=tuple(info for info in _infos() if info.partition is not None)
        )

    def list_filesystems(self, op: Transaction) -> FilesystemsReply:
        """Say of each device what is at its start."""
        found = {}
        for info in _infos():
            op.deadline.check("look at file systems")
            try:
                found[info.node] = _type_of(_head(info.node))
            except OSError:
                found[info.node] = _UNKNOWN
        return FilesystemsReply(filesystems=found)

    def vfs_type(self, request: DeviceRequest) -> TextReply:
        """Return the type of file system at the start of a device, or unknown."""
        return TextReply(value=_type_of(self._head(request)))

    def vfs_uuid(self, request: DeviceRequest) -> TextReply:
        """Return the uuid of the file system, empty where it has none."""
        head = self._head(request)
        return TextReply(value=uuid_of(_type_of(head), head))

    def vfs_label(self, request: DeviceRequest) -> TextReply:
        """Return the label of the file system, empty where it has none."""
        head = self._head(request)
        return TextReply(value=label_of(_type_of(head), head))

    def getsize64(self, request: DeviceRequest) -> SizeReply:
        """Return how large a device is."""
        return SizeReply(size_bytes=_find(request.device).size_bytes)

    def getro(self, request: DeviceRequest) -> ReadonlyReply:
        """Say whether a device is read-only."""
        return ReadonlyReply(readonly=_find(request.device).readonly)

    def checksum(self, request: FsChecksumDevice, op: Transaction, sink: Sink) -> ChecksumReply:
        """Hash a whole device."""
        device = _find(request.device)
        with op.step("checksum_device", request.device):
            fd = _open(request.device)
            try:
                reader = Reader(self._error_of, op, Meter(sink, device.size_bytes))
                name = os.fsencode(request.device)
                size_bytes, digest = reader.digest(fd, name, request.algorithm)
                # what was read once is not needed again
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        return ChecksumReply(digest=digest, size_bytes=size_bytes, timings_ms=op.timings_ms)

    def mountpoints(self) -> MountPointsReply:
        """Return every mount that the agent sees, in the order they were made."""
        return MountPointsReply(
            mounts=tuple(
                MountPoint(
                    target=_text(mount.target),
                    source=_text(mount.source),
                    filesystem=mount.filesystem,
                    dev=mount.dev,
                    mount_id=mount.mount_id,
                    options=tuple(map(_text, mount.options)),
                )
                for mount in read_mounts()
            )
        )

    def _head(self, request: DeviceRequest) -> bytes:
        _find(request.device)
        try:
            return _head(request.device)
        except OSError as error:
            raise self._error_of(error, os.fsencode(request.device), 0) from error

    def _error_of(self, error: OSError, device: bytes, offset_bytes: int) -> CallError:
        """Blame the layer whose device it is, if it is one's."""
        node = os.fsdecode(device)
        reason = f"{error.strerror} ({errno_name(error.errno) or 'no errno'})"
        text = f"cannot read device {node!r} at byte {offset_bytes}: {reason}"
        layer_id = self._verified_layer_on(node) if error.errno == errno.EIO else None
        if layer_id is None:
            return CallError("device", text, errno=error.errno, object=node)
        return CallError(
            "integrity",
            f"{text}; it is the verity device of layer {layer_id!r}",
            errno=error.errno,
            object=layer_id,
            hint="layer.verify lists the corrupt blocks",
        )

    def _verified_layer_on(self, node: str) -> str | None:
        try:
            name = _find(node).name
        except CallError:
            return None
        for live in self._state.inventory.layers():
            if live.plan.verity is None:
                continue
            info = self._state.control.find(name=live.plan.verity.name)
            if info is not None and os.path.basename(info.node) == name:
                return live.spec.layer_id
        return None


def _infos() -> list[DeviceInfo]:
    return [
        DeviceInfo(
            node=device.node,
            dev=device.dev,
            size_bytes=device.size_bytes,
            logical_block_size=device.logical_block_size,
            readonly=device.readonly,
            kind=device.kind,
            serial=device.serial,
            partition=_partition(device.name),
            labels=blockdev.labels(device.name),
        )
        for device in sorted(blockdev.list_all(), key=_place)
        if device.size_bytes
    ]


def _place(device: blockdev.BlockDevice) -> tuple[int, int]:
    """Return where a device is among others: as they were attached, partitions by number."""
    partition = _partition(device.name)
    return blockdev.order_of(device.name), partition or 0


def _partition(name: str) -> int | None:
    try:
        with open(f"/sys/class/block/{name}/partition", "rb") as file:
            return int(file.read())
    except OSError:
        return None


def _find(node: str) -> blockdev.BlockDevice:
    found = blockdev.find(PathDevice(path=node))
    if found is None:
        raise CallError(
            "not_found",
            f"there is no block device {node!r}",
            object=node,
            hint="fs.list_devices says which there are",
        )
    return found


def _open(node: str) -> int:
    fd = os.open(node, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK), node)


def _head(node: str) -> bytes:
    fd = _open(node)
    try:
        return os.pread(fd, HEAD_BYTES, 0).ljust(HEAD_BYTES, b"\0")
    finally:
        os.close(fd)


def _type_of(head: bytes) -> str:
    if head.startswith(_VERITY_MAGIC):
        return "verity"
    try:
        found = detect(lambda offset, size: head[offset : offset + size])
    except CallError:
        return "ambiguous"
    return found or _UNKNOWN


def _text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
