"""Which file system an image holds, by its magic number; of images made here, not of strangers'."""

import os

__all__ = ("detect_filesystem",)

#: Offset and bytes. Source: include/uapi/linux/magic.h, fs/squashfs/squashfs_fs.h (Linux 6.1).
_MAGICS = (
    ("erofs", 1024, bytes.fromhex("e2e1f5e0")),
    ("squashfs", 0, b"hsqs"),
    ("ext4", 1024 + 56, bytes.fromhex("53ef")),
)


def detect_filesystem(path: str | os.PathLike[str]) -> str | None:
    """Return ``erofs``, ``squashfs``, ``ext4``, or None.

    Raises:
        OSError: as open(2) and read(2).
    """
    with open(path, "rb") as image:
        head = image.read(2048)
    return next((name for name, at, magic in _MAGICS if head[at : at + len(magic)] == magic), None)
