"""The device-mapper as it stands, the agent's devices and others'. Looks, never touches."""

import errno

from guestagent.api.layers import DmDevice
from guestagent.engine.readback import dm_device
from guestagent.storage.devicemapper.control import Control
from vsock.errors import CallError

__all__ = ("DmView",)


class DmView:
    def __init__(self, control: Control) -> None:
        self._control = control

    def list(self) -> tuple[DmDevice, ...]:
        """Describe every device; one that vanishes meanwhile is left out."""
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
