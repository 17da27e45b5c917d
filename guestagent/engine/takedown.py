"""Taking things away: unmount, wait until the devices are really gone, or say who holds them."""

import errno
import os
import time

from guestagent.api import Holder, UnmountReply
from guestagent.engine.operation import Operation
from guestagent.engine.state import EngineState
from guestagent.storage.devicemapper import devices
from guestagent.storage.holders import find_holders
from guestagent.storage.mount import unmount
from guestagent.storage.mountinfo import find_mount
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = (
    "busy",
    "nothing_to_unmount",
    "remove_devices",
    "remove_directories",
    "undo_deadline",
    "unmount_target",
)

#: Looking for holders reads all of /proc; it must not make an answer late.
_HOLDER_SECONDS = 2.0
#: A device that nobody holds is gone within this; longer means that somebody does.
_GONE_SECONDS = 5.0


def undo_deadline(state: EngineState) -> Deadline:
    """Return the deadline of a clean-up: its own, because the request's may be why we clean up."""
    return Deadline(state.rules.undo_seconds)


def nothing_to_unmount(op: Operation) -> UnmountReply:
    """Return the answer for an id that nothing has: it is as if it were unmounted already."""
    return UnmountReply(unmounted=(), removed_devices=(), timings_ms=op.timings_ms, already=True)


def unmount_target(target: str, op: Operation) -> bool:
    """Unmount what is mounted at ``target``; return whether something was.

    Raises:
        CallError: ``busy``, with the holders named in the hint.
    """
    mount = find_mount(target)
    if mount is None:
        return False
    with op.step("unmount", target, code="mount"):
        try:
            unmount(target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise busy(target, mount.dev, op) from error
    return True


def busy(target: str, dev: str, op: Operation, more: tuple[Holder, ...] = ()) -> CallError:
    """Return the error for something that cannot go because it is in use, naming who uses it.

    ``more`` are holders that are known already; with an empty ``dev`` no others are looked for.
    """
    holders = more
    if dev:
        limit = Deadline(_HOLDER_SECONDS)
        holders += find_holders(dev=dev, target=target or None, deadline=limit)
    named = ", ".join(f"{holder.kind} {holder.name} ({holder.detail})" for holder in holders[:16])
    return CallError(
        "busy",
        f"{target!r} is in use",
        errno=errno.EBUSY,
        step="unmount",
        object=target,
        hint=f"held by {named}" if named else "no holder was found in this mount namespace",
        kernel_log=op.kernel_lines(),
    )


def remove_devices(state: EngineState, names: tuple[str, ...], op: Operation) -> tuple[str, ...]:
    """See dm devices gone, topmost first; return the names that were there.

    Deferred removal has the kernel take them away by itself once the mount is gone, so this mostly
    waits; what is not so marked is removed here.

    Raises:
        CallError: ``busy`` or ``timeout``, naming what is left and who holds it.
    """
    if not names:
        return ()
    with op.step("remove", ", ".join(names)):
        there = tuple(name for name in names if state.control.find(name=name) is not None)
        at = time.monotonic() + _GONE_SECONDS
        for name in there:
            _remove_one(state, name, op, Deadline(max(0.0, at - time.monotonic())))
    return there


def _remove_one(state: EngineState, name: str, op: Operation, limit: Deadline) -> None:
    try:
        devices.remove_device(state.control, name, limit)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        info = state.control.find(name=name)
        raise busy(name, info.dev if info else "", op) from error
    finally:
        limit.close()


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
