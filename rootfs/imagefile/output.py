"""Output files: every command writes its files here, each whole or not at all.

Content is written to a temporary file in the same directory, synced, and renamed. A failure at any
point leaves what was there before. Only a killed process leaves the temporary file,
``.NAME.XXXXXXXX.part``, behind.

An output replaces a regular file or nothing: a device, a FIFO, a directory and a symbolic link are
refused, and so is a file that the command reads.
"""

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from guestagent.host.output import facts_of_output
from rootfs.imagefile.errors import OsErrors, from_os_error
from vsock.errors import CallError

__all__ = (
    "check_output",
    "new_file",
    "sync_directory",
    "unnamed_file",
    "write_all",
    "write_at",
    "write_file",
)

#: Of the final name, in the temporary one: with the rest it stays below 255 bytes.
_KEPT_NAME_BYTES = 200


@contextlib.contextmanager
def new_file(
    path: str | os.PathLike[str],
    *,
    replace: bool = True,
    inputs: Iterable[str | os.PathLike[str] | int] = (),
) -> Iterator[tuple[int, Path]]:
    """Open a new file for writing; it takes the name ``path`` when the block ends without error.

    Yields its descriptor (borrowed, read and write) and its temporary path, for programs that want
    a name. A program may replace the file under that path: what the path names at the end is what
    is kept. ``replace=False`` refuses an existing ``path``. ``inputs`` are as for
    ``check_output``.

    Raises:
        CallError: as ``check_output``; ``denied``, ``resource``, ``not_found``..., by errno; step
            "create".
    """
    inputs = tuple(inputs)
    check_output(path, replace=replace, inputs=inputs)
    final = Path(path)
    kept = os.fsdecode(os.fsencode(final.name)[:_KEPT_NAME_BYTES])
    temporary = final.with_name(f".{kept}.{secrets.token_hex(4)}.part")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with OsErrors("create", final):
        fd = os.open(temporary, flags, 0o644)
    with contextlib.ExitStack() as undo:
        undo.callback(_unlink, temporary)
        undo.callback(os.close, fd)
        yield fd, temporary
        check_output(path, replace=replace, inputs=inputs)
        with OsErrors("write", final):
            _publish(temporary, final, replace=replace)


def write_file(
    path: str | os.PathLike[str],
    content: bytes,
    *,
    replace: bool = True,
    inputs: Iterable[str | os.PathLike[str] | int] = (),
) -> None:
    """Write a whole small file.

    Raises:
        CallError: as ``new_file``.
    """
    with new_file(path, replace=replace, inputs=inputs) as (fd, _), OsErrors("write", path):
        write_all(fd, content)


def write_all(fd: int, content: bytes) -> None:
    """Write all of ``content`` at the file's position.

    Raises:
        OSError: as write(2).
    """
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def check_output(
    path: str | os.PathLike[str],
    *,
    replace: bool = True,
    inputs: Iterable[str | os.PathLike[str] | int] = (),
) -> None:
    """Refuse a path that an output cannot have, before any work is done for it.

    ``inputs`` are paths and descriptors (borrowed) of what the command reads: the output must be
    none of them, under whatever name, and no existing file in a directory among them.

    Raises:
        CallError: ``invalid``, no name of a file, not a regular file, or one of the inputs;
            ``conflict``, it exists and ``replace`` is False; by errno.
    """
    text = os.fspath(path)
    try:
        with OsErrors("create", text):
            existing = facts_of_output(text)
    except ValueError as why:
        raise _refused(text, str(why)) from None
    if existing is None:
        return
    if not replace:
        refusal = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        raise from_os_error(refusal, step="create", object=text)
    for each in inputs:
        _refuse_input(text, existing, each)


def _refuse_input(text: str, existing: os.stat_result, read: str | os.PathLike[str] | int) -> None:
    try:
        facts = os.stat(read)
    except (OSError, ValueError):  # reading it fails, too, with an error of its own
        return
    if os.path.samestat(facts, existing):
        raise _refused(text, "the command reads this file")
    if stat.S_ISDIR(facts.st_mode) and not isinstance(read, int):
        top, place = os.path.realpath(read), os.path.realpath(text)
        if os.path.commonpath((top, place)) == top:
            raise _refused(text, f"it is a file of the source {os.fspath(read)!r}")


def _refused(text: str, why: str) -> CallError:
    return CallError(
        "invalid", f"cannot write the output {text!r}: {why}", step="create", object=text
    )


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
    with OsErrors("create a spool file in", directory):
        # falls back to a name that is gone at once, where the file system has no O_TMPFILE
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # closed below
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
