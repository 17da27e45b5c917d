"""A kernel on the build machine: its image, and which module files a feature needs.

The index files are those of ``depmod`` (modules.dep(5)): ``modules.dep`` names hard dependencies,
``modules.softdep`` modules to be loaded before or after another, ``modules.builtin`` modules that
need no file, ``modules.alias`` other names, such as ``crypto-sha256``.
"""

import fnmatch
import gzip
import lzma
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rootfs.bootimage.places import IS_CHECKOUT

__all__ = (
    "MODULE_PLACES",
    "Kernel",
    "KernelNotFoundError",
    "ModuleIndex",
    "ModuleNotFoundInKernelError",
    "cached_kernel",
    "module_bytes",
    "module_name",
    "open_kernel",
    "without_signature",
)

#: Where a tree has its modules. Debian before 13 has the second only, and elsewhere one is a link.
MODULE_PLACES = ("usr/lib/modules", "lib/modules")
_SUFFIXES = (".ko", ".ko.gz", ".ko.xz", ".ko.zst")
#: A signed module file ends with its signature, a struct module_signature (12 bytes, of which the
#: last four are the length of the signature, big-endian) and a marker.
#: Source: include/linux/module_signature.h.
_SIGNATURE_MARKER = b"~Module signature appended~\n"
_SIGNATURE_TRAILER = struct.Struct(">8xI")


class KernelNotFoundError(Exception):
    """No kernel where one was looked for; the message says where and what to do."""


class ModuleNotFoundInKernelError(Exception):
    """A module is neither a file of this kernel nor built into it."""

    def __init__(self, name: str, modules_dir: Path) -> None:
        super().__init__(f"no module {name!r} in {modules_dir}, and it is not built in")
        self.name = name


def module_name(path: str) -> str:
    """Return the kernel's own name of a module file: ``a/dm-mod.ko.xz`` -> ``dm_mod``."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def module_bytes(path: Path) -> bytes:
    """Return the plain ELF image of a module file, whatever it is compressed with.

    Raises:
        OSError: the file cannot be read.
        subprocess.CalledProcessError: ``zstd`` refused the file.
    """
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        return gzip.decompress(data)
    if path.name.endswith(".xz"):
        return lzma.decompress(data)
    if path.name.endswith(".zst"):
        return subprocess.run(["zstd", "-dcq"], input=data, stdout=-1, check=True).stdout
    return data


def without_signature(module: bytes) -> bytes:
    """Return a module without its signature; a module that has none is returned unchanged.

    Raises:
        ValueError: the signature would be longer than the file.
    """
    if not module.endswith(_SIGNATURE_MARKER):
        return module
    end = len(module) - len(_SIGNATURE_MARKER) - _SIGNATURE_TRAILER.size
    if end < 0:
        raise ValueError("a module that is shorter than the trailer of its signature")
    (size_bytes,) = _SIGNATURE_TRAILER.unpack_from(module, end)
    if size_bytes > end:
        raise ValueError(f"a module of {len(module)} bytes with a signature of {size_bytes}")
    return module[: end - size_bytes]


@dataclass(frozen=True, kw_only=True)
class ModuleIndex:
    """What depmod knows about one directory of modules. Each file is read when it is needed."""

    modules_dir: Path

    @cached_property
    def _files(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Module name -> (path below modules_dir, names of its direct and indirect needs)."""
        files: dict[str, tuple[str, tuple[str, ...]]] = {}
        for line in self._lines("modules.dep"):
            path, colon, needs = line.partition(":")
            if colon and path.endswith(_SUFFIXES):
                files[module_name(path)] = (path, tuple(map(module_name, needs.split())))
        return files

    @cached_property
    def _builtin(self) -> frozenset[str]:
        return frozenset(module_name(line) for line in self._lines("modules.builtin"))

    @cached_property
    def _softdeps(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Module name -> (names to load before it, names to load after it)."""
        found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        for line in self._lines("modules.softdep"):
            word, _, rest = line.partition(" ")
            name, _, needs = rest.partition(" ")
            if word == "softdep":
                pre, post = found.get(module_name(name), ((), ()))
                more_pre, more_post = _parse_softdep(needs)
                found[module_name(name)] = (pre + more_pre, post + more_post)
        return found

    @cached_property
    def _aliases(self) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
        """(exact alias -> modules, [(pattern, module)])."""
        exact: dict[str, list[str]] = {}
        patterns: list[tuple[str, str]] = []
        for line in self._lines("modules.alias"):
            words = line.split()
            if len(words) != 3 or words[0] != "alias":
                continue
            if re.search(r"[*?\[]", words[1]):
                patterns.append((words[1].replace("-", "_"), module_name(words[2])))
            else:
                exact.setdefault(words[1].replace("-", "_"), []).append(module_name(words[2]))
        return exact, patterns

    def resolve(self, name: str) -> tuple[str, ...]:
        """Return the names of the module files that ``name``, a module or an alias, stands for.

        Empty when it is built in.

        Raises:
            ModuleNotFoundInKernelError: this kernel has nothing of that name.
        """
        wanted = module_name(name)
        if wanted in self._files:
            return (wanted,)
        if wanted in self._builtin:
            return ()
        exact, patterns = self._aliases
        found = exact.get(wanted, []) + [m for p, m in patterns if fnmatch.fnmatchcase(wanted, p)]
        found = [module for module in found if module in self._files]
        if not found and not self._builtin_alias(wanted):
            raise ModuleNotFoundInKernelError(name, self.modules_dir)
        return tuple(dict.fromkeys(found))

    def has(self, name: str) -> bool:
        """Say whether ``name`` is a module, an alias of one, or built in."""
        try:
            self.resolve(name)
        except ModuleNotFoundInKernelError:
            return False
        return True

    def closure(self, names: Iterable[str]) -> tuple[Path, ...]:
        """Return the files to load for ``names``, each after everything that it needs.

        Soft dependencies that this kernel does not have are left out: that is what makes them soft.

        Raises:
            ModuleNotFoundInKernelError: a name, or a hard dependency, is not there.
        """
        ordered: dict[str, None] = {}
        for name in names:
            for module in self.resolve(name):
                self._visit(module, ordered, frozenset())
        return tuple(self.modules_dir / self._files[name][0] for name in ordered)

    def _visit(self, name: str, ordered: dict[str, None], above: frozenset[str]) -> None:
        if name in ordered or name in above:
            return
        above |= {name}
        before, after = self._softdeps.get(name, ((), ()))
        for soft in self._soft(before):
            self._visit(soft, ordered, above)
        for need in self._files[name][1]:
            for module in self.resolve(need):
                self._visit(module, ordered, above)
        ordered[name] = None
        for soft in self._soft(after):
            self._visit(soft, ordered, above)

    def _soft(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            if self.has(name):
                yield from self.resolve(name)

    def _builtin_alias(self, name: str) -> bool:
        """Look ``name`` up among the aliases of built-in code (NUL-separated ``module.key=value``).

        Kernels before 5.2 have no such file; an alias of built-in code is then unknown.
        """
        try:
            data = (self.modules_dir / "modules.builtin.modinfo").read_bytes()
        except FileNotFoundError:
            return False
        marker = b".alias="
        return any(
            entry.partition(marker)[2].decode(errors="replace").replace("-", "_") == name
            for entry in data.split(b"\0")
            if marker in entry
        )

    def _lines(self, name: str) -> list[str]:
        path = self.modules_dir / name
        try:
            text = path.read_text()
        except FileNotFoundError:
            if name != "modules.dep":
                return []
            raise KernelNotFoundError(
                f"{path} is missing: run `depmod -b ROOT {self.modules_dir.name}` first"
            ) from None
        return [line for line in text.splitlines() if line and not line.startswith("#")]


def _parse_softdep(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split ``pre: a b post: c`` into (before, after); names before any keyword come before."""
    parts: dict[str, list[str]] = {"pre:": [], "post:": []}
    current = parts["pre:"]
    for word in text.split():
        if word in parts:
            current = parts[word]
        else:
            current.append(word)
    return tuple(parts["pre:"]), tuple(parts["post:"])


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel image and the modules that belong to it."""

    version: str
    image: Path
    modules_dir: Path
    modules: ModuleIndex = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.image.is_file():
            raise KernelNotFoundError(f"kernel {self.version}: no image at {self.image}")
        if not self.modules_dir.is_dir():
            raise KernelNotFoundError(f"kernel {self.version}: no modules at {self.modules_dir}")
        object.__setattr__(self, "modules", ModuleIndex(modules_dir=self.modules_dir))


def open_kernel(root: Path) -> Kernel:
    """Return the newest kernel below ``root``, a tree such as a kernel package unpacks to.

    The modules are in ``usr/lib/modules/VERSION`` or ``lib/modules/VERSION``. The image is
    ``boot/vmlinuz-VERSION``, or ``vmlinuz`` beside the modules.

    Raises:
        KernelNotFoundError: there is no image with its modules.
    """
    found: dict[str, Kernel] = {}
    for modules_dir in (path for place in MODULE_PLACES for path in root.glob(f"{place}/*")):
        version = modules_dir.name
        for image in (root / "boot" / f"vmlinuz-{version}", modules_dir / "vmlinuz"):
            if version not in found and image.is_file() and modules_dir.is_dir():
                found[version] = Kernel(version=version, image=image, modules_dir=modules_dir)
    if not found:
        raise KernelNotFoundError(f"no kernel with its modules below {root}")
    return found[max(found, key=_version_key)]


def cached_kernel(cache_dir: Path) -> Kernel:
    """Return the newest kernel that ``scripts/setup`` put below ``cache_dir``/kernel.

    Raises:
        KernelNotFoundError: there is none yet.
    """
    # a name that begins with a dot is of a tree that scripts/setup has not finished
    roots = [path for path in (cache_dir / "kernel").glob("[!.]*") if path.is_dir()]
    if not roots:
        advice = (
            "run scripts/setup"
            if IS_CHECKOUT
            else "say --kernel DIR with boot/ and lib/modules/ in it (/ is this machine's kernel)"
        )
        raise KernelNotFoundError(f"no kernel in {cache_dir / 'kernel'}: {advice}")
    return open_kernel(max(roots, key=lambda path: _version_key(path.name)))


def _version_key(text: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", text)
    ]
