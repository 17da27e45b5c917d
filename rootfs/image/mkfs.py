"""File systems made by the programs of the distribution: squashfs and compressed EROFS.

What the installed program can do is asked of the program, not assumed from its version. Where a
program takes a tar, the tree goes to it as one and no privilege is needed.
"""

import functools
import os
import re
import stat
import subprocess
import uuid as uuid_module
from collections.abc import Iterator
from pathlib import Path

from rootfs.image.squashfs import set_root
from rootfs.image.staging import staged
from rootfs.image.tarwriter import write_tar
from rootfs.image.tree import Node, link_counts, pack_device_number, walk
from rootfs.imagefile.errors import DROP_XATTRS_HINT, cannot_hold, shown_path
from rootfs.imagefile.program import feed, missing, run
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("check_compression", "make_image")

_SQUASHFS_COMPRESSIONS = ("gzip", "lzo", "lz4", "xz", "zstd")
#: What errors call the images.
_IMAGES = {"squashfs": "a squashfs image", "erofs": "a compressed EROFS image"}
_MAX_32_BIT = (1 << 32) - 1
_SQUASHFS_NAME_SPACES = (b"user.", b"trusted.", b"security.")
#: What Linux file systems know.
_NAME_SPACES = (*_SQUASHFS_NAME_SPACES, b"system.posix_acl_access", b"system.posix_acl_default")
_MAX_TIME = (1 << 63) - 1
#: NAME_MAX, XATTR_NAME_MAX and XATTR_SIZE_MAX of the kernel: what is longer, nobody can read.
_MAX_NAME_BYTES = 255
_MAX_VALUE_BYTES = 65536
#: mkfs.erofs 1.5 cuts the names that it reads in a directory.
_MAX_STAGED_NAME_BYTES = 254


def check_compression(filesystem: str, compression: str | None) -> None:
    """Refuse a compression that the file system, or the installed program, does not have.

    Raises:
        CallError: ``unsupported``.
    """
    if compression is None:
        return
    known = _compressions(filesystem)
    if compression.partition(",")[0] not in known:
        names = ", ".join(known) or "none"
        raise CallError(
            "unsupported",
            f"cannot compress {filesystem} with {compression!r}; available: {names}",
            step="check the compression",
            object="compression",
        )


def _compressions(filesystem: str) -> tuple[str, ...]:
    if filesystem == "squashfs":
        return _SQUASHFS_COMPRESSIONS
    if filesystem == "erofs":
        found = re.search(r"Available compressors are: (.*)", _help("mkfs.erofs"))
        if found is not None:
            return tuple(found[1].split(", "))
        return tuple(re.findall(r"^\s+(lz4hc|lz4|lzma|deflate|zstd)\b", _help("mkfs.erofs"), re.M))
    return ()


@functools.cache
def _help(program: str) -> str:
    try:
        done = subprocess.run([program, "--help"], capture_output=True, check=False, timeout=10)
    except FileNotFoundError as problem:
        raise missing(program, problem) from problem
    return (done.stdout + done.stderr).decode(errors="replace")


def make_image(
    root: Node,
    path: Path,
    *,
    filesystem: str,
    compression: str | None,
    uuid: uuid_module.UUID,
    max_hole_bytes: int,
    cancel: Deadline | None = None,
) -> int:
    """Make the image in the file ``path`` and return how many inodes it has.

    The programs read holes as zeros, at most ``max_hole_bytes`` of them: a small tar may have a
    file of exabytes.

    Raises:
        CallError: ``unsupported``, the tree holds what the file system or the program cannot, or
            privilege is missing; ``resource``, a full disk, or too many holes; ``device``, the
            program failed.
    """
    _check(root, filesystem)
    _check_holes(root, max_hole_bytes)
    if filesystem == "squashfs":
        _make_squashfs(root, path, compression, cancel)
    else:
        assert filesystem == "erofs"
        assert compression is not None
        _make_erofs(root, path, compression, uuid, cancel)
    return len(link_counts(root))


def _check(root: Node, filesystem: str) -> None:
    """Refuse what the programs would cut, or rename, without an error."""
    for path, node in walk(root):
        if path and len(path[-1]) > _MAX_NAME_BYTES:
            raise cannot_hold(_IMAGES[filesystem], path, f"a name of {len(path[-1])} bytes")
        if not (0 <= node.uid <= _MAX_32_BIT and 0 <= node.gid <= _MAX_32_BIT):
            raise cannot_hold(_IMAGES[filesystem], path, f"the owner {node.uid}:{node.gid}")
        if node.is_device and pack_device_number(node.rdev) is None:
            number = f"{os.major(node.rdev)}:{os.minor(node.rdev)}"
            raise cannot_hold(_IMAGES[filesystem], path, f"the device number {number}")
        for name, value in node.xattrs.items():
            what = None
            if not name.startswith(_NAME_SPACES):
                what = f"the attribute {os.fsdecode(name)}"
            elif len(name) > _MAX_NAME_BYTES:
                what = f"an attribute with a name of {len(name)} bytes"
            elif len(value) > _MAX_VALUE_BYTES:
                what = f"the attribute {os.fsdecode(name)} with a value of {len(value)} bytes"
            if what is not None:
                raise cannot_hold(_IMAGES[filesystem], path, what, hint=DROP_XATTRS_HINT)


def _check_holes(root: Node, max_bytes: int) -> None:
    seen: set[int] = set()
    left = max_bytes
    for path, node in walk(root):
        if node.is_regular and id(node) not in seen:
            seen.add(id(node))
            left -= node.content.size_bytes - sum(length for _, length, _ in node.content.extents)
        if left < 0:
            name = shown_path(path)
            raise CallError(
                "resource",
                f"cannot make the image: with {name!r} it has holes of over {max_bytes} bytes",
                step="lay out the image",
                object=name,
                hint="raise the limit if the source is trusted; uncompressed EROFS keeps holes",
            )


def _make_squashfs(
    root: Node, path: Path, compression: str | None, cancel: Deadline | None
) -> None:
    _check_squashfs(root)
    command = ["sqfstar", "-no-progress", "-quiet", "-exit-on-error", "-force", "-mkfs-time", "0"]
    command += ["-root-mode", f"{stat.S_IMODE(root.mode):o}"]
    # inodes stay uncompressed, so that the root's owner and time can be put right
    command += ["-noI"] if compression else ["-noI", "-noD", "-noF", "-noX"]
    command += ["-comp", compression] if compression else []
    feed([*command, str(path)], _without_root(write_tar(root)), cancel)
    with path.open("r+b") as image:
        owners = {owner for path, node in walk(root) if path for owner in (node.uid, node.gid)}
        set_root(image.fileno(), root.uid, root.gid, root.mtime_ns // 10**9, owners)


def _without_root(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The root comes first, and is described by options."""
    next(pieces)
    yield from pieces


def _check_squashfs(root: Node) -> None:
    if root.xattrs:
        raise cannot_hold("a squashfs image", (), "attributes on the root directory")
    for path, node in walk(root):
        if not 0 <= node.mtime_ns // 10**9 <= _MAX_32_BIT:
            raise cannot_hold(
                "a squashfs image", path, "a time that is no unsigned 32-bit number of seconds"
            )
        for name in node.xattrs:
            # a record of a tar, which sqfstar reads, ends its key at the first "="
            if not name.startswith(_SQUASHFS_NAME_SPACES) or b"=" in name:
                what = f"the attribute {os.fsdecode(name)}"
                raise cannot_hold("a squashfs image", path, what, hint=DROP_XATTRS_HINT)


def _make_erofs(
    root: Node, path: Path, compression: str, uuid: uuid_module.UUID, cancel: Deadline | None
) -> None:
    command = ["mkfs.erofs", "--quiet", f"-z{compression}", "-U", str(uuid)]
    reads_tar = "--tar" in _help("mkfs.erofs")
    _check_erofs(root, reads_tar)
    # later than every file, so that it only sets the time of the image
    latest = max(node.mtime_ns // 10**9 for _, node in walk(root))
    environment = {"SOURCE_DATE_EPOCH": str(latest + 1)}
    if reads_tar:
        command += ["--tar=f", str(path)]
        feed(command, write_tar(root), cancel, environment=environment)
        return
    with staged(root, path.parent, "a compressed EROFS image, with this mkfs.erofs") as directory:
        run([*command, str(path), str(directory)], cancel, environment=environment)


def _check_erofs(root: Node, reads_tar: bool) -> None:
    """Refuse what mkfs.erofs would change or fail at, of which it names no file."""
    for path, node in walk(root):
        if not 0 <= node.mtime_ns // 10**9 < _MAX_TIME:
            raise cannot_hold(
                "a compressed EROFS image", path, "a time before 1970 or after 2^63 seconds"
            )
        if reads_tar and any(b"=" in name for name in node.xattrs):
            what = "an attribute with a '=' in its name"
            raise cannot_hold("a compressed EROFS image", path, what, hint=DROP_XATTRS_HINT)
        if not reads_tar and path and len(path[-1]) > _MAX_STAGED_NAME_BYTES:
            raise cannot_hold("a compressed EROFS image", path, "a name of 255 bytes")
