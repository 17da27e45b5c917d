"""The shell of a mounted root: a program that enters the root and becomes the shell there.

It is a program of its own because ``posix_spawn`` cannot change the root of what it starts. The
root's proc, sys and dev are those of the guest, bound in a mount namespace that ends with the
shell, so that nothing is mounted for other processes.
"""

import os
import signal
import sys

from guestagent.storage.syscalls import (
    CLONE_NEWNS,
    MS_BIND,
    MS_PRIVATE,
    MS_REC,
    mount,
    unshare,
)
from vsock.errors import CallError

__all__ = ("find_shell", "main", "shell_in")

#: Programs and the arguments that make them a shell; the first that exists is used.
_SHELLS = (
    ("/bin/sh",),
    ("/usr/bin/sh",),
    ("/bin/bash",),
    ("/usr/bin/bash",),
    ("/bin/busybox", "sh"),
    ("/usr/bin/busybox", "sh"),
)
_KERNEL_DIRECTORIES = ("proc", "sys", "dev")
#: Exit status of a shell for a program that it cannot find.
_NOT_FOUND = 127
_START = "import sys; sys.path[:] = {!r}; from guestagent.console.chroot import main; main()"


def find_shell() -> tuple[str, ...]:
    """Return the first shell that can be executed, as arguments.

    Raises:
        CallError: ``not_found``, there is none.
    """
    for arguments in _SHELLS:
        if os.access(arguments[0], os.X_OK):
            return arguments
    raise CallError(
        "not_found",
        "there is no shell",
        hint=f"looked for {', '.join(' '.join(arguments) for arguments in _SHELLS)}",
    )


def shell_in(root: str) -> tuple[str, ...]:
    """Return the command that becomes the shell in the directory ``root``.

    Raises:
        CallError: ``not_found``, ``root`` is no directory.
    """
    if not os.path.isdir(root):
        raise CallError("not_found", f"{root!r} is no directory", object=root)
    interpreter = os.readlink("/proc/self/exe")
    return (interpreter, "-IS", "-c", _START.format(sys.path), root)


def main() -> None:
    """Enter the root that is the first argument, and become the shell with the other arguments."""
    root, *arguments = sys.argv[1:]
    try:
        _enter(root)
        shell = find_shell()
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # the interpreter ignores them
            signal.signal(number, signal.SIG_DFL)
        os.execv(shell[0], (*shell, *arguments))
    except (OSError, CallError) as error:
        hint = getattr(error, "hint", None)
        sys.stderr.write(f"{root}: {error}{f' ({hint})' if hint else ''}\n")
    sys.exit(_NOT_FOUND)


def _enter(root: str) -> None:
    # keeps the mount at the root in use, so that an unmount is refused and names the shell
    os.set_inheritable(os.open(root, os.O_PATH | os.O_DIRECTORY), True)
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    for name in _KERNEL_DIRECTORIES:
        target = f"{root}/{name}"
        if os.path.isdir(target) and not os.path.islink(target):
            mount(f"/{name}", target, None, MS_BIND | MS_REC)
    os.chroot(root)
    os.chdir("/")
