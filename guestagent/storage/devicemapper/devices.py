"""The life of a device-mapper device: created whole or not at all, removed and proved gone.

No cookies and no udev: the kernel's devtmpfs makes /dev/dm-N, and where it does not we do.
"""

import errno
import os
from collections.abc import Sequence

from guestagent.storage.blockdev import ensure_node
from guestagent.storage.devicemapper.control import Control, DeviceInfo
from guestagent.storage.devicemapper.targets import Target, first_lines
from guestagent.storage.uevents import UeventSocket
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = (
    "DmStepError",
    "create_device",
    "remove_device",
    "remove_devices",
    "set_deferred_remove",
    "wait_gone",
)

#: Events can be lost, or come just before what they announce: a wait looks again by itself, after
#: the first time first, then after twice as long each, up to the second.
_LOOK_AGAIN_SECONDS = (0.002, 0.25)


class DmStepError(OSError):
    """An OSError that knows its ``step``: dm-create, dm-load, dm-resume, dm-node, dm-remove."""

    step = ""

    @classmethod
    def of(cls, step: str, cause: OSError, detail: str = "") -> "DmStepError":
        text = f"{cause.strerror}; {detail}" if detail else cause.strerror
        error = cls(cause.errno, text, cause.filename)
        error.step = step
        return error


def create_device(
    control: Control,
    *,
    name: str,
    uuid: str,
    targets: Sequence[Target],
    readonly: bool = True,
) -> DeviceInfo:
    """Create a device, load its table and set it going; leave nothing behind on failure.

    Raises:
        DmStepError: what a step's ioctl raised, with ``step``; an existing device of that name or
            uuid is EBUSY at dm-create and stays untouched.
    """
    step = "dm-create"
    try:
        control.create(name, uuid)
    except OSError as error:
        raise DmStepError.of(step, error) from error
    try:
        step = "dm-load"
        control.load_table(name, targets, readonly=readonly)
        step = "dm-resume"
        info = control.resume(name)
        step = "dm-node"
        ensure_node(info.node, info.dev)
    except OSError as error:
        detail = f"table: {first_lines(targets)}" if step == "dm-load" else ""
        failure = DmStepError.of(step, error, detail)
        _undo_create(control, name, failure)
        raise failure from error
    except BaseException as passing:
        _undo_create(control, name, passing)
        raise
    return info


def _undo_create(control: Control, name: str, passing: BaseException) -> None:
    """Remove what create_device made; deferred, since a process may have opened it already.

    The exception that passes stays the one to be raised.
    """
    try:
        control.remove(name, deferred=True)
    except OSError as error:
        if error.errno != errno.ENXIO:
            passing.add_note(f"the half-made device {name!r} stays behind: {error}")


def set_deferred_remove(control: Control, name: str) -> bool:
    """Have the kernel remove the device when its last user closes it.

    Returns True if the device had no user and so is gone already.
    """
    return control.remove(name, deferred=True)


def remove_device(control: Control, name: str, deadline: Deadline) -> bool:
    """Remove a device as ``remove_devices`` does; return False if it was gone before."""
    return name in remove_devices(control, (name,), deadline)


def remove_devices(control: Control, names: Sequence[str], deadline: Deadline) -> tuple[str, ...]:
    """Remove devices, the topmost first, waiting for their users to close them; return those that
    were not gone before.

    The wait is no polling: where a device is busy its removal is left to the kernel (deferred) and
    its event awaited. If the deadline passes first the removal is taken back, so that the device
    is as it was.
    On return the devices below them are released too.

    Raises:
        OSError: EBUSY, the device that ``filename`` names is still in use at the deadline.
        CallError: ``cancelled``.
    """
    removed = []
    for name in names:
        try:
            control.remove(name)
        except OSError as error:
            if error.errno == errno.ENXIO:
                continue
            if error.errno != errno.EBUSY:
                raise
            _remove_busy(control, name, deadline)
        removed.append(name)
    if len(removed) < len(names):  # the kernel may still be at one that it removes by itself
        wait_gone(control, names, deadline)
    return tuple(removed)


def _remove_busy(control: Control, name: str, deadline: Deadline) -> None:
    was_deferred = False
    try:
        was_deferred = control.info(name).deferred_remove
        control.remove(name, deferred=True)
    except OSError as error:
        if error.errno != errno.ENXIO:  # else it went by itself since
            raise
    try:
        wait_gone(control, (name,), deadline)
    except CallError as error:
        if not was_deferred and _take_back(control, name) and not _look(control)[1]:
            return
        if error.code == "timeout":
            text = "DM_DEV_REMOVE: still in use at the deadline"
            raise OSError(errno.EBUSY, text, name) from error
        raise


def _take_back(control: Control, name: str) -> bool:
    """Cancel a deferred removal; return True if it happened before that."""
    try:
        control.cancel_deferred_remove(name)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True
        raise
    return False


def wait_gone(
    control: Control, names: Sequence[str], deadline: Deadline, *, uuids: Sequence[str] = ()
) -> None:
    """Wait until no device with these names or uuids exists, and none still holds the devices
    below it.

    A deferred removal takes the name away first and closes the devices below a while later; only
    then does the disk leave sysfs. If the agent reported a device gone before that, the host could
    remove the disk while the kernel still uses it.

    Raises:
        CallError: ``timeout`` or ``cancelled``; the message names what is left.
    """
    left, dying = _look(control, names, uuids)
    if not left and not dying:
        return
    look_again_seconds = _LOOK_AGAIN_SECONDS[0]
    announced: set[str] = set()
    with UeventSocket() as events:
        while True:
            had_named = bool(left)
            left, found = _look(control, names, uuids)
            # once the names are gone all of ours are among the dying: later ones are others'
            dying = (found if had_named else dying & found) - announced
            if not left and not dying:
                return
            step = f"wait for the removal of {', '.join([*map(repr, left), *sorted(dying)])}"
            deadline.wait([events.fileno()], step, at_most=look_again_seconds)
            look_again_seconds = min(look_again_seconds * 2, _LOOK_AGAIN_SECONDS[1])
            announced |= _removed_disks(events)


def _look(
    control: Control, names: Sequence[str] = (), uuids: Sequence[str] = ()
) -> tuple[list[str], set[str]]:
    """Return the names and uuids that devices have, and the disks (dm-N) that sysfs has and
    device-mapper has no more."""
    disks = {name for name in os.listdir("/sys/block") if name.startswith("dm-")}
    listed = control.list_devices()
    left = [name for name, _, _ in listed if name in names]
    left += [uuid for _, _, uuid in listed if uuid in uuids]
    return left, disks - {f"dm-{dev.partition(':')[2]}" for _, dev, _ in listed}


def _removed_disks(events: UeventSocket) -> set[str]:
    """Return the disks whose removal was announced: a moment before they leave sysfs."""
    return {
        os.path.basename(event.devpath)
        for event in events.receive()
        if event.action == "remove" and event.subsystem == "block"
    }
