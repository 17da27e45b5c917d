"""From the members of a tar to a tree: names, hard links, duplicates and whiteouts.

- Names are taken from the root of the image: a leading ``/`` or ``./`` means nothing. A ``..`` is
  refused wherever it stands in a name or in the target of a hard link. A member below something
  that is no directory (a symlink, say) is refused: nothing is ever followed.
- Of several members of one name the last counts, as when a tar is unpacked; a directory that comes
  again keeps what it holds. Directories that no member describes are made, root:root 0755, time 0.
- A hard link names an earlier member of the same archive.

Whiteouts (``.wh.NAME``, ``.wh..wh..opq``) are turned into overlayfs form, applied to the tree, or
taken as plain names; see ``Whiteouts``.

Source: OCI image layer specification ("Whiteouts"); Documentation/filesystems/overlayfs.rst.
"""

import enum
import os
import stat
from collections.abc import Iterable, Sequence

from rootfs.tar import TarEntry
from rootfs.tree import FdContent, Node
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("OPAQUE_TRUSTED", "OPAQUE_USER", "TarTree", "Whiteouts")

#: What marks a directory opaque for an overlay mounted with, and without, privilege (userxattr).
OPAQUE_TRUSTED = b"trusted.overlay.opaque"
OPAQUE_USER = b"user.overlay.opaque"
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
        self, whiteouts: Whiteouts = Whiteouts.OVERLAY, *, below: Node | None = None
    ) -> None:
        """``below`` is the tree under this layer: directories that the layer only passes through
        look there as they do below it, as the overlay shows those of the upper layer."""
        self.root = Node(stat.S_IFDIR | 0o755)
        self._below = below
        if below is not None:
            _copy_facts(self.root, below)
        self._whiteouts = whiteouts
        self._count = 1

    def add_layer(
        self, entries: Iterable[TarEntry], fd: int, *, cancel: Deadline | None = None
    ) -> None:
        """Add the members of one archive, whose content stays in ``fd`` (to be kept open).

        Raises:
            CallError: ``invalid``, a name or link that is refused; ``resource``, over 4 Mi members;
                by the reader of the archive; by ``cancel``.
        """
        if self._whiteouts is Whiteouts.APPLY:
            entries = self._apply_whiteouts(entries)
        markers: list[tuple[tuple[bytes, ...], TarEntry]] = []
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
        if self._whiteouts is not Whiteouts.APPLY:
            # now that all of the layer is known: what a marker is in may come after it
            for path, entry in markers:
                self._convert(path, entry)

    def _add(self, path: tuple[bytes, ...], entry: TarEntry, fd: int) -> None:
        if self._whiteouts is not Whiteouts.KEEP:
            for attribute in entry.xattrs:
                if attribute.startswith(_RESERVED_ATTRIBUTES):
                    # with one of these a layer could reach into those below it
                    text = os.fsdecode(attribute)
                    raise _refused(entry, f"the attribute {text} is overlayfs's own")
        if not path:
            if entry.file_type != stat.S_IFDIR:
                raise _refused(entry, "the root of an image is a directory")
            _describe(self.root, entry)
            return
        parent = self._directory(path[:-1], entry)
        name = path[-1]
        if len(name) > 255:
            raise _refused(entry, "a part of the name is longer than 255 bytes")
        old = parent.children.get(name)
        if not entry.file_type:
            target = self._link_target(entry)
            if target is not old:
                parent.children[name] = target
        elif entry.file_type == stat.S_IFDIR and old is not None and old.is_directory:
            _describe(old, entry)
        else:
            parent.children[name] = self._new_node(entry, fd)

    def _new_node(self, entry: TarEntry, fd: int) -> Node:
        node = Node(entry.file_type, rdev=entry.rdev)
        _describe(node, entry)
        if node.is_regular:
            node.content = FdContent(fd, entry.size_bytes, entry.extents)
        elif node.is_symlink:
            if not entry.target or len(entry.target) > 4095:
                raise _refused(entry, f"a symlink to a name of {len(entry.target)} bytes")
            node.target = entry.target
        return node

    def _directory(self, path: Sequence[bytes], entry: TarEntry) -> Node:
        """Return the directory at ``path``, made where it is missing."""
        node, below = self.root, self._below
        for part in path:
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
        node: Node | None = self.root
        for part in path:
            node = node.children.get(part) if node is not None else None
        if node is None:
            raise _refused(
                entry, f"a hard link to {os.fsdecode(entry.target)!r}, which is not in the archive"
            )
        if node.is_directory:
            raise _refused(entry, "a hard link to a directory")
        return node

    def _convert(self, path: tuple[bytes, ...], entry: TarEntry) -> None:
        """Turn a marker into overlayfs form."""
        *parents, name = path
        if not self._may_hide(parents):
            return
        if name == _OPAQUE:
            self._make_opaque(self._directory(parents, entry))
        elif not name.startswith(_AUFS_PREFIX):
            hidden = name.removeprefix(_PREFIX)
            if hidden in (b"", b".", b".."):
                raise _refused(entry, "a whiteout of no name")
            self._hide(self._directory(parents, entry), hidden)

    def _may_hide(self, path: Sequence[bytes]) -> bool:
        """Say whether markers in ``path`` can hide anything: not below what is no directory.

        umoci lists what was in a directory that the layer has made a symlink.
        """
        node: Node | None = self.root
        below = self._below
        for part in path:
            node = None if node is None else node.children.get(part)
            below = None if below is None else below.children.get(part)
            own = node or below
            if own is not None and not own.is_directory:
                return False
        return True

    def _hide(self, parent: Node, name: bytes) -> None:
        """Hide a name of lower layers. What this layer has itself stays, and hides by being there;
        only a directory would let the lower one shine through."""
        own = parent.children.get(name)
        if own is None:
            parent.children[name] = Node(stat.S_IFCHR)
        elif own.is_directory:
            self._make_opaque(own)

    def _make_opaque(self, directory: Node) -> None:
        user = self._whiteouts is Whiteouts.OVERLAY_USER
        directory.xattrs[OPAQUE_USER if user else OPAQUE_TRUSTED] = b"y"

    def _apply_whiteouts(self, entries: Iterable[TarEntry]) -> list[TarEntry]:
        """Remove what a layer hides from the tree before any of its members is added."""
        listed = list(entries)
        for entry in listed:
            path = _path_of(entry.name, entry, "name")
            if not path or not path[-1].startswith(_PREFIX):
                continue
            parent = self._find(path[:-1])
            if parent is None:
                continue
            if path[-1] == _OPAQUE:
                parent.children.clear()
            else:
                parent.children.pop(path[-1].removeprefix(_PREFIX), None)
        return listed

    def _find(self, path: tuple[bytes, ...]) -> Node | None:
        node: Node | None = self.root
        for part in path:
            node = node.children.get(part) if node is not None else None
        return node


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


def _refused(entry: TarEntry, why: str) -> CallError:
    name = os.fsdecode(entry.name)
    return CallError(
        "invalid",
        f"cannot take member {name!r} at byte {entry.offset_bytes} of the tar: {why}",
        step="read the tar",
        object=name,
    )
