"""Who keeps a mount or a device busy: the second half of every honest EBUSY.

The kernel does not tell. What can be seen is: processes with an open file, a working or root
directory, a program or a mapping on the file system; mounts, in any mount namespace; overlays that
stand on a directory; device-mapper devices, loop devices and swap that stand on a device.
"""

import os
import stat

from guestagent.api.layers import Holder
from guestagent.storage.mountinfo import Mount, lowerdirs_of, read_mounts
from vsock.deadline import Deadline

__all__ = ("find_holders",)

_PROCESS_DETAILS = 4  # as many files of one process are named


def find_holders(
    dev: str,
    deadline: Deadline,
    *,
    target: str | None = None,
    proc_root: str = "/proc",
    sys_root: str = "/sys",
) -> tuple[Holder, ...]:
    """Return who uses the file system on ``dev`` (MAJOR:MINOR), or the block device itself.

    Args:
        deadline: looking stops there; what was found until then is returned.
        target: the mount in question, which is no holder of itself; what stands on it is.
    """
    found = _dm_and_loop_holders(dev, sys_root)
    found += _swap_holders(dev, proc_root)
    namespaces: set[str] = set()
    for pid in _pids(proc_root):
        if deadline.expired or deadline.cancelled:
            break
        process = f"{proc_root}/{pid}"
        found += _process_holders(process, pid, dev)
        namespace = _read_link(f"{process}/ns/mnt")
        if namespace and namespace not in namespaces:
            # our own comes first: only there is the target itself no holder
            own = not namespaces or namespace == _read_link(f"{proc_root}/self/ns/mnt")
            namespaces.add(namespace)
            found += _mount_holders(process, dev, target if own else None, None if own else pid)
    return tuple(found)


def _pids(proc_root: str) -> list[str]:
    numbers = [name for name in os.listdir(proc_root) if name.isdigit()]
    own = str(os.getpid())
    return sorted(numbers, key=lambda pid: (pid != own, int(pid)))


def _read_link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:  # the process ended, or is not ours to look into
        return None


def _process_holders(process: str, pid: str, dev: str) -> list[Holder]:
    major, _, minor = dev.partition(":")
    number = os.makedev(int(major), int(minor))
    uses = [name for name in ("cwd", "root", "exe") if _is_on(f"{process}/{name}", number)]
    try:
        files = os.listdir(f"{process}/fd")
    except OSError:  # as above
        files = []
    uses += [
        f"fd {name} ({_read_link(f'{process}/fd/{name}')})"
        for name in files
        if _is_on(f"{process}/fd/{name}", number)
    ]
    uses += _mapped_files(process, int(major), int(minor))
    if not uses:
        return []
    detail = ", ".join(uses[:_PROCESS_DETAILS])
    if len(uses) > _PROCESS_DETAILS:
        detail += f" and {len(uses) - _PROCESS_DETAILS} more"
    return [Holder(kind="process", name=f"{_command(process)}[{pid}]", detail=detail)]


def _is_on(path: str, number: int) -> bool:
    """Say whether the file is on that file system, or is that block device."""
    try:
        found = os.stat(path)
    except OSError:  # a socket of another family, a process that ended
        return False
    return found.st_dev == number or (stat.S_ISBLK(found.st_mode) and found.st_rdev == number)


def _mapped_files(process: str, major: int, minor: int) -> list[str]:
    wanted = f"{major:02x}:{minor:02x}"
    paths: dict[str, None] = {}
    for line in _lines(f"{process}/maps"):
        words = line.split(None, 5)
        if len(words) == 6 and words[3] == wanted:
            paths[words[5]] = None
    return [f"mapping of {path}" for path in paths]


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
    process: str, dev: str, target: str | None, foreign_pid: str | None
) -> list[Holder]:
    try:
        mounts = read_mounts(f"{process}/mountinfo")
    except OSError:  # as above
        return []
    where = "" if foreign_pid is None else f" in the mount namespace of process {foreign_pid}"
    found = []
    ids = {mount.mount_id for mount in mounts if mount.target == target}
    for mount in mounts:
        if mount.dev == dev and mount.target != target:
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
    major, _, minor = dev.partition(":")
    number = os.makedev(int(major), int(minor))
    found = []
    for name in sorted(os.listdir(f"{sys_root}/block")):
        backing = _lines(f"{sys_root}/block/{name}/loop/backing_file")
        if backing and _is_on(backing[0], number):
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
