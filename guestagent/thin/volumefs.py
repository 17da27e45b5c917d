"""The file system on a volume: mounted, grown to the size of the volume, filled with a rootfs."""

import os
import struct
from functools import partial

from guestagent.storage import blockdev, filesystems, syscalls
from guestagent.storage.mount import mount_filesystem
from guestagent.thin.records import VolumeRecord

__all__ = ("ROOTFS", "grow_filesystem", "make_rootfs", "mount_volume", "read_at")

#: fs/ext4/ext4.h and fs/xfs/libxfs/xfs_fs.h: the numbers of ioctls.
_EXT4_IOC_RESIZE_FS, _XFS_IOC_FSGROWFSDATA = 0x40086610, 0x4010586E
_XFS_IOC_FSGEOMETRY_V1, _XFS_GEOMETRY_BYTES = 0x80705864, 112
_XFS_IMAXPCT_AT = 28
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
ROOTFS, _ID_FILE = "rootfs", "id"


def mount_volume(
    volume: VolumeRecord, node: str, target: int | str, flags: tuple[str, ...]
) -> None:
    """Mount the file system of a volume, or of the crypt device ``node`` over it."""
    kind = volume.filesystem or ""
    try:
        mount_filesystem(
            source=node,
            target=target,
            filesystem=kind,
            flags=flags,
            options=filesystems.mount_options(kind, readonly=False),
        )
    except OSError as error:
        refused = filesystems.refusal(kind, node, error)
        if refused is None:
            raise
        raise refused from error


def grow_filesystem(volume: VolumeRecord, node: str, path: str) -> None:
    """Have a mounted file system fill its volume; nothing happens where it does."""
    kind = volume.filesystem or ""
    claimed = filesystems.claimed_size_bytes(kind, partial(read_at, node))
    fd = os.open(path, _OPEN_DIRECTORY)
    try:
        block_bytes = os.fstatvfs(fd).f_frsize
        blocks = volume.size_bytes // block_bytes
        if blocks * block_bytes <= claimed:
            return
        if kind == "ext4":
            count = bytearray(struct.pack("=Q", blocks))
            syscalls.ioctl(fd, _EXT4_IOC_RESIZE_FS, count, path, "EXT4_IOC_RESIZE_FS")
            return
        geometry = bytearray(_XFS_GEOMETRY_BYTES)
        syscalls.ioctl(fd, _XFS_IOC_FSGEOMETRY_V1, geometry, path, "XFS_IOC_FSGEOMETRY")
        (imaxpct,) = struct.unpack_from("=I", geometry, _XFS_IMAXPCT_AT)
        wanted = bytearray(struct.pack("=QI4x", blocks, imaxpct))
        syscalls.ioctl(fd, _XFS_IOC_FSGROWFSDATA, wanted, path, "XFS_IOC_FSGROWFSDATA")
    finally:
        os.close(fd)


def make_rootfs(path: str, volume_id: str) -> None:
    """Make the directory ``rootfs`` and the file ``id`` in a volume, unless they are there."""
    fd = os.open(path, _OPEN_DIRECTORY)
    try:
        try:
            os.mkdir(ROOTFS, 0o755, dir_fd=fd)
        except FileExistsError:
            os.close(os.open(ROOTFS, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            file = os.open(_ID_FILE, flags, 0o600, dir_fd=fd)
        except FileExistsError:
            return
        try:
            os.write(file, f"{volume_id}\n".encode())
        finally:
            os.close(file)
    finally:
        os.close(fd)


def read_at(node: str, offset: int, size: int) -> bytes:
    """Read ``size`` bytes of a device, zeros where it ends before."""
    return blockdev.read(node, offset, size).ljust(size, b"\0")
