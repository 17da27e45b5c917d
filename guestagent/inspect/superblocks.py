"""What a file system is called: uuid and label, read from its first bytes.

Pure over bytes. Sources: fs/erofs/erofs_fs.h, fs/ext4/ext4.h, fs/xfs/libxfs/xfs_format.h of Linux
6.1. squashfs has neither.
"""

import itertools

__all__ = ("HEAD_BYTES", "label_of", "uuid_of")

#: As much of the start as is looked at.
HEAD_BYTES = 2048
#: type -> (offset of the uuid, offset of the label, longest label)
_PLACES = {
    "erofs": (1024 + 48, 1024 + 64, 16),
    "ext4": (1024 + 104, 1024 + 120, 16),
    "xfs": (32, 108, 12),
}
_UUID_BYTES = 16


def uuid_of(filesystem: str, head: bytes) -> str:
    """Return the uuid in the usual form, the empty text where there is none."""
    if filesystem not in _PLACES:
        return ""
    start = _PLACES[filesystem][0]
    digits = head[start : start + _UUID_BYTES].hex()
    if not digits.strip("0"):
        return ""
    cuts = (0, 8, 12, 16, 20, 32)
    return "-".join(digits[a:b] for a, b in itertools.pairwise(cuts))


def label_of(filesystem: str, head: bytes) -> str:
    """Return the label, bytes that are no text escaped."""
    if filesystem not in _PLACES:
        return ""
    _, start, size_bytes = _PLACES[filesystem]
    label = head[start : start + size_bytes].split(b"\0", 1)[0]
    return label.decode("utf-8", "backslashreplace")
