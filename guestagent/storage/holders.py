"""Holders of a file system or a block device: what an EBUSY of the kernel does not name.

Holders are processes with an open file, a working or root directory, a program or a mapping on it;
mounts in any mount namespace; overlays that have a directory of it; device-mapper devices, loop
devices and swap on a block device. A file of an overlay may have the number of another file system,
so that files are compared by the id of their mount, too.
"""

import contextlib
import os
from collections.abc import Iterator

from guestagent.api.layers import Holder
from guestagent.storage import syscalls
from guestagent.storage.mountinfo import Mount, lowerdirs_of, mounts_of_dev, read_mounts
from vsock.deadline import Deadline

__all__ = ("find_holders", "mounts_elsewhere")

_PF_KTHREAD = 0x00200000
#: Files that are named of one process.
_PROCESS_DETAILS = 4
#: Holders that are returned.
_MAX_HOLDERS = 64


def find_holders(
    dev: str,
    deadline: Deadline,
    *,
    target: str | None = None,
    proc_root: str = "/proc",
    sys_root: str = "/sys",
) -> tuple[Holder, ...]:
    """Return the holders of the file system on ``dev`` (MAJOR:MINOR), or of that block device.

    Args:
        deadline: the search ends there; what was found until then is returned.
        target: the mount in question, which is no holder itself; what stands on it is.
    """
    found = _dm_and_loop_holders(dev, sys_root)
    found += _swap_holders(dev, proc_root)
    mount_ids: set[int] = set()
    for pid, path in _namespaces(proc_root, deadline):
        try:
            mounts = read_mounts(path)
        except OSError:  # the process ended, or is not ours to look into
            continue
        mount_ids.update(mount.mount_id for mount in mounts if mount.dev == dev)
        found += _mount_holders(mounts, dev, target if pid is None else None, pid)
    for pid in _pids(proc_root):
        if deadline.expired or deadline.cancelled or len(found) >= _MAX_HOLDERS:
            break
        found += _process_holders(f"{proc_root}/{pid}", pid, dev, mount_ids)
    return tuple(found[:_MAX_HOLDERS])


def mounts_elsewhere(
    devs: frozenset[str], deadline: Deadline, *, proc_root: str = "/proc"
) -> tuple[str, ...]:
    """Return those of ``devs`` that are mounted in another mount namespace than our own.

    Raises:
        CallError: ``timeout`` or ``cancelled``, not all namespaces were looked at.
    """
    found: set[str] = set()
    for pid, path in _namespaces(proc_root, deadline):
        if pid is None:
            continue
        with contextlib.suppress(OSError):  # the process ended
            found.update(dev for dev in devs if mounts_of_dev(dev, path))
    deadline.check("look for mounts in other namespaces")
    return tuple(sorted(found))


def _namespaces(proc_root: str, deadline: Deadline) -> Iterator[tuple[str | None, str]]:
    """Yield the path of the mountinfo of our own mount namespace with None, then that of each other
    namespace with a process that is in it."""
    seen: set[str] = set()
    for pid in _pids(proc_root):
        if deadline.expired or deadline.cancelled:
            return
        namespace = _read_link(f"{proc_root}/{pid}/ns/mnt")
        if namespace is None or namespace in seen:
            continue
        is_own = not seen or namespace == _read_link(f"{proc_root}/self/ns/mnt")
        seen.add(namespace)
        yield None if is_own else pid, f"{proc_root}/{pid}/mountinfo"


def _pids(proc_root: str) -> list[str]:
    """Return the ids of all processes but the kernel's threads, our own first."""
    threads = _kernel_threads(proc_root)
    numbers = [name for name in os.listdir(proc_root) if name.isdigit() and name not in threads]
    own = str(os.getpid())
    return sorted(numbers, key=lambda pid: (pid != own, int(pid)))


def _kernel_threads(proc_root: str) -> frozenset[str]:
    """Return the ids of the kernel's threads, which hold no file and are in no mount namespace of
    their own. 500 layers have a thousand of them (unmount an overlay: 107 -> 8 ms).

    They are the children of kthreadd. It is process 2, except in a process namespace, and has
    PF_KTHREAD among its flags (include/linux/sched.h; the seventh word of stat after the name).
    """
    words = "".join(_lines(f"{proc_root}/2/stat")).rpartition(")")[2].split()
    if len(words) < 7 or not int(words[6]) & _PF_KTHREAD:
        return frozenset()
    return frozenset(("2", *"".join(_lines(f"{proc_root}/2/task/2/children")).split()))


def _read_link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:  # the process ended, or is not ours to look into
        return None


def _process_holders(process: str, pid: str, dev: str, mount_ids: set[int]) -> list[Holder]:
    names = [name for name in ("cwd", "root", "exe") if _is_on(f"{process}/{name}", dev, mount_ids)]
    try:
        files = os.listdir(f"{process}/fd")
    except OSError:  # the process ended, or is not ours to look into
        files = []
    names += [
        f"fd {name} ({_read_link(f'{process}/fd/{name}')})"
        for name in files
        if _is_on(f"{process}/fd/{name}", dev, mount_ids)
    ]
    names += _mapped_files(process, dev, mount_ids)
    if not names:
        return []
    detail = ", ".join(names[:_PROCESS_DETAILS])
    if len(names) > _PROCESS_DETAILS:
        detail += f" and {len(names) - _PROCESS_DETAILS} more"
    return [Holder(kind="process", name=f"{_command(process)}[{pid}]", detail=detail)]


def _is_on(path: str, dev: str, mount_ids: set[int]) -> bool:
    """Say whether a file is on that file system, or is that block device."""
    try:
        block_dev, file_dev, mount_id = syscalls.block_and_mount_of(path)
    except OSError:  # a socket of another family, a process that ended
        return False
    return dev in (file_dev, block_dev) or mount_id in mount_ids


def _mapped_files(process: str, dev: str, mount_ids: set[int]) -> list[str]:
    major, _, minor = dev.partition(":")
    wanted = f"{int(major):02x}:{int(minor):02x}"
    paths: dict[str, bool] = {}
    for line in _lines(f"{process}/maps"):
        words = line.split(None, 5)
        if len(words) < 6 or not words[5].startswith("/") or words[5] in paths:
            continue
        paths[words[5]] = words[3] == wanted or (
            bool(mount_ids) and _is_on(f"{process}/map_files/{words[0]}", dev, mount_ids)
        )
    return [f"mapping of {path}" for path, is_on in paths.items() if is_on]


def _command(process: str) -> str:
    lines = _lines(f"{process}/comm")
    return lines[0] if lines else "?"


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:  # the process ended, or is not ours to look into
        return []


def _mount_holders(
    mounts: tuple[Mount, ...], dev: str, target: str | None, foreign_pid: str | None
) -> list[Holder]:
    where = "" if foreign_pid is None else f" in the mount namespace of process {foreign_pid}"
    found = []
    at_target = [mount for mount in mounts if mount.target == target]
    # the first there is the one in question; the same file system mounted on top is a holder
    own_id = next((mount.mount_id for mount in at_target if mount.dev == dev), None)
    ids = {mount.mount_id for mount in at_target}
    for mount in mounts:
        if mount.dev == dev and mount.mount_id != own_id:
            found.append(Holder(kind="mount", name=mount.target, detail=f"same device{where}"))
        elif mount.parent_id in ids and mount.target != target:
            found.append(Holder(kind="mount", name=mount.target, detail="mounted below it"))
        if target is not None and _stands_on(mount, target):
            found.append(Holder(kind="overlay", name=mount.target, detail=f"layer {target}"))
    return found


def _stands_on(mount: Mount, target: str) -> bool:
    """Say whether an overlay names the target, or something below it, among its directories."""
    if mount.filesystem != "overlay":
        return False
    words = (option.partition("=") for option in mount.super_options)
    paths = [value for key, _, value in words if key in ("upperdir", "workdir")]
    paths += lowerdirs_of(mount)
    return any(path == target or path.startswith(f"{target}/") for path in paths)


def _dm_and_loop_holders(dev: str, sys_root: str) -> list[Holder]:
    found = []
    directory = f"{sys_root}/dev/block/{dev}/holders"
    try:
        names = sorted(os.listdir(directory))
    except OSError:  # not a block device
        names = []
    for name in names:
        title = _lines(f"{directory}/{name}/dm/name")
        found.append(Holder(kind="dm", name=title[0] if title else name, detail=f"/dev/{name}"))
    return found + _loop_holders(dev, sys_root)


def _loop_holders(dev: str, sys_root: str) -> list[Holder]:
    """Find the loop devices whose file is on the file system (by its path, as far as we see it)."""
    found = []
    for name in sorted(os.listdir(f"{sys_root}/block")):
        backing = _lines(f"{sys_root}/block/{name}/loop/backing_file")
        if backing and _is_on(backing[0], dev, set()):
            found.append(
                Holder(kind="loop", name=f"/dev/{name}", detail=f"loop device over {backing[0]}")
            )
    return found


def _swap_holders(dev: str, proc_root: str) -> list[Holder]:
    found = []
    for line in _lines(f"{proc_root}/swaps")[1:]:
        path = line.split()[0].replace("\\040", " ")
        try:
            number = os.stat(path).st_rdev
        except OSError:  # the node is gone, the swap is not: nothing to compare
            continue
        if f"{os.major(number)}:{os.minor(number)}" == dev:
            found.append(Holder(kind="swap", name=path, detail="swap space"))
    return found
