"""Headers of tar archives: POSIX ustar, with pax records where its fields are too small.

Names that are no UTF-8 stay as they are in ustar's own fields where they fit; in pax records they
are announced with ``hdrcharset=BINARY``.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; the SCHILY keywords
are those that star, GNU tar and libarchive share.
"""

__all__ = ("BLOCK_BYTES", "Member", "end_of_archive", "header", "padding")

from vsock.record import Record

BLOCK_BYTES = 512
_RECORD_BYTES = 20 * BLOCK_BYTES
_NAME_BYTES, _PREFIX_BYTES, _LINK_BYTES = 100, 155, 100
_MAX_OCTAL_7 = 0o7777777
_MAX_OCTAL_11 = 0o77777777777
_SECOND_NS = 1_000_000_000


class Member(Record):
    """One member. ``type`` is ustar's flag: 0 file, 1 hard link, 2 symlink, 3 character device,
    4 block device, 5 directory, 6 FIFO."""

    path: bytes
    type: str
    mode: int
    uid: int
    gid: int
    size_bytes: int
    mtime_ns: int
    link: bytes = b""
    major: int = 0
    minor: int = 0
    records: tuple[tuple[bytes, bytes], ...] = ()


def header(member: Member) -> bytes:
    """Return the header blocks of a member, those of its pax records first."""
    records = list(member.records)
    name, prefix = _split(member.path)
    if name is None:
        records.append((b"path", member.path))
        name, prefix = member.path[-_NAME_BYTES:], b""
    link = member.link
    if len(link) > _LINK_BYTES:
        records.append((b"linkpath", link))
        link = link[:_LINK_BYTES]
    fields = {}
    for key, value, most in (
        ("uid", member.uid, _MAX_OCTAL_7),
        ("gid", member.gid, _MAX_OCTAL_7),
        ("size", member.size_bytes, _MAX_OCTAL_11),
    ):
        if value > most:
            records.append((key.encode(), b"%d" % value))
        fields[key] = min(value, most)
    seconds, rest_ns = divmod(member.mtime_ns, _SECOND_NS)
    if rest_ns or not 0 <= seconds <= _MAX_OCTAL_11:
        records.append((b"mtime", _time(member.mtime_ns)))
        seconds = min(max(seconds, 0), _MAX_OCTAL_11)
    block = _block(
        name,
        member.mode & 0o7777,
        fields["uid"],
        fields["gid"],
        fields["size"],
        seconds,
        member.type.encode(),
        link,
        min(member.major, _MAX_OCTAL_7),
        min(member.minor, _MAX_OCTAL_7),
        prefix,
    )
    return _extended(records) + block


def padding(size_bytes: int) -> bytes:
    """Return what fills the last block of so many bytes of content."""
    return bytes(-size_bytes % BLOCK_BYTES)


def end_of_archive(size_bytes: int) -> bytes:
    """Return what ends an archive of so many bytes: two empty blocks, up to a whole record."""
    size_bytes += 2 * BLOCK_BYTES
    return bytes(2 * BLOCK_BYTES + -size_bytes % _RECORD_BYTES)


def _split(path: bytes) -> tuple[bytes | None, bytes]:
    """Return a path as ustar's name and prefix; no name where it does not fit."""
    if len(path) <= _NAME_BYTES:
        return path, b""
    # the slash between the two is not stored; a directory's own one at the end stays in the name
    for at in range(min(len(path) - 2, _PREFIX_BYTES), 0, -1):
        if path[at : at + 1] == b"/":
            name = path[at + 1 :]
            return (name, path[:at]) if len(name) <= _NAME_BYTES else (None, b"")
    return None, b""


def _time(time_ns: int) -> bytes:
    sign = "-" if time_ns < 0 else ""
    seconds, rest_ns = divmod(abs(time_ns), _SECOND_NS)
    return f"{sign}{seconds}.{rest_ns:09d}".rstrip("0").rstrip(".").encode()


def _extended(records: list[tuple[bytes, bytes]]) -> bytes:
    if not records:
        return b""
    if any(not _is_text(value) for key, value in records if key in (b"path", b"linkpath")):
        records.insert(0, (b"hdrcharset", b"BINARY"))
    body = b"".join(_record(key, value) for key, value in records)
    block = _block(b"././@PaxHeader", 0o644, 0, 0, len(body), 0, b"x", b"", 0, 0, b"")
    return block + body + padding(len(body))


def _record(key: bytes, value: bytes) -> bytes:
    """Return ``LENGTH KEY=VALUE`` and a newline, where the length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _block(
    name: bytes,
    mode: int,
    uid: int,
    gid: int,
    size_bytes: int,
    seconds: int,
    flag: bytes,
    link: bytes,
    major: int,
    minor: int,
    prefix: bytes,
) -> bytes:
    head = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (
        name.ljust(_NAME_BYTES, b"\0"),
        mode,
        uid,
        gid,
        size_bytes,
        seconds,
    )
    tail = b"%s%sustar\00000%s%07o\0%07o\0%s" % (
        flag,
        link.ljust(_LINK_BYTES, b"\0"),
        bytes(64),  # names of user and group: the ids alone count
        major,
        minor,
        prefix.ljust(_PREFIX_BYTES + 12, b"\0"),
    )
    total = sum(head) + sum(tail) + 8 * ord(" ")  # the sum counts its own field as spaces
    return b"%s%06o\0 %s" % (head, total, tail)
