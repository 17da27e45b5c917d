"""Trees compared fact by fact: as the kernel shows them, and as our readers hold them."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rootfs.image.tree import Node, read_content, walk
from rootfs.pack.manifest import ManifestLayer
from tests.beds import dmbed
from tests.beds.loopbed import sparse_file


@contextmanager
def mounted(
    image: Path, filesystem: str, target: Path, layer: ManifestLayer | None = None
) -> Iterator[Path]:
    """Mount an image, or a layer of a pack."""
    target.mkdir(exist_ok=True)
    options = "ro,loop"
    if layer is not None:
        options += f",offset={layer.offset_bytes},sizelimit={layer.size_bytes}"
    dmbed.run("mount", "-t", filesystem, "-o", options, image, target)
    try:
        yield target
    finally:
        dmbed.run("umount", target)


@contextmanager
def ext4_directory(directory: Path) -> Iterator[Path]:
    """A directory on ext4: the tmpfs of older kernels has no attributes of users."""
    sparse_file((directory / "disk"), 64 << 20)
    dmbed.run("mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^has_journal", directory / "disk")
    (directory / "mnt").mkdir()
    dmbed.run("mount", "-o", "loop", directory / "disk", directory / "mnt")
    try:
        yield directory / "mnt"
    finally:
        dmbed.run("umount", directory / "mnt")


def make_everything(top: Path) -> Path:
    """A tree with every kind of inode, and every size at which a layout changes."""
    (top / "many").mkdir(parents=True)
    (top / "empty").mkdir(0o1777)
    sizes = (0, 1, 4031, 4032, 4033, 4063, 4064, 4065, 4095, 4096, 4097, 12345, 300_000)
    for size in sizes:
        (top / f"size{size}").write_bytes(os.urandom(size))
    for number in range(400):
        (top / "many" / f"file{number:04}").write_text(str(number))
    for name in ("!first", "-", "...", "~", "é"):
        (top / "many" / name).write_text(name)
    os.link(top / "size1", top / "hard")
    os.link(top / "size1", top / "many/hard")
    (top / "short").symlink_to("many")
    (top / "long").symlink_to("t" * 4000)
    os.mkfifo(top / "fifo", 0o622)
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70000))
    os.mknod(top / "whiteout", stat.S_IFCHR, 0)
    with (top / "sparse").open("wb") as file:
        file.truncate(40 << 20)
        file.seek(11 << 20)
        file.write(b"in the middle" * 1000)
        file.seek((40 << 20) - 3)
        file.write(b"end")
    sparse_file((top / "holeonly"), 1 << 20)
    os.chown(top / "size4096", 4_000_000_000, 70_000)
    (top / "size4097").chmod(0o6755)
    os.chown(top / "short", 12, 34, follow_symlinks=False)
    os.utime(top / "size4095", ns=(0, 123_456_789_012_345_678))
    set_attributes(top)
    return top


def set_attributes(top: Path) -> None:
    os.setxattr(top / "size1", "user.plain", b"value")
    os.setxattr(top / "size1", "user.empty", b"")
    os.setxattr(top / "size1", "user.large", os.urandom(1500))
    os.setxattr(top / "many", "trusted.overlay.opaque", b"y")
    os.setxattr(top / "many", "security.something", b"\0\xff")
    os.setxattr(top / "short", "trusted.link", b"on a link", follow_symlinks=False)


def file_facts(top: Path, *, exact_times: bool = True) -> dict[str, dict[str, object]]:
    """Return path -> all that the kernel tells of the file, for a tree in a file system."""
    found: dict[str, dict[str, object]] = {}
    groups: dict[int, str] = {}
    names = [str(top)]
    for parent, directories, files in os.walk(top):
        names += [os.path.join(parent, name) for name in directories + files]
    for name in sorted(names):  # not in the order of the directories, which is the file system's
        try:
            info = os.lstat(name)
        except FileNotFoundError:
            # overlayfs lists the whiteouts of a directory that it does not merge, and finds none
            continue
        path = os.path.relpath(name, top)
        attributes = os.listxattr(name, follow_symlinks=False)
        entry: dict[str, object] = {
            "mode": oct(info.st_mode),
            "owner": (info.st_uid, info.st_gid),
            "mtime": info.st_mtime_ns if exact_times else info.st_mtime_ns // 10**9,
            "links": info.st_nlink,
            "inode of": groups.setdefault(info.st_ino, path),
            "xattrs": {each: os.getxattr(name, each, follow_symlinks=False) for each in attributes},
        }
        if stat.S_ISREG(info.st_mode):
            digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
            entry["content"] = (info.st_size, digest)
        elif stat.S_ISLNK(info.st_mode):
            entry["content"] = (info.st_size, os.readlink(name))
        elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
            entry["rdev"] = info.st_rdev
        found[path] = entry
    return found


def assert_same(image: dict[str, dict[str, object]], source: dict[str, dict[str, object]]) -> None:
    assert sorted(image) == sorted(source)
    differing = {
        (path, fact): (image[path][fact], source[path][fact])
        for path in source
        for fact in source[path]
        if image[path][fact] != source[path][fact]
    }
    assert differing == {}


def node_facts(root: Node) -> dict[str, object]:
    """Return path -> (mode, uid, gid, mtime, rdev, content or target, attributes)."""
    found: dict[str, object] = {}
    for path, node in walk(root):
        content = b"".join(read_content(node.content, b"")) if node.is_regular else node.target
        found[os.fsdecode(b"/".join(path))] = (
            oct(node.mode),
            node.uid,
            node.gid,
            node.mtime_ns,
            node.rdev,
            content,
            node.xattrs,
        )
    return found
