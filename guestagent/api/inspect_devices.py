"""Looking at block devices and mounts, and at what the agent can do."""

from collections.abc import Mapping

from guestagent.api.checks import check_choice, check_path, check_range
from guestagent.api.inspect import CHECKSUM_ALGORITHMS, ChecksumReply
from guestagent.api.request import Request
from vsock.record import Record


class DeviceRequest(Record):
    """A block device by its node."""

    device: str

    def check(self) -> None:
        check_path("device", self.device)
        if not self.device.startswith("/dev/"):
            raise ValueError(f"device must lie below /dev, got {self.device!r}")


class DeviceInfo(Record):
    """A block device. ``dev`` is MAJOR:MINOR, ``kind`` pmem, virtio-blk, scsi, dm, loop or other;
    ``partition`` its number on its disk, None for a whole disk. ``labels`` are those by which a
    request may name it (kind label)."""

    node: str
    dev: str
    size_bytes: int
    logical_block_size: int
    readonly: bool
    kind: str
    serial: str | None
    partition: int | None
    labels: tuple[str, ...] = ()


class DeviceListReply(Record):
    devices: tuple[DeviceInfo, ...]


class FsListDevices(Request[DeviceListReply], method="fs.list_devices"):
    """List the disks in the order in which they were attached.

    That is the order in which the kernel met them: of one bus, that of their slots or LUNs, then as
    they were plugged in.
    """


class FsListPartitions(Request[DeviceListReply], method="fs.list_partitions"):
    """List the partitions of disks."""


class FilesystemsReply(Record):
    """Node -> file system at its start: a type that layers may have, or unknown."""

    filesystems: Mapping[str, str]


class FsListFilesystems(Request[FilesystemsReply], method="fs.list_filesystems"):
    """Tell what is at the start of each device."""


class TextReply(Record):
    """One value; empty where there is none."""

    value: str


class FsVfsType(Request[TextReply], DeviceRequest, method="fs.vfs_type"):
    """Name the file system of a device."""


class FsVfsUuid(Request[TextReply], DeviceRequest, method="fs.vfs_uuid"):
    """Tell the uuid of a file system."""


class FsVfsLabel(Request[TextReply], DeviceRequest, method="fs.vfs_label"):
    """Tell the label of a file system."""


class SizeReply(Record):
    size_bytes: int


class FsBlockdevGetsize64(Request[SizeReply], DeviceRequest, method="fs.blockdev_getsize64"):
    """Tell how large a device is."""


class ReadonlyReply(Record):
    readonly: bool


class FsBlockdevGetro(Request[ReadonlyReply], DeviceRequest, method="fs.blockdev_getro"):
    """Tell whether a device is read-only."""


class FsChecksumDevice(Request[ChecksumReply], DeviceRequest, method="fs.checksum_device"):
    """Hash a whole block device."""

    algorithm: str = "sha256"

    def check(self) -> None:
        super().check()
        check_choice("algorithm", self.algorithm, CHECKSUM_ALGORITHMS)


class MountPoint(Record):
    """A mount; ``target`` with undecodable bytes escaped. ``dev`` is MAJOR:MINOR."""

    target: str
    source: str
    filesystem: str
    dev: str
    mount_id: int
    options: tuple[str, ...]


class MountPointsReply(Record):
    mounts: tuple[MountPoint, ...]


class FsMountpoints(Request[MountPointsReply], method="fs.mountpoints"):
    """List every mount."""


class AvailableReply(Record):
    """Which of the features asked for are there, and which are not."""

    available: tuple[str, ...]
    missing: tuple[str, ...]


class FsAvailable(Request[AvailableReply], method="fs.available"):
    """Tell which of some features are there, by the names that hello has for them."""

    features: tuple[str, ...]

    def check(self) -> None:
        check_range("number of features", len(self.features), 0, 256)


class VersionReply(Record):
    agent: str
    protocol: int
    kernel: str
    machine: str
    python: str


class FsVersion(Request[VersionReply], method="fs.version"):
    """Tell the versions of agent and kernel."""
