"""Extended attributes of an EROFS inode: a header, then every attribute beside the inode itself.

Source: fs/erofs/erofs_fs.h, xattr.h (Linux 6.1).
"""

import struct
from collections.abc import Mapping

from rootfs.imagefile.errors import DROP_XATTRS_HINT, cannot_hold
from vsock.errors import CallError

__all__ = ("XATTR_HEADER_BYTES", "pack_xattrs", "unsupported")

_HEADER = struct.Struct("<IB7x")
_ENTRY = struct.Struct("<BBH")
XATTR_HEADER_BYTES = _HEADER.size
_MAX_NAME_BYTES = 255
#: Name prefixes with their numbers; the two ACL names stand for themselves.
_PREFIXES = (
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)

Path = tuple[bytes, ...]


def pack_xattrs(path: Path, xattrs: Mapping[bytes, bytes]) -> bytes:
    """Return the bytes that follow the inode; none without attributes.

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
            raise unsupported(path, f"the attribute {name!r}: name or value is too long")
        entry = _ENTRY.pack(len(suffix), index, len(value)) + suffix + value
        parts.append(entry + bytes(-len(entry) % 4))
    packed = b"".join(parts)
    if len(packed) // 4 > 0xFFFF:
        raise unsupported(path, f"{len(packed)} bytes of attributes, limit 256 KiB")
    return packed


def _prefix(path: Path, name: bytes) -> tuple[bytes, int]:
    for prefix, index in _PREFIXES:
        whole = index in (2, 3)
        if name == prefix if whole else name.startswith(prefix) and name != prefix:
            return prefix, index
    raise unsupported(
        path,
        f"the attribute {name!r}, of no name space it knows",
        hint=DROP_XATTRS_HINT,
    )


def unsupported(path: Path, what: str, *, hint: str | None = None) -> CallError:
    """Return the error for what an EROFS image cannot hold."""
    return cannot_hold("an EROFS image", path, what, hint=hint)
