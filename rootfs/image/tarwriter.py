"""Writing a tree as a PAX tar, for programs that make file systems from one.

Deterministic. Everything that does not fit the ustar fields is in PAX records, attributes as
``SCHILY.xattr``. Holes are written as zeros: sqfstar 4.5 cannot read every sparse member, and makes
holes of zeros itself.

Source: POSIX.1-2017 pax.
"""

import os
import stat
from collections.abc import Iterator

from rootfs.image.tree import Node, read_content, walk
from vsock.errors import CallError

__all__ = ("write_tar",)

_BLOCK_BYTES = 512
_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}
_OCTAL_MAX = {8: 0o7777777, 12: 0o77777777777}


def write_tar(root: Node) -> Iterator[bytes]:
    """Yield the archive in pieces. The root itself is the member ``./``.

    Raises:
        CallError: ``unsupported``, a socket; ``conflict``, a source changed.
    """
    first_names: dict[int, bytes] = {}
    for path, node in walk(root):
        name = b"/".join(path)
        if node.is_directory:
            yield _header(name + b"/" if path else b"./", node, b"5", b"", 0)
            continue
        target = first_names.get(id(node))
        if target is not None:
            yield _header(name, Node(node.mode), b"1", target, 0)
            continue
        first_names[id(node)] = name
        yield from _member(name, node)
    yield bytes(2 * _BLOCK_BYTES)


def _member(name: bytes, node: Node) -> Iterator[bytes]:
    kind = _TYPES.get(stat.S_IFMT(node.mode))
    if kind is None:
        text = os.fsdecode(name)
        raise CallError(
            "unsupported",
            f"cannot write {text!r} into a tar: it is a socket",
            step="write the tar",
            object=text,
        )
    yield _header(name, node, kind, node.target, node.content.size_bytes)
    yield from read_content(node.content, name)
    yield bytes(-node.content.size_bytes % _BLOCK_BYTES)


def _header(name: bytes, node: Node, kind: bytes, target: bytes, size: int) -> bytes:
    """Return a member's header, after a PAX one where something does not fit."""
    pax: dict[bytes, bytes] = {}
    seconds, nanoseconds = divmod(node.mtime_ns, 10**9)
    if nanoseconds or not 0 <= seconds <= _OCTAL_MAX[12]:
        pax[b"mtime"] = _decimal_time(node.mtime_ns)
        seconds = 0
    fields = {b"uid": (node.uid, 8), b"gid": (node.gid, 8), b"size": (size, 12)}
    octal = {b"mtime": b"%011o" % seconds}
    for key, (value, width) in fields.items():
        if not 0 <= value <= _OCTAL_MAX[width]:
            pax[key] = b"%d" % value
            value = 0
        octal[key] = b"%0*o" % (width - 1, value)
    names = {b"path": name, b"linkpath": target}
    pax |= {key: text for key, text in names.items() if len(text) > 100 or not text.isascii()}
    pax |= {b"SCHILY.xattr." + key: text for key, text in sorted(node.xattrs.items())}
    major, minor = (os.major(node.rdev), os.minor(node.rdev)) if node.is_device else (0, 0)
    block = _ustar(name, node.mode, octal, kind, target, major, minor)
    return _pax_header(pax) + block if pax else block


def _ustar(
    name: bytes,
    mode: int,
    octal: dict[bytes, bytes],
    kind: bytes,
    target: bytes,
    major: int,
    minor: int,
) -> bytes:
    parts = (
        (name[:100], 100),
        (b"%07o" % stat.S_IMODE(mode), 8),
        (octal[b"uid"], 8),
        (octal[b"gid"], 8),
        (octal[b"size"], 12),
        (octal[b"mtime"], 12),
        (b"        ", 8),
        (kind, 1),
        (target[:100], 100),
        (b"ustar\x0000", 8),
        (b"", 64),
        (b"%07o" % major, 8),
        (b"%07o" % minor, 8),
        (b"", 167),
    )
    block = b"".join(value.ljust(width, b"\0") for value, width in parts)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _pax_header(records: dict[bytes, bytes]) -> bytes:
    data = b"".join(_record(key, value) for key, value in records.items())
    octal = {b"uid": b"0000000", b"gid": b"0000000", b"mtime": b"00000000000"}
    octal[b"size"] = b"%011o" % len(data)
    header = _ustar(b"././@PaxHeader", 0o644, octal, b"x", b"", 0, 0)
    return header + data + bytes(-len(data) % _BLOCK_BYTES)


def _record(key: bytes, value: bytes) -> bytes:
    """The length counts its own digits."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def _decimal_time(time_ns: int) -> bytes:
    sign = b"-" if time_ns < 0 else b""
    seconds, nanoseconds = divmod(abs(time_ns), 10**9)
    fraction = b".%09d" % nanoseconds
    return sign + b"%d" % seconds + fraction.rstrip(b"0").rstrip(b".")
