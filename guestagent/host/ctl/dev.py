"""``guestctl dev``: private /dev trees for containers."""

from collections.abc import Callable, Iterable
from typing import TypedDict, TypeVar, Unpack

import click

from guestagent.api.devtree import (
    MISSING,
    PRESERVED,
    STRATEGIES,
    DevAdd,
    DevAttach,
    DevClosure,
    DevCreate,
    DevListReply,
    DevNode,
    DevPathsReply,
    DevRemove,
    DevTree,
    UserNamespace,
)
from guestagent.host.ctl.session import Session, pass_session
from guestagent.host.ctl.style import described, plain, spent, table

__all__ = ("dev",)

Command = TypeVar("Command", bound=Callable[..., object])
_NODE_HEADER = ("PATH", "KIND", "DEV", "WAY", "STATE", "MODE", "OWNER", "TARGET")


class PathWords(TypedDict):
    """What ``_path_options`` adds to a command."""

    paths: tuple[str, ...]
    missing: str
    strategy: str
    outside: tuple[str, ...]


_missing = click.option(
    "--missing",
    type=click.Choice(MISSING),
    default="fail",
    show_default=True,
    help="What becomes of a path that is not there.",
)


def _path_options(command: Command) -> Command:
    """Add the paths and how they are followed and made."""
    for option in (
        click.option(
            "--outside",
            multiple=True,
            metavar="DIRECTORY",
            help="A directory outside of /dev that a link may lead through; may be repeated.",
        ),
        click.option(
            "--strategy",
            type=click.Choice(STRATEGIES),
            default="auto",
            show_default=True,
            help="How device nodes are made; auto is mknod, and bind for a user namespace.",
        ),
        _missing,
        click.argument("paths", nargs=-1, required=True),
    ):
        command = option(command)
    return command


@click.group()
def dev() -> None:
    """Private /dev trees: what a container may see of the devices."""


@dev.command("create")
@click.argument("tree_id")
@click.option("--root", metavar="PATH", help="Default: /run/devtrees/TREE_ID.")
@click.option("--size", "size_bytes", type=int, default=64 * 1024, show_default=True)
@click.option("--mode", metavar="OCTAL", default="755", show_default=True)
@click.option("--preserve", multiple=True, type=click.Choice(PRESERVED))
@click.option(
    "--user-namespace",
    metavar="UID:GID[:SIZE]",
    help="The ids outside of the container's user namespace that its 0 and those after it are.",
)
@pass_session
def create(
    session: Session,
    tree_id: str,
    root: str | None,
    size_bytes: int,
    mode: str,
    preserve: tuple[str, ...],
    user_namespace: str | None,
) -> None:
    """Make an empty tree, with the directories of the guest's /dev to --preserve."""
    try:
        request = DevCreate(
            tree_id=tree_id,
            root=root,
            size_bytes=size_bytes,
            mode=int(mode, 8),
            preserve=preserve,
            user_namespace=None if user_namespace is None else _namespace(user_namespace),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with session.agent() as guest:
        tree = guest.dev_create(request)
    session.show(tree, lambda: _describe(tree))


def _namespace(text: str) -> UserNamespace:
    uid, gid, *size = (int(number) for number in text.split(":"))
    if not size:
        return UserNamespace(uid=uid, gid=gid)
    (number,) = size
    return UserNamespace(uid=uid, gid=gid, size=number)


@dev.command("add")
@click.argument("tree_id")
@_path_options
@pass_session
def add(session: Session, tree_id: str, **words: Unpack[PathWords]) -> None:
    """Add PATHS of the guest's /dev, with what they need: all or nothing."""
    try:
        request = DevAdd(tree_id=tree_id, **words)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with session.agent() as guest:
        reply = guest.dev_add(request)
    session.show(reply, lambda: _describe_paths(reply))


@dev.command("closure")
@_path_options
@pass_session
def closure(session: Session, **words: Unpack[PathWords]) -> None:
    """Print what PATHS of the guest's /dev need, without making anything."""
    try:
        request = DevClosure(**words)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with session.agent() as guest:
        reply = guest.dev_closure(request)
    session.show(reply, lambda: _describe_paths(reply))


@dev.command("remove")
@click.argument("tree_id")
@click.argument("paths", nargs=-1, required=True)
@_missing
@pass_session
def remove(session: Session, tree_id: str, paths: tuple[str, ...], missing: str) -> None:
    """Take PATHS out of a tree, with what no other path needs."""
    try:
        request = DevRemove(tree_id=tree_id, paths=paths, missing=missing)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with session.agent() as guest:
        reply = guest.dev_remove(request)
    lines = [
        *(f"removed {path}" for path in reply.removed),
        *(f"kept {path}, which other paths need" for path in reply.kept),
    ]
    session.show(reply, lambda: "\n".join(map(plain, lines)) or "nothing was to remove")


@dev.command("list")
@click.argument("tree_id", required=False)
@pass_session
def list_trees(session: Session, tree_id: str | None) -> None:
    """List the trees of a guest, or the files of one."""
    with session.agent() as guest:
        trees = guest.dev_list(tree_id)
    if tree_id is not None:
        session.show(DevListReply(trees=trees), lambda: "\n".join(map(_describe, trees)))
        return
    header = ("TREE", "STATE", "PATHS", "ATTACHED", "ROOT")
    rows = [
        (
            tree.tree_id,
            tree.state,
            str(len(tree.paths)),
            str(len(tree.attached)),
            tree.root,
        )
        for tree in trees
    ]
    session.show(DevListReply(trees=trees), lambda: table(header, rows))


@dev.command("attach")
@click.argument("tree_id")
@click.argument("target")
@click.option("--pid", type=int, help="A process of the container, whose root TARGET is in.")
@click.option("--namespace", metavar="PATH", help="A file that a mount namespace is bound to.")
@pass_session
def attach(
    session: Session, tree_id: str, target: str, pid: int | None, namespace: str | None
) -> None:
    """Mount a tree on the directory TARGET, mostly a container's /dev."""
    try:
        request = DevAttach(tree_id=tree_id, target=target, pid=pid, namespace=namespace)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with session.agent() as guest:
        reply = guest.dev_attach(request)
    already = ", as it was" if reply.already else ""
    text = f"{reply.tree_id} is at {reply.target} (mount {reply.mount_id}){already}"
    session.show(reply, lambda: plain(text))


@dev.command("destroy")
@click.argument("tree_id")
@pass_session
def destroy(session: Session, tree_id: str) -> None:
    """Take a tree away; busy while a container has it."""
    with session.agent() as guest:
        guest.dev_destroy(tree_id)
    session.say({"tree_id": tree_id}, plain(f"private /dev {tree_id} is gone"))


def _describe(tree: DevTree) -> str:
    facts = [
        ("root", f"{tree.root} (mount {tree.mount_id})"),
        ("bytes", f"{tree.free_bytes} of {tree.size_bytes} free"),
        ("paths", " ".join(tree.paths)),
    ]
    for where in tree.attached:
        place = where.namespace or (f"process {where.pid}" if where.pid else "the guest")
        facts.append(("attached", f"{where.target} in {place}"))
    head = described("private /dev", tree.tree_id, tree.state, facts)
    return f"{head}\n{table(_NODE_HEADER, _rows(tree.nodes))}" if tree.nodes else head


def _describe_paths(reply: DevPathsReply) -> str:
    lines = [plain(f"{path.path}: {path.state}") for path in reply.paths]
    nodes = {node.path: node for path in reply.paths for node in path.nodes}
    lines.append(table(_NODE_HEADER, _rows(nodes.values())))
    return "\n".join((*lines, plain(f"ms: {spent(reply.timings_ms)}")))


def _rows(nodes: Iterable[DevNode]) -> list[tuple[str, ...]]:
    return [
        (
            node.path,
            node.kind,
            node.rdev or "-",
            node.way,
            node.state,
            f"{node.mode:04o}",
            f"{node.uid}:{node.gid}",
            node.target or "-",
        )
        for node in nodes
    ]
