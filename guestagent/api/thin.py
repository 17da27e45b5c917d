"""Thin provisioning: pools of two disks, and volumes that take space from a pool as it is written.

A volume is known by its ``volume_id`` within its pool. The pool's own data disk holds the records
of its volumes, so that a later machine can go on with them (``adopt``).
"""

from collections.abc import Mapping

from guestagent.api.checks import MAX_BYTES, check_choice, check_path, check_range, check_word
from guestagent.api.devices import Device
from guestagent.api.overlays import SCRATCH_FILESYSTEMS
from guestagent.api.request import Request
from vsock.record import Record

#: What may be on the metadata device of a pool that is opened; a blank one makes a new pool.
ADOPT = ("never", "empty", "matching")
#: What becomes of a write once the pool is full: it fails, or it waits for the pool to grow.
ON_FULL = ("error", "queue")
#: State of a pool: as dm-thin has it (rw, ro, out of space, failed), or closed by another program.
POOL_MODES = ("rw", "ro", "out_of_data_space", "failed", "gone")
#: dm-thin shares data out in blocks of a multiple of 64 KiB, up to 1 GiB.
BLOCK_BYTES_MIN, BLOCK_BYTES_MAX = 64 * 1024, 1024**3
VOLUME_BYTES_MIN, VOLUME_BYTES_ALIGNED = 1024**2, 4096
MAX_DATA_DEVICES = 16
#: Pool and device id make the name of a dm device, which has 127 letters.
_POOL_ID_MAX = 48
_HOLDER_MAX = 128


def _check_size(size_bytes: int) -> None:
    check_range("size_bytes", size_bytes, VOLUME_BYTES_MIN, MAX_BYTES)
    if size_bytes % VOLUME_BYTES_ALIGNED:
        raise ValueError(f"size_bytes {size_bytes} is not a multiple of {VOLUME_BYTES_ALIGNED}")


class PoolName(Record):
    """A pool."""

    pool_id: str

    def check(self) -> None:
        check_word("pool_id", self.pool_id, _POOL_ID_MAX)


class VolumeName(PoolName):
    """A volume of a pool."""

    volume_id: str

    def check(self) -> None:
        super().check()
        check_word("volume_id", self.volume_id)


class SpaceUsed(Record):
    """How much of a device is given out."""

    used_bytes: int
    total_bytes: int


class PoolReport(Record):
    """A pool as the kernel has it.

    ``devices`` are the nodes of the metadata disk and of the data disks in order. ``deleting`` are
    the volumes whose deletion waits until they are not in use. ``foreign_ids`` are thin devices in
    the pool that are not volumes of the agent: they are never touched (at most 64 are listed).
    ``discard_passdown`` says that freed blocks are discarded on the data disk, too.
    """

    pool_id: str
    mode: str
    transaction_id: int
    data: SpaceUsed
    metadata: SpaceUsed
    block_size_bytes: int
    low_water_bytes: int
    on_full: str
    needs_check: bool
    discard_passdown: bool
    devices: tuple[str, ...]
    volumes: int
    deleting: tuple[str, ...]
    foreign_ids: tuple[int, ...]
    created: bool = False
    already: bool = False
    timings_ms: Mapping[str, float] = {}

    def check(self) -> None:
        check_choice("mode", self.mode, POOL_MODES)


class PoolOpen(Request[PoolReport], PoolName, method="pool.open"):
    """Open a pool on two disks; blank metadata makes a new pool.

    ``adopt`` says what else the metadata may hold: ``never`` anything, ``empty`` a pool without
    volumes, ``matching`` the pool of this ``pool_id`` with its volumes. ``more_data_devices`` are
    those that the pool was grown by, in order.

    ``block_size_bytes`` is 64 KiB unless said, and that of the pool where it is adopted.
    ``on_full`` says what becomes of a write once no block is left: ``error`` or ``queue``. An event
    tells when less than ``low_water_bytes`` (a tenth unless said) are free. While less than
    ``min_free_percent`` of data or metadata are free, no volume is made.
    """

    metadata_device: Device
    data_device: Device
    more_data_devices: tuple[Device, ...] = ()
    block_size_bytes: int | None = None
    on_full: str = "error"
    low_water_bytes: int | None = None
    min_free_percent: int = 10
    adopt: str = "never"

    def check(self) -> None:
        super().check()
        check_range("block_size_bytes", self.block_size_bytes, BLOCK_BYTES_MIN, BLOCK_BYTES_MAX)
        if (size_bytes := self.block_size_bytes or 0) % BLOCK_BYTES_MIN:
            raise ValueError(f"block_size_bytes {size_bytes} is not a multiple of 64 KiB")
        check_choice("on_full", self.on_full, ON_FULL)
        check_choice("adopt", self.adopt, ADOPT)
        check_range("low_water_bytes", self.low_water_bytes, 0, MAX_BYTES)
        check_range("min_free_percent", self.min_free_percent, 0, 90)
        if len(self.data_devices) > MAX_DATA_DEVICES:
            raise ValueError(f"a pool has at most {MAX_DATA_DEVICES} data devices")
        devices = (self.metadata_device, *self.data_devices)
        if any(device in devices[:number] for number, device in enumerate(devices)):
            raise ValueError("a device is named twice")

    @property
    def data_devices(self) -> tuple[Device, ...]:
        return (self.data_device, *self.more_data_devices)


class PoolCloseReply(Record):
    """``already`` says that there was no such pool."""

    removed_devices: tuple[str, ...]
    already: bool
    timings_ms: Mapping[str, float]


class PoolClose(Request[PoolCloseReply], PoolName, method="pool.close"):
    """Close a pool whose volumes are not mounted; its disks keep everything."""


class PoolStatus(Request[PoolReport], PoolName, method="pool.status"):
    """Say how a pool is."""


class PoolListReply(Record):
    pools: tuple[PoolReport, ...]


class PoolList(Request[PoolListReply], method="pool.list"):
    """List the open pools."""


class PoolGrow(Request[PoolReport], PoolName, method="pool.grow"):
    """Take up what the disks of a pool have grown by, and append ``data_device`` if there is one.

    Of the data disks only the last can have grown. A disk that has shrunk is refused.
    """

    data_device: Device | None = None


class VolumeReport(Record):
    """A volume, told without activating it.

    ``transaction_id`` is that of the pool when the volume was made. ``mapped_sectors`` (of 512
    bytes) have blocks in the pool, shared ones included; None where the pool cannot say. A
    list leaves ``highest_mapped_sector`` out.
    ``origin`` is the volume that it was a snapshot of; ``external_origin`` the disk that unwritten
    blocks are read from. ``node`` is its block device while it is active, else empty. ``mounts``
    are the paths of all its mounts, ``holders`` those of ``volume.mount``.
    """

    pool_id: str
    volume_id: str
    device_id: int
    size_bytes: int
    sectors: int
    transaction_id: int
    mapped_sectors: int | None
    highest_mapped_sector: int | None
    filesystem: str | None
    origin: str | None
    external_origin: str | None
    active: bool
    node: str
    open_count: int
    mounts: tuple[str, ...]
    holders: tuple[str, ...]
    deleting: bool
    already: bool = False
    timings_ms: Mapping[str, float] = {}


class VolumeCreate(Request[VolumeReport], VolumeName, method="volume.create"):
    """Make a volume; ``filesystem`` is made on it, None leaves it blank.

    With ``origin``, a read-only block device, what was never written is read from there; the
    origin's file system must be ``filesystem``.
    """

    size_bytes: int
    filesystem: str | None = "ext4"
    origin: Device | None = None

    def check(self) -> None:
        super().check()
        _check_size(self.size_bytes)
        check_choice("filesystem", self.filesystem, SCRATCH_FILESYSTEMS)


class VolumeSnapshot(Request[VolumeReport], VolumeName, method="volume.snapshot"):
    """Make a volume that begins with the content of the volume ``of``, mounted or not.

    ``size_bytes`` is that of ``of`` unless said; it cannot be less.
    """

    of: str
    size_bytes: int | None = None

    def check(self) -> None:
        super().check()
        check_word("of", self.of)
        if self.size_bytes is not None:
            _check_size(self.size_bytes)


class VolumeDeleteReply(Record):
    """``deleted``: it is gone; ``deferred``: it goes when its last user lets it go;
    ``already``: there was none."""

    deleted: bool
    deferred: bool
    already: bool
    timings_ms: Mapping[str, float]


class VolumeDelete(Request[VolumeDeleteReply], VolumeName, method="volume.delete"):
    """Delete a volume.

    One that is in use is ``busy``, or with ``deferred`` deleted as soon as it is not.
    """

    deferred: bool = False


class VolumeListReply(Record):
    volumes: tuple[VolumeReport, ...]


class VolumeList(Request[VolumeListReply], PoolName, method="volume.list"):
    """List the volumes of a pool."""


class VolumeGet(Request[VolumeReport], VolumeName, method="volume.get"):
    """Describe a volume."""


class VolumeMountReply(Record):
    """``root`` is the directory to use: the mount point, or ``rootfs`` in it."""

    path: str
    root: str
    node: str
    dev: str
    mount_id: int
    filesystem: str
    holders: tuple[str, ...]
    already: bool
    timings_ms: Mapping[str, float]


class VolumeMount(Request[VolumeMountReply], VolumeName, method="volume.mount"):
    """Mount a volume at a path for a holder; it stays until its last holder unmounts it.

    ``rootfs`` makes a directory of this name in it, and a file ``id`` with the volume's id. Set-uid
    programs take effect with ``suid``, device nodes with ``dev``.
    """

    path: str
    holder: str = "default"
    rootfs: bool = False
    suid: bool = False
    dev: bool = False

    def check(self) -> None:
        super().check()
        check_path("path", self.path)
        check_word("holder", self.holder, _HOLDER_MAX)


class VolumeUnmountReply(Record):
    """``unmounted`` is the path, empty while ``holders`` remain and where nothing was mounted;
    ``already`` says that the holder had not mounted it."""

    unmounted: str
    holders: tuple[str, ...]
    deleted: bool
    already: bool
    timings_ms: Mapping[str, float]


class VolumeUnmount(Request[VolumeUnmountReply], VolumeName, method="volume.unmount"):
    """Let a holder go; the last one unmounts the volume."""

    holder: str = "default"

    def check(self) -> None:
        super().check()
        check_word("holder", self.holder, _HOLDER_MAX)


class VolumeGrow(Request[VolumeReport], VolumeName, method="volume.grow"):
    """Make a volume larger, and its file system: now if it is mounted, else when it is."""

    size_bytes: int

    def check(self) -> None:
        super().check()
        _check_size(self.size_bytes)


class VolumeTrimReply(Record):
    """``trimmed_bytes`` were free in the file system; the pool has ``freed_bytes`` more now."""

    trimmed_bytes: int
    freed_bytes: int
    timings_ms: Mapping[str, float]


class VolumeTrim(Request[VolumeTrimReply], VolumeName, method="volume.trim"):
    """Give the free space of a mounted volume back to its pool."""
