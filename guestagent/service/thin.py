"""Pools and volumes of thin provisioning."""

from guestagent.api.thin import (
    PoolClose,
    PoolCloseReply,
    PoolGrow,
    PoolList,
    PoolListReply,
    PoolOpen,
    PoolReport,
    PoolStatus,
    VolumeCreate,
    VolumeDelete,
    VolumeDeleteReply,
    VolumeGet,
    VolumeGrow,
    VolumeList,
    VolumeListReply,
    VolumeMount,
    VolumeMountReply,
    VolumeReport,
    VolumeSnapshot,
    VolumeTrim,
    VolumeTrimReply,
    VolumeUnmount,
    VolumeUnmountReply,
)
from guestagent.engine.engine import Engine
from guestagent.service.context import Context, handles
from guestagent.thin.part import Thin

__all__ = ("ThinHandlers",)


class ThinHandlers:
    """Every handler hands its request to the pools or to the volumes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thin = Thin(engine)

    @handles(PoolOpen)
    def open(self, request: PoolOpen, call: Context) -> PoolReport:
        """Open a pool."""
        return self._thin.pools.open(request, call.begin(self._engine))

    @handles(PoolClose)
    def close(self, request: PoolClose, call: Context) -> PoolCloseReply:
        """Close a pool."""
        return self._thin.pools.close(request, call.begin(self._engine))

    @handles(PoolStatus)
    def status(self, request: PoolStatus, call: Context) -> PoolReport:
        """Report one pool."""
        return self._thin.pools.status(request.pool_id, call.begin(self._engine))

    @handles(PoolList)
    def pools(self, _request: PoolList, _call: Context) -> PoolListReply:
        """Report every pool."""
        return PoolListReply(pools=self._thin.pools.list())

    @handles(PoolGrow)
    def grow_pool(self, request: PoolGrow, call: Context) -> PoolReport:
        """Grow a pool."""
        return self._thin.pools.grow(request, call.begin(self._engine))

    @handles(VolumeCreate)
    def create(self, request: VolumeCreate, call: Context) -> VolumeReport:
        """Make a volume."""
        return self._thin.volumes.create(request, call.begin(self._engine))

    @handles(VolumeSnapshot)
    def snapshot(self, request: VolumeSnapshot, call: Context) -> VolumeReport:
        """Make a snapshot of a volume."""
        return self._thin.volumes.snapshot(request, call.begin(self._engine))

    @handles(VolumeDelete)
    def delete(self, request: VolumeDelete, call: Context) -> VolumeDeleteReply:
        """Delete a volume."""
        return self._thin.volumes.delete(request, call.begin(self._engine))

    @handles(VolumeList)
    def volumes(self, request: VolumeList, call: Context) -> VolumeListReply:
        """Report every volume of a pool."""
        volumes = self._thin.volumes.list(request.pool_id, call.begin(self._engine))
        return VolumeListReply(volumes=volumes)

    @handles(VolumeGet)
    def get(self, request: VolumeGet, call: Context) -> VolumeReport:
        """Report one volume."""
        operation = call.begin(self._engine)
        return self._thin.volumes.get(request.pool_id, request.volume_id, operation)

    @handles(VolumeMount)
    def mount(self, request: VolumeMount, call: Context) -> VolumeMountReply:
        """Mount a volume."""
        return self._thin.volumes.mount(request, call.begin(self._engine))

    @handles(VolumeUnmount)
    def unmount(self, request: VolumeUnmount, call: Context) -> VolumeUnmountReply:
        """Let a holder of a volume go."""
        return self._thin.volumes.unmount(request, call.begin(self._engine))

    @handles(VolumeGrow)
    def grow_volume(self, request: VolumeGrow, call: Context) -> VolumeReport:
        """Grow a volume."""
        return self._thin.volumes.grow(request, call.begin(self._engine))

    @handles(VolumeTrim)
    def trim(self, request: VolumeTrim, call: Context) -> VolumeTrimReply:
        """Give the free space of a volume back."""
        return self._thin.volumes.trim(request, call.begin(self._engine))
