"""Directories of runs: gone with the run; those of a run that was killed, by the next one.

A directory is named after the process that made it, and locked. The lock is handed down to the
programs of the run, so that it lasts for as long as any of them does: a directory may go when its
process is dead and no process holds its lock. The lock alone would not do, since a directory exists
for a moment before it is locked. The process number alone would not do, since it means another
process in another process namespace.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ("RunDirectory", "run_directory")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDirectory:
    """``path``, and the descriptor whose inheritors keep it from being taken for left behind."""

    path: Path
    lock_fd: int


@contextlib.contextmanager
def run_directory(prefix: str) -> Iterator[RunDirectory]:
    """Make a directory whose name begins with ``prefix``, and remove it in the end.

    Those of the same prefix that killed runs left behind are removed first.

    Raises:
        OSError: it cannot be made.
    """
    _remove_stale(Path(tempfile.gettempdir()), prefix)
    path = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield RunDirectory(path=path, lock_fd=fd)


def _remove_stale(parent: Path, prefix: str) -> None:
    """Tidy up as far as it goes: what cannot be removed is another user's, or the next run's."""
    for path in parent.glob(f"{prefix}*"):
        pid = path.name.removeprefix(prefix).partition("-")[0]
        if not pid.isdecimal() or _is_alive(int(pid)):
            continue
        with contextlib.suppress(OSError):
            _remove_unlocked(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove_unlocked(path: Path) -> None:
    # following no link: another user may have made this name
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(fd)
