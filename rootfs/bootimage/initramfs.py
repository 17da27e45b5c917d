"""The boot image: interpreter, agent and kernel modules, and nothing that they do not reach.

The same inputs give the same bytes. What it holds is found, not listed: the interpreter and what it
needs by ``rootfs.bootimage.userland``, kernel modules by ``rootfs.bootimage.kernel``.

    /init                       starts the entry point (PID 1)
    /usr/bin/python3            the interpreter
    /usr/lib/python3.X          every module, byte code only, in one directory
    /usr/sbin                   programs of features, such as mkfs.ext4
    /lib/modules/VERSION        kernel modules, flat
    /etc/guestagent/modules     their absolute paths, one a line, each after what it needs
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from rootfs.bootimage.closure import Module
from rootfs.bootimage.cpio import CpioEntry, device, directory, regular, write_cpio
from rootfs.bootimage.features import DEFAULT_FEATURES, FEATURES
from rootfs.bootimage.kernel import Kernel, ModuleIndex, module_bytes, without_signature
from rootfs.bootimage.places import CACHE_DIR, PROJECT
from rootfs.bootimage.userland import PYTHON_DIR, Item, userland
from rootfs.imagefile.output import check_output, new_file, write_file

__all__ = (
    "CACHE_DIR",
    "COMPRESSIONS",
    "DEFAULT_COMPRESSION",
    "PROJECT",
    "InitramfsReport",
    "InitramfsSpec",
    "build_initramfs",
    "feature_modules",
    "feature_programs",
)

MODULE_LIST = "etc/guestagent/modules"  # guestagent.boot.modules reads it
_KEPT_IN_CACHE = 32
#: The code that decides the bytes of an image, which are part of its key in the cache.
_BUILDERS = ("initramfs.py", "userland.py", "cpio.py", "elf.py", "kernel.py")


#: Commands that compress standard input as the kernel unpacks it, reproducibly.
_COMPRESSORS = {
    "zstd": ("zstd", "-q", "-19", "-T1", "-c"),
    "lz4": ("lz4", "-q", "-l", "-9", "-c"),  # -l: the kernel reads the legacy frame only
    "gzip": ("gzip", "-n", "-9", "-c"),
}
COMPRESSIONS = (*_COMPRESSORS, "none")
DEFAULT_COMPRESSION = "lz4"  # boots fastest: a third larger than zstd, far cheaper to unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class InitramfsSpec:
    """What to build.

    ``entry`` is ``module:function``, called as PID 1. ``imports`` names further modules to hold
    (debugging aids). ``files`` are added as they are: path in the image -> file here. ``optimize``
    is the level of compile(): 2 leaves out assertions and docstrings. ``module_signatures`` keeps
    those of kernel modules, for kernels that load no others (lockdown, module.sig_enforce):
    checking them is three quarters of the time that loading takes, and the image is measured as a
    whole.
    """

    kernel: Kernel
    features: tuple[str, ...] = DEFAULT_FEATURES
    entry: str = "guestagent.boot.early:main"
    imports: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    files: tuple[tuple[str, Path], ...] = ()
    compression: str = DEFAULT_COMPRESSION
    optimize: int = 2
    module_signatures: bool = False
    project: Path = PROJECT

    def __post_init__(self) -> None:
        unknown = [name for name in self.features if name not in FEATURES]
        if unknown:
            raise ValueError(f"unknown feature {unknown[0]!r}; known: {', '.join(FEATURES)}")
        if self.compression not in COMPRESSIONS:
            raise ValueError(
                f"unknown compression {self.compression!r}; known: {', '.join(COMPRESSIONS)}"
            )
        for path, _ in self.files:
            if not path or any(part in ("", ".", "..") for part in path.split("/")):
                raise ValueError(
                    f"{path!r} is no path of a file, relative to the root of the image"
                )
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.entry):
            raise ValueError(f"entry {self.entry!r} is not module:function")

    @property
    def entry_module(self) -> str:
        return self.entry.partition(":")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class InitramfsReport:
    """What was built. ``parts`` is bytes by kind of content, before compression."""

    path: Path
    size_bytes: int
    unpacked_bytes: int
    digest: str
    parts: Mapping[str, int]
    kernel_modules: tuple[str, ...]
    python_modules: tuple[str, ...]
    cached: bool
    seconds: float

    def describe(self) -> str:
        """Return the report as a few lines for a person."""
        lines = [
            f"{self.path}: {_mib(self.size_bytes)}, {_mib(self.unpacked_bytes)} unpacked, "
            f"{len(self.python_modules)} Python and {len(self.kernel_modules)} kernel modules"
            + (" (from the cache)" if self.cached else f" (built in {self.seconds:.1f} s)")
        ]
        for name, size in sorted(self.parts.items(), key=lambda part: -part[1]):
            lines.append(f"  {_mib(size):>10}  {name}")
        return "\n".join(lines)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.2f} MiB"


def build_initramfs(
    spec: InitramfsSpec, *, cache_dir: Path = CACHE_DIR, output: Path | None = None
) -> InitramfsReport:
    """Build the image, or take it from the cache when nothing that goes into it has changed.

    The image is at ``output``, or in the cache when that is None.

    Raises:
        ClosureError, ElfError, ModuleNotFoundInKernelError: something needed is not there.
        CallError: the image cannot be written; as ``new_file``.
        OSError: reading failed.
        subprocess.CalledProcessError: the compressor failed.
    """
    started = time.monotonic()
    if output is not None:
        check_output(output)
    modules, items = userland(
        spec.entry_module,
        entries=tuple(name for feature in spec.features for name in FEATURES[feature].entries),
        imports=spec.imports,
        programs=feature_programs(spec.features),
        project=spec.project,
        optimize=spec.optimize,
    )
    items += [*_kernel_items(spec), *_own_items(spec)]
    store = cache_dir / "initramfs"
    path = store / f"{_key(spec, items)}.cpio"
    report = _cached(path)
    if report is None:
        store.mkdir(parents=True, exist_ok=True)
        report = _build(spec, items, modules, path)
        report = replace(report, seconds=time.monotonic() - started)
        _remember(report)
        _prune(store)
    if output is not None:
        write_file(output, report.path.read_bytes(), inputs=(report.path,))
        report = replace(report, path=output)
    return report


def _kernel_items(spec: InitramfsSpec) -> Iterator[Item]:
    index = spec.kernel.modules
    wanted = [*spec.modules, *feature_modules(spec.features, index)]
    base = f"lib/modules/{spec.kernel.version}"
    order = []
    for file in index.closure(wanted):
        path = f"{base}/{file.name.partition('.ko')[0]}.ko"
        order.append(f"/{path}\n")
        yield Item(
            path=path,
            part="kernel modules",
            source=file,
            build=lambda _, file=file: _module(file, spec),  # type: ignore[misc]
        )
    yield Item(path=MODULE_LIST, part="kernel modules", source="".join(order).encode())


def _module(file: Path, spec: InitramfsSpec) -> bytes:
    data = module_bytes(file)
    return data if spec.module_signatures else without_signature(data)


def feature_modules(features: Iterable[str], index: ModuleIndex) -> list[str]:
    """Return the names of the modules to ask a kernel for, so that it can serve the features."""
    wanted: list[str] = []
    for name in features:
        wanted += [m for m in FEATURES[name].optional_modules if index.has(m)]
        wanted += FEATURES[name].modules
    return wanted


def feature_programs(features: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the programs that the features need."""
    return tuple(sorted({program for name in features for program in FEATURES[name].programs}))


def _own_items(spec: InitramfsSpec) -> Iterator[Item]:
    module, _, function = spec.entry.partition(":")
    script = f"#!/usr/bin/python3 -IS\nfrom {module} import {function}\n{function}()\n"
    yield Item(path="init", part="agent", source=script.encode(), permissions=0o755)
    for path, file in spec.files:
        permissions = stat.S_IMODE(file.stat().st_mode)
        yield Item(path=path, part="added files", source=file, permissions=permissions)


def _directories() -> list[CpioEntry]:
    entries = [directory(name) for name in ("dev", "etc", "mnt", "proc", "run", "sys", "tmp")]
    # the interpreter complains without this directory, though all extensions lie one above
    entries.append(directory(f"{PYTHON_DIR}/lib-dynload"))
    # it knows its prefix by this file, and has the module itself built in (frozen)
    entries.append(regular(f"{PYTHON_DIR}/os.pyc", b""))
    # init's standard streams, before it mounts devtmpfs
    entries.append(device("dev/console", stat.S_IFCHR, 5, 1))
    # an interpreter that was built without getrandom(2) does not start without it
    entries.append(device("dev/urandom", stat.S_IFCHR, 1, 9, 0o666))
    return entries


def _key(spec: InitramfsSpec, items: list[Item]) -> str:
    """Digest all that decides the bytes of the image."""
    digest = hashlib.sha256()
    settings = (
        sys.version, spec.compression, spec.optimize, spec.kernel.version, spec.module_signatures
    )  # fmt: skip
    digest.update(repr(settings).encode())
    for name in _BUILDERS:
        digest.update(hashlib.sha256(Path(__file__).with_name(name).read_bytes()).digest())
    for item in items:
        digest.update(repr((item.path, item.permissions)).encode())
        digest.update(hashlib.sha256(item.read()).digest())
    return digest.hexdigest()[:32]


def _build(
    spec: InitramfsSpec, items: list[Item], modules: tuple[Module, ...], path: Path
) -> InitramfsReport:
    parts: dict[str, int] = {}
    entries = _directories()
    for item in items:
        data = item.build(item.read())
        parts[item.part] = parts.get(item.part, 0) + len(data)
        entries.append(regular(item.path, data, item.permissions))
    with new_file(path) as (fd, _), open(fd, "wb", closefd=False) as file:
        unpacked_bytes = _compress(spec.compression, entries, file)
    return InitramfsReport(
        path=path,
        size_bytes=path.stat().st_size,
        unpacked_bytes=unpacked_bytes,
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        parts=parts,
        kernel_modules=tuple(Path(item.path).stem for item in items if item.path.endswith(".ko")),
        python_modules=tuple(module.name for module in modules),
        cached=False,
        seconds=0.0,
    )


def _compress(compression: str, entries: list[CpioEntry], file: BinaryIO) -> int:
    """Write the archive compressed; return its size before compression."""
    if compression == "none":
        return write_cpio(file, entries)
    argv = _COMPRESSORS[compression]
    if shutil.which(argv[0]) is None:
        raise FileNotFoundError(f"{argv[0]} is not installed, needed for {compression} images")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=file) as process:
        size_bytes = write_cpio(cast("BinaryIO", process.stdin), entries)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    return size_bytes


def _remember(report: InitramfsReport) -> None:
    fields = asdict(report) | {"path": str(report.path)}
    write_file(report.path.with_suffix(".json"), json.dumps(fields).encode())


def _cached(path: Path) -> InitramfsReport | None:
    try:
        fields = json.loads(path.with_suffix(".json").read_bytes())
    except FileNotFoundError:
        return None
    # the time of use is for pruning only, which a cache of another owner leaves to that owner
    with contextlib.suppress(PermissionError):
        os.utime(path)
    for name in ("kernel_modules", "python_modules"):
        fields[name] = tuple(fields[name])
    return InitramfsReport(**fields | {"path": path, "cached": True})


def _prune(store: Path) -> None:
    """Keep the images that were used last."""
    images = sorted(store.glob("*.cpio"), key=lambda path: path.stat().st_mtime)
    for path in images[:-_KEPT_IN_CACHE]:
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
