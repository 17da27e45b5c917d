"""The private /dev trees that are there: made, filled, attached, taken away, adopted.

A tree has one entry in the journal. What a request is about to make, or to remove, is written down
in it as ``pending`` first, and taken out of it at the end: that one write decides. After a restart
what is pending is removed, and a tree that was not whole, or is not what the kernel has any more,
is undone.

Each path that was added names the nodes that it needs. A node goes with the last path that needs
it, and only if the agent has made it.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from guestagent.api import devtree as api
from guestagent.api.request import Empty, handles
from guestagent.devtree.attach import Namespace, attach_copy
from guestagent.devtree.closure import MAX_NODES, Node, PathPlan, normal_path, plan_paths
from guestagent.devtree.livetree import LiveTree
from guestagent.devtree.source import Guest
from guestagent.devtree.tree import Tree
from guestagent.engine.inventory import refuse_other_spec
from guestagent.engine.parts import (
    adopt_target,
    attempt,
    begin_entry,
    claim_target,
    forget_entry,
    recover_part,
    undoing,
)
from guestagent.engine.plan import check_target
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import (
    busy_error,
    refuse_mounts_elsewhere,
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage import syscalls
from guestagent.storage.holders import find_holders
from guestagent.storage.mount import TargetDirectory, mount_filesystem
from guestagent.storage.mountinfo import Mount, find_mount, mounts_of_dev, read_mounts
from vsock.errors import CallError

__all__ = ("DevTrees", "LiveTree")

#: Name of the part in the journal and in reservations.
PART = "devtree"
_MAX_TREES = 256
#: Looking for the processes that use a tree reads all of /proc.
_HOLDER_SECONDS = 2.0
_NODE_WAYS = ("symlink", "mkdir", "mknod", "bind")


class DevTrees:
    """Every method may be called from many threads at once."""

    def __init__(self, state: EngineState) -> None:
        """Adopt or undo what an earlier agent has left; nothing else may use it meanwhile."""
        self._state = state
        self._trees: dict[str, LiveTree] = {}
        self._guest = Guest()
        recover_part(state, PART, LiveTree, _name, self._recover)
        attempt(state, "mounts of a private /dev without an entry", self._undo_orphans)

    # --- requests

    @handles(api.DevCreate)
    def create(self, spec: api.DevCreate, op: Transaction) -> api.DevTree:
        """Make a tree, or say that exactly this tree is there already.

        Raises:
            CallError: ``conflict``, the id or the root is that of another tree; nothing is left
                behind.
        """
        tree_id = spec.tree_id
        with self._state.locks.hold([(PART, tree_id)], op.deadline):
            permit = self._state.gate.request(spec.method, spec)
            live = self._trees.get(tree_id)
            if live is not None:
                refuse_other_spec("tree", tree_id, spec, live.spec)
                return self._report(live, with_nodes=True).replace(already=True)
            if len(self._trees) >= _MAX_TREES:
                raise CallError("resource", f"there are {_MAX_TREES} trees", object=tree_id)
            with op:
                live = self._mount(spec, op, permit)
                if spec.preserve:
                    paths = tuple(f"/dev/{name}" for name in spec.preserve)
                    live, _ = self._fill(live, api.DevClosure(paths=paths), op, permit)
                live = live.replace(pending=(), whole=True)
                with op.step("read back", spec.mount_point):
                    report = self._report(live, with_nodes=True)
                self._commit(live, op)
        return report

    @handles(api.DevAdd)
    def add(self, request: api.DevAdd, op: Transaction) -> api.DevPathsReply:
        """Add paths and what they need: all or nothing.

        Raises:
            CallError: ``conflict``, another file is in the place of a node; and any code of
                ``plan_paths``. Nothing is left behind.
        """
        with self._state.locks.hold([(PART, request.tree_id)], op.deadline):
            permit = self._state.gate.request(request.method, request)
            live = self._get(request.tree_id)
            with op:
                after, paths = self._fill(live, request.closure, op, permit)
                self._commit(after, op)
        return api.DevPathsReply(paths=paths, timings_ms=op.timings_ms)

    @handles(api.DevClosure)
    def closure(self, request: api.DevClosure, op: Transaction) -> api.DevPathsReply:
        """Say what paths need; nothing is made."""
        with op.step("closure", request.paths[0]):
            plans = plan_paths(request, self._guest, op.deadline)
        paths = tuple(
            api.DevPath(
                path=plan.path,
                state="planned" if plan.nodes else "skipped",
                nodes=tuple(node.report("planned") for node in plan.nodes),
            )
            for plan in plans
        )
        return api.DevPathsReply(paths=paths, timings_ms=op.timings_ms)

    @handles(api.DevRemove)
    def remove(self, request: api.DevRemove, op: Transaction) -> api.DevRemoveReply:
        """Take paths out with what no other path needs: all or nothing.

        Raises:
            CallError: ``not_found``, a path was not added; ``busy``, a process uses what is bound.
        """
        tree_id = request.tree_id
        with self._state.locks.hold([(PART, tree_id)], op.deadline):
            live = self._get(tree_id)
            paths = dict.fromkeys(map(normal_path, request.paths))
            for path in paths:
                if path not in live.needs and request.missing != "skip":
                    text = f"{path!r} was not added to private /dev {tree_id!r}"
                    raise CallError("not_found", text, object=path)
            after, doomed = live.without(paths)
            asked = frozenset().union(*(live.needs.get(path, ()) for path in paths))
            with op:
                self._begin(live, after.replace(pending=doomed), op)
                with live.open() as tree:
                    for node in reversed(doomed):
                        with op.step("remove", node.path):
                            is_removed = tree.remove(node)
                        if is_removed:
                            op.on_rollback(node.path, partial(_redo, live, Tree.make, node))
                self._commit(after, op)
        return api.DevRemoveReply(
            removed=tuple(node.path for node in doomed),
            kept=tuple(sorted(asked.intersection(after.nodes))),
            timings_ms=op.timings_ms,
        )

    @handles(api.DevList)
    def list(self, request: api.DevList, op: Transaction) -> api.DevListReply:
        """Describe all trees, or one with its nodes.

        Raises:
            CallError: ``not_found``.
        """
        tree_id, reports = request.tree_id, []
        for each in tuple(self._trees) if tree_id is None else (tree_id,):
            with self._state.locks.hold([(PART, each)], op.deadline):
                if tree_id is not None or each in self._trees:
                    reports.append(self._report(self._get(each), with_nodes=tree_id is not None))
        return api.DevListReply(trees=tuple(reports))

    @handles(api.DevAttach)
    def attach(self, request: api.DevAttach, op: Transaction) -> api.DevAttachReply:
        """Mount a copy of a tree on a directory, or say that it is there already.

        Raises:
            CallError: as ``Namespace`` and ``attach_copy``.
        """
        tree_id, target = request.tree_id, request.target
        where = api.DevAttachment(target=target, pid=request.pid, namespace=request.namespace)
        with self._state.locks.hold([(PART, tree_id)], op.deadline):
            self._state.gate.request(request.method, request)
            live = self._get(tree_id)
            others = (each for each in self._attached(live) if each != where)
            after = live.replace(attached=(*others, where))
            if request.pid is None and request.namespace is None:
                check_target(target, self._state.rules.scratch_roots)
                self._state.inventory.refuse_hiding(target)
            with op:
                with op.step("namespace", target, code="mount"):
                    namespace = Namespace(where)
                with namespace, live.open() as tree:
                    self._begin(live, after, op)
                    with op.step("attach", target, code="mount"):
                        mount_id, already = attach_copy(tree.fd, namespace, target, op.deadline)
                op.commit()
            self._trees[tree_id] = after
        return api.DevAttachReply(
            tree_id=tree_id,
            target=target,
            mount_id=mount_id,
            already=already,
            timings_ms=op.timings_ms,
        )

    @handles(api.DevDestroy)
    def destroy(self, request: api.DevDestroy, op: Transaction) -> Empty:
        """Take a tree away with its copies in the agent's own mount namespace. Idempotent.

        Raises:
            CallError: ``busy``, another mount namespace or a process has it, named in the hint.
        """
        tree_id = request.tree_id
        with self._state.locks.hold([(PART, tree_id)], op.deadline):
            live = self._trees.get(tree_id)
            if live is None:
                return Empty()
            with op:
                self._take_down(live, op)
                op.commit()
            del self._trees[tree_id]
            forget_entry(self._state, (PART, tree_id), _name(live), live.created)
        return Empty()

    def take_downs(self) -> Iterator[Callable[[Transaction], object]]:
        """Yield what destroys each tree."""
        return (partial(self.destroy, api.DevDestroy(tree_id=each)) for each in tuple(self._trees))

    # --- the steps

    def _mount(self, spec: api.DevCreate, op: Transaction, _permit: Allowed) -> LiveTree:
        state, tree_id, root = self._state, spec.tree_id, spec.mount_point
        owner, roots = (PART, tree_id), state.rules.scratch_roots
        allowed, created = claim_target(state, owner, root, roots, op, "root")
        live = LiveTree(spec=spec, created=created)
        begin_entry(state, owner, live, op)
        with op.step("target", root, code="mount"):
            target = TargetDirectory(root, root=allowed)
        with target:
            op.on_rollback("target directory", lambda: remove_directories(created))
            ids = spec.user_namespace
            options = (
                ("size", str(spec.size_bytes)),
                ("nr_inodes", str(2 * MAX_NODES)),
                ("mode", f"{spec.mode:o}"),
                ("uid", str(ids.uid if ids else 0)),
                ("gid", str(ids.gid if ids else 0)),
            )
            with op.step("mount", root, code="mount"):
                mount_filesystem(
                    source=self._source(tree_id),
                    target=target.fd,
                    filesystem="tmpfs",
                    flags=("nosuid",),
                    options=options,
                )
        op.on_rollback(f"mount at {root}", partial(self._undo_mounts, tree_id))
        dev, mount_id = syscalls.mount_of(root)
        live = live.replace(dev=dev, mount_id=mount_id)
        with op.step("share", root, code="mount"), live.open() as tree:
            # what is bound in it, and unmounted, is so in its copies
            flags = syscalls.AT_EMPTY_PATH
            syscalls.mount_setattr(tree.fd, "", flags, propagation=syscalls.MS_SHARED)
        return live

    def _fill(
        self, live: LiveTree, request: api.DevClosure, op: Transaction, permit: Allowed
    ) -> tuple[LiveTree, tuple[api.DevPath, ...]]:
        """Make what paths need; return the tree with it, not written yet, and what became of each
        path."""
        with op.step("closure", request.paths[0]):
            plans = plan_paths(request, self._guest, op.deadline, live.spec.user_namespace)
            plans = live.merged(plans)
            wanted = {node.path: node for plan in plans for node in plan.nodes}
            with live.open() as tree:
                fresh = tuple(
                    node
                    for node in wanted.values()
                    if node.path not in live.nodes
                    and node.way in _NODE_WAYS
                    and tree.state(node) == "missing"
                )
        if fresh:
            self._begin(live, live.replace(pending=fresh), op)
        nodes, needs, paths = dict(live.nodes), dict(live.needs), []
        for plan in plans:
            made = self._make(live, plan, nodes, request.missing, op, permit)
            if made is None or not plan.nodes:
                paths.append(api.DevPath(path=plan.path, state="skipped", nodes=()))
                continue
            nodes |= made
            needed = (node.path for node in plan.nodes if node.way in _NODE_WAYS)
            needs[plan.path] = tuple(needed)
            reports = (
                node.report("made" if node.path in made else "existed") for node in plan.nodes
            )
            state = "created" if made else "existed"
            paths.append(api.DevPath(path=plan.path, state=state, nodes=tuple(reports)))
        return live.replace(nodes=nodes, needs=needs), tuple(paths)

    def _make(
        self,
        live: LiveTree,
        plan: PathPlan,
        nodes: Mapping[str, Node],
        missing: str,
        op: Transaction,
        _permit: Allowed,
    ) -> dict[str, Node] | None:
        """Make what a path needs beyond ``nodes`` and return it; None where something of it has
        vanished meanwhile and may be ``missing``."""
        made: dict[str, Node] = {}
        own = op.child()
        with live.open() as tree:
            for node in plan.nodes:
                if node.path in nodes or node.way not in _NODE_WAYS:
                    continue
                try:
                    with op.step("make", node.path):
                        is_made = tree.make(node)
                except CallError as error:
                    op.adopt(own)
                    if error.code != "not_found" or missing != "skip":
                        raise
                    for unwanted in reversed(tuple(made.values())):
                        # a rollback does so once more, and finds nothing
                        with op.step("make", unwanted.path):
                            tree.remove(unwanted)
                    return None
                if is_made:
                    made[node.path] = node
                    own.on_rollback(node.path, partial(_redo, live, Tree.remove, node))
        op.adopt(own)
        return made

    def _take_down(self, live: LiveTree, op: Transaction) -> None:
        root = live.spec.mount_point
        with op.step("look", root):
            refuse_mounts_elsewhere(frozenset((live.dev,)), root, op)
            self._refuse_processes(live, op)
        self._begin(live, live.replace(whole=False), op)
        for where in reversed(live.attached):
            if _is_copy(where, live.dev):
                self._unmount(live.at(where.target), op)
                op.on_rollback(where.target, partial(self._attach_again, live, where))
        if any(mount.mount_id == live.mount_id for mount in mounts_of_dev(live.dev)):
            self._unmount(live, op)

    def _refuse_processes(self, live: LiveTree, op: Transaction) -> None:
        """What a process uses cannot be unmounted: to know it first leaves nothing to undo."""
        with op.deadline.part(_HOLDER_SECONDS) as limit:
            holders = find_holders(live.dev, limit, target=live.spec.mount_point)
        users = tuple(holder for holder in holders if holder.kind == "process")
        if users:
            raise busy_error(live.spec.mount_point, "", op, more=users)

    def _unmount(self, live: LiveTree, op: Transaction) -> None:
        """Unmount a tree, or a copy of it, with what is bound in it."""
        root = live.spec.mount_point
        own = op.child()
        try:
            with live.open() as tree:
                for node in reversed(tuple(live.nodes.values())):
                    if node.way == "bind":
                        with op.step("unmount", node.path, code="mount"):
                            tree.unbind(node)
                        own.on_rollback(node.path, partial(_redo, live, Tree.rebind, node))
            unmount_target(root, op, dev=live.dev)
        except BaseException:
            op.adopt(own)
            raise

    def _attach_again(self, live: LiveTree, where: api.DevAttachment) -> None:
        with (
            undo_deadline(self._state) as deadline,
            Namespace(where) as namespace,
            live.open() as tree,
        ):
            attach_copy(tree.fd, namespace, where.target, deadline)

    # --- journal and recovery

    def _write(self, live: LiveTree) -> None:
        self._state.journal.write_part(PART, live.spec.tree_id, live)

    def _begin(self, before: LiveTree, after: LiveTree, op: Transaction) -> None:
        """Write down what is about to be made, removed or attached."""
        with op.step("journal", before.spec.tree_id, code="resource"):
            self._write(after)
        op.on_rollback("journal entry", lambda: self._write(before), is_record=True)

    def _commit(self, after: LiveTree, op: Transaction) -> None:
        """Let a tree be from now on what a request has made of it."""
        with op.step("commit", after.spec.tree_id, code="resource"):
            self._write(after)
        op.commit()
        self._trees[after.spec.tree_id] = after

    def _recover(self, live: LiveTree) -> None:
        spec = live.spec
        mounts = [m for m in self._mounts(spec.tree_id) if m.target == spec.mount_point]
        if not live.whole or not mounts:
            self._undo(live)
            return
        live = live.replace(mount_id=mounts[0].mount_id)
        live = live.replace(attached=self._attached(live))
        adopt_target(self._state, (PART, spec.tree_id), spec.mount_point, live.created)
        self._trees[spec.tree_id] = live
        if live.pending:
            with live.open() as tree:
                for node in reversed(live.pending):
                    tree.remove(node)
            live = live.replace(pending=())
            self._write(live)
            self._trees[spec.tree_id] = live

    def _undo(self, live: LiveTree) -> None:
        """Take away what there is of a tree that is not whole, then its entry."""
        self._undo_mounts(live.spec.tree_id)
        remove_directories(live.created)
        self._state.journal.remove_part(PART, live.spec.tree_id)

    def _undo_mounts(self, tree_id: str) -> None:
        for mount in reversed(self._mounts(tree_id)):
            self._undo_mount(mount)

    def _undo_orphans(self) -> None:
        """Take away the trees that no entry tells of."""
        for mount in reversed(self._mounts("")):
            if mount.source.removeprefix(self._source("")) not in self._trees:
                self._undo_mount(mount)

    def _undo_mount(self, mount: Mount) -> None:
        """Unmount a tree, or a copy of it, and first what is mounted on it."""
        own = {mount.mount_id: mount}
        for each in read_mounts():
            if each.parent_id in own:
                own[each.mount_id] = each
        with undoing(self._state) as op:
            for each in reversed(own.values()):
                unmount_target(each.target, op, dev=each.dev)

    def _mounts(self, tree_id: str) -> tuple[Mount, ...]:
        """Return the mounts of a tree and its copies in the agent's mount namespace, those of all
        trees without an id."""
        own = self._source(tree_id)
        return tuple(
            mount
            for mount in read_mounts()
            if mount.filesystem == "tmpfs"
            and (mount.source == own or (not tree_id and mount.source.startswith(own)))
        )

    def _source(self, tree_id: str) -> str:
        """Return what mountinfo has as the source of a tree: by it the agent knows its own."""
        return f"{self._state.uuid_prefix}{PART}-{tree_id}"

    # --- look

    def _get(self, tree_id: str) -> LiveTree:
        live = self._trees.get(tree_id)
        if live is None:
            raise CallError("not_found", f"there is no private /dev {tree_id!r}", object=tree_id)
        return live

    def _attached(self, live: LiveTree) -> tuple[api.DevAttachment, ...]:
        """Return the attachments that are there still, as far as the kernel tells."""
        return tuple(
            where
            for where in live.attached
            if where.namespace is not None
            or _is_copy(where, live.dev)
            or (where.pid is not None and _has_mount(where.pid, live.dev))
        )

    def _report(self, live: LiveTree, *, with_nodes: bool = False) -> api.DevTree:
        spec = live.spec
        mount = find_mount(spec.mount_point)
        is_there = mount is not None and (mount.dev, mount.mount_id) == (live.dev, live.mount_id)
        nodes: list[api.DevNode] = []
        size_bytes = free_bytes = 0
        if is_there:
            with live.open() as tree:
                space = os.fstatvfs(tree.fd)
                size_bytes = space.f_frsize * space.f_blocks
                free_bytes = space.f_frsize * space.f_bavail
                if with_nodes:
                    needing = live.needing()
                    nodes += (
                        node.report(tree.state(node), tuple(needing.get(path, ())))
                        for path, node in live.nodes.items()
                    )
        return api.DevTree(
            tree_id=spec.tree_id,
            state="mounted" if is_there else "unmounted",
            root=spec.mount_point,
            dev=live.dev,
            mount_id=live.mount_id,
            size_bytes=size_bytes,
            free_bytes=free_bytes,
            mode=spec.mode,
            user_namespace=spec.user_namespace,
            paths=tuple(live.needs),
            nodes=tuple(nodes),
            attached=self._attached(live),
        )


def _name(live: LiveTree) -> str:
    return f"private /dev {live.spec.tree_id}"


def _redo(live: LiveTree, action: Callable[[Tree, Node], object], node: Node) -> None:
    """Do something to a node of a tree that is not open."""
    with live.open() as tree:
        action(tree, node)


def _is_copy(where: api.DevAttachment, dev: str) -> bool:
    """Return whether an attachment is there, in the agent's own mount namespace."""
    mount = find_mount(where.target) if where.pid is None and where.namespace is None else None
    return mount is not None and mount.dev == dev


def _has_mount(pid: int, dev: str) -> bool:
    try:
        return bool(mounts_of_dev(dev, f"/proc/{pid}/mountinfo"))
    except OSError:  # the process has ended
        return False
