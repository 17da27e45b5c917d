"""Layers merged into one EROFS image of metadata: what an overlay of them shows, in one mount.

The image lists the layers as devices, and the content of files stays there. The unified space of
blocks, which dm-linear and a hash tree are made over, is

    metadata        the image itself
    layers[0]       the topmost layer
    layers[1]...    the others, downwards

and each part starts at a multiple of ``PART_BYTES``, with zeros up to there; ``MergedImage.parts``
says where. Linux mounts the space as a whole since 6.4, and since 5.16 the image with each layer as
an option ``device=``, topmost first.

Source: Documentation/filesystems/overlayfs.rst, fs/overlayfs/namei.c, inode.c, util.c (Linux 6.1
and 6.12); fs/erofs/super.c, data.c.
"""

import hashlib
import os
import stat
import uuid as uuid_module
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rootfs.image.erofs import MAX_DEVICES, PART_BYTES, ErofsImage
from rootfs.image.erofs_device import LayerFile
from rootfs.image.erofs_format import BLOCK_BYTES
from rootfs.image.erofs_reader import ErofsReader, LayerNode
from rootfs.image.images import collector_paused, derive_uuid
from rootfs.image.tree import CHUNK_BYTES, Node, Progress
from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.output import new_file
from rootfs.imagefile.ranges import round_up
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("DEFAULT_MAX_NAMES", "LayerFile", "MergedImage", "Part", "merge_layers", "overlay")

#: Names in all layers together, of about 1.2 KiB of memory each.
DEFAULT_MAX_NAMES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the unified space. After its ``size_bytes`` come zeros up to ``padded_bytes``, a
    multiple of ``PART_BYTES``; ``start_bytes`` is one, too."""

    name: str
    start_bytes: int
    size_bytes: int

    @property
    def padded_bytes(self) -> int:
        return round_up(self.size_bytes, PART_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedImage:
    """A finished image of metadata. ``parts`` is the unified space from its start on without gaps:
    the metadata (``parts[0]``, all of the file ``path``), then the layers, topmost first."""

    path: Path
    uuid: uuid_module.UUID
    inode_count: int
    parts: tuple[Part, ...]

    @property
    def unified_bytes(self) -> int:
        return self.parts[-1].start_bytes + self.parts[-1].padded_bytes


def merge_layers(
    layers: Sequence[LayerFile],
    output: str | os.PathLike[str],
    *,
    userxattr: bool = False,
    max_names: int = DEFAULT_MAX_NAMES,
    progress: Progress | None = None,
    cancel: Deadline | None = None,
) -> MergedImage:
    """Merge uncompressed EROFS images, topmost first; the same layers give the same bytes.

    The image shows, file by file, what an overlay of the layers shows: ``userxattr`` says whether
    one that is mounted with that option. So the link count of a file is that of its layer, and that
    of a directory of several layers is 1. ``max_names`` limits the names of all layers together.
    ``progress`` is of the bytes of files that are copied, their tails.

    Raises:
        CallError: ``integrity``, a layer is damaged; ``unsupported``, a layer is compressed, has
            blocks of another size, refers to other layers (metacopy, redirect), or they are too
            many or too large; ``resource``, too many names, a full disk; ``invalid``, no layers;
            ``cancelled``, ``timeout`` by ``cancel``; as ``new_file``. They name the layer.
    """
    if not 1 <= len(layers) <= MAX_DEVICES:
        code, wanted = ("unsupported", f"at most {MAX_DEVICES}") if layers else ("invalid", "none")
        raise CallError(
            code,
            f"cannot merge {len(layers)} layers: a table of devices holds {wanted}",
            step="merge the layers",
            object=os.fspath(output),
        )
    with OsErrors("merge the layers into", output), collector_paused():
        readers = [ErofsReader(layer, cancel=cancel) for layer in layers]
        trees = []
        for reader in readers:
            trees.append(reader.tree(max_names))
            max_names -= reader.names
        root = overlay(trees, userxattr=userxattr)
        del trees
        devices = [reader.device for reader in readers]
        del readers
        image = ErofsImage(root, devices=devices, links=_links(root))
        with new_file(output, inputs=[layer.fd for layer in layers]) as (fd, _):
            uuids: list[uuid_module.UUID] = []

            def make_uuid() -> uuid_module.UUID:
                uuids.append(_uuid_of(fd, image.size_bytes))
                return uuids[0]

            image.write(fd, make_uuid, progress=progress, cancel=cancel)
    parts = [Part(name="metadata", start_bytes=0, size_bytes=image.size_bytes)]
    parts += [
        Part(
            name=layer.name,
            start_bytes=device.first_block * BLOCK_BYTES,
            size_bytes=layer.size_bytes,
        )
        for layer, device in zip(layers, devices, strict=True)
    ]
    return MergedImage(
        path=Path(output), uuid=uuids[0], inode_count=image.inode_count, parts=tuple(parts)
    )


def _links(root: LayerNode) -> dict[int, int]:
    found = {id(root): root.links}
    waiting: list[Node] = [root]
    while waiting:
        for node in waiting.pop().children.values():
            assert isinstance(node, LayerNode)
            found[id(node)] = node.links
            if node.is_directory:
                waiting.append(node)
    return found


def _uuid_of(fd: int, size_bytes: int) -> uuid_module.UUID:
    """Return a UUID that depends on the image, which lacks nothing but its superblock."""
    content = hashlib.sha256()
    for at in range(0, size_bytes, CHUNK_BYTES):
        content.update(os.pread(fd, CHUNK_BYTES, at))
    return derive_uuid("sha256:" + content.hexdigest(), "erofs-merged")


def overlay(layers: Sequence[LayerNode], *, userxattr: bool = False) -> LayerNode:
    """Return what an overlay of some trees shows, topmost first. The trees are used up.

    Whiteouts are character devices 0:0 and empty files with the attribute ``overlay.whiteout``
    (Linux 6.7). Of overlayfs's own attributes only escaped ones (``overlay.overlay.NAME``) are
    kept, for an overlay with the merged image as a layer.

    Raises:
        CallError: ``unsupported``, a file refers to another layer (metacopy, redirect).
    """
    own = b"user.overlay." if userxattr else b"trusted.overlay."
    waiting = [list(layers)]
    while waiting:
        directories = waiting.pop()
        found: dict[bytes, list[LayerNode]] = {}
        closed: set[bytes] = set()  # names that layers further down add nothing to
        for directory in directories:
            _refuse(directory, own + b"redirect")
            for name, node in directory.children.items():
                assert isinstance(node, LayerNode)
                if name in closed:
                    continue
                if _is_whiteout(node, own):
                    closed.add(name)
                elif node.is_directory:
                    found.setdefault(name, []).append(node)
                    # an overlay never takes the root of a layer as opaque
                    if node.xattrs.get(own + b"opaque") == b"y":
                        closed.add(name)
                else:
                    found.setdefault(name, [node])
                    closed.add(name)
        top = directories[0]
        top.children = {name: nodes[0] for name, nodes in found.items()}
        if len(directories) > 1:
            top.links = 1
        _strip(top, own)
        for nodes in found.values():
            if nodes[0].is_directory:
                waiting.append(nodes)
            else:
                _refuse(nodes[0], own + b"metacopy")
                _strip(nodes[0], own)
    return layers[0]


def _is_whiteout(node: LayerNode, own: bytes) -> bool:
    if stat.S_ISCHR(node.mode):
        return node.rdev == 0
    return node.is_regular and not node.content.size_bytes and own + b"whiteout" in node.xattrs


def _strip(node: LayerNode, own: bytes) -> None:
    if node.xattrs:
        escaped = own + b"overlay."
        node.xattrs = {
            name: value
            for name, value in node.xattrs.items()
            if not name.startswith(own) or name.startswith(escaped)
        }


def _refuse(node: LayerNode, attribute: bytes) -> None:
    if attribute in node.xattrs:
        raise CallError(
            "unsupported",
            f"cannot merge the layer {node.layer.name!r}: inode {node.nid} has the attribute "
            f"{os.fsdecode(attribute)}, which refers to another layer",
            step="merge the layers",
            object=node.layer.name,
        )
