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


def file_facts(top: Path, *, exact_times: bool = True) -> dict[str, dict[str, object]]:
    """Return path -> all that the kernel tells of the file, for a tree in a file system."""
    found: dict[str, dict[str, object]] = {}
    groups: dict[int, str] = {}
    names = [str(top)]
    for parent, directories, files in os.walk(top):
        names += sorted(os.path.join(parent, name) for name in directories + files)
    for name in names:
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
