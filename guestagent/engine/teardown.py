"""Unmounting: until the file system and its devices are gone, or ``busy`` with the holders.

The kernel lets a mount go although the file system stays in use: by other mounts, other mount
namespaces, or processes inside a detached mount. So it is checked before and after.
"""

import errno
import os
from functools import partial

from guestagent.api.layers import Holder, UnmountReply
from guestagent.engine.state import EngineState
from guestagent.engine.transaction import Transaction
from guestagent.storage import syscalls
from guestagent.storage.blockdev import LATE_CLOSE_SECONDS
from guestagent.storage.devicemapper import devices
from guestagent.storage.holders import find_holders, mounts_elsewhere
from guestagent.storage.mount import unmount
from guestagent.storage.mountinfo import Mount, find_mount, is_reused, mounts_of_dev, read_text
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.retry import has_errno, retry

__all__ = (
    "busy_error",
    "nothing_to_unmount",
    "refuse_held",
    "refuse_mounts_elsewhere",
    "refuse_other_mounts",
    "refuse_shared_devices",
    "remove_devices",
    "remove_directories",
    "undo_deadline",
    "unmount_target",
)

#: Looking for holders reads all of /proc; it must not make an answer late.
_HOLDER_SECONDS = 2.0
#: All mount namespaces are looked at within this.
_NAMESPACE_SECONDS = 10.0
_NO_HOLDER = "no holder was found"
#: A device without holders is gone within this.
_GONE_SECONDS = 5.0


def undo_deadline(state: EngineState) -> Deadline:
    """Return the deadline of a clean-up: its own, because the request's may be why we clean up."""
    return Deadline(state.rules.undo_seconds)


def nothing_to_unmount(op: Transaction) -> UnmountReply:
    """Return the reply for an id that is not mounted."""
    return UnmountReply(unmounted=(), removed_devices=(), timings_ms=op.timings_ms, already=True)


def unmount_target(
    target: str, op: Transaction, *, dev: str | None = None, mountinfo: str | None = None
) -> bool:
    """Unmount what is mounted at ``target``; return whether something was.

    ``dev`` (MAJOR:MINOR) is that of the agent's mount; with None any mount there is unmounted.
    ``mountinfo`` is the kernel's table where the caller has just read it.

    Raises:
        CallError: ``busy``, with the holders named in the hint; ``conflict``, another mount
            covers the agent's.
    """
    with op.step("unmount", target, code="mount"):
        mount = find_mount(target, text=mountinfo)
        if mount is None:
            return False
        if dev is not None and mount.dev != dev:
            raise _foreign(mount, dev)
        try:
            unmount(target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise busy_error(target, mount.dev, op) from error
    return True


def _foreign(mount: Mount, dev: str) -> CallError:
    return CallError(
        "conflict",
        f"{mount.target!r} is covered by {mount.filesystem} of {mount.source!r} ({mount.dev}), "
        f"not ours ({dev})",
        object=mount.target,
        hint="another program mounted it; unmount that first",
    )


def refuse_other_mounts(state: EngineState, dev: str, target: str, op: Transaction) -> str:
    """Check, before an unmount, that the file system on ``dev`` is mounted at ``target`` only, and
    where other layers are on the same one. Return the kernel's table of mounts.

    Raises:
        CallError: ``busy``, it is mounted elsewhere in our mount namespace; all holders are named.
    """
    allowed = {target, *state.inventory.targets_on(dev)}
    mountinfo = read_text()
    for mount in mounts_of_dev(dev, text=mountinfo):
        if mount.target not in allowed:
            raise busy_error(target, dev, op)
        allowed.discard(mount.target)
    return mountinfo


def refuse_mounts_elsewhere(devs: frozenset[str], target: str, op: Transaction) -> None:
    """Check, before an unmount, that no other mount namespace has one of the file systems ``devs``.

    Raises:
        CallError: ``busy``, with the holders.
    """
    with op.deadline.part(_NAMESPACE_SECONDS) as limit:
        for dev in mounts_elsewhere(devs, limit):
            raise busy_error(target, dev, op)


def refuse_shared_devices(
    state: EngineState, names: tuple[str, ...], target: str, op: Transaction
) -> None:
    """Check, before an unmount, that the dm devices (topmost first) will go with the mount.

    Raises:
        CallError: ``busy``, one has other users than what is right above it; they are named.
    """
    for name in names:
        if not _is_shared(state, name):
            continue
        try:
            with op.deadline.part(LATE_CLOSE_SECONDS) as limit:
                retry(
                    partial(_refuse_shared, state, name),
                    limit,
                    when=has_errno(errno.EBUSY),
                    step="look",
                )
        except OSError as error:
            info = state.control.find(name=name)
            if error.errno != errno.EBUSY or info is None:
                raise
            raise busy_error(target, info.dev, op) from error


def _is_shared(state: EngineState, name: str) -> bool:
    """Return whether a dm device has more than one user."""
    info = state.control.find(name=name)
    return info is not None and info.open_count > 1


def _refuse_shared(state: EngineState, name: str) -> None:
    """Raise OSError (EBUSY) where a dm device has more than one user."""
    if _is_shared(state, name):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), name)


def refuse_held(
    state: EngineState,
    dev: str,
    target: str,
    op: Transaction,
    *,
    filesystem: str,
    name: str | None = None,
) -> None:
    """Check, after an unmount, that the kernel has dropped the file system that was on ``dev``.

    It has not while another mount namespace, a detached mount with a process inside, or an overlay
    has it. ``filesystem`` is its type; ``name`` is the dm device of that number, if it is one.

    Raises:
        CallError: ``busy``, with the holders.
    """
    if syscalls.has_superblock(dev) is False:
        return
    if state.inventory.targets_on(dev) - {target}:  # another layer is on the same file system
        return
    if name is not None:
        info = state.control.find(name=name)
        if info is None or info.open_count == 0:  # another device has its number by now
            return
    if is_reused(dev, filesystem, state.inventory.is_target):
        return
    error = busy_error(target, dev, op)
    if syscalls.has_superblock(dev) is None and error.hint == _NO_HOLDER:
        return
    raise error


def busy_error(target: str, dev: str, op: Transaction, more: tuple[Holder, ...] = ()) -> CallError:
    """Return the error for something that cannot go because it is in use, naming its holders.

    ``more`` are holders that are known already; with an empty ``dev`` no others are looked for.
    """
    holders = more
    if dev:
        with op.deadline.part(_HOLDER_SECONDS) as limit:
            holders += find_holders(dev, limit, target=target or None)
    named = ", ".join(f"{holder.kind} {holder.name} ({holder.detail})" for holder in holders[:16])
    return CallError(
        "busy",
        f"{target!r} is in use",
        errno=errno.EBUSY,
        step="unmount",
        object=target,
        hint=f"held by {named}" if named else _NO_HOLDER,
        kernel_log=op.kernel_lines(),
    )


def remove_devices(state: EngineState, names: tuple[str, ...], op: Transaction) -> tuple[str, ...]:
    """See dm devices gone, topmost first; return their names.

    Deferred removal has the kernel take them away by itself once the mount is gone, so this mostly
    waits; what is not so marked is removed here.

    Raises:
        CallError: ``busy``, naming what is left and its holders; ``timeout`` or ``cancelled``.
    """
    if not names:
        return ()
    with op.step("remove", ", ".join(names)), op.deadline.part(_GONE_SECONDS) as limit:
        try:
            devices.remove_devices(state.control, names, limit)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            op.deadline.check("remove")
            name = str(error.filename)
            info = state.control.find(name=name)
            raise busy_error(name, info.dev if info else "", op) from error
    return names


def remove_directories(paths: tuple[str, ...]) -> None:
    """Remove directories that a mount made, innermost first, as far as they are empty."""
    for path in reversed(paths):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EBUSY):
                return
            raise
