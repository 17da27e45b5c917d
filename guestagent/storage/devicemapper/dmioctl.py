"""struct dm_ioctl and what follows it: packed and parsed, with no kernel in sight.

Source: include/uapi/linux/dm-ioctl.h (Linux 6.1, interface 4.47).
"""

import functools
import struct

from guestagent.storage.devicemapper.targets import Target
from vsock.record import Record

#: struct dm_ioctl: version[3], data_size, data_start, target_count, open_count, flags, event_nr,
#: padding, dev, name[128], uuid[129], data[7].
HEADER = struct.Struct("=3I3IiIIIQ128s129s7x")
#: struct dm_target_spec: sector_start, length, status, next, target_type[16].
_SPEC = struct.Struct("=QQiI16s")
NAME_MAX_BYTES = 127
UUID_MAX_BYTES = 128

DM_LIST_DEVICES = 2
DM_DEV_CREATE = 3
DM_DEV_REMOVE = 4
DM_DEV_SUSPEND = 6
DM_DEV_STATUS = 7
DM_TABLE_LOAD = 9
DM_TABLE_CLEAR = 10
DM_TABLE_DEPS = 11
DM_TABLE_STATUS = 12
DM_LIST_VERSIONS = 13
DM_TARGET_MSG = 14
DM_DEV_ARM_POLL = 16
DM_VERSION = 0
CALL_NAMES = {
    DM_VERSION: "DM_VERSION",
    DM_LIST_DEVICES: "DM_LIST_DEVICES",
    DM_DEV_CREATE: "DM_DEV_CREATE",
    DM_DEV_REMOVE: "DM_DEV_REMOVE",
    DM_DEV_SUSPEND: "DM_DEV_SUSPEND",
    DM_DEV_STATUS: "DM_DEV_STATUS",
    DM_TABLE_LOAD: "DM_TABLE_LOAD",
    DM_TABLE_CLEAR: "DM_TABLE_CLEAR",
    DM_TABLE_DEPS: "DM_TABLE_DEPS",
    DM_TABLE_STATUS: "DM_TABLE_STATUS",
    DM_LIST_VERSIONS: "DM_LIST_VERSIONS",
    DM_TARGET_MSG: "DM_TARGET_MSG",
    DM_DEV_ARM_POLL: "DM_DEV_ARM_POLL",
}

DM_READONLY_FLAG = 1 << 0
DM_SUSPEND_FLAG = 1 << 1
DM_PERSISTENT_DEV_FLAG = 1 << 3
DM_STATUS_TABLE_FLAG = 1 << 4
_DM_ACTIVE_PRESENT_FLAG = 1 << 5
_DM_INACTIVE_PRESENT_FLAG = 1 << 6
DM_BUFFER_FULL_FLAG = 1 << 8
DM_NOFLUSH_FLAG = 1 << 11
DM_QUERY_INACTIVE_TABLE_FLAG = 1 << 12
DM_UUID_FLAG = 1 << 14
DM_SECURE_DATA_FLAG = 1 << 15
DM_DATA_OUT_FLAG = 1 << 16
DM_DEFERRED_REMOVE = 1 << 17
#: Since interface 4.45 (Linux 5.13) the list of devices carries uuids.
VERSION_WITH_LISTED_UUIDS = (4, 45, 0)
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


class Reply:
    """What the kernel answered. Parsed as far as it is asked for, since most calls ask nothing."""

    __slots__ = ("_buffer", "_fields", "flags")

    def __init__(self, buffer: bytearray) -> None:
        self._buffer = buffer
        self._fields = HEADER.unpack_from(buffer)
        self.flags: int = self._fields[7]

    @property
    def version(self) -> tuple[int, int, int]:
        return self._fields[:3]

    @property
    def target_count(self) -> int:
        return int(self._fields[5])

    @property
    def data(self) -> bytes:
        """What is behind the header."""
        data_size, data_start = self._fields[3:5]
        return bytes(self._buffer[data_start:data_size]) if data_start < data_size else b""

    @property
    def info(self) -> DeviceInfo:
        """The device as the header has it."""
        open_count, flags, event_number, _, dev, name, uuid = self._fields[6:]
        dev_text = format_dev(dev)
        return DeviceInfo(
            name=until_nul(name),
            uuid=until_nul(uuid),
            dev=dev_text,
            node=f"/dev/dm-{dev_text.partition(':')[2]}",
            readonly=bool(flags & DM_READONLY_FLAG),
            suspended=bool(flags & DM_SUSPEND_FLAG),
            live_table=bool(flags & _DM_ACTIVE_PRESENT_FLAG),
            inactive_table=bool(flags & _DM_INACTIVE_PRESENT_FLAG),
            open_count=open_count,
            event_number=event_number,
            target_count=self.target_count,
            deferred_remove=bool(flags & DM_DEFERRED_REMOVE),
        )


@functools.lru_cache(maxsize=256)
def encode_word(kind: str, word: str, longest: int) -> bytes:
    """Encode a name that another program may have chosen: no NUL, and it fits the field."""
    encoded = word.encode("utf-8", "surrogateescape")
    if len(encoded) > longest or b"\0" in encoded:
        raise ValueError(f"device-mapper {kind} must be at most {longest} bytes, got {word!r}")
    return encoded


def check_new_word(kind: str, word: str, longest: int) -> None:
    if not 0 < len(word) <= longest:
        raise ValueError(f"device-mapper {kind} must have 1 to {longest} characters, got {word!r}")
    if not _NAME_LETTERS.issuperset(word):
        raise ValueError(f"device-mapper {kind} holds a letter that is not allowed: {word!r}")


def encode_dev(major: int, minor: int) -> int:
    """The kernel's huge_encode_dev."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def format_dev(dev: int) -> str:
    return f"{(dev & 0xFFF00) >> 8}:{dev & 0xFF | (dev >> 12) & 0xFFF00}"


def until_nul(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def pack_target(target: Target) -> bytes:
    params = target.params.encode("ascii") + b"\0"
    size = (_SPEC.size + len(params) + 7) & ~7
    kind = target.target_type.encode("ascii")
    head = _SPEC.pack(target.start_sectors, target.length_sectors, 0, size, kind)
    return (head + params).ljust(size, b"\0")


def unpack_targets(reply: Reply) -> list[tuple[int, int, str, str]]:
    """Here ``next`` counts from the start of the data, where on loading it counts from the spec."""
    found = []
    at, data = 0, reply.data
    for _ in range(reply.target_count):
        start, length, _, next_at, kind = _SPEC.unpack_from(data, at)
        text = until_nul(data[at + _SPEC.size : next_at])
        found.append((start, length, until_nul(kind), text))
        at = next_at
    return found


def unpack_names(reply: Reply, uuids_told: bool) -> list[tuple[str, str, str | None]]:
    """Walk struct dm_name_list: dev, next, name; then, 8-aligned, event_nr, flags, uuid."""
    found: list[tuple[str, str, str | None]] = []
    at, data = 0, reply.data
    while at + 12 <= len(data):
        dev, next_by = struct.unpack_from("=QI", data, at)
        if not dev:  # an empty list is one zeroed entry
            break
        name_at = at + 12
        name_end = data.index(b"\0", name_at)
        uuid: str | None = None
        if uuids_told:
            extra_at = (name_end + 1 + 7) & ~7
            (flags,) = struct.unpack_from("=4xI", data, extra_at)
            if flags & _DM_NAME_LIST_FLAG_HAS_UUID:
                uuid = until_nul(data[extra_at + 8 : extra_at + 8 + UUID_MAX_BYTES + 1])
            elif flags & _DM_NAME_LIST_FLAG_DOESNT_HAVE_UUID:
                uuid = ""
        name = until_nul(data[name_at:name_end])
        found.append((name, format_dev(dev), uuid))
        if not next_by:
            break
        at += next_by
    return found


def unpack_versions(data: bytes) -> list[tuple[str, tuple[int, int, int]]]:
    """Walk struct dm_target_versions: next, version[3], name."""
    found = []
    at = 0
    while at + 16 <= len(data):
        next_by, major, minor, patch = struct.unpack_from("=4I", data, at)
        name = until_nul(data[at + 16 :][:64])
        if name:
            found.append((name, (major, minor, patch)))
        if not next_by:
            break
        at += next_by
    return found
