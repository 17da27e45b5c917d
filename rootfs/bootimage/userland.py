"""The files that Python code takes to run in a guest: interpreter, shared libraries, modules; and
the programs of features.

They are found, not listed: modules by ``rootfs.bootimage.closure``, libraries by
``rootfs.bootimage.elf``. The boot image holds them, and so do images that distributions make with
our hooks in them.
"""

import contextlib
import importlib.util
import marshal
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rootfs.bootimage.closure import Module, interpreter_path, module_closure, site_packages
from rootfs.bootimage.elf import ElfError, library_closure, without_debug_information
from rootfs.bootimage.places import PROJECT

__all__ = (
    "PYTHON_DIR",
    "Item",
    "compile_module",
    "userland",
)

#: Our packages that the guest may hold; a test keeps the guest's imports within them.
_GUEST_PACKAGES = ("vsock", "guestagent")
#: Of the packages that the guest imports late, those that it has: for dialling a host, again and
#: again (vsock.retry).
_LATE_PACKAGES = ("tenacity",)
PYTHON_DIR = f"usr/lib/python{sys.version_info.major}.{sys.version_info.minor}"
#: hashlib does without OpenSSL: the interpreter has the same functions built in, and the library
#: would be a quarter of the image.
_ABSENT = ("_hashlib",)
#: Where programs are looked for, whatever PATH this user has.
_PROGRAM_PLACES = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
_UNCHECKED_HASH = 0b01  # PEP 552: with a hash of the source that is not compared
# Later versions of the format mark objects by their reference counts, which differ from one
# compilation to the next. This version has no marks; its files are a fifth larger.
_MARSHAL_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One file before it is built: ``build`` makes its bytes from ``source``. ``path`` has no /."""

    path: str
    part: str
    source: bytes | Path
    build: Callable[[bytes], bytes] = bytes
    permissions: int = 0o644

    def read(self) -> bytes:
        return self.source.read_bytes() if isinstance(self.source, Path) else self.source


def userland(
    entry_module: str,
    *,
    entries: tuple[str, ...] = (),
    imports: tuple[str, ...] = (),
    programs: tuple[str, ...] = (),
    project: Path = PROJECT,
    optimize: int = 2,
) -> tuple[tuple[Module, ...], list[Item]]:
    """Return the Python modules that running ``entry_module`` and ``entries`` takes, and all files
    for them: the interpreter, its libraries and the modules; and ``programs`` of this machine, by
    name.

    Raises:
        ClosureError, ElfError: something needed is not there.
    """
    modules = module_closure(
        [entry_module, *entries],
        project=project,
        packages=(*_GUEST_PACKAGES, entry_module.partition(".")[0]),
        late=_LATE_PACKAGES,
        extra=imports,
        search=[site_packages()],
        absent=_ABSENT,
    )
    files = {name: _find_program(name) for name in programs}
    return modules, [*_binary_items(modules, files), *_python_items(modules, optimize)]


def _binary_items(modules: tuple[Module, ...], programs: dict[str, Path]) -> Iterator[Item]:
    """Yield the interpreter, the programs by name, and the libraries of all."""
    interpreter = interpreter_path()
    yield _binary("usr/bin/python3", "interpreter", interpreter)
    for name, path in programs.items():
        yield _binary(f"usr/sbin/{name}", "programs", path)
    extensions = (module.path for module in modules if module.is_extension)
    for library in library_closure((interpreter, *extensions, *programs.values())):
        yield _binary(_library_path(library), "shared libraries", library)


def _binary(path: str, part: str, source: Path) -> Item:
    build = without_debug_information
    return Item(path=path, part=part, source=source, build=build, permissions=0o755)


def _find_program(name: str) -> Path:
    """Return the file of a program; a link to it may have the name, by which it knows its job."""
    for directory in _PROGRAM_PLACES:
        if os.access(f"{directory}/{name}", os.X_OK):
            return Path(directory, name).resolve()
    raise ElfError(f"no program {name!r} in {', '.join(_PROGRAM_PLACES)}: is it installed?")


def _library_path(library: Path) -> str:
    """Return where a library goes: those bundled with a package keep their place beside it."""
    with contextlib.suppress(ValueError):
        return f"{PYTHON_DIR}/{library.relative_to(site_packages())}"
    return str(library).lstrip("/")


def _python_items(modules: tuple[Module, ...], optimize: int) -> Iterator[Item]:
    for module in modules:
        base = module.name.replace(".", "/")
        own = module.name.partition(".")[0] in _GUEST_PACKAGES
        top = module.name.partition(".")[0]
        standard = top in sys.stdlib_module_names
        part = "agent" if own else "standard library" if standard else f"package {top}"
        if module.is_extension:
            path = f"{PYTHON_DIR}/{base.rpartition('/')[0]}/{module.path.name}".replace("//", "/")
            yield Item(path=path, part=part, source=module.path, build=without_debug_information)
            continue
        inner = f"{base}/__init__.py" if module.package else f"{base}.py"
        yield Item(
            path=f"{PYTHON_DIR}/{inner}c",
            part=part,
            source=module.path,
            build=lambda source, name=inner: compile_module(source, name, optimize),  # type: ignore[misc]
        )


def compile_module(source: bytes, name: str, optimize: int) -> bytes:
    """Return the contents of a .pyc file for ``source``; ``name`` is the path in tracebacks.

    Raises:
        SyntaxError: the source is no Python of this version.
    """
    code = compile(source, name, "exec", dont_inherit=True, optimize=optimize)
    header = struct.pack("<I", _UNCHECKED_HASH) + importlib.util.source_hash(source)
    return importlib.util.MAGIC_NUMBER + header + marshal.dumps(code, _MARSHAL_VERSION)
