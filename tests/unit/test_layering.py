"""An import only ever goes down: the floors of docs/architecture.md, held by reading the code."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

#: Room -> what of ours it may import; the longest prefix of a module's name counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "vsock": ("vsock",),
    "guestagent": (),  # the package itself: its version only
    "guestagent.api": ("vsock.errors", "vsock.record", "guestagent.api"),
    "guestagent.storage": ("vsock", "guestagent.api", "guestagent.storage"),
    "guestagent.engine": (
        "vsock",
        "guestagent.api",
        "guestagent.storage",
        "guestagent.engine",
    ),
    "guestagent.host.client": ("vsock", "guestagent.api", "guestagent.host.client"),
    "guestagent.host": ("vsock", "guestagent.api", "guestagent.host"),
    "rootfs": (
        "vsock",
        "rootfs",
        "guestagent.api",
        "guestagent.host",
        "guestagent.storage.filesystems",
        "guestagent.storage.verity",
    ),
}
MAY_IMPORT["guestagent.inspect"] = (*MAY_IMPORT["guestagent.engine"], "guestagent.inspect")
#: The top floor of the guest: may import every room of the guest, nothing of the host's.
_GUEST_ROOMS = ("api", "storage", "inspect", "engine", "service", "observe", "console", "boot")
_TOP = (
    "vsock",
    *(f"guestagent.{name}" for name in (*_GUEST_ROOMS, "agent", "config", "listeners")),
)
for name in ("service", "observe", "boot", "agent", "config", "listeners", "__main__"):
    MAY_IMPORT[f"guestagent.{name}"] = _TOP
#: A client of the service, which is handed to it.
MAY_IMPORT["guestagent.console"] = (
    "vsock",
    "guestagent.api",
    "guestagent.console",
    "guestagent.listeners",
)
#: A program of its own, which becomes the shell of a mounted root.
MAY_IMPORT["guestagent.console.chroot"] = ("vsock", "guestagent.storage.syscalls")

#: What would make the guest slow to start or large; late imports inside functions are not counted.
HEAVY = frozenset(
    [
        "asyncio",
        "argparse",
        "click",
        "cryptography",
        "dataclasses",
        "enum",
        "hashlib",
        "inspect",
        "json",
        "logging",
        "pathlib",
        "pyroute2",
        "random",
        "re",
        "rich",
        "shutil",
        "ssl",
        "subprocess",
        "tempfile",
        "tenacity",
        "typing",
        "unittest",
        "urllib",
        "uuid",
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


def _modules() -> Iterator[tuple[str, Path]]:
    for package in ("vsock", "guestagent", "rootfs"):
        for path in sorted((PROJECT / package).rglob("*.py")):
            name = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _imports(tree: ast.AST, *, late: bool) -> Iterator[str]:
    """Yield the names of imported modules; ``from a import b`` yields both a and a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where an arrow goes"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif _is_type_checking(node):
            continue
        elif late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports(node, late=late)


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _allowed(module: str) -> tuple[str, ...]:
    names = [name for name in MAY_IMPORT if _within(module, (name,))]
    return MAY_IMPORT[max(names, key=len)]


MODULES = dict(_modules())


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def _wrong_ways(module: str, tree: ast.Module) -> Iterator[str]:
    allowed = _allowed(module)
    for name in _imports(tree, late=True):
        if not _within(name, ("vsock", "guestagent", "rootfs")):
            continue
        # "from guestagent import __version__" names an attribute, not a module
        target = name if name in MODULES else name.rpartition(".")[0]
        if target != "guestagent" and not _within(target, allowed):
            yield f"{module} must not import {name}"


# one test for all modules, because a test of each would cost more than its look at the tree


def test_imports_go_down_only() -> None:
    assert [text for module in MODULES for text in _wrong_ways(module, _tree(module))] == []


def _heavy(tree: ast.Module) -> list[str]:
    return [name for name in _imports(tree, late=False) if name.split(".")[0] in HEAVY]


def test_the_guest_imports_nothing_heavy() -> None:
    guest = [name for name in MODULES if _within(name, GUEST)]
    found = {name: _heavy(_tree(name)) for name in guest if not _within(name, NOT_IN_THE_GUEST)}
    assert {name: heavy for name, heavy in found.items() if heavy} == {}


def test_storage_modules_do_not_import_their_siblings() -> None:
    """Each storage module is usable alone; what they share is named here."""
    shared = {
        "syscalls", "uevents", "mountinfo", "fscontext", "mount", "openat", "openonce", "hashing",
        "blockdev", "filesystems", "verity",
    }  # fmt: skip
    for module in MODULES:
        parts = module.split(".")
        if parts[:2] != ["guestagent", "storage"] or len(parts) < 3:
            continue
        for name in _imports(_tree(module), late=True):
            other = name.split(".")
            if other[:2] != ["guestagent", "storage"] or len(other) < 3 or name not in MODULES:
                continue
            assert other[2] == parts[2] or other[2] in shared, f"{module} imports {name}"


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
    """One that does not leave signals to the main thread could swallow them."""
    others = [name for name in MODULES if name != "vsock.threads"]
    assert [name for name in others if _starts_another_way(_tree(name))] == []


def test_this_test_sees_what_it_must() -> None:
    """The checks above would notice: a planted import is reported."""
    tree = ast.parse("def f():\n    from rootfs.pack.pack import Pack\nimport json\n")
    assert list(_imports(tree, late=True)) == ["rootfs.pack.pack", "rootfs.pack.pack.Pack", "json"]
    assert list(_imports(tree, late=False)) == ["json"]
    assert list(_wrong_ways("guestagent.engine.layers", tree)) == [
        "guestagent.engine.layers must not import rootfs.pack.pack",
        "guestagent.engine.layers must not import rootfs.pack.pack.Pack",
    ]
    assert list(_wrong_ways("rootfs.cli.pack", tree)) == []
    assert _heavy(tree) == ["json"]
    tree = ast.parse("start_thread(threading.Thread(target=print))\nself.a.b()\n")
    assert set(_calls(tree)) == {"start_thread", "threading.Thread"}
    assert not _starts_another_way(tree)
    assert _starts_another_way(ast.parse("threading.Thread(target=print).start()"))
