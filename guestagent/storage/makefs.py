"""Make a file system on an empty scratch device, with the tools that the guest has for it."""

import os
import signal

from guestagent.storage.filesystems import TABLE
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("make_filesystem",)

_SEARCH = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")


def make_filesystem(filesystem: str, node: str, deadline: Deadline) -> None:
    """Format ``node``; everything on it is lost.

    Raises:
        CallError: ``unsupported``, the guest lacks the program; ``device``, it failed;
            ``timeout`` or ``cancelled``, it was ended.
    """
    program, *options = TABLE[filesystem].mkfs
    path = next((f"{d}/{program}" for d in _SEARCH if os.access(f"{d}/{program}", os.X_OK)), None)
    if path is None:
        raise CallError(
            "unsupported",
            f"cannot format {node}: this guest has no {program}",
            step="format",
            object=node,
            hint=f"build the guest with {program}, or hand in a formatted device",
        )
    arguments = (program, *options, node)
    child = os.posix_spawn(path, arguments, {"PATH": ":".join(_SEARCH)}, setsigmask=())
    pid_fd = os.pidfd_open(child)
    try:
        deadline.wait([pid_fd], f"{program} {node}")
    except CallError:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(pid_fd)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        raise CallError(
            "device", f"{program} {node} ended with {status}", step="format", object=node
        )
