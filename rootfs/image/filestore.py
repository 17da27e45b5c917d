"""Named files in a directory or in a tar: what container images are exchanged as."""

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rootfs.image.tar import TarEntry
from rootfs.imagefile.errors import from_os_error
from vsock.errors import CallError

__all__ = (
    "AmbiguousError",
    "ArchiveStore",
    "DirectoryStore",
    "FileStore",
    "StoredFile",
    "read_json",
)

_MAX_JSON_BYTES = 8 << 20
_MAX_LINKS = 8


class AmbiguousError(CallError):
    """One reader would find another image there than the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """``size_bytes`` at ``start_bytes`` of ``fd``, which is borrowed."""

    fd: int
    start_bytes: int
    size_bytes: int


class FileStore(Protocol):
    def open(self, name: str) -> contextlib.AbstractContextManager[StoredFile]:
        """Open a file for the time of a ``with`` block.

        Raises:
            CallError: ``not_found``; ``invalid``, it is no regular file; by errno.
        """
        ...

    def has(self, name: str) -> bool: ...

    def earlier(self, name: str) -> Sequence[StoredFile | None]:
        """Return what an archive had under the same name before; None for no plain file."""
        ...


class DirectoryStore:
    """The files below a directory of this host."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def has(self, name: str) -> bool:
        return os.path.isfile(self._path / name)  # False also where we may not look

    def earlier(self, name: str) -> Sequence[StoredFile | None]:
        return ()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[StoredFile]:
        if name.startswith("/") or ".." in name.split("/"):
            raise _invalid(name, "it is outside of the directory")
        path = self._path / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as problem:
            raise from_os_error(problem, step="open", object=path) from problem
        except ValueError as problem:  # a NUL, or half of a surrogate pair
            raise _invalid(name, "it is no name of a file") from problem
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise _invalid(str(path), "it is no regular file")
            yield StoredFile(fd=fd, start_bytes=0, size_bytes=facts.st_size)
        finally:
            os.close(fd)


class ArchiveStore:
    """The members of a tar that is kept open by someone else."""

    def __init__(self, fd: int, members: Iterable[TarEntry]) -> None:
        """``members`` are those of the archive in ``fd`` (borrowed)."""
        self._fd = fd
        self._files: dict[str, StoredFile | None] = {}
        self._links: dict[str, str] = {}
        self._earlier: dict[str, list[StoredFile | None]] = {}
        for entry in members:
            name = _normal(os.fsdecode(entry.name))
            if name in self._files or name in self._links:
                self._earlier.setdefault(name, []).append(self._files.get(name))
            self._files.pop(name, None)
            self._links.pop(name, None)
            if entry.file_type == stat.S_IFLNK:
                target = os.path.join(os.path.dirname(name), os.fsdecode(entry.target))
                self._links[name] = os.path.normpath(target)
            elif not entry.file_type:
                self._links[name] = _normal(os.fsdecode(entry.target))
            elif entry.file_type == stat.S_IFREG:
                whole = entry.extents in ((), ((0, entry.size_bytes, _start(entry.extents)),))
                self._files[name] = (
                    StoredFile(
                        fd=self._fd,
                        start_bytes=_start(entry.extents),
                        size_bytes=entry.size_bytes,
                    )
                    if whole
                    else None
                )

    def has(self, name: str) -> bool:
        return self._resolve(name) in self._files

    def earlier(self, name: str) -> Sequence[StoredFile | None]:
        return self._earlier.get(self._resolve(name), ())

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[StoredFile]:
        resolved = self._resolve(name)
        if resolved not in self._files:
            raise CallError(
                "not_found",
                f"cannot open {name!r}: the archive has no such file",
                step="open",
                object=name,
            )
        found = self._files[resolved]
        if found is None:
            raise _invalid(name, "it is a sparse member of the archive")
        yield found

    def _resolve(self, name: str) -> str:
        """Follow links inside the archive; old ``docker save`` writes equal layers so."""
        name = _normal(name)
        for _ in range(_MAX_LINKS):
            if name not in self._links:
                break
            name = self._links[name]
        return name


class _DoubledKeyError(Exception):
    """An object has a key twice."""


def _ambiguous(name: str, why: str) -> AmbiguousError:
    text = f"cannot read {name!r}: {why}"
    return AmbiguousError("invalid", text, step="read", object=name)


def _content(file: StoredFile) -> bytes:
    return os.pread(file.fd, file.size_bytes, file.start_bytes)


def _unambiguous(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise _DoubledKeyError(f"the key {twice[:100]!r} comes twice")
    return found


def _start(extents: tuple[tuple[int, int, int], ...]) -> int:
    return extents[0][2] if extents else 0


def _normal(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _invalid(name: str, why: str) -> CallError:
    return CallError("invalid", f"cannot open {name!r}: {why}", step="open", object=name)


def read_json(store: FileStore, name: str) -> tuple[object, bytes]:
    """Return a JSON file of at most 8 MiB, parsed, and its bytes.

    Raises:
        CallError: ``invalid``, no JSON, or not the same to every reader; ``resource``, too large;
            as ``FileStore.open``.
    """
    with store.open(name) as file:
        if file.size_bytes > _MAX_JSON_BYTES:
            raise CallError(
                "resource",
                f"cannot read {name!r}: {file.size_bytes} bytes, limit {_MAX_JSON_BYTES}",
                step="read",
                object=name,
            )
        raw = _content(file)
    for other in store.earlier(name):
        if other is None or other.size_bytes != len(raw) or _content(other) != raw:
            raise _ambiguous(name, "it comes twice in the archive, with other content")
    try:
        return json.loads(raw, object_pairs_hook=_unambiguous), raw
    except _DoubledKeyError as problem:
        raise _ambiguous(name, str(problem)) from None
    except (ValueError, RecursionError) as problem:
        raise CallError(
            "invalid", f"cannot read {name!r}: no JSON: {problem}", step="read", object=name
        ) from None
