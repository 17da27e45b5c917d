"""Looking at block devices and mounts, and at what the agent can do."""

from collections.abc import Mapping

from guestagent.api.checks import check_choice, check_path, check_range
from guestagent.api.inspect import CHECKSUM_ALGORITHMS
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
    ``partition`` its number on its disk, None for a whole disk."""

    node: str
    dev: str
    size_bytes: int
    logical_block_size: int
    readonly: bool
    kind: str
    serial: str | None
    partition: int | None


class DeviceListReply(Record):
    devices: tuple[DeviceInfo, ...]


class FilesystemsReply(Record):
    """Node -> file system at its start: a type that layers may have, or unknown."""

    filesystems: Mapping[str, str]


class TextReply(Record):
    """One value; empty where there is none."""

    value: str


class SizeReply(Record):
    size_bytes: int


class ReadonlyReply(Record):
    readonly: bool


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


class ChecksumDeviceRequest(DeviceRequest):
    """Hash a whole block device."""

    algorithm: str = "sha256"

    def check(self) -> None:
        super().check()
        check_choice("algorithm", self.algorithm, CHECKSUM_ALGORITHMS)


class AvailableRequest(Record):
    """Names of features, as hello lists them."""

    features: tuple[str, ...]

    def check(self) -> None:
        check_range("number of features", len(self.features), 0, 256)


class AvailableReply(Record):
    """Which of the features asked for are there, and which are not."""

    available: tuple[str, ...]
    missing: tuple[str, ...]


class VersionReply(Record):
    agent: str
    protocol: int
    kernel: str
    machine: str
    python: str
