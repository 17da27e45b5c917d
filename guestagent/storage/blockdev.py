"""Block devices as sysfs shows them: finding the device that a request means, and waiting for it.

Nothing here sleeps and looks again: ``wait_for`` subscribes to the kernel's events first, then
looks, then waits for events. A rescan of the bus is tried when a device stays away, since some
virtual machine monitors plug without telling. A failure says what was there instead.

``sys_root`` stands for /sys in every function, so that the rules can be tried on made-up trees.
"""

import errno
import os
import stat
import sys
import time

from guestagent.api import devices as api
from guestagent.storage import syscalls
from guestagent.storage.uevents import UeventSocket
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log
from vsock.record import Record
from vsock.retry import has_errno, retry

__all__ = (
    "LATE_CLOSE_SECONDS",
    "BlockDevice",
    "Search",
    "delete",
    "deleter_of",
    "describe",
    "ensure_node",
    "find",
    "flush",
    "holders",
    "inspect",
    "is_partition",
    "is_readonly",
    "labels",
    "list_all",
    "order_of",
    "partitions",
    "read",
    "set_readonly",
    "wait_for",
    "wait_unused",
)

#: Since Linux 6.9 a device that was removed or unmounted closes its disk a little later (delayed
#: fput), after it has left /sys and /proc.
LATE_CLOSE_SECONDS = 0.5

# include/uapi/linux/fs.h
_BLKROSET, _BLKROGET, _BLKFLSBUF, _BLKSSZGET = 0x125D, 0x125E, 0x1261, 0x1268
#: How often to look again at a node that devtmpfs or udev makes meanwhile.
_NODE_ATTEMPTS = 4
#: Seconds without the device after which the buses are rescanned; once each.
_RESCAN_AFTER_SECONDS = (0.5, 3.0)
#: Events can be lost, so a wait looks again by itself after this long.
_LOOK_AGAIN_SECONDS = 1.0
_WITHOUT_SERIAL = ("pmem", "loop", "dm")


#: Disks that a host names.
_LABELLED = ("vd", "sd", "nvme", "pmem")


class BlockDevice(Record):
    """A block device. ``dev`` is MAJOR:MINOR, ``kind`` pmem, virtio-blk, scsi, dm, loop or other;
    that of a partition is its disk's."""

    node: str
    dev: str
    name: str
    size_bytes: int
    logical_block_size: int
    readonly: bool
    serial: str | None
    kind: str


def inspect(name_or_dev: str, *, sys_root: str = "/sys", by_node: bool = False) -> BlockDevice:
    """Describe a device given by kernel name (``vda``) or MAJOR:MINOR.

    ``by_node``: the device itself tells its size and the like, by half the calls that sysfs takes;
    its node is made if it is not there.

    Raises:
        FileNotFoundError: there is none.
        OSError: ENXIO with ``by_node``, the kernel does not open it (yet).
    """
    link = "dev/block" if ":" in name_or_dev else "class/block"
    directory = f"{sys_root}/{link}"
    # one link leads there; realpath would look at each part of the path
    path = os.path.join(directory, os.readlink(f"{directory}/{name_or_dev}"))
    name = os.path.basename(path)
    is_partition = os.path.exists(f"{path}/partition")
    disk = os.path.dirname(path) if is_partition else path
    kind = _kind(os.path.basename(disk))
    node = "/dev/" + name.replace("!", "/")
    dev = name_or_dev if ":" in name_or_dev else _read(f"{path}/dev")
    facts = _facts_of_node(node, dev) if by_node else None
    size_bytes, logical_block_size, readonly = facts or (
        _read_number(f"{path}/size") * api.SECTOR_BYTES,
        _read_number(f"{disk}/queue/logical_block_size"),
        _read(f"{path}/ro") == "1",
    )
    return BlockDevice(
        node=node,
        dev=dev,
        name=name,
        size_bytes=size_bytes,
        logical_block_size=logical_block_size,
        readonly=readonly,
        serial=None if kind in _WITHOUT_SERIAL else _serial(disk),
        kind=kind,
    )


def _facts_of_node(node: str, dev: str) -> tuple[int, int, bool] | None:
    """Return size, logical block size and whether it is read-only; None if it cannot be opened,
    which the step that uses the device tells.

    ``device_add_disk`` (block/genhd.c) registers a disk, which makes its node, before it can be
    opened: until then the kernel answers ENXIO. The event that a disk was added comes afterwards.
    """
    ensure_node(node, dev)
    try:
        fd = os.open(node, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise
        return None
    try:
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        return size_bytes, _get(fd, _BLKSSZGET, node), bool(_get(fd, _BLKROGET, node))
    finally:
        os.close(fd)


def _get(fd: int, request: int, node: str) -> int:
    """Return the ``int`` that an ioctl tells of a block device."""
    value = bytearray(4)
    syscalls.ioctl(fd, request, value, node, "BLKSSZGET or BLKROGET")
    return int.from_bytes(value, sys.byteorder)


def list_all(*, sys_root: str = "/sys") -> tuple[BlockDevice, ...]:
    """Describe every block device, in order of name."""
    devices = []
    for name in sorted(_entries(f"{sys_root}/class/block")):
        try:
            devices.append(inspect(name, sys_root=sys_root))
        except OSError as error:
            if not _is_vanished(error):
                raise
    return tuple(devices)


def find(
    device: api.Device, *, sys_root: str = "/sys", by_node: bool = False
) -> BlockDevice | None:
    """Find the device that a request means; None if it is not there, or not ready (size 0).

    ``by_node`` is as of ``inspect``; where the kernel does not open the device it is not ready.

    Raises:
        CallError: ``invalid``, the path is there but is no block device; ``conflict``, two disks
            have the serial.
    """
    try:
        name = _locate(device, sys_root)
        found = None if name is None else inspect(name, sys_root=sys_root, by_node=by_node)
    except OSError as error:
        if _is_vanished(error):
            return None
        raise
    return found if found is not None and found.size_bytes > 0 else None


def describe(device: api.Device) -> str:
    """Say which device is meant, in a few words."""
    match device:
        case api.PmemDevice():
            return f"pmem {device.number}"
        case api.VirtioBlkDevice():
            return f"virtio-blk disk with serial {device.serial!r}"
        case api.LabelDevice():
            return f"disk with label {device.label!r}"
        case api.ScsiDevice():
            return f"scsi {device.controller}:0:0:{device.lun} partition {device.partition}"
        case api.VmbusScsiDevice():
            where = f"lun {device.lun} partition {device.partition}"
            return f"scsi of the VMBus device {device.guid} {where}"
        case api.PathDevice():
            return f"block device {device.path!r}"


def labels(name: str, *, sys_root: str = "/sys") -> tuple[str, ...]:
    """Return the names that the host gave to a disk, given by kernel name, as far as they can be
    labels: its serial, for SCSI also its WWN, for NVDIMMs the name of the namespace and the unique
    ids of the DIMMs that it is on. A partition has none.
    """
    disk = f"{sys_root}/class/block/{name}"
    if os.path.exists(f"{disk}/partition"):
        return ()
    found = [_serial(disk)] if name.startswith(("vd", "nvme")) else []
    if name.startswith("sd"):
        found = [_scsi_serial(disk), _wwn(disk)]
    elif name.startswith("pmem"):
        found = _nvdimm_names(disk)
    return tuple(dict.fromkeys(text for text in found if text and api.is_label(text)))


def _wwn(disk: str) -> str:
    """Return the identifier of a SCSI disk without its type (naa., eui., t10.)."""
    try:
        return _read(f"{disk}/device/wwid", "").partition(".")[2]
    except OSError as error:
        if error.errno != errno.EINVAL:  # it has none (drivers/scsi/scsi_lib.c, scsi_vpd_lun_id)
            raise
        return ""


def _scsi_serial(disk: str) -> str:
    """Return the unit serial number: a page that begins with type, code and a length of two bytes
    (SPC-5, 7.7.19; scsi_sysfs.c of the kernel serves it)."""
    page = _read_bytes(f"{disk}/device/vpd_pg80")
    return page[4 : 4 + int.from_bytes(page[2:4], "big")].decode("latin-1").strip(" \0")


def _nvdimm_names(disk: str) -> list[str | None]:
    """Return the name of the namespace that a pmem disk is, and the unique id of each DIMM that it
    is on: manufacturer, place, date and serial (drivers/acpi/nfit/core.c, id_show).

    The region, which is the directory above, lists its DIMMs; both are on one bus.
    """
    device = os.path.realpath(f"{disk}/device")
    region = os.path.dirname(device)
    # a disk with a memory map of its own is not the namespace, and names it
    namespace = _read(f"{device}/namespace", "") or os.path.basename(device)
    found: list[str | None] = [_read(f"{region}/{namespace}/alt_name", "")]
    for entry in _entries(region):
        if entry.startswith("mapping"):
            dimm = _read(f"{region}/{entry}", "").partition(",")[0]
            found.append(_read(f"{os.path.dirname(region)}/{dimm}/nfit/id", ""))
    return found


def order_of(name: str, *, sys_root: str = "/sys") -> int:
    """Return a number by which disks, given by kernel name, are in the order in which the kernel
    met them: that of their slots or LUNs for those of the start, then as they were plugged in. That
    of a partition is its disk's.

    Drivers give names in an order of their own. The directory of the hardware is numbered when the
    bus is looked at, and numbers grow (fs/kernfs/dir.c, __kernfs_new_node).
    """
    disk = os.path.realpath(f"{sys_root}/class/block/{name}")
    if os.path.exists(f"{disk}/partition"):
        disk = os.path.dirname(disk)
    for path in (f"{disk}/device", disk):
        try:
            return os.stat(path).st_ino
        except OSError as error:
            if not _is_vanished(error):
                raise
    return 0


def wait_for(
    device: api.Device,
    deadline: Deadline,
    *,
    sys_root: str = "/sys",
) -> BlockDevice:
    """Return the device once it is there, with its node. The agent's log tells of rescans.

    Raises:
        CallError: ``timeout`` or ``cancelled``; the message lists the devices there are.
    """
    found = find(device, sys_root=sys_root, by_node=True)
    return _wait(device, deadline, sys_root) if found is None else found


def _wait(device: api.Device, deadline: Deadline, sys_root: str) -> BlockDevice:
    search = Search(device, sys_root=sys_root)
    with UeventSocket() as events:
        while (found := search.look()) is None:
            try:
                step = f"wait for {describe(device)}"
                deadline.wait([events.fileno()], step, at_most=search.pause_seconds)
            except CallError as error:
                raise _not_there(device, error, sys_root) from error
            events.receive()
    return found


class Search:
    """Looks for a device that stays away: at each event, and by itself after ``pause_seconds``.

    The subscription to events must be older than the first look. When a device has stayed away for
    some time its bus is rescanned.
    """

    def __init__(self, device: api.Device, *, sys_root: str = "/sys") -> None:
        self.device = device
        self._sys_root = sys_root
        self._started = time.monotonic()
        self._rescans = list(_RESCAN_AFTER_SECONDS)
        #: How long to wait for an event before the next look.
        self.pause_seconds = 0.0

    def look(self) -> BlockDevice | None:
        """Return the device if it is there.

        Raises:
            CallError: as ``find``.
        """
        while (found := find(self.device, sys_root=self._sys_root, by_node=True)) is None:
            self.pause_seconds = _LOOK_AGAIN_SECONDS
            if not self._rescans:
                return None
            elapsed = time.monotonic() - self._started
            if elapsed < self._rescans[0]:
                self.pause_seconds = min(self.pause_seconds, self._rescans[0] - elapsed)
                return None
            del self._rescans[0]
            _rescan(self.device, self._sys_root)
        return found


def _not_there(device: api.Device, error: CallError, sys_root: str) -> CallError:
    seen = [
        f"{found.name} ({found.kind}, {found.size_bytes} bytes"
        + (f", serial {found.serial!r})" if found.serial else ")")
        for found in list_all(sys_root=sys_root)
    ]
    return CallError(
        error.code,
        f"{describe(device)} is not there; block devices seen: {', '.join(seen) or 'none'}",
        step="wait-device",
        object=describe(device),
        hint="is it attached to this machine, and the driver loaded?",
    )


def _locate(device: api.Device, sys_root: str) -> str | None:
    """Return the kernel name, or MAJOR:MINOR, of the device that is meant."""
    match device:
        case api.PmemDevice():
            return f"pmem{device.number}"
        case api.VirtioBlkDevice():
            return _locate_virtio(device.serial, sys_root)
        case api.LabelDevice():
            return _locate_label(device.label, sys_root)
        case api.ScsiDevice() | api.VmbusScsiDevice():
            return _locate_scsi(device, sys_root)
        case api.PathDevice():
            return _locate_path(device.path)


def _locate_virtio(serial: str, sys_root: str) -> str | None:
    names = [
        name
        for name in _entries(f"{sys_root}/class/block")
        if name.startswith("vd") and _serial(f"{sys_root}/class/block/{name}") == serial
    ]
    return _only(names, f"serial {serial!r}", serial)


def _locate_label(label: str, sys_root: str) -> str | None:
    directory = f"{sys_root}/class/block"
    # no label is of a partition, or of what the kernel makes of other devices
    names = [
        name
        for name in _entries(directory)
        if name.startswith(_LABELLED) and label in labels(name, sys_root=sys_root)
    ]
    return _only(names, f"label {label!r}", label)


def _only(names: list[str], what: str, object: str) -> str | None:
    if len(names) > 1:
        text = f"disks {' and '.join(sorted(names))} all have {what}"
        hint = "name the device in another way"
        raise CallError("conflict", text, step="wait-device", object=object, hint=hint)
    return names[0] if names else None


def _locate_scsi(device: api.ScsiDevice | api.VmbusScsiDevice, sys_root: str) -> str | None:
    controller = _controller_of(device, sys_root)
    disks = _entries(f"{sys_root}/bus/scsi/devices/{controller}:0:0:{device.lun}/block")
    if not disks or not device.partition:
        return disks[0] if disks else None
    disk = f"{sys_root}/class/block/{disks[0]}"
    for name in _entries(disk):
        if name.startswith(disks[0]) and _read(f"{disk}/{name}/partition", "") == str(
            device.partition
        ):
            return name
    return None


def _locate_path(path: str) -> str:
    found = os.stat(path)
    if not stat.S_ISBLK(found.st_mode):
        text = f"{path!r} is not a block device"
        raise CallError("invalid", text, step="wait-device", object=path)
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def _controller_of(device: api.ScsiDevice | api.VmbusScsiDevice, sys_root: str) -> str:
    """Return the number of the SCSI host; empty where a VMBus device has none (yet).

    hv_storvsc makes one host for each controller, below the controller's device
    (drivers/scsi/storvsc_drv.c of Linux).
    """
    if isinstance(device, api.ScsiDevice):
        return str(device.controller)
    names = _entries(f"{sys_root}/bus/vmbus/devices/{device.guid.lower()}")
    hosts = [name.removeprefix("host") for name in names if name.startswith("host")]
    return next((host for host in hosts if host.isdecimal()), "")


def _rescan(device: api.Device, sys_root: str) -> None:
    """Have the kernel look at its buses once more; a bus that is not there is no error."""
    triggers = [(f"{sys_root}/bus/pci/rescan", "1")]
    if isinstance(device, (api.ScsiDevice, api.VmbusScsiDevice)):
        controller = _controller_of(device, sys_root)
        host = f"{sys_root}/class/scsi_host/host{controller}/scan"
        triggers = [(host, f"0 0 {device.lun}")]
    elif isinstance(device, (api.PathDevice, api.LabelDevice)):
        hosts = _entries(f"{sys_root}/class/scsi_host")
        triggers += [(f"{sys_root}/class/scsi_host/{host}/scan", "- - -") for host in hosts]
    for path, text in triggers:
        if not os.path.exists(path):
            continue
        log.info(
            "a device stays away: rescanning", device=describe(device), path=path, written=text
        )
        _write(path, text)


def holders(dev: str, *, sys_root: str = "/sys") -> tuple[str, ...]:
    """Return the kernel names of the devices that stand on ``dev`` (MAJOR:MINOR)."""
    return tuple(sorted(_entries(f"{sys_root}/dev/block/{dev}/holders")))


def partitions(name: str, *, sys_root: str = "/sys") -> tuple[BlockDevice, ...]:
    """Describe the partitions of a disk, given by kernel name."""
    disk = f"{sys_root}/class/block/{name}"
    found = [each for each in _entries(disk) if os.path.exists(f"{disk}/{each}/partition")]
    return tuple(inspect(each, sys_root=sys_root) for each in found)


def is_partition(name: str, *, sys_root: str = "/sys") -> bool:
    """Say whether a device, given by kernel name, is a partition."""
    return os.path.exists(f"{sys_root}/class/block/{name}/partition")


def deleter_of(name: str, *, sys_root: str = "/sys") -> str | None:
    """Return the file by which the kernel lets go of a disk, which SCSI disks alone have."""
    path = f"{sys_root}/class/block/{name}/device/delete"
    return path if os.path.exists(path) else None


def delete(disk: BlockDevice, deleter: str, deadline: Deadline) -> None:
    """Write a disk's cached data out, have the kernel let go of it, and wait until it has.

    Raises:
        OSError: EBUSY, it or a partition is mounted or held; EIO, its data cannot be written.
        CallError: ``timeout`` or ``cancelled``, it is still there.
    """
    wait_unused(disk.node, deadline)
    with UeventSocket() as events:
        # nothing can be mounted or set up on it as long as it is open in this way
        fd = os.open(disk.node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            _write(deleter, "1")
        finally:
            os.close(fd)
        while os.path.exists(f"/sys/dev/block/{disk.dev}"):
            deadline.wait(
                [events.fileno()], f"wait until {disk.name} is gone", at_most=_LOOK_AGAIN_SECONDS
            )
            events.receive()


def ensure_node(node: str, dev: str) -> None:
    """Make the block device node of ``dev`` (MAJOR:MINOR) unless it is there.

    devtmpfs or udev may make it at the same time. A node of another device is replaced.

    Raises:
        OSError: it cannot be made; EEXIST, another node appears there each time.
    """
    major, _, minor = dev.partition(":")
    number = os.makedev(int(major), int(minor))
    for attempt in range(1, _NODE_ATTEMPTS + 1):
        try:
            found = os.stat(node, follow_symlinks=False)
            if stat.S_ISBLK(found.st_mode) and found.st_rdev == number:
                return
            os.unlink(node)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(node), 0o755, exist_ok=True)
        try:
            os.mknod(node, 0o600 | stat.S_IFBLK, number)
            return
        except FileExistsError:
            if attempt == _NODE_ATTEMPTS:
                raise


def wait_unused(node: str, deadline: Deadline) -> None:
    """Return once a block device has no user, if it comes to that within ``LATE_CLOSE_SECONDS``.

    Raises:
        OSError: EBUSY, it is in use.
        CallError: ``cancelled``.
    """

    def open_exclusively() -> None:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))

    with deadline.part(LATE_CLOSE_SECONDS) as limit:
        retry(open_exclusively, limit, when=has_errno(errno.EBUSY), step="open the device")


def is_readonly(name: str, *, sys_root: str = "/sys") -> bool:
    """Say whether the kernel refuses writes to a device, given by kernel name."""
    return _read(f"{sys_root}/class/block/{name}/ro") == "1"


def set_readonly(node: str, readonly: bool) -> None:
    """Have the kernel refuse writes to a device, or no longer; what the host attached as read-only
    stays so."""
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flag = bytearray(int(readonly).to_bytes(4, sys.byteorder))
        syscalls.ioctl(fd, _BLKROSET, flag, node, "BLKROSET")
    finally:
        os.close(fd)


def read(node: str, offset_bytes: int, size_bytes: int) -> bytes:
    """Read a part of a device, fewer bytes at its end."""
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size_bytes, offset_bytes)
    finally:
        os.close(fd)


def flush(node: str) -> None:
    """Write a device's dirty pages out and drop its cached ones."""
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.ioctl(fd, _BLKFLSBUF, 0, node, "BLKFLSBUF")
    finally:
        os.close(fd)


def _kind(name: str) -> str:
    for prefix, kind in (
        ("pmem", "pmem"),
        ("vd", "virtio-blk"),
        ("sd", "scsi"),
        ("sr", "scsi"),
        ("dm-", "dm"),
        ("loop", "loop"),
    ):
        rest = name.removeprefix(prefix)
        if rest != name and rest[:1].isalnum():
            return kind
    return "other"


def _serial(disk: str) -> str | None:
    """The serial that the host gave; virtio-blk has it at the disk, others at their device."""
    for path in (f"{disk}/serial", f"{disk}/device/serial"):
        text = _read(path, "")
        if text:
            return text
    return None


def _is_vanished(error: OSError) -> bool:
    """Sysfs answers ENODEV or ENXIO from a file whose device is just going away."""
    return error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)


def _entries(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        if _is_vanished(error):
            return []
        raise


def _read(path: str, missing: str | None = None) -> str:
    """Read a sysfs attribute; ``missing`` is the answer where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.fsdecode(os.read(fd, 4096)).strip()
        finally:
            os.close(fd)
    except OSError as error:
        if missing is not None and _is_vanished(error):
            return missing
        raise


def _read_bytes(path: str) -> bytes:
    """Read a binary attribute; nothing where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 4096)
        finally:
            os.close(fd)
    except OSError as error:
        if _is_vanished(error):
            return b""
        raise


def _read_number(path: str) -> int:
    return int(_read(path))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)
