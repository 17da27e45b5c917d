"""Entries of chunks, typed.

A chunk of another shape than the contract's raises KeyError, TypeError or ValueError, of which
``FsStream`` makes a CallError.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = (
    "Checksum",
    "DirectoryEntry",
    "FoundEntry",
    "checksums",
    "data",
    "directory_entries",
    "found_entries",
    "names",
    "nothing",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksum:
    """An entry of a tree. ``kind`` is a letter of ``api.inspect.ENTRY_TYPES``.

    ``digest`` (hexadecimal digits) is that of a regular file. ``target`` is that of a symlink, as
    ``os.fsdecode`` has it: ``os.fsencode`` gives the bytes. ``device`` is MAJOR:MINOR of a node.
    """

    path: bytes
    kind: str
    size_bytes: int
    digest: str | None = None
    target: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryEntry:
    """An entry of a directory. ``kind`` is a letter of ``api.inspect.ENTRY_TYPES``, ``mode`` the
    permission bits, ``rdev`` MAJOR:MINOR of a node, ``target`` that of a symlink."""

    name: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    size_bytes: int
    links: int
    inode: int
    mtime_ns: int
    rdev: str | None
    target: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundEntry:
    """Something below a directory, its path relative to that."""

    path: bytes
    kind: str


def names(chunk: Mapping[str, object]) -> Iterator[bytes]:
    """Read a chunk of ``fs.ls``."""
    for (name,) in _entries(chunk):
        yield name


def directory_entries(chunk: Mapping[str, object]) -> Iterator[DirectoryEntry]:
    """Read a chunk of ``fs.readdir``."""
    fields = tuple(DirectoryEntry.__dataclass_fields__)
    for entry in _entries(chunk):
        yield DirectoryEntry(**dict(zip(fields, entry, strict=True)))


def found_entries(chunk: Mapping[str, object]) -> Iterator[FoundEntry]:
    """Read a chunk of ``fs.find``."""
    for path, kind in _entries(chunk):
        yield FoundEntry(path=path, kind=kind)


def checksums(chunk: Mapping[str, object]) -> Iterator[Checksum]:
    """Read a chunk of ``fs.checksums``."""
    for path, kind, size_bytes, value in _entries(chunk):
        yield Checksum(
            path=path,
            kind=kind,
            size_bytes=size_bytes,
            digest=value if kind == "f" else None,
            target=os.fsdecode(value) if kind == "l" else None,
            device=value if kind in "bc" else None,
        )


def data(chunk: Mapping[str, object]) -> Iterator[bytes]:
    """Read a chunk of bytes."""
    piece = chunk["data"]
    if not isinstance(piece, bytes):
        raise TypeError(f"data is of type {type(piece).__name__}")
    yield piece


def nothing(_chunk: Mapping[str, object]) -> Iterator[bytes]:
    """Read a chunk of an answer that has none."""
    return iter(())


def _entries(chunk: Mapping[str, object]) -> list[list[Any]]:
    entries = chunk["entries"]
    if not isinstance(entries, list):
        raise TypeError(f"entries are of type {type(entries).__name__}")
    return entries
