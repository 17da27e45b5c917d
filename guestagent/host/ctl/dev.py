"""``guestctl dev``: private /dev trees for containers."""

from collections.abc import Iterable

import click

from guestagent.api import devtree as api
from guestagent.host.ctl.session import Session, pass_session, with_options, wrong_usage
from guestagent.host.ctl.style import described, plain, spent, table

__all__ = ("dev",)

_NODE_HEADER = ("PATH", "KIND", "DEV", "WAY", "STATE", "MODE", "OWNER", "TARGET")


_missing = click.option(
    "--missing",
    type=click.Choice(api.MISSING),
    default="fail",
    show_default=True,
    help="What becomes of a path that is not there.",
)


_path_options = with_options(
    click.argument("paths", nargs=-1, required=True),
    _missing,
    click.option(
        "--strategy",
        type=click.Choice(api.STRATEGIES),
        default="auto",
        show_default=True,
        help="How device nodes are made; auto is mknod, and bind for a user namespace.",
    ),
    click.option(
        "--outside",
        multiple=True,
        metavar="DIRECTORY",
        help="A directory outside of /dev that a link may lead through; may be repeated.",
    ),
)


@click.group()
def dev() -> None:
    """Private /dev trees: what a container may see of the devices."""


@dev.command("create")
@click.argument("tree_id")
@click.option("--root", metavar="PATH", help="Default: /run/devtrees/TREE_ID.")
@click.option("--size", "size_bytes", type=int, default=64 * 1024, show_default=True)
@click.option("--mode", metavar="OCTAL", default="755", show_default=True)
@click.option("--preserve", multiple=True, type=click.Choice(api.PRESERVED))
@click.option(
    "--user-namespace",
    metavar="UID:GID[:SIZE]",
    help="The ids outside of the container's user namespace that its 0 and those after it are.",
)
@pass_session
def create(session: Session, /, mode: str, user_namespace: str | None, **fields: object) -> None:
    """Make an empty tree, with the directories of the guest's /dev to --preserve."""
    with wrong_usage():
        ids = None if user_namespace is None else _namespace(user_namespace)
        mode_bits = int(mode, 8)
    session.tell(api.DevCreate, _describe, mode=mode_bits, user_namespace=ids, **fields)


def _namespace(text: str) -> api.UserNamespace:
    uid, gid, *size = (int(number) for number in text.split(":"))
    if not size:
        return api.UserNamespace(uid=uid, gid=gid)
    (number,) = size
    return api.UserNamespace(uid=uid, gid=gid, size=number)


@dev.command("add")
@click.argument("tree_id")
@_path_options
@pass_session
def add(session: Session, /, **fields: object) -> None:
    """Add PATHS of the guest's /dev, with what they need: all or nothing."""
    session.tell(api.DevAdd, _describe_paths, **fields)


@dev.command("closure")
@_path_options
@pass_session
def closure(session: Session, /, **fields: object) -> None:
    """Print what PATHS of the guest's /dev need, without making anything."""
    session.tell(api.DevClosure, _describe_paths, **fields)


@dev.command("remove")
@click.argument("tree_id")
@click.argument("paths", nargs=-1, required=True)
@_missing
@pass_session
def remove(session: Session, /, **fields: object) -> None:
    """Take PATHS out of a tree, with what no other path needs."""
    reply = session.ask(api.DevRemove, **fields)
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
    reply = session.ask(api.DevList, tree_id=tree_id)
    if tree_id is not None:
        session.show(reply, lambda: "\n".join(map(_describe, reply.trees)))
        return
    header = ("TREE", "STATE", "PATHS", "ATTACHED", "ROOT")
    rows = [
        (tree.tree_id, tree.state, str(len(tree.paths)), str(len(tree.attached)), tree.root)
        for tree in reply.trees
    ]
    session.show(reply, lambda: table(header, rows))


@dev.command("attach")
@click.argument("tree_id")
@click.argument("target")
@click.option("--pid", type=int, help="A process of the container, whose root TARGET is in.")
@click.option("--namespace", metavar="PATH", help="A file that a mount namespace is bound to.")
@pass_session
def attach(session: Session, /, **fields: object) -> None:
    """Mount a tree on the directory TARGET, mostly a container's /dev."""
    reply = session.ask(api.DevAttach, **fields)
    already = ", as it was" if reply.already else ""
    text = f"{reply.tree_id} is at {reply.target} (mount {reply.mount_id}){already}"
    session.show(reply, lambda: plain(text))


@dev.command("destroy")
@click.argument("tree_id")
@pass_session
def destroy(session: Session, tree_id: str) -> None:
    """Take a tree away; busy while a container has it."""
    session.ask(api.DevDestroy, tree_id=tree_id)
    session.say({"tree_id": tree_id}, plain(f"private /dev {tree_id} is gone"))


def _describe(tree: api.DevTree) -> str:
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


def _describe_paths(reply: api.DevPathsReply) -> str:
    lines = [plain(f"{path.path}: {path.state}") for path in reply.paths]
    nodes = {node.path: node for path in reply.paths for node in path.nodes}
    lines.append(table(_NODE_HEADER, _rows(nodes.values())))
    return "\n".join((*lines, plain(f"ms: {spent(reply.timings_ms)}")))


def _rows(nodes: Iterable[api.DevNode]) -> list[tuple[str, ...]]:
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
