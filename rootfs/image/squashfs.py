"""The root directory of a squashfs image, put right in the finished image.

sqfstar 4.5 takes no notice of -root-time, -root-uid and -root-gid. Inodes and ids of the image have
to be uncompressed (-noI).

Source: fs/squashfs/squashfs_fs.h, Documentation/filesystems/squashfs.rst (Linux 6.1).
"""

import os
import struct

from vsock.errors import CallError

__all__ = ("set_root",)

#: id count, root inode, start of the id table and of the inode table.
_SUPERBLOCK = struct.Struct("<26xH4xQ8xQ8xQ24x")
_UNCOMPRESSED = 0x8000
_DIRECTORIES = (1, 8)
_IDS_PER_BLOCK = 2048


def set_root(fd: int, uid: int, gid: int, seconds: int) -> None:
    """Give the root directory of the image ``fd`` (borrowed) an owner and a time.

    Raises:
        CallError: ``unsupported``, the owner owns nothing else, so that the image does not know it;
            ``internal``, the image is not as it should be.
        OSError: as read(2) and write(2).
    """
    superblock = os.pread(fd, _SUPERBLOCK.size, 0)
    id_count, reference, id_table, inode_table = _SUPERBLOCK.unpack(superblock)
    ids = _read_ids(fd, id_table, id_count)
    owner = [_index(ids, each) for each in (uid, gid)]
    block = inode_table + (reference >> 16)
    place = block + 2 + (reference & 0xFFFF)
    kind, mode = struct.unpack("<HH", os.pread(fd, 4, place))
    if not _is_uncompressed(fd, block) or kind not in _DIRECTORIES:
        raise _unexpected(f"an inode of kind {kind} where the root should be")
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


def _is_uncompressed(fd: int, block: int) -> bool:
    (header,) = struct.unpack("<H", os.pread(fd, 2, block))
    return bool(header & _UNCOMPRESSED)


def _index(ids: list[int], wanted: int) -> int:
    if wanted not in ids:
        raise CallError(
            "unsupported",
            f"cannot put '/' into a squashfs image: its owner {wanted} owns nothing else there",
            step="make the image",
            object="/",
        )
    return ids.index(wanted)


def _unexpected(what: str) -> CallError:
    return CallError(
        "internal", f"cannot set the root directory: sqfstar wrote {what}", step="make the image"
    )
