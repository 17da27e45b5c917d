"""Device nodes: there, and of the right device, whether or not somebody else sees to them."""

import os
import stat

__all__ = ("ensure_node",)

#: How often to look again at what others made meanwhile.
_ATTEMPTS = 4


def ensure_node(node: str, dev: str) -> None:
    """Make the block device node of ``dev`` (MAJOR:MINOR) unless it is there.

    devtmpfs or udev may be at it at the same time. A node of another device is replaced.

    Raises:
        OSError: it cannot be made; EEXIST where somebody keeps making another one.
    """
    major, _, minor = dev.partition(":")
    number = os.makedev(int(major), int(minor))
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            found = os.stat(node, follow_symlinks=False)
            if stat.S_ISBLK(found.st_mode) and found.st_rdev == number:
                return
            os.unlink(node)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(node), 0o755, exist_ok=True)
        try:
            os.mknod(node, 0o600 | stat.S_IFBLK, number)
            return
        except FileExistsError:
            if attempt == _ATTEMPTS:
                raise
