"""From the members of a tar to a tree: names, hard links, duplicates and whiteouts.

- Names are taken from the root of the image: a leading ``/`` or ``./`` means nothing. A ``..`` is
  refused wherever it stands in a name or in the target of a hard link. A member below something
  that is no directory (a symlink, say) is refused: nothing is ever followed.
- Of several members of one name the last counts, as when a tar is unpacked; a directory that comes
  again keeps what it holds. Directories that no member describes are made, root:root 0755, time 0.
- A hard link names an earlier member of the same archive, or what lower layers have by that name
  when the whiteouts of this layer are applied. The layer then gets a copy of the lower file under
  both names, as overlayfs copies a file up when it is linked: the names stay one inode.

Whiteouts (``.wh.NAME``, ``.wh..wh..opq``) are turned into overlayfs form, applied to the tree, or
taken as plain names; see ``Whiteouts``.

Source: OCI image layer specification ("Whiteouts"); Documentation/filesystems/overlayfs.rst.
"""

import enum
import os
import stat
from collections.abc import Iterable, Iterator, Sequence

from rootfs.image.tar import TarEntry
from rootfs.image.tree import OPAQUE_TRUSTED, OPAQUE_USER, Content, FdContent, Node
from rootfs.imagefile.errors import DROP_XATTRS_HINT
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("TarTree", "Whiteouts", "overlay_names")

_RESERVED_ATTRIBUTES = (b"trusted.overlay.", b"user.overlay.")

_PREFIX = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS_PREFIX = b".wh..wh."
_MAX_NODES = 4 << 20
_MAX_DEPTH = 1000


class Whiteouts(enum.Enum):
    """What to make of a layer's whiteouts.

    OVERLAY: character devices 0:0 and the attribute ``trusted.overlay.opaque``, which overlayfs
    honours. OVERLAY_USER: the same with ``user.overlay.opaque``, for overlays mounted with
    ``userxattr``. APPLY: remove what they hide, for an image of several layers in one. KEEP: they
    are files like others.
    """

    OVERLAY = "overlay"
    OVERLAY_USER = "overlay-user"
    APPLY = "apply"
    KEEP = "keep"


class TarTree:
    """A tree that members are added to, one archive after the other."""

    def __init__(
        self,
        whiteouts: Whiteouts = Whiteouts.OVERLAY,
        *,
        below: Node | None = None,
        shown: Node | None = None,
    ) -> None:
        """``below`` is the tree under this layer: directories that the layer only passes through
        look as they do there, as the overlay shows those of the upper layer. It is not changed,
        but the layer's whiteouts are to be applied to it (``apply_whiteouts``) before
        ``add_layer``. ``shown`` is what the layers show that are mounted below this one, where
        that is less than ``below`` (see ``overlay_names``)."""
        self.root = Node(stat.S_IFDIR | 0o755)
        #: Copies of inodes of ``below`` that hard links name; their content is still that of below.
        self.borrowed: dict[Node, Node] = {}
        self._below = below
        self._shown = shown or below
        self._root_names = () if self._shown is None else tuple(self._shown.children)
        if below is not None:
            _copy_facts(self.root, below)
        self._whiteouts = whiteouts
        self._layer: str | None = None
        #: Directories in the place of something else that this layer had there: the layer has
        #: removed whatever lower layers have in them.
        self._anew: set[Node] = set()
        self._count = 1

    def add_layer(
        self,
        entries: Iterable[TarEntry],
        fd: int,
        *,
        layer: str | None = None,
        cancel: Deadline | None = None,
    ) -> None:
        """Add the members of one archive, whose content stays in ``fd`` (to be kept open).
        ``layer`` is what errors call it, where it is one of several.

        Raises:
            CallError: ``invalid``, a name or link that is refused; ``resource``, over 4 Mi members;
                by the reader of the archive; by ``cancel``.
        """
        self._layer = layer
        if self._whiteouts is Whiteouts.APPLY:
            entries = list(entries)
            self.apply_whiteouts(entries)
        markers: list[tuple[tuple[bytes, ...], TarEntry]] = []
        aufs: set[tuple[bytes, ...]] = set()
        for entry in entries:
            if cancel is not None:
                cancel.check("read the tar")
            self._count += 1
            if self._count > _MAX_NODES:
                raise CallError(
                    "resource",
                    f"cannot read the tar: over {_MAX_NODES} members",
                    step="read the tar",
                )
            path = _path_of(entry.name, entry, "name")
            if path and path[-1].startswith(_PREFIX) and self._whiteouts is not Whiteouts.KEEP:
                markers.append((path, entry))
            else:
                self._add(path, entry, fd)
                aufs.update(_aufs_directory(path))
        if self._whiteouts is not Whiteouts.KEEP:
            for path in aufs:
                parent = self._find(path[:-1])
                if parent is not None:
                    parent.children.pop(path[-1], None)
        if self._whiteouts is not Whiteouts.APPLY:
            # now that all of the layer is known: what a marker is in may come after it; and
            # what hides a directory, or all that is in it, comes before single names in it
            for path, entry in sorted(
                markers, key=lambda each: (len(each[0]), each[0][-1] != _OPAQUE)
            ):
                self._convert(path, entry)
        if self._whiteouts is not Whiteouts.KEEP:
            for directory in self._anew:
                self._make_opaque(directory)

    def _add(self, path: tuple[bytes, ...], entry: TarEntry, fd: int) -> None:
        if self._whiteouts is not Whiteouts.KEEP:
            for attribute in entry.xattrs:
                if attribute.startswith(_RESERVED_ATTRIBUTES):
                    # with one of these a layer could reach into those below it
                    text = os.fsdecode(attribute)
                    raise _refused(
                        entry,
                        f"the attribute {text} is overlayfs's own",
                        hint=DROP_XATTRS_HINT,
                    )
        if not path:
            if entry.file_type != stat.S_IFDIR:
                raise _refused(entry, "the root of an image is a directory")
            _describe(self.root, entry)
            return
        parent = self._directory(path[:-1], entry)
        name = path[-1]
        if len(name) > 255:
            raise _refused(entry, "a part of the name is longer than 255 bytes")
        if not entry.file_type:
            target = self._link_target(entry)
            old = parent.children.get(name)
            if target is not old:
                parent.children[name] = target
            return
        old = parent.children.get(name)
        if entry.file_type == stat.S_IFDIR and old is not None and old.is_directory:
            _describe(old, entry)
            return
        node = parent.children[name] = self._new_node(entry, fd)
        if node.is_directory and old is not None and self._below is not None:
            self._anew.add(node)

    def _new_node(self, entry: TarEntry, fd: int) -> Node:
        node = Node(entry.file_type, rdev=entry.rdev)
        _describe(node, entry)
        if node.is_regular:
            node.content = self._content(entry, fd)
        elif node.is_symlink:
            if not entry.target or len(entry.target) > 4095:
                raise _refused(entry, f"a symlink to a name of {len(entry.target)} bytes")
            node.target = entry.target
        return node

    def _content(self, entry: TarEntry, fd: int) -> Content:
        return FdContent(fd, entry.size_bytes, entry.extents)

    def _directory(self, path: Sequence[bytes], entry: TarEntry) -> Node:
        """Return the directory at ``path``, made where it is missing."""
        node, below = self.root, self._below
        for part in path:
            if node in self._anew:
                below = None
            below = None if below is None else below.children.get(part)
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = Node(stat.S_IFDIR | 0o755)
                if below is not None and below.is_directory:
                    _copy_facts(child, below)
                self._count += 1
            elif not child.is_directory:
                raise _refused(entry, f"{os.fsdecode(part)!r} above it is no directory")
            node = child
        return node

    def _link_target(self, entry: TarEntry) -> Node:
        path = _path_of(entry.target, entry, "target")
        node, below = self._look_up(path)
        found = node or below
        if found is None:
            raise _refused(entry, self._no_target(path, entry.target))
        if found.is_directory:
            raise _refused(entry, self._in_layer("a hard link to a directory"))
        if node is None:
            node = self._borrow(found)
            self._directory(path[:-1], entry).children[path[-1]] = node
        return node

    def _look_up(self, path: Sequence[bytes]) -> tuple[Node | None, Node | None]:
        """Return what this layer has at ``path``, and what lower layers show there."""
        node: Node | None = self.root
        below = self._below
        for part in path:
            if node is not None and (node in self._anew or not node.is_directory):
                below = None
            node = None if node is None else node.children.get(part)
            below = None if below is None else below.children.get(part)
        return node, below

    def _borrow(self, lower: Node) -> Node:
        """Return this layer's copy of an inode below, one for all of its names."""
        copy = self.borrowed.get(lower)
        if copy is None:
            copy = self.borrowed[lower] = Node(
                lower.mode, rdev=lower.rdev, target=lower.target, content=lower.content
            )
            _copy_facts(copy, lower)
            self._count += 1
        return copy

    def _no_target(self, path: Sequence[bytes], target: bytes) -> str:
        link = f"a hard link to {os.fsdecode(target)!r}, "
        for length in range(1, len(path)):
            node, below = self._look_up(path[:length])
            found = node or below
            if found is not None and not found.is_directory:
                way = os.fsdecode(b"/".join(path[:length]))
                return self._in_layer(f"{link}but {way!r} is no directory")
        if self._layer is None:
            return f"{link}which is not in the archive"
        return f"{link}which is neither in the layer {self._layer} nor left of those below it"

    def _in_layer(self, why: str) -> str:
        return why if self._layer is None else f"{why}, in the layer {self._layer}"

    def _convert(self, path: tuple[bytes, ...], entry: TarEntry) -> None:
        """Turn a marker into overlayfs form."""
        *parents, name = path
        hidden = _hidden_by(name, entry)
        if not self._shows_through(parents):
            return
        if name == _OPAQUE and not parents:
            self._hide_all(entry)
        elif name == _OPAQUE:
            self._make_opaque(self._directory(parents, entry))
        elif hidden is not None:
            self._hide(self._directory(parents, entry), hidden)

    def _shows_through(self, path: Sequence[bytes]) -> bool:
        """Say whether lower layers can show anything in the directory ``path``. Where they cannot,
        a marker must leave no trace: overlayfs lists whiteouts in directories that it does not
        merge, and a directory made for a marker would be seen.

        umoci lists what was in a directory that the layer has made a symlink.
        """
        node: Node | None = self.root
        below = self._shown
        for part in path:
            if node is not None and self._is_opaque(node):
                return False
            node = None if node is None else node.children.get(part)
            if node is not None and not node.is_directory:
                return False
            if self._shown is not None:
                below = None if below is None else below.children.get(part)
                if below is None or not below.is_directory:
                    return False
        return True

    def _hide(self, parent: Node, name: bytes) -> None:
        """Hide a name of lower layers. What this layer has itself stays, and hides by being there;
        only a directory would let the lower one shine through."""
        own = parent.children.get(name)
        if own is None:
            if not self._is_opaque(parent):
                parent.children[name] = Node(stat.S_IFCHR)
        elif own.is_directory:
            self._make_opaque(own)

    def _hide_all(self, entry: TarEntry) -> None:
        """Hide each name that is below: overlayfs never takes the root of a layer as opaque."""
        if self._below is None:
            raise _refused(entry, "only in an image of several layers can it hide all of the root")
        for name in self._root_names:
            self._hide(self.root, name)

    def _make_opaque(self, directory: Node) -> None:
        directory.xattrs[self._opaque_name] = b"y"

    def _is_opaque(self, directory: Node) -> bool:
        return directory in self._anew or self._opaque_name in directory.xattrs

    @property
    def _opaque_name(self) -> bytes:
        return OPAQUE_USER if self._whiteouts is Whiteouts.OVERLAY_USER else OPAQUE_TRUSTED

    def apply_whiteouts(self, entries: Iterable[TarEntry]) -> None:
        """Remove what a layer hides from the tree, as is done before its members are added.

        Raises:
            CallError: ``invalid``, a name that is refused.
        """
        for entry in entries:
            if _PREFIX not in entry.name:
                continue
            path = _path_of(entry.name, entry, "name")
            if not path or not path[-1].startswith(_PREFIX):
                continue
            hidden = _hidden_by(path[-1], entry)
            parent = self._find(path[:-1])
            if parent is None:
                continue
            if path[-1] == _OPAQUE:
                parent.children.clear()
            elif hidden is not None:
                parent.children.pop(hidden, None)

    def _find(self, path: tuple[bytes, ...]) -> Node | None:
        node: Node | None = self.root
        for part in path:
            node = node.children.get(part) if node is not None else None
        return node


def overlay_names(lower: Node, upper: Node) -> None:
    """Make of ``lower`` what an overlay of ``upper`` over it shows: names and types, no content.

    ``upper`` is not changed, and no node of it is taken over.
    """
    waiting = [(lower, upper)]
    while waiting:
        below, above = waiting.pop()
        for name, node in above.children.items():
            if stat.S_ISCHR(node.mode) and not node.rdev:
                below.children.pop(name, None)
                continue
            old = below.children.get(name)
            hides = OPAQUE_TRUSTED in node.xattrs or OPAQUE_USER in node.xattrs
            if old is None or not (old.is_directory and node.is_directory) or hides:
                old = below.children[name] = Node(node.mode)
            waiting.append((old, node))


def _aufs_directory(path: tuple[bytes, ...]) -> Iterator[tuple[bytes, ...]]:
    """Yield the directory of AUFS's own that a name is in: its files, such as those of
    ``.wh..wh.plnk``, are targets of hard links and no part of the layer.

    Source: moby pkg/archive/diff.go, UnpackLayer.
    """
    for depth, part in enumerate(path[:-1], 1):
        if part.startswith(_AUFS_PREFIX):
            yield path[:depth]
            return


def _hidden_by(marker: bytes, entry: TarEntry) -> bytes | None:
    """Return the one name that a marker hides, None for those that mean something else."""
    if marker.startswith(_AUFS_PREFIX):
        return None
    hidden = marker.removeprefix(_PREFIX)
    if hidden in (b"", b".", b".."):
        raise _refused(entry, "a whiteout of no name")
    return hidden


def _describe(node: Node, entry: TarEntry) -> None:
    node.mode = stat.S_IFMT(node.mode) | entry.permissions
    node.uid = entry.uid
    node.gid = entry.gid
    node.mtime_ns = entry.mtime_ns
    node.xattrs = dict(entry.xattrs)


def _copy_facts(node: Node, below: Node) -> None:
    node.mode, node.uid, node.gid = below.mode, below.uid, below.gid
    node.mtime_ns = below.mtime_ns
    node.xattrs = dict(below.xattrs)


def _path_of(name: bytes, entry: TarEntry, what: str) -> tuple[bytes, ...]:
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if b".." in parts:
        raise _refused(entry, f"its {what} has a '..'")
    if len(parts) > _MAX_DEPTH:
        raise _refused(entry, f"its {what} has over {_MAX_DEPTH} parts")
    if not parts and not name:
        raise _refused(entry, f"its {what} is empty")
    return parts


def _refused(entry: TarEntry, why: str, *, hint: str | None = None) -> CallError:
    name = os.fsdecode(entry.name)
    return CallError(
        "invalid",
        f"cannot take member {name!r} at byte {entry.offset_bytes} of the tar: {why}",
        step="read the tar",
        object=name,
        hint=hint,
    )
