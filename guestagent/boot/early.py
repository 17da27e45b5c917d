"""The entry point of the boot image: starts what takes time, then imports and becomes PID 1.

Little is imported here, so that the kernel loads its modules while the agent is still read.
"""

import os

from guestagent.boot.modules import Loading, start_loading
from guestagent.storage import syscalls

__all__ = ("main",)

_MOUNTS = (
    # source, target, type, flags, options; what is there already (an outer init's) stays
    ("proc", "/proc", "proc", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", syscalls.MS_NOSUID, "mode=0755"),
    ("tmpfs", "/run", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=1777"),
    ("devpts", "/dev/pts", "devpts", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, "ptmxmode=0666"),
)


def main() -> None:
    """Run as PID 1. Never returns."""
    loading: Loading | OSError
    try:
        loading = _begin()
    except OSError as error:  # init tells of it, where the log goes
        loading = error
    try:
        from guestagent.boot.init import main as init_main
    except BaseException as error:  # PID 1 must never end: the kernel would panic
        os.write(2, f"the agent cannot be imported: {error!r}\n".encode())
        syscalls.reboot(syscalls.LINUX_REBOOT_CMD_POWER_OFF)
        raise
    init_main(loading)


def _begin() -> Loading:
    """Mount the API file systems and begin to load the kernel modules.

    Raises:
        OSError: a directory cannot be made, or there can be no other process.
    """
    for source, target, kind, flags, options in _MOUNTS:
        os.makedirs(target, mode=0o755, exist_ok=True)
        try:
            syscalls.mount(source, target, kind, flags, options)
        except OSError:
            # EBUSY: the kernel has mounted devtmpfs by itself. What is really missing fails later,
            # and by name: a cmdline that cannot be read, a device that does not come
            continue
    return start_loading()
