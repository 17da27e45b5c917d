"""Walking a tree of any size in bounded memory: one open directory for each level."""

import os
import stat
from collections.abc import Generator

from vsock.errors import CallError

__all__ = ("MAX_DEPTH", "Found", "in_64_bits", "letter_of", "rdev_of", "walk")

#: Each level costs two descriptors while something below it is looked at; a process has 1024.
MAX_DEPTH = 100
_LETTERS = {
    stat.S_IFREG: "f",
    stat.S_IFDIR: "d",
    stat.S_IFLNK: "l",
    stat.S_IFBLK: "b",
    stat.S_IFCHR: "c",
    stat.S_IFIFO: "p",
    stat.S_IFSOCK: "s",
}


def in_64_bits(number: int) -> int:
    """Return a number of a layer, which may state any, or the nearest that a reply can tell."""
    return max(-(1 << 63), min(number, (1 << 64) - 1))


class Found:
    """One entry. ``path`` is relative to the top; ``name`` is valid below ``directory_fd``, which
    is open until the walk goes on."""

    __slots__ = ("directory_fd", "entry", "path")

    def __init__(self, path: bytes, directory_fd: int, entry: "os.DirEntry[str]") -> None:
        self.path = path
        self.directory_fd = directory_fd
        self.entry = entry

    @property
    def name(self) -> str:
        return self.entry.name

    def lstat(self) -> os.stat_result:
        return self.entry.stat(follow_symlinks=False)

    def open_path(self) -> int:
        """Return an O_PATH descriptor; nothing is followed and no device woken."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.entry.name, flags, dir_fd=self.directory_fd)

    def readlink(self) -> bytes:
        return os.fsencode(os.readlink(self.entry.name, dir_fd=self.directory_fd))


class _Level:
    __slots__ = ("entries", "fd", "path")

    def __init__(self, path: bytes, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.entries = os.scandir(fd)

    def close(self) -> None:
        self.entries.close()
        os.close(self.fd)


def walk(top_fd: int, *, max_depth: int | None = None) -> Generator[Found, None, None]:
    """Yield everything below a directory, a directory before what it holds, in the kernel's order.

    ``top_fd`` is taken over. What vanishes on the way is left out. ``max_depth`` is that of the
    entries, 1 for those of the top alone; without it the whole tree is walked.

    Raises:
        OSError: a directory cannot be read; ``filename`` is its path, as bytes.
        CallError: ``resource``, the tree is deeper than ``MAX_DEPTH``.
    """
    stack: list[_Level] = []
    try:
        stack.append(_enter(b"", top_fd))
        while stack:
            level = stack[-1]
            entry = _next(level)
            if entry is None:
                stack.pop().close()
                continue
            name = os.fsencode(entry.name)
            path = level.path + b"/" + name if level.path else name
            yield Found(path, level.fd, entry)
            if (max_depth is None or len(stack) < max_depth) and entry.is_dir(
                follow_symlinks=False
            ):
                _descend(stack, path, entry.name)
    finally:
        for level in stack:
            level.close()


def _enter(path: bytes, fd: int) -> _Level:
    try:
        return _Level(path, fd)
    except OSError as error:
        os.close(fd)
        error.filename = path
        raise


def _next(level: _Level) -> "os.DirEntry[str] | None":
    try:
        return next(level.entries, None)
    except OSError as error:
        error.filename = level.path
        raise


def _descend(stack: list[_Level], path: bytes, name: str) -> None:
    if len(stack) >= MAX_DEPTH:
        raise CallError(
            "resource",
            f"directories are more than {MAX_DEPTH} levels deep, at {path[:200]!r}...",
            hint="start further down",
        )
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=stack[-1].fd)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        error.filename = path
        raise
    stack.append(_enter(path, fd))


def letter_of(mode: int) -> str:
    """Return the letter of ``api.inspect.ENTRY_TYPES`` for a file's mode."""
    return _LETTERS.get(stat.S_IFMT(mode), "u")


def rdev_of(status: os.stat_result) -> str | None:
    """Return MAJOR:MINOR of a device node, None for anything else."""
    if not (stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode)):
        return None
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
