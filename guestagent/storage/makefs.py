"""The file system of a scratch: made, with the tools that the guest has, emptied, trimmed."""

import errno
import itertools
import os
import signal
import stat
import struct

from guestagent.storage import syscalls
from guestagent.storage.filesystems import TABLE
from vsock.deadline import Deadline
from vsock.errors import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = (
    "are_programs_forbidden",
    "empty_directory",
    "forbid_programs",
    "make_filesystem",
    "trim",
)

#: The start and the end of what a program says are kept, where it may give its reason.
_SAID_BYTES = 512
_SEARCH = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
#: include/uapi/linux/fs.h: _IOWR('X', 121, struct fstrim_range); start, length and least length of
#: a range in bytes, which comes back as what was discarded.
_FITRIM, _TRIM_RANGE = 0xC0185879, struct.Struct("=3Q")
#: A call cannot be cancelled, so that one takes at most this much of a file system.
_TRIM_BYTES = 4 << 30
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_is_forbidden = False


def forbid_programs() -> None:
    """Refuse to format from now on: this process leaves the root whose programs it may trust."""
    global _is_forbidden
    _is_forbidden = True


def are_programs_forbidden() -> bool:
    """Say whether this process has left the root whose programs it may trust."""
    return _is_forbidden


def make_filesystem(filesystem: str, node: str, deadline: Deadline) -> None:
    """Format ``node``; everything on it is lost.

    Raises:
        CallError: ``unsupported``, the guest lacks the program; ``device``, it failed;
            ``timeout`` or ``cancelled``, it was ended.
    """
    program, *options = TABLE[filesystem].mkfs
    path = next((f"{d}/{program}" for d in _SEARCH if os.access(f"{d}/{program}", os.X_OK)), None)
    if _is_forbidden:
        raise CallError(
            "unsupported",
            f"cannot format {node}: the programs of this root were not measured with the agent",
            step="format",
            object=node,
            hint="hand in a formatted device",
        )
    if path is None:
        raise CallError(
            "unsupported",
            f"cannot format {node}: this guest has no {program}",
            step="format",
            object=node,
            hint=f"build the guest with {program}, or hand in a formatted device",
        )
    said = b""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.posix_spawn(
            path,
            (program, *options, node),
            {"PATH": ":".join(_SEARCH)},
            file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)],
            setsigmask=(),
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    try:
        while True:  # until the program has closed its end, by ending
            deadline.wait([reader], f"{program} {node}")
            piece = os.read(reader, _SAID_BYTES)
            if not piece:
                break
            said += piece
            said = said[:_SAID_BYTES] + said[_SAID_BYTES:][-_SAID_BYTES:]
    except CallError:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        why = " ".join(said.decode("ascii", "replace").split())
        raise CallError(
            "device",
            f"{program} {node} ended with {status}: {why or 'it did not say why'}",
            step="format",
            object=node,
        )


def trim(directory: str, deadline: Deadline) -> int:
    """Discard the unused blocks of the file system that a directory is on; return how many bytes.

    Raises:
        OSError: EOPNOTSUPP, its device knows no discards, or does not pass them on.
        CallError: ``timeout`` or ``cancelled``; what was discarded until then is.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        space = os.fstatvfs(fd)
        done_bytes = 0
        for start_bytes in range(0, space.f_blocks * space.f_frsize, _TRIM_BYTES):
            deadline.check("trim")
            piece = bytearray(_TRIM_RANGE.pack(start_bytes, _TRIM_BYTES, 0))
            syscalls.ioctl(fd, _FITRIM, piece, directory, "FITRIM")
            done_bytes += _TRIM_RANGE.unpack(piece)[1]
        return done_bytes
    finally:
        os.close(fd)


def empty_directory(path: str, deadline: Deadline) -> None:
    """Remove all that is in a directory, however deep; no link is followed.

    Directories that are not empty are moved to the top first, so that no depth takes descriptors.

    Raises:
        OSError: EPERM, a file is immutable; ELOOP or ENOTDIR, the directory is a link or none.
        CallError: ``timeout`` or ``cancelled``; a part is gone then.
    """
    numbers = itertools.count()
    top = os.open(path, _OPEN_DIRECTORY)
    try:
        while True:
            names = _take_files_away(top, deadline)
            if not names:
                return
            for name in names:
                inner = os.open(name, _OPEN_DIRECTORY, dir_fd=top)
                try:
                    for each in _take_files_away(inner, deadline):
                        _move_up(each, inner, top, numbers)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def _take_files_away(directory: int, deadline: Deadline) -> list[str]:
    """Remove the files of an open directory; return the names of the directories in it."""
    directories = []
    with os.scandir(directory) as entries:
        for entry in entries:
            deadline.check("empty")
            if stat.S_ISDIR(entry.stat(follow_symlinks=False).st_mode):
                directories.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=directory)
    return directories


def _move_up(name: str, inner: int, top: int, numbers: "Iterator[int]") -> None:
    for number in numbers:
        try:
            os.rename(name, f"removed-{number}", src_dir_fd=inner, dst_dir_fd=top)
            return
        except OSError as error:
            # the content may have such a name itself
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
