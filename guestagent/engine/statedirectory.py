"""The directory where an agent keeps its state: its own, locked for as long as it lives."""

import binascii
import errno
import fcntl
import os
import stat

from vsock.closeable import FdOwner
from vsock.errors import CallError

__all__ = ("DEFAULT_STATE", "Counter", "StateDirectory", "refuse_foreign", "uuid_prefix")

#: Where the state is kept unless the configuration says otherwise.
DEFAULT_STATE = "/run/guestagent"


class StateDirectory(FdOwner):
    """The state directory of an agent, which no other agent can have meanwhile. A context manager.

    Source: flock(2); the kernel releases the lock when the agent ends, however it ends.
    """

    def __init__(self, path: str) -> None:
        """Make the directory if it is missing, and lock it.

        Raises:
            CallError: ``conflict``, another agent has it.
            OSError: EPERM, another user owns it or may write to it; or it cannot be made.
        """
        os.makedirs(path, mode=0o700, exist_ok=True)
        refuse_foreign(path)
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise CallError(
                "conflict",
                f"another agent has the state directory {path!r}",
                object=path,
                hint="a second agent needs a state directory of its own: guestagent.state=",
            ) from None
        except BaseException:
            self.close()
            raise


def uuid_prefix(state_directory: str) -> str:
    """Return what the uuids of an agent's dm devices begin with: each state directory but the
    default one has its own."""
    if state_directory == DEFAULT_STATE:
        return "guestagent-"
    return f"guestagent.{binascii.crc32(os.fsencode(state_directory)):08x}-"


def refuse_foreign(directory: str) -> None:
    """Refuse a directory that another user could have written to: recovery acts on its files.

    Raises:
        OSError: EPERM.
    """
    info = os.lstat(directory)
    if not stat.S_ISDIR(info.st_mode):
        why = "is a link or no directory"
    elif info.st_uid != os.geteuid():
        why = f"belongs to user {info.st_uid}, not to {os.geteuid()}"
    elif info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = f"has mode {stat.S_IMODE(info.st_mode):04o}: others may write to it"
    else:
        return
    raise OSError(errno.EPERM, f"the state directory {why}", directory)


class Counter:
    """One number in a file, written in place: a single 8-byte write, whole whenever we are killed.

    Not thread-safe.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.value = int.from_bytes(os.pread(self._fd, 8, 0), "little")

    def store(self, value: int) -> None:
        self.value = value
        os.pwrite(self._fd, value.to_bytes(8, "little"), 0)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
