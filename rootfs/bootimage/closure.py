"""Which Python modules a program needs, so that an image holds these and no others.

Two questions, two ways. Our own packages are read (their syntax trees), because they import some
modules late, inside the functions that need them. Everything that they import is then really
imported, in a clean interpreter, because only that shows what a library pulls in.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ("ClosureError", "Module", "interpreter_path", "module_closure", "site_packages")

#: Modules of the standard library that the interpreter itself may ask for at any time.
_ALWAYS = ("encodings.utf_8", "encodings.ascii", "encodings.latin_1", "os", "zipimport")

# Imports nothing for itself: whatever it loaded would count as needed.
_PROBE = """\
import sys
paths, certain, possible, absent = (text.split("\\n") if text else [] for text in sys.argv[1:5])
sys.path += paths
sys.modules.update(dict.fromkeys(absent))
for name in certain:
    __import__(name)
for name in possible:
    try:
        __import__(name)
    except ModuleNotFoundError as problem:
        if problem.name != name:
            raise
for name, module in sorted(sys.modules.items()):
    spec = getattr(module, "__spec__", None)
    if name != "__main__" and spec is not None and spec.origin not in ("built-in", "frozen"):
        file = getattr(module, "__file__", None)
        print(repr((spec.name, file, spec.submodule_search_locations is not None)))
"""


class ClosureError(Exception):
    """A module cannot be found or imported; the message has what the interpreter said."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Module:
    """One module and its file: a .py or an extension; ``package`` when it has submodules."""

    name: str
    path: Path
    package: bool

    @property
    def is_extension(self) -> bool:
        return self.path.suffix == ".so"


def interpreter_path() -> Path:
    """Return the real interpreter behind this process, not the link in a virtual environment."""
    return Path(os.path.realpath(sys.executable))


def site_packages() -> Path:
    """Return where this environment keeps the packages that were installed into it."""
    import msgpack

    return Path(msgpack.__file__).parent.parent


def module_closure(
    entries: Iterable[str],
    *,
    project: Path,
    packages: Iterable[str],
    late: Iterable[str],
    search: Iterable[Path],
    extra: Iterable[str] = (),
    absent: Iterable[str] = (),
) -> tuple[Module, ...]:
    """Return the modules that running ``entries`` may load, sorted by name.

    ``entries`` are names of modules below ``project``; ``packages`` the top-level packages there
    that are read for late imports. Of the third-party packages that are imported late, only those
    in ``late`` are taken. ``search`` are the directories where installed packages are, ``extra``
    further modules to take, ``absent`` those that are left out though something tries them.

    Raises:
        ClosureError: a module is missing or fails to import.
    """
    walk = _Walk(project, frozenset(packages))
    for entry in entries:
        walk.visit(entry)
    third_party = frozenset(late)
    certain: set[str] = {*walk.own, *extra, *_ALWAYS}
    possible: set[str] = set()
    for imported in walk.outside:
        top = imported.name.partition(".")[0]
        if imported.late and top not in third_party and top not in sys.stdlib_module_names:
            continue
        (certain if imported.certain else possible).add(imported.name)
    return tuple(sorted(_load(certain, possible, absent, [project, *search])))


@dataclass(frozen=True, slots=True)
class _Import:
    """A name that is imported. ``certain``: it is a module, and not perhaps a name inside one."""

    name: str
    late: bool
    certain: bool


class _Walk:
    """Follows imports through our own packages."""

    def __init__(self, project: Path, packages: frozenset[str]) -> None:
        self._project = project
        self._packages = packages
        self.own: dict[str, Path] = {}
        self.outside: set[_Import] = set()

    def visit(self, name: str) -> None:
        path = self._find(name)
        if path is None:
            raise ClosureError(f"no module {name!r} below {self._project}")
        self._add(name, path)

    def _add(self, name: str, path: Path) -> None:
        if name in self.own:
            return
        self.own[name] = path
        if "." in name:  # importing a module imports its packages
            self.visit(name.rpartition(".")[0])
        is_package = path.name == "__init__.py"
        tree = ast.parse(path.read_bytes(), str(path))
        for imported in _imports(tree.body, name if is_package else name.rpartition(".")[0]):
            self._follow(imported)

    def _follow(self, imported: _Import) -> None:
        if imported.name.partition(".")[0] not in self._packages:
            self.outside.add(imported)
            return
        path = self._find(imported.name)
        if path is not None:
            self._add(imported.name, path)
        elif imported.certain:
            raise ClosureError(f"no module {imported.name!r} below {self._project}")

    def _find(self, name: str) -> Path | None:
        base = self._project.joinpath(*name.split("."))
        for path in (base / "__init__.py", base.with_name(base.name + ".py")):
            if path.is_file():
                return path
        return None


def _imports(body: Iterable[ast.AST], package: str, *, late: bool = False) -> Iterator[_Import]:
    """Yield each import that can run in the guest."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (_Import(alias.name, late, True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, package)
            yield _Import(base, late, True)
            yield from (_Import(f"{base}.{a.name}", late, False) for a in node.names)
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            yield from _imports(node.orelse, package, late=late)
        else:
            inside = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from _imports(ast.iter_child_nodes(node), package, late=inside)


def _base(node: ast.ImportFrom, package: str) -> str:
    """Return the absolute name of the module after ``from``."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _load(
    certain: set[str], possible: set[str], absent: Iterable[str], search: list[Path]
) -> Iterator[Module]:
    """Import the names in a clean interpreter; yield every module with a file that this loads."""
    argv = [str(interpreter_path()), "-I", "-S", "-B", "-c", _PROBE]
    argv += ["\n".join(str(path) for path in search)]
    argv += ["\n".join(sorted(names)) for names in (certain, possible, absent)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    if result.returncode:
        raise ClosureError(f"the interpreter cannot import its modules:\n{result.stderr}")
    for line in result.stdout.splitlines():
        name, file, package = ast.literal_eval(line)
        if file:  # a namespace package has none
            yield Module(name=name, path=Path(file), package=package)
