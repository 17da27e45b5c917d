"""What a path of the guest's /dev needs: decided before anything is made, and without the kernel.

A path is followed as the kernel follows it, one name at a time. Every symbolic link, every
directory on the way and what is at the end becomes a node of the tree, so that the path leads to
the same there. Of a device-mapper device the devices below it are needed, too. What is looked at
comes from a ``Look``: that of the guest is in ``source``.

Source: path_resolution(7); at most 40 links in a path, as MAXSYMLINKS of Linux.
"""

import errno
import functools
import os
from collections.abc import Callable, Mapping

from guestagent.api.devtree import DevClosure, DevNode, UserNamespace
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("MAX_NODES", "Look", "Node", "PathPlan", "Seen", "normal_path", "plan_paths")

#: Files in a tree, and in what one request needs.
MAX_NODES = 4096
_MAX_LINKS = 40
_NAME_MAX_BYTES = 255
_DEV = "/dev"
#: What a link into /proc leads to differs from process to process: the link is all there is.
_PER_PROCESS = "/proc/"
#: struct posix_acl_xattr_entry: tag, permissions, id; behind a header of 4 bytes.
_ACL_HEADER_BYTES, _ACL_ENTRY_BYTES = 4, 8
_ACL_NAMED_TAGS = (0x02, 0x08)
_ACL_NAMES = ("system.posix_acl_access", "system.posix_acl_default")


class Seen(Record):
    """What is at a path of the guest: ``rdev`` (MAJOR:MINOR) of a device, ``target`` of a link;
    ``attributes`` are its access control lists and security labels."""

    kind: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    rdev: str | None = None
    target: str | None = None
    attributes: Mapping[str, bytes] = {}


class Look:
    """How the guest is looked at."""

    def at(self, path: str) -> Seen | None:
        """Return what is at a path, a link as itself; None if there is nothing."""
        raise NotImplementedError

    def below(self, rdev: str) -> tuple[str, ...]:
        """Return the nodes of the devices that a block device (MAJOR:MINOR) stands on."""
        raise NotImplementedError


class Node(Record):
    """A file of a tree by its path in the guest: all that its making needs to know.

    ``way`` is symlink, mkdir, mknod or bind; ``none`` for what is outside of /dev.
    """

    path: str
    way: str
    seen: Seen

    @property
    def is_bound_directory(self) -> bool:
        return self.way == "bind" and self.seen.kind == "directory"

    def is_like(self, other: "Node") -> bool:
        """Return whether another node is of the same file, however it is made."""
        mine = (self.seen.kind, self.seen.rdev, self.seen.target)
        return mine == (other.seen.kind, other.seen.rdev, other.seen.target)

    def report(self, state: str, needed_by: tuple[str, ...] = ()) -> DevNode:
        seen = self.seen
        return DevNode(
            path=self.path,
            kind=seen.kind,
            way=self.way,
            state=state,
            rdev=seen.rdev,
            target=seen.target,
            uid=seen.uid,
            gid=seen.gid,
            mode=seen.mode,
            needed_by=needed_by,
        )


class PathPlan(Record):
    """A path that was asked for and the nodes that it needs, parents first; none if it is
    skipped."""

    path: str
    nodes: tuple[Node, ...]


def normal_path(path: str) -> str:
    """Return an absolute path without ``//``, ``.`` and ``..``, which are resolved as text."""
    return os.path.normpath("/" + path.lstrip("/"))


def plan_paths(
    request: DevClosure,
    look: Look,
    deadline: Deadline,
    user_namespace: UserNamespace | None = None,
) -> tuple[PathPlan, ...]:
    """Return what each path needs, each path once.

    Raises:
        CallError: ``not_found``, a path is not there; ``denied``, it leads out of /dev; ``invalid``
            with ELOOP, ENOTDIR or ENAMETOOLONG; ``unsupported``, a link that is not UTF-8;
            ``resource``, too many nodes. The object is the path. ``timeout`` or ``cancelled``.
    """
    auto = "mknod" if user_namespace is None else "bind"
    way = auto if request.strategy == "auto" else request.strategy
    outside = tuple(map(normal_path, request.outside))
    at = functools.cache(look.at)  # what many paths share is looked at once
    plans: list[PathPlan] = []
    known: set[str] = set()
    for path in dict.fromkeys(map(normal_path, request.paths)):
        walk = _Walk(at, look.below, outside, way, deadline)
        try:
            walk.need(path)
        except CallError as error:
            if error.code != "not_found" or request.missing != "skip":
                raise
            walk.nodes.clear()
        known.update(walk.nodes)
        if len(known) > MAX_NODES:
            raise _too_many(path)
        nodes = tuple(_owned(node, user_namespace) for node in walk.nodes.values())
        plans.append(PathPlan(path=path, nodes=nodes))
    return tuple(plans)


class _Walk:
    """Follows paths and keeps the nodes that they need, by path, in the order of their making."""

    def __init__(
        self,
        at: Callable[[str], Seen | None],
        below: Callable[[str], tuple[str, ...]],
        outside: tuple[str, ...],
        way: str,
        deadline: Deadline,
    ) -> None:
        self._at = at
        self._below = below
        self._outside = outside
        self._way = way
        self._deadline = deadline
        self.nodes: dict[str, Node] = {}

    def need(self, path: str) -> None:
        """Follow a path, then those of the devices below what it leads to."""
        pending = [path]
        followed = set()
        while pending:
            path = pending.pop()
            if path not in followed:
                followed.add(path)
                pending += self._follow(path)

    def _follow(self, asked: str) -> tuple[str, ...]:
        """Follow one path to its end; return the nodes below the device that is there."""
        names, at, links = asked.split("/")[::-1], "", 0
        end: tuple[str, Seen] | None = None
        while names:
            name = names.pop()
            if name == "..":
                at, end = at.rpartition("/")[0], None
            if name in ("", ".", ".."):
                continue
            here = f"{at}/{name}"
            seen = self._see(here, asked)
            if seen.kind == "link":
                links += 1
                if links > _MAX_LINKS:
                    text = f"{asked!r} leads through over {_MAX_LINKS} links, last {here!r}"
                    raise CallError("invalid", text, errno=errno.ELOOP, object=here)
                self._add(here, seen, "symlink")
                target = seen.target or ""
                if target.startswith(_PER_PROCESS):
                    return ()
                at = "" if target.startswith("/") else at
                names += target.split("/")[::-1]
                end = None
            elif seen.kind == "directory":
                self._add(here, seen, "mkdir")
                at, end = here, (here, seen)
            elif any(name not in ("", ".") for name in names):
                text = f"{here!r}, on the way of {asked!r}, is no directory"
                raise CallError("invalid", text, errno=errno.ENOTDIR, object=here)
            else:
                end = here, seen
        return self._end(asked, *(end or (at or "/", self._see(at, asked))))

    def _end(self, asked: str, path: str, seen: Seen) -> tuple[str, ...]:
        if _is_within(_DEV, path):
            text = f"{asked!r} is all of {path!r}: name what is in it"
            raise CallError("denied", text, object=asked)
        is_device = seen.kind in ("block", "character")
        self._add(path, seen, self._way if is_device else "bind", is_end=True)
        return self._below(seen.rdev) if seen.kind == "block" and seen.rdev else ()

    def _see(self, path: str, asked: str) -> Seen:
        self._deadline.check("closure")
        if len(os.fsencode(path.rpartition("/")[2])) > _NAME_MAX_BYTES:
            text = f"{asked!r} leads to a name of over {_NAME_MAX_BYTES} bytes"
            raise CallError("invalid", text, errno=errno.ENAMETOOLONG, object=asked)
        allowed = any(_is_within(path, place) or _is_within(place, path) for place in self._outside)
        if not (allowed or _is_within(path, _DEV) or _is_within(_DEV, path)):
            text = f"{asked!r} leads out of {_DEV}, to {path!r}"
            hint = "outside: names directories that a path or a link may lead through"
            raise CallError("denied", text, object=asked, hint=hint)
        seen = self._at(path or "/")
        if seen is None:
            what = f"{path!r}" if path == asked else f"{path!r}, which {asked!r} needs,"
            hint, text = "missing: skip leaves out what is not there", f"{what} is not there"
            raise CallError("not_found", text, errno=errno.ENOENT, object=asked, hint=hint)
        return seen

    def _add(self, path: str, seen: Seen, way: str, *, is_end: bool = False) -> None:
        """A directory that was passed on the way becomes one that is wanted, never the reverse."""
        if _is_within(_DEV, path) or (path in self.nodes and not is_end):
            return
        if len(self.nodes) >= MAX_NODES:
            raise _too_many(path)
        if not _is_within(path, _DEV):
            way = "none"
        self.nodes[path] = Node(path=path, way=way, seen=seen)


def _is_within(path: str, directory: str) -> bool:
    """Return whether a path is a directory or lies below it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/") or directory == "/"


def _too_many(path: str) -> CallError:
    return CallError("resource", f"the paths need over {MAX_NODES} files", object=path)


def _owned(node: Node, ids: UserNamespace | None) -> Node:
    """Return a node with the ids that it has outside of a user namespace."""
    if ids is None:
        return node
    seen = node.seen
    attributes = {
        name: _shifted_acl(value, ids) if name in _ACL_NAMES else value
        for name, value in seen.attributes.items()
    }
    uid, gid = _shifted(seen.uid, ids.uid, ids.size), _shifted(seen.gid, ids.gid, ids.size)
    return node.replace(seen=seen.replace(uid=uid, gid=gid, attributes=attributes))


def _shifted(number: int, base: int, size: int) -> int:
    """An id that the namespace does not have becomes that of its root."""
    return base + number if number < size else base


def _shifted_acl(value: bytes, ids: UserNamespace) -> bytes:
    moved = bytearray(value)
    for at in range(_ACL_HEADER_BYTES, len(value) - _ACL_ENTRY_BYTES + 1, _ACL_ENTRY_BYTES):
        tag = int.from_bytes(value[at : at + 2], "little")
        if tag in _ACL_NAMED_TAGS:
            base = ids.uid if tag == _ACL_NAMED_TAGS[0] else ids.gid
            number = int.from_bytes(value[at + 4 : at + 8], "little")
            moved[at + 4 : at + 8] = _shifted(number, base, ids.size).to_bytes(4, "little")
    return bytes(moved)
