"""Which file system is full: what ENOSPC does not say."""

import os

from guestagent.storage.mountinfo import find_mount

__all__ = ("describe_space", "filesystem_at")


def filesystem_at(path: str) -> tuple[str, str]:
    """Return (mount point, type) of the file system that an absolute path is on."""
    while (mount := find_mount(path)) is None:
        if path == "/":
            return "/", "unknown"
        path = os.path.dirname(path)
    return mount.target, mount.filesystem


def describe_space(path: str) -> str:
    """Say how much room there is where ``path`` is, or would be."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    target, kind = filesystem_at(path)
    space = os.statvfs(path)
    text = f"{kind} at {target!r} has {space.f_frsize * space.f_bavail} of "
    text += f"{space.f_frsize * space.f_blocks} bytes free"
    if space.f_files:
        text += f", {space.f_favail} of {space.f_files} inodes"
    return text
