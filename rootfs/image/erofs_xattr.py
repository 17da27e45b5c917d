"""Extended attributes of an EROFS inode: a header, then every attribute beside the inode itself.

Other writers share attributes between inodes, which then have their numbers, and shorten names by
a table of prefixes; both are read, not written.

Source: fs/erofs/erofs_fs.h, xattr.h, xattr.c (Linux 6.1 and 6.12).
"""

import struct
from collections.abc import Callable, Mapping, Sequence

from rootfs.imagefile.errors import DROP_XATTRS_HINT, cannot_hold
from vsock.errors import CallError

__all__ = (
    "XATTR_ENTRY_BYTES",
    "XATTR_HEADER_BYTES",
    "entry_bytes",
    "long_prefix",
    "pack_xattrs",
    "unpack_entry",
    "unpack_xattrs",
    "unsupported",
)

_HEADER = struct.Struct("<IB7x")
_ENTRY = struct.Struct("<BBH")
XATTR_HEADER_BYTES = _HEADER.size
XATTR_ENTRY_BYTES = _ENTRY.size
#: In the number of a prefix: it counts the image's own long prefixes.
_LONG_PREFIX = 0x80
_MAX_NAME_BYTES = 255
#: Name prefixes with their numbers; the two ACL names stand for themselves.
_PREFIXES = (
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)

_WHOLE_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")
_NAMES = {number: name for name, number in _PREFIXES}

Path = tuple[bytes, ...]


def pack_xattrs(path: Callable[[], Path], xattrs: Mapping[bytes, bytes]) -> bytes:
    """Return the bytes that follow the inode; none without attributes. ``path`` is asked for an
    error only.

    Raises:
        CallError: ``unsupported``, the format cannot hold one; ``object`` is the path.
    """
    if not xattrs:
        return b""
    parts = [_HEADER.pack(0, 0)]
    for name in sorted(xattrs):
        value = xattrs[name]
        prefix, index = _prefix(path, name)
        suffix = name[len(prefix) :]
        if len(suffix) > _MAX_NAME_BYTES or len(value) > 0xFFFF:
            raise unsupported(path(), f"the attribute {name!r}: name or value is too long")
        entry = _ENTRY.pack(len(suffix), index, len(value)) + suffix + value
        parts.append(entry + bytes(-len(entry) % 4))
    packed = b"".join(parts)
    if len(packed) // 4 > 0xFFFF:
        raise unsupported(path(), f"{len(packed)} bytes of attributes, limit 256 KiB")
    return packed


def _prefix(path: Callable[[], Path], name: bytes) -> tuple[bytes, int]:
    for prefix, index in _PREFIXES:
        whole = index in (2, 3)
        if name == prefix if whole else name.startswith(prefix) and name != prefix:
            return prefix, index
    raise unsupported(
        path(),
        f"the attribute {name!r}, of no name space it knows",
        hint=DROP_XATTRS_HINT,
    )


def unpack_xattrs(
    data: bytes, shared: Callable[[int], tuple[bytes, bytes]], prefixes: Sequence[bytes]
) -> dict[bytes, bytes]:
    """Return the attributes that ``data``, the bytes after an inode, hold.

    ``shared`` returns name and value of a shared attribute by its number; ``prefixes`` are the long
    ones.

    Raises:
        ValueError: they are damaged; the text says how.
    """
    if len(data) <= XATTR_HEADER_BYTES:
        raise ValueError("its attributes have a header and nothing else")
    _, count = _HEADER.unpack_from(data)
    at = XATTR_HEADER_BYTES + 4 * count
    if at > len(data):
        raise ValueError(f"it has {count} shared attributes in {len(data)} bytes")
    pairs = [shared(n) for n in struct.unpack_from(f"<{count}I", data, XATTR_HEADER_BYTES)]
    while at < len(data):
        if at + XATTR_ENTRY_BYTES > len(data):
            raise ValueError("its last attribute is cut")
        size = entry_bytes(data[at : at + XATTR_ENTRY_BYTES])
        pairs.append(unpack_entry(data[at : at + size], prefixes))
        at += -(-size // 4) * 4
    found: dict[bytes, bytes] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has the attribute {name!r} twice")
        found[name] = value
    return found


def entry_bytes(head: bytes) -> int:
    """Return the bytes of an attribute, from the ``XATTR_ENTRY_BYTES`` that it starts with."""
    name_bytes, _, value_bytes = _ENTRY.unpack(head)
    return XATTR_ENTRY_BYTES + int(name_bytes) + int(value_bytes)


def unpack_entry(entry: bytes, prefixes: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Return name and value of a whole entry.

    Raises:
        ValueError: as ``unpack_xattrs``.
    """
    name_bytes, number, value_bytes = _ENTRY.unpack_from(entry)
    value_at = XATTR_ENTRY_BYTES + name_bytes
    if len(entry) < value_at + value_bytes:
        raise ValueError("an attribute reaches past the end of its attributes")
    prefix = _prefix_of(number, prefixes)
    suffix = entry[XATTR_ENTRY_BYTES:value_at]
    name = prefix + suffix
    if (prefix in _WHOLE_NAMES) != (not suffix) or b"\0" in name or len(name) > _MAX_NAME_BYTES:
        raise ValueError(f"it has an attribute of the name {name!r}")
    return name, entry[value_at : value_at + value_bytes]


def _prefix_of(number: int, prefixes: Sequence[bytes]) -> bytes:
    if number & _LONG_PREFIX:
        index = number & ~_LONG_PREFIX
        if index >= len(prefixes):
            raise ValueError(f"an attribute has the long prefix {index} of {len(prefixes)}")
        return prefixes[index]
    if number not in _NAMES:
        raise ValueError(f"an attribute is of the unknown name space {number}")
    return _NAMES[number]


def long_prefix(item: bytes) -> bytes:
    """Return a long prefix from its item of the table: the number of a name space, and the rest.

    Raises:
        ValueError: it is of an unknown name space.
    """
    return _prefix_of(item[0] & ~_LONG_PREFIX, ()) + item[1:]


def unsupported(path: Path, what: str, *, hint: str | None = None) -> CallError:
    """Return the error for what an EROFS image cannot hold."""
    return cannot_hold("an EROFS image", path, what, hint=hint)
