"""POSIX access control lists as the kernel stores them, without libacl.

Source: include/uapi/linux/posix_acl.h and posix_acl_xattr.h: a version of 32 bits, which is 2, then
entries of tag (16 bits), permissions (16) and id (32), little-endian.
"""

import struct

from vsock.errors import CallError

__all__ = ("Entry", "from_mode", "parse_acl", "show_acl")

#: (tag, id or None, permissions like "r-x")
Entry = tuple[str, int | None, str]

_VERSION = 2
_HEADER_BYTES = 4
_ENTRY = struct.Struct("<HHI")
#: number -> (tag, whether the entry has the id of a user or group)
_TAGS = {
    0x01: ("user", False),
    0x02: ("user", True),
    0x04: ("group", False),
    0x08: ("group", True),
    0x10: ("mask", False),
    0x20: ("other", False),
}


def parse_acl(value: bytes) -> tuple[Entry, ...]:
    """Decode the value of ``system.posix_acl_access`` or ``system.posix_acl_default``.

    Raises:
        CallError: ``unsupported``, it is none, or one of another version.
    """
    size_bytes = len(value) - _HEADER_BYTES
    if size_bytes < 0 or size_bytes % _ENTRY.size:
        raise _refused(f"{len(value)} bytes are no whole number of entries")
    version = int.from_bytes(value[:_HEADER_BYTES], "little")
    if version != _VERSION:
        raise _refused(f"version {version}, not {_VERSION}")
    entries: list[Entry] = []
    for tag, permissions, number in _ENTRY.iter_unpack(value[_HEADER_BYTES:]):
        if tag not in _TAGS:
            raise _refused(f"unknown tag {tag:#x}")
        name, is_named = _TAGS[tag]
        entries.append((name, number if is_named else None, _letters(permissions)))
    return tuple(entries)


def from_mode(mode: int) -> tuple[Entry, ...]:
    """Return the list that says what a mode says."""
    return (
        ("user", None, _letters(mode >> 6)),
        ("group", None, _letters(mode >> 3)),
        ("other", None, _letters(mode)),
    )


def show_acl(entries: tuple[Entry, ...], separator: str) -> str:
    """Return the text form, ids as numbers: ``user:1000:r-x``."""
    return separator.join(
        f"{tag}:{'' if number is None else number}:{permissions}"
        for tag, number, permissions in entries
    )


def _letters(permissions: int) -> str:
    return "".join(
        letter if permissions & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1))
    )


def _refused(problem: str) -> CallError:
    return CallError("unsupported", f"an access control list cannot be read: {problem}")
