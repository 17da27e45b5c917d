"""Make a file system on an empty scratch device, with the tools that the guest has for it."""

import os
import signal

from guestagent.storage.filesystems import TABLE
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("forbid_programs", "make_filesystem")

#: The end of what a program says is kept: where it gives its reason.
_SAID_BYTES = 1024
_SEARCH = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
_is_forbidden = False


def forbid_programs() -> None:
    """Refuse to format from now on: this process leaves the root whose programs it may trust."""
    global _is_forbidden
    _is_forbidden = True


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
            said = (said + piece)[-_SAID_BYTES:]
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
