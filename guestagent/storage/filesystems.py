"""The file systems a layer or a scratch may have: how to know one, and how to mount it safely.

Only a few types are admitted, since each is kernel code that parses bytes of a stranger. Detection
reads magic numbers and refuses what looks like two at once; sizes claimed by a superblock are
compared with the device before the kernel is asked to mount it.
"""

import struct
from collections.abc import Callable

from vsock.errors import CallError

__all__ = ("ALLOWED", "check_size", "claimed_size_bytes", "detect", "mount_options", "registered")

ReadAt = Callable[[int, int], bytes]  # (offset_bytes, length_bytes) -> exactly so many bytes

#: Types that are ever mounted; the first three for layers, ext4 and xfs for scratch devices.
ALLOWED = ("erofs", "squashfs", "ext4", "xfs")

#: type -> (offset in bytes, magic)
_MAGIC = {
    "erofs": (1024, b"\xe2\xe1\xf5\xe0"),
    "squashfs": (0, b"hsqs"),
    "ext4": (1024 + 56, b"\x53\xef"),
    "xfs": (0, b"XFSB"),
}
_HEAD_BYTES = 2048
_EROFS_INCOMPAT_48BIT = 0x80
_EXT4_INCOMPAT_64BIT = 0x80


def detect(read_at: ReadAt) -> str | None:
    """Return the type whose magic number is there; None if none is.

    Raises:
        CallError: ``mount``, two types fit at once: somebody wants two readers to see two things.
    """
    head = read_at(0, _HEAD_BYTES)
    found = [
        name
        for name, (offset, magic) in _MAGIC.items()
        if head[offset : offset + len(magic)] == magic
    ]
    if len(found) > 1:
        text = f"the first bytes are those of {' and '.join(found)} at once"
        raise CallError("mount", text, step="detect-filesystem")
    return found[0] if found else None


def claimed_size_bytes(filesystem: str, read_at: ReadAt) -> int:
    """Return how large the superblock says that the file system is.

    Raises:
        CallError: ``mount``, the magic number is not there or a block size is absurd.
    """
    if filesystem not in _MAGIC:
        raise CallError("unsupported", f"file system {filesystem!r} is not one of {ALLOWED}")
    head = read_at(0, _HEAD_BYTES)
    offset, magic = _MAGIC[filesystem]
    if head[offset : offset + len(magic)] != magic:
        raise CallError("mount", f"there is no {filesystem} superblock", step="check-filesystem")
    return _SIZES[filesystem](head)


def _block_bits(bits: int, low: int, high: int, filesystem: str) -> int:
    if not low <= bits <= high:
        text = f"the {filesystem} superblock claims blocks of 2^{bits} bytes"
        raise CallError("mount", text, step="check-filesystem")
    return bits


def _erofs_size(head: bytes) -> int:
    """struct erofs_super_block, fs/erofs/erofs_fs.h: blkszbits at 12, blocks at 36."""
    bits = _block_bits(head[1024 + 12], 9, 16, "erofs")
    (blocks,) = struct.unpack_from("<I", head, 1024 + 36)
    (incompat,) = struct.unpack_from("<I", head, 1024 + 80)
    if incompat & _EROFS_INCOMPAT_48BIT:
        blocks |= struct.unpack_from("<H", head, 1024 + 14)[0] << 32
    return int(blocks) << bits


def _squashfs_size(head: bytes) -> int:
    """struct squashfs_super_block, fs/squashfs/squashfs_fs.h: bytes_used at 40."""
    return int(struct.unpack_from("<Q", head, 40)[0])


def _ext4_size(head: bytes) -> int:
    """struct ext4_super_block, fs/ext4/ext4.h: counts at 4 and 0x150, log_block_size at 24."""
    (blocks,) = struct.unpack_from("<I", head, 1024 + 4)
    bits = _block_bits(struct.unpack_from("<I", head, 1024 + 24)[0] + 10, 10, 16, "ext4")
    (incompat,) = struct.unpack_from("<I", head, 1024 + 96)
    if incompat & _EXT4_INCOMPAT_64BIT:
        blocks |= struct.unpack_from("<I", head, 1024 + 0x150)[0] << 32
    return int(blocks) << bits


def _xfs_size(head: bytes) -> int:
    """struct xfs_dsb, fs/xfs/libxfs/xfs_format.h, big-endian: blocksize at 4, dblocks at 8."""
    block_size, blocks = struct.unpack_from(">IQ", head, 4)
    if block_size & (block_size - 1):
        text = f"the xfs superblock claims blocks of {block_size} bytes"
        raise CallError("mount", text, step="check-filesystem")
    _block_bits(block_size.bit_length() - 1, 9, 16, "xfs")
    return int(block_size * blocks)


_SIZES: dict[str, Callable[[bytes], int]] = {
    "erofs": _erofs_size,
    "squashfs": _squashfs_size,
    "ext4": _ext4_size,
    "xfs": _xfs_size,
}


def check_size(filesystem: str, read_at: ReadAt, device_bytes: int) -> int:
    """Return the size that the superblock claims, after comparing it with the device's.

    Raises:
        CallError: ``mount``, the file system is larger than the device (cut short, or a mapping
            of the wrong length), or of size 0.
    """
    claimed = claimed_size_bytes(filesystem, read_at)
    if not 0 < claimed <= device_bytes:
        raise CallError(
            "mount",
            f"the {filesystem} superblock claims {claimed} bytes, the device has {device_bytes}",
            step="check-filesystem",
        )
    return claimed


def mount_options(
    filesystem: str, *, readonly: bool = True, dax: bool = False
) -> tuple[tuple[str, str | None], ...]:
    """Return the options (key, value or None) to mount that type with.

    A read-only layer must not have its journal replayed: that would write, or, where it cannot,
    fail. xfs refuses a second file system of the same uuid, which layers made from one template
    have.

    Raises:
        CallError: ``unsupported``, a type that is not admitted, or one that has no dax.
    """
    if filesystem not in ALLOWED:
        text = f"file system {filesystem!r} is not one of {', '.join(ALLOWED)}"
        raise CallError("unsupported", text, step="mount-options", object=filesystem)
    options: list[tuple[str, str | None]] = []
    if filesystem == "ext4" and readonly:
        options.append(("noload", None))
    if filesystem == "xfs":
        options.append(("nouuid", None))
        if readonly:
            options.append(("norecovery", None))
    if dax:
        if filesystem == "squashfs":
            raise CallError("unsupported", "squashfs has no dax", step="mount-options")
        options.append(("dax", "always"))
    return tuple(options)


def registered(path: str = "/proc/filesystems") -> frozenset[str]:
    """Return the types that the kernel has now; one in a module is missing until it is loaded."""
    with open(path, encoding="ascii") as file:
        return frozenset(line.split()[-1] for line in file if line.strip())
