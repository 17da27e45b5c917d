"""The owners and the root directory of a squashfs image, put right in the finished image.

sqfstar 4.5 takes no notice of -root-time, -root-uid and -root-gid: the root directory belongs to
the user who runs it, whose ids are in the table of ids, behind those of the files. Inodes and ids
of the image have to be uncompressed (-noI).

Source: fs/squashfs/squashfs_fs.h, Documentation/filesystems/squashfs.rst (Linux 6.1).
"""

import os
import struct
from collections.abc import Set

from vsock.errors import CallError

__all__ = ("set_root",)

#: id count, root inode, bytes used, start of the tables of ids, attributes and inodes.
_SUPERBLOCK = struct.Struct("<26xH4xQQQQQ24x")
_ID_COUNT, _BYTES_USED = 26, 40  # the places of what is changed; three numbers at the latter
_NO_TABLE = (1 << 64) - 1
_UNCOMPRESSED = 0x8000
_DIRECTORIES = (1, 8)
_IDS_PER_BLOCK = 2048
_ATTRIBUTES_PER_BLOCK = 512
_MAX_IDS = 0xFFFF


def set_root(fd: int, uid: int, gid: int, seconds: int, owners: Set[int]) -> None:
    """Give the root directory of the image ``fd`` (borrowed) an owner and a time.

    ``owners`` are the ids of everything below it; others go out of the image.

    Raises:
        CallError: ``unsupported``, over 65535 ids; ``internal``, the image is not as it should be.
        OSError: as read(2) and write(2).
    """
    superblock = os.pread(fd, _SUPERBLOCK.size, 0)
    id_count, reference, _, id_table, _, inode_table = _SUPERBLOCK.unpack(superblock)
    found = _read_ids(fd, id_table, id_count)
    ids = [each for each in found if each in owners]
    if found[: len(ids)] != ids:
        raise _unexpected("ids that own nothing before those of files")
    ids += [each for each in dict.fromkeys((uid, gid)) if each not in owners]
    if len(ids) > _MAX_IDS:
        raise CallError(
            "unsupported",
            f"cannot make a squashfs image of {len(ids)} owners: it holds {_MAX_IDS}",
            step="make the image",
        )
    if ids != found:
        _replace_ids(fd, superblock, ids)
    block = inode_table + (reference >> 16)
    place = block + 2 + (reference & 0xFFFF)
    kind, mode = struct.unpack("<HH", os.pread(fd, 4, place))
    if not _is_uncompressed(fd, block) or kind not in _DIRECTORIES:
        raise _unexpected(f"an inode of kind {kind} where the root should be")
    owner = (ids.index(uid), ids.index(gid))
    os.pwrite(fd, struct.pack("<HHHHI", kind, mode, *owner, seconds), place)


def _read_ids(fd: int, table: int, count: int) -> list[int]:
    ids: list[int] = []
    for number in range(-(-count // _IDS_PER_BLOCK)):
        (block,) = struct.unpack("<Q", os.pread(fd, 8, table + 8 * number))
        if not _is_uncompressed(fd, block):
            raise _unexpected("compressed ids")
        size = min(_IDS_PER_BLOCK, count - len(ids))
        ids += struct.unpack(f"<{size}I", os.pread(fd, 4 * size, block + 2))
    return ids


def _replace_ids(fd: int, superblock: bytes, ids: list[int]) -> None:
    """Write another table of ids, and move what is behind it: the table of attributes."""
    id_count, _, used, id_table, attributes, _ = _SUPERBLOCK.unpack(superblock)
    (start,) = struct.unpack("<Q", os.pread(fd, 8, id_table))
    old_end = id_table + 8 * -(-id_count // _IDS_PER_BLOCK)
    tail = bytearray(os.pread(fd, used - old_end, old_end))
    blocks, places = b"", []
    for at in range(0, len(ids), _IDS_PER_BLOCK):
        part = ids[at : at + _IDS_PER_BLOCK]
        places.append(start + len(blocks))
        blocks += struct.pack(f"<H{len(part)}I", _UNCOMPRESSED | 4 * len(part), *part)
    id_table = start + len(blocks)
    table = blocks + struct.pack(f"<{len(places)}Q", *places)
    moved = start + len(table) - old_end
    if attributes != _NO_TABLE:
        _move_attributes(tail, attributes - old_end, moved)
        attributes += moved
    elif tail:
        raise _unexpected(f"{len(tail)} bytes behind the ids")
    os.pwrite(fd, table + tail, start)
    os.pwrite(fd, struct.pack("<H", len(ids)), _ID_COUNT)
    os.pwrite(fd, struct.pack("<QQQ", used + moved, id_table, attributes), _BYTES_USED)
    os.ftruncate(fd, used + moved)


def _move_attributes(tail: bytearray, at: int, moved: int) -> None:
    """Add to the places in the table of attributes, which is at ``at`` of ``tail``."""
    first, count = struct.unpack_from("<QI", tail, at)
    struct.pack_into("<Q", tail, at, first + moved)
    for place in range(at + 16, at + 16 + 8 * -(-count // _ATTRIBUTES_PER_BLOCK), 8):
        (block,) = struct.unpack_from("<Q", tail, place)
        struct.pack_into("<Q", tail, place, block + moved)


def _is_uncompressed(fd: int, block: int) -> bool:
    (header,) = struct.unpack("<H", os.pread(fd, 2, block))
    return bool(header & _UNCOMPRESSED)


def _unexpected(what: str) -> CallError:
    return CallError(
        "internal", f"cannot set the root directory: sqfstar wrote {what}", step="make the image"
    )
