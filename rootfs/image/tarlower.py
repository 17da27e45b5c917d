"""The layers below the layer that is being built: their merged tree, and copies of their content.

A hard link may name a file of a lower layer. The layer then gets a copy of the file, as overlayfs
makes one. Each file of the merged tree keeps the diff_id of the layer that has its content; that
layer is read again when a copy is needed. Content that no link names is not kept.

Source: OCI image layer specification ("Applying Changesets"); overlayfs.rst ("Non-directories").
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

from rootfs.image.spool import Spool
from rootfs.image.tar import BLOCK_BYTES, TarEntry
from rootfs.image.tartree import TarTree, Whiteouts
from rootfs.image.tree import Content, Extent, FdContent, Node, work_off
from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.output import unnamed_file
from rootfs.imagefile.ranges import FileRange, copy_range
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("LowerLayers", "LowerTree")

#: What a piece of a sparse file takes in a listing: two numbers.
_EXTENT_BYTES = 16


class _LayerContent:
    """Content in the tar of a layer that is not open: ``extents`` are in what ``Spool`` gives."""

    __slots__ = ("extents", "layer", "size_bytes")

    def __init__(self, layer: str, size_bytes: int, extents: tuple[Extent, ...]) -> None:
        self.layer = layer
        self.size_bytes = size_bytes
        self.extents = extents

    def open(self) -> contextlib.AbstractContextManager[int]:
        raise AssertionError(f"layer {self.layer} is closed; copy its content first")


class LowerTree(TarTree):
    """Layers merged, to look things up in. Its content cannot be read; see ``LowerLayers``."""

    def __init__(self) -> None:
        super().__init__(Whiteouts.APPLY)

    def _content(self, entry: TarEntry, fd: int) -> Content:
        if not entry.extents:
            return FdContent(-1, entry.size_bytes, ())
        assert self._layer is not None
        return _LayerContent(self._layer, entry.size_bytes, entry.extents)


class LowerLayers:
    """Copies content out of lower layers. ``open_layer`` opens a layer by its diff_id; what it
    gives must be the same each time. All copies together are at most ``max_bytes``: layers of a
    few bytes that link to one large file must not fill a disk."""

    def __init__(
        self,
        open_layer: Callable[[str], contextlib.AbstractContextManager[Spool]],
        *,
        directory: str | os.PathLike[str],
        max_bytes: int,
        cancel: Deadline | None = None,
    ) -> None:
        self._open_layer = open_layer
        self._directory = directory
        self._max_bytes = max_bytes
        self._left_bytes = max_bytes
        self._cancel = cancel

    @contextlib.contextmanager
    def copied(self, borrowed: Iterable[Node]) -> Iterator[None]:
        """Make the content of inodes that a layer borrowed readable for the time of a ``with``
        block. The copies go to a file without a name.

        Raises:
            CallError: ``resource``, over the limit, or a full disk; what opens a layer; by
                ``cancel``.
        """
        nodes = list(borrowed)
        for node in nodes:
            self._left_bytes -= _cost_bytes(node)
        if self._left_bytes < 0:
            raise CallError(
                "resource",
                "cannot copy what hard links name in lower layers: it is more than "
                f"{self._max_bytes} bytes",
                step="copy from lower layers",
                hint="raise the limit if the source is trusted",
            )
        wanted: dict[str, list[Node]] = {}
        for node in nodes:
            if isinstance(node.content, _LayerContent):
                wanted.setdefault(node.content.layer, []).append(node)
        if not wanted:
            yield
            return
        with unnamed_file(self._directory) as fd:
            self._copy(wanted, fd)
            yield

    def _copy(self, wanted: Mapping[str, list[Node]], fd: int) -> None:
        end = 0
        for layer, nodes in wanted.items():
            with self._open_layer(layer) as spool:
                for node in nodes:
                    with OsErrors("copy from lower layers"):
                        node.content, end = self._copied(node.content, spool.fd, fd, end)

    def _copied(self, content: Content, source: int, fd: int, end: int) -> tuple[Content, int]:
        """Copy a file's content to ``end`` of ``fd``; return where it is, and the new end."""
        extents = []
        for offset, length, at in content.extents:
            extent = FileRange(offset_bytes=at, size_bytes=length)
            copied = copy_range(source, extent, fd, end)
            work_off(copied, length, "copy from lower layers", None, self._cancel)
            extents.append((offset, length, end))
            end += length
        return FdContent(fd, content.size_bytes, tuple(extents)), end


def _cost_bytes(node: Node) -> int:
    """Return what an inode would take in a tar, more or less; nothing is free of charge."""
    attributes = sum(len(name) + len(value) for name, value in node.xattrs.items())
    data = sum(length + _EXTENT_BYTES for _, length, _ in node.content.extents)
    return BLOCK_BYTES + len(node.target) + attributes + data
