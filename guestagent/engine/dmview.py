"""The device-mapper as it stands: each device with its table and status, as the contract has it."""

import errno

from guestagent.api.layers import SHOWN_PARTS, DmDevice
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.devicemapper.targets import Target
from vsock.errors import CallError

__all__ = ("DmView", "described", "dm_device")


def dm_device(control: Control, name: str) -> DmDevice:
    """Describe one dm device.

    Raises:
        OSError: ENXIO, there is none.
    """
    return described(control, name)[0]


def described(control: Control, name: str) -> tuple[DmDevice, tuple[Target, ...]]:
    """Describe one dm device, and return its table.

    Raises:
        OSError: ENXIO, there is none.
    """
    info, table, status = control.describe(name)
    device = DmDevice(
        name=info.name,
        uuid=info.uuid,
        dev=info.dev,
        node=info.node,
        target_type=table[0].target_type if table else "",
        table="; ".join(target.line() for target in table[:SHOWN_PARTS]),
        status="; ".join(target.status for target in status[:SHOWN_PARTS]),
        readonly=info.readonly,
        deferred_remove=info.deferred_remove,
        open_count=info.open_count,
        target_count=len(table),
    )
    return device, table


class DmView:
    """The agent's devices and others'. Looks, never touches."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def list(self) -> tuple[DmDevice, ...]:
        """Describe every device. A device that vanishes meanwhile is left out."""
        found = []
        for name, _dev, _uuid in self._control.list_devices():
            try:
                found.append(dm_device(self._control, name))
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
        return tuple(found)

    def table(self, name: str) -> tuple[str, ...]:
        """Return the table lines of a device.

        Raises:
            CallError: ``not_found``.
        """
        self._device(name)
        return tuple(target.line() for target in self._control.table(name))

    def status(self, name: str) -> tuple[DmDevice, tuple[str, ...]]:
        """Return a device and its status lines.

        Raises:
            CallError: ``not_found``.
        """
        device = self._device(name)
        return device, tuple(target.line() for target in self._control.status(name))

    def _device(self, name: str) -> DmDevice:
        try:
            return dm_device(self._control, name)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            raise CallError(
                "not_found", f"there is no dm device {name!r}", errno=error.errno, object=name
            ) from None
