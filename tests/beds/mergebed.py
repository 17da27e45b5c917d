"""Layers for an overlay, drawn at random, and what the overlay shows by a model of its own.

The model applies the layers from the lowest to the topmost, as one would unpack them; overlayfs and
the code under test look from the topmost downwards.
"""

import contextlib
import hashlib
import os
import random
import stat
import struct
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypothesis import strategies as st

from rootfs.image.erofs import ErofsImage
from rootfs.image.erofs_format import BLOCK_BYTES
from rootfs.image.erofs_merge import LayerFile, MergedImage
from rootfs.image.erofs_reader import ErofsReader
from rootfs.image.tree import Extent, Node, link_counts, read_content, walk
from rootfs.imagefile.ranges import round_up

TRUSTED, USER = b"trusted.overlay.", b"user.overlay."
EPOCH_NS = 1_600_000_000 * 10**9
_DATA = random.Random(1).randbytes(1 << 17)
_SIZES = (0, 1, 100, 4030, 4096, 4097, 5000, 3 * 4096 - 20, 8 * 4096)
_NAMES = (b"a", b"b", b"c", b"\xff\xfe", b"n" * 255)
_NO_ID = 0xFFFFFFFF
_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in [(1, 7, _NO_ID), (2, 5, 70_000), (4, 5, _NO_ID), (16, 7, _NO_ID), (32, 4, _NO_ID)]
)
_XATTRS = {
    b"system.posix_acl_access": _ACL,
    b"user.note": b"noted",
    b"trusted.kept": b"\0binary",
    b"security.capability": bytes.fromhex("0100000200200000") + bytes(12),
    b"user.large": b"v" * 3000,
    b"trusted.overlay.origin": b"",
    b"user.overlay.origin": b"",
}


class DrawnContent:
    """Random bytes, always the same; ``extents`` are as of a file of ``_DATA``."""

    def __init__(self, size_bytes: int, extents: tuple[Extent, ...]) -> None:
        self.size_bytes = size_bytes
        self.extents = extents

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        fd = os.memfd_create("data")
        try:
            os.pwrite(fd, _DATA, 0)
            yield fd
        finally:
            os.close(fd)


@st.composite
def layers(
    draw: st.DrawFn, *, least: int = 1, most: int = 4, empty_file_whiteouts: bool = True
) -> list[Node]:
    """Trees for an overlay, topmost first. Some whiteouts are empty files with an attribute, which
    Linux knows since 6.7."""
    found = []
    for _ in range(draw(st.integers(least, most))):
        found.append(draw(_trees(empty_file_whiteouts, 0, [])))
        draw(_opaqueness(found[-1]))  # which overlayfs does not look at
    return found


@st.composite
def _opaqueness(draw: st.DrawFn, directory: Node) -> None:
    """Mark a directory, in one of the forms that there are; only the value "y" makes it opaque."""
    own = draw(st.sampled_from([None, None, TRUSTED, USER]))
    if own:
        directory.xattrs[own + b"opaque"] = draw(st.sampled_from([b"y", b"y", b"x", b"yes", b""]))


@st.composite
def _trees(draw: st.DrawFn, empty_file_whiteouts: bool, depth: int, files: list[Node]) -> Node:
    """A directory; ``files`` are those of the layer so far, to be linked again."""
    root = draw(_facts(stat.S_IFDIR))
    kinds = ["file", "file", "link", "symlink", "special", "whiteout"]
    kinds += ["empty-file whiteout"] if empty_file_whiteouts else []
    kinds += ["directory"] * 4 if depth < 3 else []
    for name in sorted(draw(st.sets(st.sampled_from(_NAMES), max_size=4))):
        kind = draw(st.sampled_from(kinds))
        if kind == "directory":
            node = draw(_trees(empty_file_whiteouts, depth + 1, files))
            draw(_opaqueness(node))
        elif kind == "link" and files:
            node = draw(st.sampled_from(files))
        elif kind == "symlink":
            node = draw(_facts(stat.S_IFLNK))
            node.target = b"t" * draw(st.sampled_from([1, 60, 4095]))
        elif kind == "special":
            types = [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFBLK, stat.S_IFCHR]
            node = draw(_facts(draw(st.sampled_from(types))))
            if node.is_device:
                node.rdev = os.makedev(draw(st.integers(1, 4095)), draw(st.integers(0, 0xFFFFF)))
        elif kind == "whiteout":
            node = Node(stat.S_IFCHR)
        elif kind == "empty-file whiteout":
            node = Node(stat.S_IFREG, xattrs={TRUSTED + b"whiteout": b"y"})
        else:
            node = draw(_facts(stat.S_IFREG))
            node.content = draw(_contents())
            files.append(node)
        root.children[name] = node
    return root


@st.composite
def _facts(draw: st.DrawFn, kind: int) -> Node:
    names = sorted(draw(st.sets(st.sampled_from(sorted(_XATTRS)), max_size=2)))
    if kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFBLK, stat.S_IFCHR):
        # Linux has these attributes on regular files and directories only
        names = [name for name in names if name.startswith(b"trusted.")]
    mode = 0o777 if kind == stat.S_IFLNK else draw(st.sampled_from([0o644, 0o755, 0o4711, 0o1777]))
    return Node(
        kind | mode,
        uid=draw(st.sampled_from([0, 7, 70_000])),
        gid=draw(st.sampled_from([0, 4_000_000_000])),
        mtime_ns=draw(st.sampled_from([EPOCH_NS, EPOCH_NS, 1, EPOCH_NS + 123_456_789])),
        xattrs={name: _XATTRS[name] for name in names},
    )


@st.composite
def _contents(draw: st.DrawFn) -> DrawnContent:
    size = draw(st.sampled_from(_SIZES))
    start = draw(st.integers(0, len(_DATA) - size))
    if size >= 4 * 4096 and draw(st.booleans()):  # with a hole
        return DrawnContent(size, ((0, 4000, start), (size - 4100, 4100, start)))
    return DrawnContent(size, ((0, size, start),) if size else ())


def write_layer(root: Node, name: str, *, inline_tails: bool = True) -> LayerFile:
    """Write a tree as an image in memory; the descriptor is the caller's to close."""
    fd = os.memfd_create(name)
    image = ErofsImage(root, inline_tails=inline_tails)
    image.write(fd, lambda: uuid.uuid5(uuid.NAMESPACE_OID, name))
    return LayerFile(name=name, fd=fd, size_bytes=image.size_bytes)


def write_images(trees: Sequence[Node], directory: Path) -> list[Path]:
    """Write each tree as an image into a file."""
    paths = []
    for number, tree in enumerate(trees):
        layer = write_layer(tree, f"layer{number}")
        paths.append(directory / layer.name)
        paths[-1].write_bytes(layer.read(0, layer.size_bytes))
        os.close(layer.fd)
    return paths


@contextlib.contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[LayerFile]]:
    """Open images for reading; one that ends within a block is made longer first."""
    with contextlib.ExitStack() as stack:
        found = []
        for path in paths:
            size_bytes = round_up(path.stat().st_size, BLOCK_BYTES)
            os.truncate(path, size_bytes)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            found.append(LayerFile(name=path.name, fd=fd, size_bytes=size_bytes))
        yield found


def write_unified(merged: MergedImage, layers: Sequence[LayerFile], path: Path) -> LayerFile:
    """Write the unified space to a file, by what ``parts`` says; return it opened, as an image."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with merged.path.open("rb") as metadata:
        metadata_fd = metadata.fileno()
        first = LayerFile(name="metadata", fd=metadata_fd, size_bytes=merged.parts[0].size_bytes)
        for part, layer in zip(merged.parts, (first, *layers), strict=True):
            assert part.size_bytes == layer.size_bytes
            os.pwrite(fd, layer.read(0, layer.size_bytes), part.start_bytes)
    os.ftruncate(fd, merged.unified_bytes)
    return LayerFile(name=str(path), fd=fd, size_bytes=merged.unified_bytes)


Facts = dict[str, dict[str, object]]


def read_facts(layer: LayerFile) -> Facts:
    """Return what ``file_facts`` of treebed returns of a mounted image, as the reader has it."""
    root = ErofsReader(layer).tree(1 << 20)
    groups: dict[int, str] = {}
    found: Facts = {}
    for path, node in walk(root):
        name = os.fsdecode(b"/".join(path)) or "."
        found[name] = _facts_of(node, node.links)  # type: ignore[attr-defined]
        found[name]["inode of"] = groups.setdefault(node.nid, name)  # type: ignore[attr-defined]
    return found


def _facts_of(node: Node, links: int) -> dict[str, object]:
    entry: dict[str, object] = {
        "mode": oct(node.mode),
        "owner": (node.uid, node.gid),
        "mtime": node.mtime_ns,
        "links": links,
        "xattrs": {os.fsdecode(name): value for name, value in node.xattrs.items()},
    }
    if node.is_regular:
        content = b"".join(read_content(node.content, b""))
        entry["content"] = (len(content), hashlib.sha256(content).hexdigest())
    elif node.is_symlink:
        entry["content"] = (len(node.target), os.fsdecode(node.target))
    elif node.is_device:
        entry["rdev"] = node.rdev
    return entry


class _Shown:
    """What an overlay shows under a name: the inode that it shows, of how many directories it is
    made, and what is below."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.directories = 0
        self.children: dict[bytes, _Shown] = {}


def model(layers: Sequence[Node], *, userxattr: bool = False) -> Facts:
    """Return the facts of an overlay of trees, topmost first."""
    own = USER if userxattr else TRUSTED
    links: dict[int, int] = {}
    for layer in layers:
        links |= link_counts(layer)
    root = _Shown(layers[-1])
    for layer in reversed(layers):
        _apply(root, layer, own)
    found: Facts = {}
    groups: dict[int, str] = {}
    waiting = [((), root)]
    while waiting:
        path, shown = waiting.pop(0)
        name = os.fsdecode(b"/".join(path)) or "."
        node = shown.node
        found[name] = _facts_of(node, 1 if shown.directories > 1 else links[id(node)])
        xattrs = found[name]["xattrs"]
        assert isinstance(xattrs, dict)
        private = [each for each in xattrs if each.startswith(own.decode())]
        for each in private:
            del xattrs[each]
        found[name]["inode of"] = groups.setdefault(id(node), name)
        waiting += [((*path, each), shown.children[each]) for each in sorted(shown.children)]
    return found


def _apply(shown: _Shown, directory: Node, own: bytes) -> None:
    shown.node = directory
    shown.directories += 1
    for name, node in directory.children.items():
        is_empty_file = node.is_regular and node.content.size_bytes == 0
        if (stat.S_ISCHR(node.mode) and node.rdev == 0) or (
            is_empty_file and own + b"whiteout" in node.xattrs
        ):
            shown.children.pop(name, None)
            continue
        below = shown.children.get(name)
        merges = (
            below is not None
            and below.node.is_directory
            and node.is_directory
            and node.xattrs.get(own + b"opaque") != b"y"
        )
        if below is None or not merges:
            below = shown.children[name] = _Shown(node)
        if node.is_directory:
            _apply(below, node, own)
