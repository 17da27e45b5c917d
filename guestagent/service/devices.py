"""The devices below layers and scratches: device-mapper's, and disks."""

from guestagent.api.devicemapper import (
    DmList,
    DmListReply,
    DmStatus,
    DmStatusReply,
    DmTable,
    DmTableReply,
)
from guestagent.api.devices import DeviceRemove, DeviceRemoveReply
from guestagent.api.request import handles
from guestagent.engine.engine import Engine
from guestagent.service.context import Context

__all__ = ("DeviceHandlers",)


class DeviceHandlers:
    """Looks at device-mapper, and lets go of disks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @handles(DeviceRemove)
    def remove_device(self, request: DeviceRemove, call: Context) -> DeviceRemoveReply:
        """Have the kernel let go of a disk."""
        from guestagent.engine.unplug import remove_disk  # most hosts never ask for it

        operation = call.begin(self._engine)
        return remove_disk(self._engine.state, request.device, operation)

    @handles(DmList)
    def list_dm(self, _request: DmList, _call: Context) -> DmListReply:
        """Report every device-mapper device."""
        return DmListReply(devices=self._engine.dm.list())

    @handles(DmTable)
    def dm_table(self, request: DmTable, _call: Context) -> DmTableReply:
        """Return the table of a device-mapper device."""
        return DmTableReply(name=request.name, lines=self._engine.dm.table(request.name))

    @handles(DmStatus)
    def dm_status(self, request: DmStatus, _call: Context) -> DmStatusReply:
        """Return the status of a device-mapper device."""
        device, lines = self._engine.dm.status(request.name)
        return DmStatusReply(name=request.name, device=device, lines=lines)
