"""Which shared libraries a program needs, as the dynamic linker finds them, and its bytes without
what only debuggers read.

Only 64-bit little-endian files, which is what this project's guests run.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

__all__ = ("ElfError", "ElfFile", "library_closure", "without_debug_information")

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
#: e_shoff; e_shnum and e_shstrndx (elf.h, Elf64_Ehdr).
_SECTION_FIELDS = (slice(0x28, 0x30), slice(0x3C, 0x40))

#: What reading a damaged file ends in.
_DAMAGED = (ELFError, ValueError, OverflowError)


class ElfError(Exception):
    """The file is no ELF file that can be handled, or a library that it needs is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElfFile:
    """The dynamic-linking facts of one file.

    ``interpreter`` is the path of the dynamic linker (programs), ``needed`` the names of the
    libraries, ``search_paths`` the run path with $ORIGIN put in.
    """

    path: Path
    interpreter: str | None
    needed: tuple[str, ...]
    search_paths: tuple[Path, ...]

    @classmethod
    def read(cls, path: Path) -> "ElfFile":
        """Read ``path``.

        Raises:
            ElfError: not a 64-bit little-endian ELF file, or damaged.
            OSError: it cannot be read.
        """
        interpreter, tags = None, []
        try:
            for segment in _segments(path.read_bytes()):
                if segment["p_type"] == "PT_INTERP":
                    interpreter = segment.get_interp_name()
                elif segment["p_type"] == "PT_DYNAMIC":
                    tags = list(segment.iter_tags())
            needed = tuple(tag.needed for tag in tags if tag["d_tag"] == "DT_NEEDED")
            search_paths = tuple(_search_paths(path, tags))
        except _DAMAGED as problem:
            raise ElfError(f"{path}: {problem or 'damaged'}") from problem
        return cls(path=path, interpreter=interpreter, needed=needed, search_paths=search_paths)


def _segments(data: bytes) -> Iterator[Any]:
    if not data.startswith(_MAGIC):
        raise ValueError("not a 64-bit little-endian ELF file")
    yield from ELFFile(io.BytesIO(data)).iter_segments()


def _search_paths(path: Path, tags: list[Any]) -> Iterator[Path]:
    # a RUNPATH makes the linker ignore an RPATH
    found = [tag.runpath for tag in tags if tag["d_tag"] == "DT_RUNPATH"]
    found = found or [tag.rpath for tag in tags if tag["d_tag"] == "DT_RPATH"]
    origin = str(path.resolve().parent)
    for part in (part for paths in found for part in paths.split(":")):
        yield Path(part.replace("$ORIGIN", origin).replace("${ORIGIN}", origin))


def without_debug_information(data: bytes) -> bytes:
    """Return a program or shared library without what only debuggers and linkers read.

    Everything past the last loaded byte goes, the section table with it, as no loader reads
    those. Anything else (an object file, a kernel module, a text) comes back as it is. The bytes
    depend on ``data`` alone; those of strip(1) depend on its version, too.

    Raises:
        ElfError: it is damaged.
    """
    if not data.startswith(_MAGIC):
        return data
    try:
        loaded = [each for each in _segments(data) if each["p_type"] == "PT_LOAD"]
        header = ELFFile(io.BytesIO(data)).header
    except _DAMAGED as problem:
        raise ElfError(f"a damaged ELF file: {problem}") from problem
    ends = [segment["p_offset"] + segment["p_filesz"] for segment in loaded]
    end = max([*ends, header["e_phoff"] + header["e_phentsize"] * header["e_phnum"]])
    if not ends or end >= len(data):
        return data
    kept = bytearray(data[:end])
    for field in _SECTION_FIELDS:
        kept[field] = bytes(field.stop - field.start)
    return bytes(kept)


def library_closure(roots: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return every library that the files ``roots`` need, directly or not, sorted by path.

    The dynamic linker of a program is among them. Paths are as the linker would open them.

    Raises:
        ElfError: a library is not found.
    """
    found: dict[str, Path] = {}
    waiting = [ElfFile.read(path) for path in roots]
    interpreters = {Path(elf.interpreter) for elf in waiting if elf.interpreter}
    for path in interpreters:
        found[path.name] = path
    while waiting:
        elf = waiting.pop()
        for name in elf.needed:
            if name not in found:
                found[name] = _find_library(name, elf)
                waiting.append(ElfFile.read(found[name]))
    return tuple(sorted(found.values()))


def _find_library(name: str, wanted_by: ElfFile) -> Path:
    directories = [*wanted_by.search_paths, *_default_directories()]
    for directory in directories:
        if (directory / name).is_file():
            return directory / name
    raise ElfError(f"{wanted_by.path} needs {name!r}, found in none of the library directories")


def _default_directories() -> Iterator[Path]:
    """Yield where the dynamic linker looks by itself: the built-in places first, as they need no
    cache file in the guest, then what ld.so.conf names.
    """
    triplet = f"{os.uname().machine}-linux-gnu"
    for base in ("/lib", "/usr/lib"):
        yield Path(base, triplet)
    for base in ("/lib64", "/usr/lib64", "/lib", "/usr/lib"):
        yield Path(base)
