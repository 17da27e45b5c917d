"""A private /dev as the agent knows it, and how what is asked for fits into what is there."""

import errno
from collections.abc import Collection, Mapping

from guestagent.api.devtree import DevAttachment, DevCreate
from guestagent.devtree.closure import MAX_NODES, Node, PathPlan
from guestagent.devtree.tree import Tree
from guestagent.engine.claims import parent_of
from guestagent.storage import syscalls
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("LiveTree",)


class LiveTree(Record):
    """A tree. ``dev`` (MAJOR:MINOR) is its file system and ``mount_id`` its mount.

    ``nodes`` are those that the agent has made, by path, parents first; ``needs`` has the paths of
    all that each added path needs, those that were there already too. ``pending`` is what is being
    made or removed. A tree that is not ``whole`` is being made or taken away. ``created`` are the
    directories on the way to its root that were made, outermost first.
    """

    spec: DevCreate
    created: tuple[str, ...]
    dev: str = ""
    mount_id: int = 0
    whole: bool = False
    nodes: Mapping[str, Node] = {}
    needs: Mapping[str, tuple[str, ...]] = {}
    pending: tuple[Node, ...] = ()
    attached: tuple[DevAttachment, ...] = ()

    def open(self) -> Tree:
        """Open the tree.

        Raises:
            CallError: ``conflict``, it is not mounted at its root any more, or is covered there.
        """
        root = self.spec.mount_point
        try:
            return Tree(root, self.dev, self.mount_id)
        except OSError as error:
            text = f"private /dev {self.spec.tree_id!r} is not at {root!r} any more"
            raise CallError("conflict", text, errno=error.errno, object=root) from error

    def at(self, target: str) -> "LiveTree":
        """Return the tree as its copy at another place in the agent's own mount namespace."""
        _, mount_id = syscalls.mount_of(target)
        return self.replace(spec=self.spec.replace(root=target), mount_id=mount_id)

    def needing(self) -> dict[str, list[str]]:
        """Return the added paths that need each node, by its path."""
        found: dict[str, list[str]] = {}
        for added, needed in self.needs.items():
            for path in needed:
                found.setdefault(path, []).append(added)
        return found

    def without(self, paths: Collection[str]) -> tuple["LiveTree", tuple[Node, ...]]:
        """Return the tree without added paths, and the nodes that go with them."""
        needs = {path: needed for path, needed in self.needs.items() if path not in paths}
        needed = frozenset().union(*needs.values())
        nodes = {path: node for path, node in self.nodes.items() if path in needed}
        doomed = tuple(node for path, node in self.nodes.items() if path not in needed)
        return self.replace(needs=needs, nodes=nodes), doomed

    def merged(self, plans: Collection[PathPlan]) -> tuple[PathPlan, ...]:
        """Return plans with each node as the tree has it or is to have it.

        What lies below a directory that is bound as a whole is there with that directory.

        Raises:
            CallError: ``conflict``, the tree has another file at the path of a node; ``resource``,
                it would have too many.
        """
        planned: dict[str, Node] = {}
        for node in (node for plan in plans for node in plan.nodes):
            has = self.nodes.get(node.path)
            if has is not None:
                _refuse_other_node(node, has)
            if node.path not in planned or node.is_bound_directory:
                planned[node.path] = has or node
        all_nodes = {**self.nodes, **planned}
        if len(all_nodes) > MAX_NODES or len(self.needs) + len(plans) > MAX_NODES:
            text = f"private /dev {self.spec.tree_id!r} would have over {MAX_NODES} files or paths"
            raise CallError("resource", text, object=self.spec.tree_id)
        bound = {path for path, node in all_nodes.items() if node.is_bound_directory}
        return tuple(
            plan.replace(
                nodes=tuple(
                    planned[node.path] for node in plan.nodes if not _is_below(node.path, bound)
                )
            )
            for plan in plans
        )


def _is_below(path: str, directories: set[str]) -> bool:
    while path := parent_of(path):
        if path in directories:
            return True
    return False


def _refuse_other_node(wanted: Node, has: Node) -> None:
    if has.is_bound_directory and wanted.way == "mkdir":
        return
    if wanted.is_bound_directory and has.way == "mkdir":
        text = f"the tree has {wanted.path!r} as a directory of single files"
        hint = "remove the paths in it first, or add the directory before them"
        raise CallError("conflict", text, object=wanted.path, hint=hint)
    if wanted.is_like(has):
        return
    text = f"{wanted.path!r} is {_named(wanted)} by now, and {_named(has)} in the tree"
    hint = "remove the paths that need it, and add them again"
    raise CallError("conflict", text, errno=errno.EEXIST, object=wanted.path, hint=hint)


def _named(node: Node) -> str:
    return " ".join(filter(None, (node.seen.kind, node.seen.rdev, node.seen.target)))
