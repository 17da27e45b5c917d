"""Extended attributes of an ext4 inode: behind its fields, and in one block of their own.

An area of attributes starts with the entries, each with a name, and four zero bytes that end them;
the values are at its end, the first one last.

Source: fs/ext4/xattr.h, xattr.c, acl.h and Documentation/filesystems/ext4/attributes.rst.
"""

import struct
from collections.abc import Mapping

from rootfs.imagefile.errors import DROP_XATTRS_HINT, cannot_hold

__all__ = ("Attribute", "pack_block", "pack_xattrs")

_MAGIC = struct.Struct("<I")
_MAGIC_NUMBER = 0xEA020000
_BLOCK_BYTES = 4096
_BLOCK_HEADER = struct.Struct("<IIIII12x")
_ENTRY = struct.Struct("<BBHIII")
_END_BYTES = 4
_MAX_NAME_BYTES = 255
_ACCESS, _DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
#: Name spaces with their numbers; the two ACL names stand for themselves.
_PREFIXES = ((b"user.", 1), (_ACCESS, 2), (_DEFAULT, 3), (b"trusted.", 4), (b"security.", 6))

#: A list of access rights: as attribute (uapi/linux/posix_acl_xattr.h) and on disk (ext4/acl.h).
_ACL_VERSION, _DISK_ACL_VERSION = 2, 1
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_TAGS = (0x01, 0x04, 0x10, 0x20)
#: Only these two, a user and a group, have an id on disk.
_ACL_TAGS_WITH_ID = (0x02, 0x08)

Path = tuple[bytes, ...]
#: The number of a name space, the rest of the name, and the value as it is on disk.
Attribute = tuple[int, bytes, bytes]


def pack_xattrs(
    path: Path, xattrs: Mapping[bytes, bytes], room_bytes: int
) -> tuple[bytes, list[Attribute]]:
    """Return ``room_bytes`` for the inode, or none, and the attributes that are for a block.

    Raises:
        CallError: ``unsupported``, ext4 cannot hold an attribute or all of them; ``object`` is the
            path.
    """
    inside: list[Attribute] = []
    outside: list[Attribute] = []
    area_bytes = room_bytes - _MAGIC.size
    room = area_bytes - _END_BYTES
    # the kernel stops searching a block at the first entry that is past the name in this order
    for attribute in sorted(
        (_attribute(path, name, xattrs[name]) for name in xattrs),
        key=lambda each: (each[0], len(each[1]), each[1]),
    ):
        size = _size_bytes(attribute)
        if size <= room:
            inside.append(attribute)
            room -= size
        else:
            outside.append(attribute)
    total = sum(map(_size_bytes, outside))
    limit = _BLOCK_BYTES - _BLOCK_HEADER.size - _END_BYTES
    if total > limit:
        what = f"{total} bytes of attributes for one block, limit {limit}"
        raise cannot_hold("an ext4 image", path, what)
    if not inside:
        return b"", outside
    return _MAGIC.pack(_MAGIC_NUMBER) + _pack_area(inside, 0, area_bytes), outside


def _attribute(path: Path, name: bytes, value: bytes) -> Attribute:
    for prefix, number in _PREFIXES:
        suffix = name[len(prefix) :]
        # an ACL's name has nothing after it, every other name has something
        if not name.startswith(prefix) or bool(suffix) is (number in (2, 3)):
            continue
        if len(suffix) > _MAX_NAME_BYTES or b"\0" in suffix:
            break
        return number, suffix, _disk_acl(path, name, value) if not suffix else value
    what = f"the attribute {name[:80]!r} ({len(name)} bytes), a name that ext4 cannot store"
    raise cannot_hold("an ext4 image", path, what, hint=DROP_XATTRS_HINT)


def _disk_acl(path: Path, name: bytes, value: bytes) -> bytes:
    """Return a list of access rights as ext4 keeps it."""
    if len(value) % _ACL_ENTRY.size != 4 or int.from_bytes(value[:4], "little") != _ACL_VERSION:
        what = f"the attribute {name!r}, which is no list of access rights"
        raise cannot_hold("an ext4 image", path, what)
    packed = [struct.pack("<I", _DISK_ACL_VERSION)]
    for entry in _ACL_ENTRY.iter_unpack(value[4:]):
        if entry[0] in _ACL_TAGS_WITH_ID:
            packed.append(_ACL_ENTRY.pack(*entry))
        elif entry[0] in _ACL_TAGS:
            packed.append(struct.pack("<HH", *entry[:2]))
        else:
            what = f"the attribute {name!r} with an entry of the unknown tag {entry[0]:#x}"
            raise cannot_hold("an ext4 image", path, what)
    return b"".join(packed)


def _size_bytes(attribute: Attribute) -> int:
    _, suffix, value = attribute
    return _ENTRY.size + _round_up(len(suffix)) + _round_up(len(value))


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // 4) * 4


def _pack_area(attributes: list[Attribute], first: int, size_bytes: int) -> bytes:
    """Return an area whose entries start at ``first``; offsets count from the area's start."""
    area = bytearray(size_bytes)
    at, end = first, size_bytes
    for number, suffix, value in attributes:
        end -= _round_up(len(value))
        area[end : end + len(value)] = value
        offset = end if value else 0
        _ENTRY.pack_into(area, at, len(suffix), number, offset, 0, len(value), _hash(suffix, value))
        at += _ENTRY.size
        area[at : at + len(suffix)] = suffix
        at += _round_up(len(suffix))
    return bytes(area)


def pack_block(attributes: list[Attribute]) -> bytes:
    """Return the block of ``attributes``; its checksum is zero, as it covers where the block is."""
    area = _pack_area(attributes, _BLOCK_HEADER.size, _BLOCK_BYTES)
    hash_of_all = 0
    for _, suffix, value in attributes:
        hash_of_all = _rotate(hash_of_all, 16) ^ _hash(suffix, value)
    return _BLOCK_HEADER.pack(_MAGIC_NUMBER, 1, 1, hash_of_all, 0) + area[_BLOCK_HEADER.size :]


def _hash(suffix: bytes, value: bytes) -> int:
    """Return what an entry says of its name and value (``ext4_xattr_hash_entry``)."""
    number = 0
    for byte in suffix:
        number = _rotate(number, 5) ^ byte
    for (word,) in struct.iter_unpack("<I", value + bytes(-len(value) % 4)):
        number = _rotate(number, 16) ^ word
    return number


def _rotate(number: int, bits: int) -> int:
    return (number << bits | number >> 32 - bits) & 0xFFFFFFFF
