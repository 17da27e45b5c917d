"""What a dynamic linker wants to know of an ELF file: interpreter, needed libraries, search paths.

Only 64-bit little-endian files, which is what this project's guests run.

Source: the System V ABI, chapter "Program Loading and Dynamic Linking"; elf.h.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ("ElfError", "ElfFile", "library_closure", "without_debug_information")

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 1, 5, 14, 15, 29
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")
_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian


class ElfError(Exception):
    """The file is no ELF file that can be handled, or a library that it needs is missing."""


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    offset: int
    address: int
    size: int


class ElfFile:
    """The dynamic-linking facts of one file.

    ``interpreter`` is the path of the dynamic linker (programs), ``needed`` the names of the
    libraries, ``search_paths`` the run path with $ORIGIN put in.
    """

    def __init__(self, path: Path) -> None:
        """Read ``path``.

        Raises:
            ElfError: not a 64-bit little-endian ELF file, or damaged.
            OSError: it cannot be read.
        """
        self.path = path
        data = path.read_bytes()
        try:
            segments = list(_segments(data))
            self.interpreter = self._interpreter(data, segments)
            tags = list(_dynamic(data, segments))
            strings = _strings_offset(tags, segments)
            self.needed = tuple(_text(data, strings + v) for t, v in tags if t == _DT_NEEDED)
            self.search_paths = tuple(self._search_paths(data, tags, strings))
        except (struct.error, ValueError) as problem:
            raise ElfError(f"{path}: {problem}") from problem

    def _interpreter(self, data: bytes, segments: list[_Segment]) -> str | None:
        for segment in segments:
            if segment.kind == _PT_INTERP:
                return _text(data, segment.offset)
        return None

    def _search_paths(
        self, data: bytes, tags: list[tuple[int, int]], strings: int
    ) -> Iterator[Path]:
        # a RUNPATH makes the linker ignore an RPATH
        kinds = [t for t, _ in tags]
        wanted = _DT_RUNPATH if _DT_RUNPATH in kinds else _DT_RPATH
        for tag, value in tags:
            if tag == wanted:
                for part in _text(data, strings + value).split(":"):
                    origin = str(self.path.resolve().parent)
                    yield Path(part.replace("$ORIGIN", origin).replace("${ORIGIN}", origin))


def _segments(data: bytes) -> Iterator[_Segment]:
    if not data.startswith(_MAGIC):
        raise ValueError("not a 64-bit little-endian ELF file")
    header = _HEADER.unpack_from(data)
    table, entry_size, count = header[5], header[9], header[10]
    for number in range(count):
        kind, _, offset, address, _, size, _, _ = _SEGMENT.unpack_from(
            data, table + number * entry_size
        )
        yield _Segment(kind, offset, address, size)


def _dynamic(data: bytes, segments: list[_Segment]) -> Iterator[tuple[int, int]]:
    for segment in segments:
        if segment.kind == _PT_DYNAMIC:
            for offset in range(segment.offset, segment.offset + segment.size, _DYNAMIC.size):
                tag, value = _DYNAMIC.unpack_from(data, offset)
                if tag == 0:
                    return
                yield tag, value


def _strings_offset(tags: list[tuple[int, int]], segments: list[_Segment]) -> int:
    """Turn the address of the string table into an offset in the file."""
    for tag, address in tags:
        if tag == _DT_STRTAB:
            for segment in segments:
                inside = address - segment.address
                if segment.kind == _PT_LOAD and 0 <= inside < segment.size:
                    return segment.offset + inside
            raise ValueError(f"the string table at {address:#x} lies in no segment")
    return 0


def _text(data: bytes, offset: int) -> str:
    return os.fsdecode(data[offset : data.index(b"\0", offset)])


def without_debug_information(data: bytes) -> bytes:
    """Return a program or shared library without what only debuggers and linkers read.

    Everything past the last loaded byte goes, the section table with it, as no loader reads
    those. Anything else (an object file, a kernel module, a text) comes back as it is.
    """
    if not data.startswith(_MAGIC):
        return data
    loaded = [s for s in _segments(data) if s.kind == _PT_LOAD]
    if not loaded:
        return data
    end = max(segment.offset + segment.size for segment in loaded)
    fields = list(_HEADER.unpack_from(data))
    end = max(end, fields[5] + fields[9] * fields[10])
    if end >= len(data):
        return data
    fields[6] = fields[12] = fields[13] = 0  # e_shoff, e_shnum, e_shstrndx
    return _HEADER.pack(*fields) + data[_HEADER.size : end]


def library_closure(roots: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return every library that the files ``roots`` need, directly or not, sorted by path.

    The dynamic linker of a program is among them. Paths are as the linker would open them.

    Raises:
        ElfError: a library is not found.
    """
    found: dict[str, Path] = {}
    waiting = [ElfFile(path) for path in roots]
    interpreters = {Path(elf.interpreter) for elf in waiting if elf.interpreter}
    for path in interpreters:
        found[path.name] = path
    while waiting:
        elf = waiting.pop()
        for name in elf.needed:
            if name not in found:
                found[name] = _find_library(name, elf)
                waiting.append(ElfFile(found[name]))
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
