"""A file-system context: the kernel object in which a superblock is configured and created.

What the kernel has to say about a failure is written into the context and nowhere else on some
kernels; every error here carries those lines.
"""

import errno
import functools
import os
from collections.abc import Collection

from guestagent.storage import syscalls
from vsock.closeable import FdOwner

__all__ = ("FsContext", "FsContextError", "attach", "flag_bits", "is_supported")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Result = TypeVar("Result")

_LOG_LINE_BYTES = 4096
#: name -> (attribute of fsmount, flag of mount(2))
_FLAGS = {
    "ro": (syscalls.MOUNT_ATTR_RDONLY, syscalls.MS_RDONLY),
    "nosuid": (syscalls.MOUNT_ATTR_NOSUID, syscalls.MS_NOSUID),
    "nodev": (syscalls.MOUNT_ATTR_NODEV, syscalls.MS_NODEV),
    "noexec": (syscalls.MOUNT_ATTR_NOEXEC, syscalls.MS_NOEXEC),
    "noatime": (syscalls.MOUNT_ATTR_NOATIME, syscalls.MS_NOATIME),
    "nodiratime": (syscalls.MOUNT_ATTR_NODIRATIME, syscalls.MS_NODIRATIME),
}


class FsContextError(OSError):
    """An OSError with the ``step`` (mount-open, mount-option, mount-create, mount-attach) and the
    kernel's own lines in ``log``, each as ``LEVEL TEXT`` with level e, w or i."""

    step = ""
    log: tuple[str, ...] = ()

    @classmethod
    def of(cls, step: str, cause: OSError, log: tuple[str, ...] = ()) -> "FsContextError":
        text = "; ".join((str(cause.strerror), *log))
        error = cls(cause.errno, text, cause.filename)
        error.step = step
        error.log = log
        return error


class FsContext(FdOwner):
    """An open context for one file-system type. Use as a context manager."""

    def __init__(self, filesystem: str) -> None:
        """Open it.

        Raises:
            FsContextError: ENODEV, the kernel does not know the type; ENOSYS, it has no fsopen.
        """
        try:
            self._fd = syscalls.fsopen(filesystem)
        except OSError as error:
            raise FsContextError.of("mount-open", error) from error
        self.filesystem = filesystem

    def set(self, key: str, value: "str | None" = None) -> None:
        """Set an option to a text, or a flag where ``value`` is None."""
        if value is None:
            self._do("mount-option", lambda: syscalls.fsconfig_flag(self._fd, key))
        else:
            text = value
            self._do("mount-option", lambda: syscalls.fsconfig_string(self._fd, key, text))

    def set_fd(self, key: str, fd: int) -> None:
        """Set an option to an open file, which is borrowed."""
        self._do("mount-option", lambda: syscalls.fsconfig_fd(self._fd, key, fd))

    def create(self, filename: str) -> None:
        """Create the superblock; ``filename`` is named in errors."""
        self._do("mount-create", lambda: syscalls.fsconfig_create(self._fd, filename))

    def mount(self, attributes: int, filename: str) -> int:
        """Return a detached mount of the created superblock; the caller owns the descriptor."""
        return self._do("mount-create", lambda: syscalls.fsmount(self._fd, attributes, filename))

    def log(self) -> tuple[str, ...]:
        """Take the kernel's lines out of the context."""
        lines: list[str] = []
        while True:
            try:
                line = os.read(self._fd, _LOG_LINE_BYTES)
            except OSError:  # ENODATA: no more; on anything else there is nothing to show either
                return tuple(lines)
            if not line:
                return tuple(lines)
            lines.append(line.decode("utf-8", "backslashreplace").strip())

    def _do(self, step: str, action: "Callable[[], Result]") -> "Result":
        try:
            return action()
        except OSError as error:
            raise FsContextError.of(step, error, self.log()) from error


def flag_bits(flags: Collection[str]) -> tuple[int, int]:
    """Return the bits of named flags, for fsmount and for mount(2)."""
    return _flag_bits(tuple(flags))


@functools.lru_cache(maxsize=64)
def _flag_bits(flags: tuple[str, ...]) -> tuple[int, int]:
    attributes = bits = 0
    for flag in flags:
        if flag not in _FLAGS:
            raise ValueError(f"mount flag must be one of {', '.join(_FLAGS)}, got {flag!r}")
        attributes |= _FLAGS[flag][0]
        bits |= _FLAGS[flag][1]
    return attributes, bits


def attach(mount_fd: int, target: "int | str") -> None:
    """Put a detached mount on a directory, given open or by path; both are borrowed."""
    try:
        if isinstance(target, int):
            syscalls.move_mount(mount_fd, target, filename=f"fd {target}")
        else:
            syscalls.move_mount(mount_fd, syscalls.AT_FDCWD, target)
    except OSError as error:
        raise FsContextError.of("mount-attach", error) from error


_supported: bool | None = None


def is_supported() -> bool:
    """Say whether the kernel has fsopen and lets us use it (a sandbox may not)."""
    global _supported
    if _supported is None:
        try:
            FsContext("tmpfs").close()
            _supported = True
        except OSError as error:
            _supported = error.errno not in (errno.ENOSYS, errno.EPERM)
    return _supported
