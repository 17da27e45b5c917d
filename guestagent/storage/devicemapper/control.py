"""The device-mapper control device: one method for each ioctl, typed in and out.

``Control`` owns one descriptor of /dev/mapper/control. Its methods are safe to call from several
threads: the kernel takes its own locks, every call has its own buffer, and the interpreter lock is
free while the kernel works. They raise ``OSError`` with the device's name as ``filename``: ENXIO
where there is no such device, EBUSY where it is open or the name or uuid is taken.

Source: include/uapi/linux/dm-ioctl.h, drivers/md/dm-ioctl.c (Linux 6.1, interface 4.47).
"""

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Sequence

from guestagent.storage import syscalls
from guestagent.storage.devicemapper import dmioctl
from guestagent.storage.devicemapper.dmioctl import DeviceInfo, Reply
from guestagent.storage.devicemapper.targets import Target, TargetStatus
from vsock.closeable import FdOwner
from vsock.deadline import Deadline

__all__ = ("CONTROL_PATH", "Control", "DeviceInfo", "NoControl", "open_control")

CONTROL_PATH = "/dev/mapper/control"
_HEADER_BYTES = dmioctl.HEADER.size
#: The number of each ioctl: _IOWR(0xFD, number, struct dm_ioctl).
_REQUESTS = {
    number: 3 << 30 | _HEADER_BYTES << 16 | 0xFD << 8 | number for number in dmioctl.CALL_NAMES
}
_ABSENT = "the kernel has no device-mapper"
_ROOM_BYTES = 16 * 1024
#: Enough for a table of ours, and small enough for the cheap kind of ioctl.
_TABLE_ROOM_BYTES = 1024
#: Enough for a linear target of any size: its struct dm_target_spec and MAJOR:MINOR SECTOR.
_TARGET_ROOM_BYTES = 40 + 40
_LARGEST_BUFFER_BYTES = 16 * 1024 * 1024


class Control(FdOwner):
    """An open control device. Use as a context manager, or ``close()`` it."""

    #: Whether the kernel has device-mapper.
    is_there = True

    def __init__(self, path: str = CONTROL_PATH) -> None:
        """Open the control device; make its node first if nothing did.

        Raises:
            OSError: ENODEV, the kernel has no device-mapper.
        """
        self._fd = _open_control(path)
        self._path = path
        self._version: tuple[int, int, int] | None = None

    def fileno(self) -> int:
        """Return the descriptor; the caller must not close it."""
        return self._fd

    def version(self) -> tuple[int, int, int]:
        """Return the interface version of the kernel, as (4, 47, 0)."""
        if self._version is None:
            self._version = self._call(dmioctl.DM_VERSION, what="version").version
        return self._version

    def create(self, name: str, uuid: str, minor: int | None = None) -> None:
        """Create a device with no table yet.

        Raises:
            OSError: EBUSY, the name or the uuid is taken; EBUSY too, the minor number is.
            ValueError: name or uuid is empty, too long, or holds letters outside libdm's set.
        """
        dmioctl.check_new_word("name", name, dmioctl.NAME_MAX_BYTES)
        dmioctl.check_new_word("uuid", uuid, dmioctl.UUID_MAX_BYTES)
        flags = 0 if minor is None else dmioctl.DM_PERSISTENT_DEV_FLAG
        dev = 0 if minor is None else dmioctl.encode_dev(0, minor)
        self._call(dmioctl.DM_DEV_CREATE, name, uuid, flags=flags, dev=dev)

    def load_table(self, name: str, targets: Sequence[Target], *, readonly: bool) -> None:
        """Load targets into the inactive slot; sector ranges must be contiguous from 0.

        Raises:
            OSError: EINVAL, a target refused its parameters (the reason is in the kernel log);
                ENOKEY or EKEYREJECTED, a verity signature is missing or wrong.
        """
        if not targets:
            raise ValueError(f"the table for {name!r} is empty")
        data = b"".join(dmioctl.pack_target(target) for target in targets)
        flags = dmioctl.DM_READONLY_FLAG if readonly else 0
        if any(target.target_type == "crypt" for target in targets):
            flags |= dmioctl.DM_SECURE_DATA_FLAG  # the kernel wipes its copies of the request
        self._call(dmioctl.DM_TABLE_LOAD, name, flags=flags, data=data, target_count=len(targets))

    def resume(self, name: str) -> DeviceInfo:
        """Make the inactive table live, if there is one, and let input and output go on."""
        return self._call(dmioctl.DM_DEV_SUSPEND, name).info

    def suspend(self, name: str) -> DeviceInfo:
        """Hold input and output back until ``resume``; a mounted file system is made consistent."""
        return self._call(dmioctl.DM_DEV_SUSPEND, name, flags=dmioctl.DM_SUSPEND_FLAG).info

    def clear_table(self, name: str) -> None:
        """Drop the table in the inactive slot, if there is one."""
        self._call(dmioctl.DM_TABLE_CLEAR, name)

    def remove(self, name: str, *, deferred: bool = False) -> bool:
        """Remove the device; return False if that was put off until its last user closes it.

        Raises:
            OSError: EBUSY, it is in use and ``deferred`` was not asked for.
        """
        flags = dmioctl.DM_DEFERRED_REMOVE if deferred else 0
        reply = self._call(dmioctl.DM_DEV_REMOVE, name, flags=flags)
        return not reply.flags & dmioctl.DM_DEFERRED_REMOVE

    def cancel_deferred_remove(self, name: str) -> None:
        """Take a deferred removal back. Nothing happens where none was asked for."""
        self.message(name, 0, "@cancel_deferred_remove")

    def info(self, name: str) -> DeviceInfo:
        """Describe the device of that name."""
        return self._call(dmioctl.DM_DEV_STATUS, name).info

    def find(self, *, name: str = "", uuid: str = "") -> DeviceInfo | None:
        """Describe the device of that name or of that uuid; None if there is none."""
        reply = self._look_up(name, uuid)
        return None if reply is None else reply.info

    def exists(self, *, name: str = "", uuid: str = "") -> bool:
        """Say whether there is a device of that name or of that uuid."""
        return self._look_up(name, uuid) is not None

    def _look_up(self, name: str, uuid: str) -> Reply | None:
        if bool(name) == bool(uuid):
            raise ValueError("a device is found by either a name or a uuid")
        try:
            return self._call(dmioctl.DM_DEV_STATUS, name, uuid)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise

    def describe(
        self, name: str
    ) -> tuple[DeviceInfo, tuple[Target, ...], tuple[TargetStatus, ...]]:
        """Return what ``info``, ``table`` and ``status`` do, by fewer calls."""
        reply = self._table_status(name, dmioctl.DM_STATUS_TABLE_FLAG)
        table = _targets(reply)
        if all(target.target_type == "linear" for target in table):  # these have nothing to say
            return reply.info, table, tuple(_silent(target) for target in table)
        reply = self._table_status(name)
        return reply.info, table, _statuses(reply)

    def status(self, name: str, *, flush: bool = False) -> tuple[TargetStatus, ...]:
        """Return what each target of the live table says of itself; with ``flush`` a pool writes
        its metadata out first, so that its counts are those of now."""
        return _statuses(self._table_status(name, flush=flush))

    def table(self, name: str, *, inactive: bool = False) -> tuple[Target, ...]:
        """Return the targets of the live table, or of the inactive one."""
        flags = dmioctl.DM_STATUS_TABLE_FLAG
        flags |= dmioctl.DM_QUERY_INACTIVE_TABLE_FLAG if inactive else 0
        return _targets(self._table_status(name, flags))

    def _table_status(self, name: str, flags: int = 0, *, flush: bool = False) -> Reply:
        flags |= 0 if flush else dmioctl.DM_NOFLUSH_FLAG
        return self._call(dmioctl.DM_TABLE_STATUS, name, flags=flags, room=_TABLE_ROOM_BYTES)

    def deps(self, name: str) -> tuple[str, ...]:
        """Return the devices (MAJOR:MINOR) that the live table stands on."""
        data = self._call(dmioctl.DM_TABLE_DEPS, name, room=_ROOM_BYTES).data
        if not data:
            return ()
        (count,) = struct.unpack_from("=I4x", data)
        return tuple(dmioctl.format_dev(dev) for dev in struct.unpack_from(f"={count}Q", data, 8))

    def list_devices(self) -> tuple[tuple[str, str, str], ...]:
        """Return (name, MAJOR:MINOR, uuid) of every device; the uuid is empty where it has none."""
        listed = []
        told = self.version() >= dmioctl.VERSION_WITH_LISTED_UUIDS
        flags = dmioctl.DM_UUID_FLAG
        reply = self._call(dmioctl.DM_LIST_DEVICES, what="list", flags=flags, room=_ROOM_BYTES)
        for name, dev, uuid in dmioctl.unpack_names(reply, told):
            if uuid is None:
                found = self.find(name=name)
                if found is None:  # went away since
                    continue
                uuid = found.uuid
            listed.append((name, dev, uuid))
        return tuple(listed)

    def list_versions(self) -> dict[str, tuple[int, int, int]]:
        """Return the version of each target type that is loaded now."""
        reply = self._call(dmioctl.DM_LIST_VERSIONS, what="list-versions", room=_ROOM_BYTES)
        return dict(dmioctl.unpack_versions(reply.data))

    def message(self, name: str, sector: int, text: str) -> str:
        """Send a message to the target at ``sector``; return its answer, mostly empty."""
        encoded = text.encode("ascii")
        if b"\0" in encoded:
            raise ValueError(f"embedded null byte in {text!r}")
        data = struct.pack("=Q", sector) + encoded + b"\0"
        reply = self._call(dmioctl.DM_TARGET_MSG, name, data=data, room=_ROOM_BYTES)
        return dmioctl.until_nul(reply.data) if reply.flags & dmioctl.DM_DATA_OUT_FLAG else ""

    def arm_poll(self) -> None:
        """Have the descriptor readable from the next event of any device on."""
        self._call(dmioctl.DM_DEV_ARM_POLL, what="arm-poll")

    def wait_event(self, name: str, event_number: int, deadline: Deadline) -> DeviceInfo:
        """Wait until the device's event number is another than ``event_number``.

        DM_DEV_WAIT can be ended by a signal only. A polled descriptor can be left at the deadline,
        so that is what is used, re-armed before each look so that no event falls between.

        Raises:
            OSError: ENXIO, the device went away.
            CallError: ``timeout`` or ``cancelled``.
        """
        with Control(self._path) as watcher:
            while True:
                watcher.arm_poll()
                info = self.info(name)
                if info.event_number != event_number:
                    return info
                deadline.wait([watcher._fd], f"wait for an event of {name!r}")

    def _call(
        self,
        number: int,
        name: str = "",
        uuid: str = "",
        *,
        what: str = "",
        flags: int = 0,
        dev: int = 0,
        data: bytes = b"",
        target_count: int = 0,
        room: int = 0,
    ) -> Reply:
        """Make one ioctl, with a larger buffer for as long as the kernel says it is too small.

        ``room`` is how many bytes to begin with where the kernel answers more than the header; it
        copies the whole buffer in first, so that calls with nothing to answer have none.
        """
        name_bytes = dmioctl.encode_word("name", name, dmioctl.NAME_MAX_BYTES)
        uuid_bytes = dmioctl.encode_word("uuid", uuid, dmioctl.UUID_MAX_BYTES) if uuid else b""
        request, call = _REQUESTS[number], dmioctl.CALL_NAMES[number]
        object_name = name or uuid or what or self._path
        end = _HEADER_BYTES + len(data)
        size = max(room, end)
        while True:
            buffer = bytearray(size)
            header = (4, 0, 0, size, _HEADER_BYTES, target_count, 0, flags, 0, 0, dev)
            dmioctl.HEADER.pack_into(buffer, 0, *header, name_bytes, uuid_bytes)
            if data:
                buffer[_HEADER_BYTES:end] = data
            syscalls.ioctl(self._fd, request, buffer, object_name, call)
            reply = Reply(buffer)
            if not reply.flags & dmioctl.DM_BUFFER_FULL_FLAG:
                return reply
            if size >= _LARGEST_BUFFER_BYTES:
                raise OSError(errno.EOVERFLOW, f"{call}: the answer exceeds {size} bytes", name)
            # the header is filled in all the same, and tells how many targets a table has
            size = max(4 * size, _HEADER_BYTES + reply.target_count * _TARGET_ROOM_BYTES)
            size = min(size, _LARGEST_BUFFER_BYTES)


class NoControl(Control):
    """The control device of a kernel without device-mapper: there are no devices, and no targets.

    What makes a device fails with ENODEV.
    """

    is_there = False

    def __init__(self, path: str = CONTROL_PATH) -> None:
        self._fd = -1
        self._path = path
        self._version = None

    def list_devices(self) -> tuple[tuple[str, str, str], ...]:
        return ()

    def list_versions(self) -> dict[str, tuple[int, int, int]]:
        return {}

    def _look_up(self, name: str, uuid: str) -> None:
        return None

    def _call(self, number: int, name: str = "", *arguments: object, **options: object) -> Reply:
        raise OSError(errno.ENODEV, _ABSENT, name or self._path)


def open_control() -> Control:
    """Return the kernel's control device, or a ``NoControl`` where the kernel has none.

    Raises:
        OSError: the control device exists but cannot be opened.
    """
    try:
        return Control()
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return NoControl()


def _targets(reply: Reply) -> tuple[Target, ...]:
    return tuple(
        Target(start_sectors=start, length_sectors=length, target_type=kind, params=text)
        for start, length, kind, text in dmioctl.unpack_targets(reply)
    )


def _statuses(reply: Reply) -> tuple[TargetStatus, ...]:
    return tuple(
        TargetStatus(start_sectors=start, length_sectors=length, target_type=kind, status=text)
        for start, length, kind, text in dmioctl.unpack_targets(reply)
    )


def _silent(target: Target) -> TargetStatus:
    return TargetStatus(
        start_sectors=target.start_sectors,
        length_sectors=target.length_sectors,
        target_type=target.target_type,
        status="",
    )


def _open_control(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        minor = _misc_minor("device-mapper")
        if minor is None:
            raise OSError(errno.ENODEV, _ABSENT, path) from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a static node with nothing behind it
            raise OSError(errno.ENODEV, _ABSENT, path) from error
        raise
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another thread was as quick
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(10, minor))
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def _misc_minor(name: str) -> int | None:
    """Find a misc character device's minor number; None if the kernel has no such device."""
    with open("/proc/misc", encoding="ascii") as file:
        for line in file:
            words = line.split()
            if len(words) == 2 and words[1] == name:
                return int(words[0])
    return None
