"""The house of docs/architecture.md, held by reading the code: rooms, arrows, circles, budgets."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("vsock", "guestagent", "rootfs")
#: Packages that hold rooms, and a version at most.
ROOTS = ("guestagent", "rootfs")

#: What would make the guest slow to start or large; late imports inside functions are not counted.
HEAVY = frozenset(
    [
        *("asyncio", "argparse", "click", "cryptography", "dataclasses", "enum", "hashlib"),
        *("inspect", "json", "logging", "pathlib", "pyroute2", "random", "re", "rich", "shutil"),
        *("ssl", "subprocess", "tempfile", "tenacity", "typing", "unittest", "urllib", "uuid"),
    ]
)
GUEST = ("vsock", "guestagent")
NOT_IN_THE_GUEST = (
    "vsock.protocol",
    "vsock.client",
    "vsock.aio",
    "vsock.device",
    "guestagent.host",
)
#: What the child imports that sets up the network, with pyroute2; the agent never does.
IN_A_CHILD = tuple(
    f"guestagent.net.{name}" for name in ("child", "configure", "changes", "rtnetlink", "messages")
)
#: Storage modules that other storage modules may import; each of the rest is usable alone.
SHARED_STORAGE = frozenset(
    [
        *("syscalls", "uevents", "mountinfo", "fscontext", "mount", "openat", "hashing"),
        *("blockdev", "filesystems", "verity"),
    ]
)


class Room(NamedTuple):
    """One row of the table of rooms: ``floor`` counts from the ground, ``imports`` name rooms."""

    name: str
    floor: int
    imports: tuple[str, ...]
    budget_lines: int


_ROW = re.compile(
    r"^\| `(?P<name>[\w.]+)` \| (?P<floor>\d+) \| (?P<imports>[^|]*) ?\| (?P<lines>[\d,]+) \|"
)
_ARCHITECTURE = (PROJECT / "docs/architecture.md").read_text()


def _rooms() -> dict[str, Room]:
    found = {}
    for line in _ARCHITECTURE.splitlines():
        if row := _ROW.match(line):
            imports = tuple(re.findall(r"`([\w.]+)`", row["imports"]))
            budget_lines = int(row["lines"].replace(",", ""))
            found[row["name"]] = Room(row["name"], int(row["floor"]), imports, budget_lines)
    return found


ROOMS = _rooms()


def _modules() -> dict[str, Path]:
    paths = (path for package in PACKAGES for path in sorted((PROJECT / package).rglob("*.py")))
    return {
        ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


MODULES = _modules()


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _imports(tree: ast.AST, *, late: bool) -> Iterator[str]:
    """Yield the imported names, ``a.b`` for ``from a import b``.

    With ``late``, imports inside functions and for the type checker are yielded too.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where an arrow goes"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif late or not (
            _is_type_checking(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ):
            yield from _imports(node, late=late)


def _module_of(name: str) -> str | None:
    """Return the module of ours that an imported name lies in."""
    if name.split(".")[0] not in PACKAGES:
        return None
    return name if name in MODULES else name.rpartition(".")[0]


def _targets(module: str) -> set[str]:
    found = (_module_of(name) for name in _imports(_tree(module), late=True))
    return {target for target in found if target is not None} - {module}


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _drawn(room: Room, target: str) -> str | None:
    """Return the entry of the room's row that allows an import."""
    there = _room_of(target)
    names = [n for n in room.imports if _within(target, (n,)) and _room_of(n) == there]
    return max(names, key=len, default=None)


def _room_of(module: str) -> Room:
    names = [name for name in ROOMS if _within(module, (name,))]
    assert names, f"{module} is in no room of docs/architecture.md"
    return ROOMS[max(names, key=len)]


def _arrows() -> Iterator[tuple[Room, str, str]]:
    """Yield the imports that leave a room: room, module, imported module."""
    for module in MODULES:
        if module in ROOTS:
            continue
        room = _room_of(module)
        for target in _targets(module):
            if target not in ROOTS and _room_of(target) != room:
                yield room, module, target


def test_imports_go_where_the_table_allows() -> None:
    wrong = [
        f"{module} imports {target}"
        for room, module, target in _arrows()
        if _drawn(room, target) is None
    ]
    assert wrong == []


def test_table_allows_no_import_that_no_module_makes() -> None:
    made = {(room.name, _drawn(room, target)) for room, _, target in _arrows()}
    assert {(room.name, name) for room in ROOMS.values() for name in room.imports} - made == set()


def test_imports_go_down() -> None:
    upward = [
        (room.name, name)
        for room in ROOMS.values()
        for name in room.imports
        if _room_of(name).floor >= room.floor
    ]
    assert upward == []


def _circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of nodes that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        pending = [start]
        while pending:
            new = graph.get(pending.pop(), set()) - seen
            seen |= new
            pending += new
        reach[start] = seen
    groups = ({other for other in reach[node] if node in reach.get(other, ())} for node in graph)
    return [group for group in {frozenset(group) for group in groups if group} if len(group) > 1]


def test_modules_form_no_circle() -> None:
    """Late imports and those for the type checker count: they hide a missing third module."""
    assert _circles({module: _targets(module) for module in MODULES}) == []


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
def test_room_keeps_its_budget_of_lines(room: Room) -> None:
    lines = sum(
        path.read_text().count("\n")
        for module, path in MODULES.items()
        if module not in ROOTS and _room_of(module) == room
    )
    assert lines <= room.budget_lines


def test_reading_order_is_short() -> None:
    """The mount path can be read in an afternoon: at most 15 files and 4,500 lines."""
    section = _ARCHITECTURE.partition("## Reading order")[2].partition("\n## ")[0]
    files = re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.M)
    assert 5 <= len(files) <= 15
    assert sum((PROJECT / file).read_text().count("\n") for file in files) <= 4500


def _heavy(tree: ast.Module) -> list[str]:
    return [name for name in _imports(tree, late=False) if name.split(".")[0] in HEAVY]


def test_guest_imports_nothing_heavy() -> None:
    guest = [name for name in MODULES if _within(name, GUEST) and name not in IN_A_CHILD]
    found = {name: _heavy(_tree(name)) for name in guest if not _within(name, NOT_IN_THE_GUEST)}
    assert {name: heavy for name, heavy in found.items() if heavy} == {}


def test_agent_does_not_import_what_is_for_a_child() -> None:
    importers = {
        module
        for module in MODULES
        for target in _targets(module)
        if target in IN_A_CHILD or target.split(".")[0] == "pyroute2"
    }
    assert importers <= set(IN_A_CHILD)
    assert not any(
        name.split(".")[0] == "pyroute2"
        for module in MODULES
        if module not in IN_A_CHILD
        for name in _imports(_tree(module), late=True)
    )


def test_storage_modules_do_not_import_their_siblings() -> None:
    wrong = [
        f"{module} imports {target}"
        for module in MODULES
        for target in _targets(module)
        if _within(module, ("guestagent.storage",)) and _within(target, ("guestagent.storage",))
        if target.split(".")[2:3] not in ([], module.split(".")[2:3])
        if target.split(".")[2] not in SHARED_STORAGE
    ]
    assert wrong == []


def _calls(tree: ast.AST) -> Iterator[str]:
    """Yield the names of what is called, those in a module or an object with its name."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            yield f"{node.func.value.id}.{node.func.attr}"


def _starts_another_way(tree: ast.Module) -> bool:
    calls = set(_calls(tree))
    return "threading.Thread" in calls and "start_thread" not in calls


def test_threads_are_started_in_one_way() -> None:
    """A thread that does not leave signals to the main thread could swallow them."""
    others = [name for name in MODULES if name != "vsock.threads"]
    assert [name for name in others if _starts_another_way(_tree(name))] == []


def test_these_checks_see_what_they_must() -> None:
    tree = ast.parse(
        "def f():\n    from rootfs.pack import Pack\nimport json\n"
        "if TYPE_CHECKING:\n    from vsock.log import Log\n"
    )
    assert list(_imports(tree, late=True)) == ["rootfs.pack.Pack", "json", "vsock.log.Log"]
    assert list(_imports(tree, late=False)) == ["json"]
    assert _heavy(tree) == ["json"]
    assert _drawn(ROOMS["guestagent.engine"], "guestagent.storage.mount") == "guestagent.storage"
    assert _drawn(ROOMS["guestagent.engine"], "rootfs.pack.pack") is None
    assert _drawn(ROOMS["guestagent.console"], "guestagent.storage.mount") is None
    assert _drawn(ROOMS["rootfs.machine"], "guestagent.host.ctl.main") is None
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]
    tree = ast.parse("start_thread(threading.Thread(target=print))\nself.a.b()\n")
    assert set(_calls(tree)) == {"start_thread", "threading.Thread"}
    assert not _starts_another_way(tree)
    assert _starts_another_way(ast.parse("threading.Thread(target=print).start()"))
