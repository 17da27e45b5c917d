"""A file that appears under its name whole, or not at all.

Content is written to a temporary file in the same directory, synced, and renamed. A failure at any
point leaves what was there before. Only a killed process leaves the temporary file,
``.NAME.XXXXXXXX.part``, behind.
"""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rootfs.imagefile.errors import from_os_error

__all__ = ("new_file", "sync_directory", "unnamed_file", "write_at")


@contextlib.contextmanager
def new_file(
    path: str | os.PathLike[str], *, mode: int = 0o644, replace: bool = True
) -> Iterator[tuple[int, Path]]:
    """Open a new file for writing; it takes the name ``path`` when the block ends without error.

    Yields its descriptor (borrowed, read and write) and its temporary path, for programs that want
    a name. A program may replace the file under that path: what the path names at the end is what
    is kept. ``replace=False`` refuses an existing ``path`` (FileExistsError becomes ``conflict``).

    Raises:
        CallError: ``denied``, ``resource``, ``not_found``..., by errno; step "create".
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name[:200]}.{secrets.token_hex(4)}.part")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(temporary, flags, mode)
    except OSError as problem:
        raise from_os_error(problem, step="create", object=final) from problem
    with contextlib.ExitStack() as undo:
        undo.callback(_unlink, temporary)
        undo.callback(os.close, fd)
        yield fd, temporary
        try:
            _publish(temporary, final, replace=replace)
        except OSError as problem:
            raise from_os_error(problem, step="write", object=final) from problem


def _publish(temporary: Path, final: Path, *, replace: bool) -> None:
    fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    if replace:
        os.rename(temporary, final)
    else:
        os.link(temporary, final)
    sync_directory(final.parent)


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Raises:
        OSError: as fsync(2).
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def unnamed_file(directory: str | os.PathLike[str]) -> Iterator[int]:
    """Open a file without a name in ``directory``; it is gone when the block ends, or the process.

    Raises:
        CallError: by errno; step "create a spool file in".
    """
    try:
        # falls back to a name that is gone at once, where the file system has no O_TMPFILE
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # closed below
    except OSError as problem:
        raise from_os_error(problem, step="create a spool file in", object=directory) from problem
    with file:
        yield file.fileno()


def write_at(fd: int, data: bytes, offset_bytes: int) -> None:
    """Write all of ``data``.

    Raises:
        OSError: as write(2).
    """
    count = os.pwrite(fd, data, offset_bytes)
    while count < len(data):
        count += os.pwrite(fd, memoryview(data)[count:], offset_bytes + count)
