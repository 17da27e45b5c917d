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
from guestagent.storage.devicemapper.targets import Target, TargetStatus
from vsock.deadline import Deadline
from vsock.record import Record

__all__ = ("CONTROL_PATH", "Control", "DeviceInfo")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

CONTROL_PATH = "/dev/mapper/control"

#: struct dm_ioctl: version[3], data_size, data_start, target_count, open_count, flags, event_nr,
#: padding, dev, name[128], uuid[129], data[7].
_HEADER = struct.Struct("=3I3IiIIIQ128s129s7x")
#: struct dm_target_spec: sector_start, length, status, next, target_type[16].
_SPEC = struct.Struct("=QQiI16s")
_NAME_MAX_BYTES = 127
_UUID_MAX_BYTES = 128
_FIRST_BUFFER_BYTES = 16 * 1024
_LARGEST_BUFFER_BYTES = 16 * 1024 * 1024

_DM_LIST_DEVICES = 2
_DM_DEV_CREATE = 3
_DM_DEV_REMOVE = 4
_DM_DEV_RENAME = 5
_DM_DEV_SUSPEND = 6
_DM_DEV_STATUS = 7
_DM_TABLE_LOAD = 9
_DM_TABLE_CLEAR = 10
_DM_TABLE_DEPS = 11
_DM_TABLE_STATUS = 12
_DM_LIST_VERSIONS = 13
_DM_TARGET_MSG = 14
_DM_DEV_ARM_POLL = 16
_DM_VERSION = 0
_CALL_NAMES = {
    _DM_VERSION: "DM_VERSION",
    _DM_LIST_DEVICES: "DM_LIST_DEVICES",
    _DM_DEV_CREATE: "DM_DEV_CREATE",
    _DM_DEV_REMOVE: "DM_DEV_REMOVE",
    _DM_DEV_RENAME: "DM_DEV_RENAME",
    _DM_DEV_SUSPEND: "DM_DEV_SUSPEND",
    _DM_DEV_STATUS: "DM_DEV_STATUS",
    _DM_TABLE_LOAD: "DM_TABLE_LOAD",
    _DM_TABLE_CLEAR: "DM_TABLE_CLEAR",
    _DM_TABLE_DEPS: "DM_TABLE_DEPS",
    _DM_TABLE_STATUS: "DM_TABLE_STATUS",
    _DM_LIST_VERSIONS: "DM_LIST_VERSIONS",
    _DM_TARGET_MSG: "DM_TARGET_MSG",
    _DM_DEV_ARM_POLL: "DM_DEV_ARM_POLL",
}

_DM_READONLY_FLAG = 1 << 0
_DM_SUSPEND_FLAG = 1 << 1
_DM_PERSISTENT_DEV_FLAG = 1 << 3
_DM_STATUS_TABLE_FLAG = 1 << 4
_DM_ACTIVE_PRESENT_FLAG = 1 << 5
_DM_INACTIVE_PRESENT_FLAG = 1 << 6
_DM_BUFFER_FULL_FLAG = 1 << 8
_DM_SKIP_LOCKFS_FLAG = 1 << 10
_DM_NOFLUSH_FLAG = 1 << 11
_DM_QUERY_INACTIVE_TABLE_FLAG = 1 << 12
_DM_UUID_FLAG = 1 << 14
_DM_DATA_OUT_FLAG = 1 << 16
_DM_DEFERRED_REMOVE = 1 << 17
#: Since interface 4.45 (Linux 5.13) the list of devices carries uuids.
_VERSION_WITH_LISTED_UUIDS = (4, 45, 0)
_DM_NAME_LIST_FLAG_HAS_UUID = 1
_DM_NAME_LIST_FLAG_DOESNT_HAVE_UUID = 2
#: The letters that libdm passes unmangled; what we make must look the same in its tools.
_NAME_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789#+-.:=@_")


class DeviceInfo(Record):
    """A device as the kernel describes it. ``dev`` is MAJOR:MINOR, ``node`` the kernel's own node.

    ``event_number`` grows with each event of its targets. ``readonly`` is that of the live table.
    """

    name: str
    uuid: str
    dev: str
    node: str
    readonly: bool
    suspended: bool
    live_table: bool
    inactive_table: bool
    open_count: int
    event_number: int
    target_count: int
    deferred_remove: bool


class _Reply(Record):
    version: tuple[int, ...]
    info: DeviceInfo
    flags: int
    data: bytes


class Control:
    """An open control device. Use as a context manager, or ``close()`` it."""

    def __init__(self, path: str = CONTROL_PATH) -> None:
        """Open the control device; make its node first if nothing did.

        Raises:
            OSError: ENODEV, the kernel has no device-mapper.
        """
        self._fd = _open_control(path)
        self._path = path
        self._version: tuple[int, int, int] | None = None

    def close(self) -> None:
        """Close the descriptor. Idempotent; no other thread may still be using it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: "BaseException | None",
        trace: "TracebackType | None",
    ) -> None:
        self.close()

    def version(self) -> tuple[int, int, int]:
        """Return the interface version of the kernel, as (4, 47, 0)."""
        if self._version is None:
            major, minor, patch = self._call(_DM_VERSION, what="version").version
            self._version = (major, minor, patch)
        return self._version

    def create(self, name: str, uuid: str, minor: int | None = None) -> DeviceInfo:
        """Create a device with no table yet.

        Raises:
            OSError: EBUSY, the name or the uuid is taken; EBUSY too, the minor number is.
            ValueError: name or uuid is empty, too long, or holds letters outside libdm's set.
        """
        _check_new_word("name", name, _NAME_MAX_BYTES)
        _check_new_word("uuid", uuid, _UUID_MAX_BYTES)
        flags = 0 if minor is None else _DM_PERSISTENT_DEV_FLAG
        dev = 0 if minor is None else _encode_dev(0, minor)
        return self._call(_DM_DEV_CREATE, name, uuid, flags=flags, dev=dev).info

    def load_table(self, name: str, targets: Sequence[Target], *, readonly: bool) -> DeviceInfo:
        """Load targets into the inactive slot; sector ranges must be contiguous from 0.

        Raises:
            OSError: EINVAL, a target refused its parameters (the reason is in the kernel log);
                ENOKEY or EKEYREJECTED, a verity signature is missing or wrong.
        """
        if not targets:
            raise ValueError(f"the table for {name!r} is empty")
        data = b"".join(_pack_target(target) for target in targets)
        flags = _DM_READONLY_FLAG if readonly else 0
        return self._call(
            _DM_TABLE_LOAD, name, flags=flags, data=data, target_count=len(targets)
        ).info

    def clear_table(self, name: str) -> DeviceInfo:
        """Drop the table in the inactive slot."""
        return self._call(_DM_TABLE_CLEAR, name).info

    def resume(self, name: str) -> DeviceInfo:
        """Make the inactive table live, if there is one, and let input and output go on."""
        return self._call(_DM_DEV_SUSPEND, name).info

    def suspend(self, name: str, *, noflush: bool = False, lockfs: bool = True) -> DeviceInfo:
        """Stop input and output, after freezing the file system (``lockfs``) and finishing what is
        under way (unless ``noflush``)."""
        flags = _DM_SUSPEND_FLAG
        flags |= _DM_NOFLUSH_FLAG if noflush else 0
        flags |= 0 if lockfs else _DM_SKIP_LOCKFS_FLAG
        return self._call(_DM_DEV_SUSPEND, name, flags=flags).info

    def remove(self, name: str, *, deferred: bool = False) -> bool:
        """Remove the device; return False if that was put off until its last user closes it.

        Raises:
            OSError: EBUSY, it is in use and ``deferred`` was not asked for.
        """
        flags = _DM_DEFERRED_REMOVE if deferred else 0
        return not self._call(_DM_DEV_REMOVE, name, flags=flags).flags & _DM_DEFERRED_REMOVE

    def cancel_deferred_remove(self, name: str) -> None:
        """Take a deferred removal back. Nothing happens where none was asked for."""
        self.message(name, 0, "@cancel_deferred_remove")

    def rename(self, name: str, new_name: str) -> DeviceInfo:
        """Give the device another name; EBUSY where that is taken."""
        _check_new_word("name", new_name, _NAME_MAX_BYTES)
        return self._call(_DM_DEV_RENAME, name, data=new_name.encode() + b"\0").info

    def set_uuid(self, name: str, uuid: str) -> DeviceInfo:
        """Give a uuid to a device that has none; EINVAL where it has one."""
        _check_new_word("uuid", uuid, _UUID_MAX_BYTES)
        data = uuid.encode() + b"\0"
        return self._call(_DM_DEV_RENAME, name, flags=_DM_UUID_FLAG, data=data).info

    def info(self, name: str) -> DeviceInfo:
        """Describe the device of that name."""
        return self._call(_DM_DEV_STATUS, name).info

    def find(self, *, name: str = "", uuid: str = "") -> DeviceInfo | None:
        """Describe the device of that name or of that uuid; None if there is none."""
        if bool(name) == bool(uuid):
            raise ValueError("find takes either a name or a uuid")
        try:
            return self._call(_DM_DEV_STATUS, name, uuid).info
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise

    def status(self, name: str) -> tuple[TargetStatus, ...]:
        """Return what each target of the live table says of itself."""
        reply = self._call(_DM_TABLE_STATUS, name, flags=_DM_NOFLUSH_FLAG)
        return tuple(
            TargetStatus(start_sectors=start, length_sectors=length, target_type=kind, status=text)
            for start, length, kind, text in _unpack_targets(reply)
        )

    def table(self, name: str, *, inactive: bool = False) -> tuple[Target, ...]:
        """Return the targets of the live table, or of the inactive one."""
        flags = _DM_STATUS_TABLE_FLAG | _DM_NOFLUSH_FLAG
        flags |= _DM_QUERY_INACTIVE_TABLE_FLAG if inactive else 0
        reply = self._call(_DM_TABLE_STATUS, name, flags=flags)
        return tuple(
            Target(start_sectors=start, length_sectors=length, target_type=kind, params=text)
            for start, length, kind, text in _unpack_targets(reply)
        )

    def deps(self, name: str) -> tuple[str, ...]:
        """Return the devices (MAJOR:MINOR) that the live table stands on."""
        data = self._call(_DM_TABLE_DEPS, name).data
        if not data:
            return ()
        (count,) = struct.unpack_from("=I4x", data)
        return tuple(_format_dev(dev) for dev in struct.unpack_from(f"={count}Q", data, 8))

    def list_devices(self) -> tuple[tuple[str, str, str], ...]:
        """Return (name, MAJOR:MINOR, uuid) of every device; the uuid is empty where it has none."""
        listed = []
        told = self.version() >= _VERSION_WITH_LISTED_UUIDS
        reply = self._call(_DM_LIST_DEVICES, what="list", flags=_DM_UUID_FLAG)
        for name, dev, uuid in _unpack_names(reply, told):
            if uuid is None:
                found = self.find(name=name)
                if found is None:  # went away since
                    continue
                uuid = found.uuid
            listed.append((name, dev, uuid))
        return tuple(listed)

    def list_versions(self) -> dict[str, tuple[int, int, int]]:
        """Return the version of each target type that is loaded now."""
        return dict(_unpack_versions(self._call(_DM_LIST_VERSIONS, what="list-versions").data))

    def message(self, name: str, sector: int, text: str) -> str:
        """Send a message to the target at ``sector``; return its answer, mostly empty."""
        encoded = text.encode("ascii")
        if b"\0" in encoded:
            raise ValueError(f"embedded null byte in {text!r}")
        data = struct.pack("=Q", sector) + encoded + b"\0"
        reply = self._call(_DM_TARGET_MSG, name, data=data)
        return _until_nul(reply.data) if reply.flags & _DM_DATA_OUT_FLAG else ""

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
                watcher._call(_DM_DEV_ARM_POLL, what="arm-poll")
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
    ) -> _Reply:
        """Make one ioctl, with a larger buffer for as long as the kernel says it is too small."""
        request = 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | number
        name_bytes = _encode_word("name", name, _NAME_MAX_BYTES)
        uuid_bytes = _encode_word("uuid", uuid, _UUID_MAX_BYTES)
        size = max(_FIRST_BUFFER_BYTES, _HEADER.size + len(data))
        while True:
            header = (4, 0, 0, size, _HEADER.size, target_count, 0, flags, 0, 0, dev)
            buffer = bytearray(size)
            _HEADER.pack_into(buffer, 0, *header, name_bytes, uuid_bytes)
            buffer[_HEADER.size : _HEADER.size + len(data)] = data
            syscalls.ioctl(
                self._fd, request, buffer, name or uuid or what or self._path, _CALL_NAMES[number]
            )
            reply = _parse_reply(buffer)
            if not reply.flags & _DM_BUFFER_FULL_FLAG:
                return reply
            size *= 4
            if size > _LARGEST_BUFFER_BYTES:
                text = f"{_CALL_NAMES[number]}: the answer exceeds {size // 4} bytes"
                raise OSError(errno.EOVERFLOW, text, name)


def _open_control(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        minor = _misc_minor("device-mapper")
        if minor is None:
            raise OSError(errno.ENODEV, "the kernel has no device-mapper", path) from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a static node with nothing behind it
            raise OSError(errno.ENODEV, "the kernel has no device-mapper", path) from error
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


def _encode_word(kind: str, word: str, longest: int) -> bytes:
    """Encode a name that somebody else may have chosen: anything but NUL, within the field."""
    encoded = os.fsencode(word)
    if len(encoded) > longest or b"\0" in encoded:
        raise ValueError(f"device-mapper {kind} must be at most {longest} bytes, got {word!r}")
    return encoded


def _check_new_word(kind: str, word: str, longest: int) -> None:
    if not 0 < len(word) <= longest:
        raise ValueError(f"device-mapper {kind} must have 1 to {longest} characters, got {word!r}")
    if not _NAME_LETTERS.issuperset(word):
        raise ValueError(f"device-mapper {kind} holds a letter that is not allowed: {word!r}")


def _encode_dev(major: int, minor: int) -> int:
    """The kernel's huge_encode_dev."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def _format_dev(dev: int) -> str:
    return f"{(dev & 0xFFF00) >> 8}:{dev & 0xFF | (dev >> 12) & 0xFFF00}"


def _until_nul(data: bytes) -> str:
    return os.fsdecode(data.split(b"\0", 1)[0])


def _parse_reply(buffer: bytearray) -> _Reply:
    fields = _HEADER.unpack_from(buffer)
    data_size, data_start, target_count, open_count, flags, event_number = fields[3:9]
    dev, name, uuid = fields[10:13]
    dev_text = _format_dev(dev)
    info = DeviceInfo(
        name=_until_nul(name),
        uuid=_until_nul(uuid),
        dev=dev_text,
        node=f"/dev/dm-{dev_text.partition(':')[2]}",
        readonly=bool(flags & _DM_READONLY_FLAG),
        suspended=bool(flags & _DM_SUSPEND_FLAG),
        live_table=bool(flags & _DM_ACTIVE_PRESENT_FLAG),
        inactive_table=bool(flags & _DM_INACTIVE_PRESENT_FLAG),
        open_count=open_count,
        event_number=event_number,
        target_count=target_count,
        deferred_remove=bool(flags & _DM_DEFERRED_REMOVE),
    )
    data = bytes(buffer[data_start:data_size]) if data_start < data_size else b""
    return _Reply(version=fields[:3], info=info, flags=flags, data=data)


def _pack_target(target: Target) -> bytes:
    params = target.params.encode("ascii") + b"\0"
    size = (_SPEC.size + len(params) + 7) & ~7
    kind = target.target_type.encode("ascii")
    head = _SPEC.pack(target.start_sectors, target.length_sectors, 0, size, kind)
    return (head + params).ljust(size, b"\0")


def _unpack_targets(reply: _Reply) -> list[tuple[int, int, str, str]]:
    """Here ``next`` counts from the start of the data, where on loading it counts from the spec."""
    found = []
    at = 0
    for _ in range(reply.info.target_count):
        start, length, _, next_at, kind = _SPEC.unpack_from(reply.data, at)
        text = _until_nul(reply.data[at + _SPEC.size : next_at])
        found.append((start, length, _until_nul(kind), text))
        at = next_at
    return found


def _unpack_names(reply: _Reply, uuids_told: bool) -> list[tuple[str, str, str | None]]:
    """Walk struct dm_name_list: dev, next, name; then, 8-aligned, event_nr, flags, uuid."""
    found: list[tuple[str, str, str | None]] = []
    at = 0
    while at + 12 <= len(reply.data):
        dev, next_by = struct.unpack_from("=QI", reply.data, at)
        if not dev:  # an empty list is one zeroed entry
            break
        name_at = at + 12
        name_end = reply.data.index(b"\0", name_at)
        uuid: str | None = None
        if uuids_told:
            extra_at = (name_end + 1 + 7) & ~7
            (flags,) = struct.unpack_from("=4xI", reply.data, extra_at)
            if flags & _DM_NAME_LIST_FLAG_HAS_UUID:
                uuid = _until_nul(reply.data[extra_at + 8 : extra_at + 8 + _UUID_MAX_BYTES + 1])
            elif flags & _DM_NAME_LIST_FLAG_DOESNT_HAVE_UUID:
                uuid = ""
        name = os.fsdecode(reply.data[name_at:name_end])
        found.append((name, _format_dev(dev), uuid))
        if not next_by:
            break
        at += next_by
    return found


def _unpack_versions(data: bytes) -> list[tuple[str, tuple[int, int, int]]]:
    """Walk struct dm_target_versions: next, version[3], name."""
    found = []
    at = 0
    while at + 16 <= len(data):
        next_by, major, minor, patch = struct.unpack_from("=4I", data, at)
        name = _until_nul(data[at + 16 :][:64])
        if name:
            found.append((name, (major, minor, patch)))
        if not next_by:
            break
        at += next_by
    return found
