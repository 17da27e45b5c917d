"""The handle's methods for pools and volumes of thin provisioning: one for each RPC."""

from guestagent.api.devices import Device
from guestagent.api.thin import (
    PoolClose,
    PoolCloseReply,
    PoolGrow,
    PoolList,
    PoolOpen,
    PoolReport,
    PoolStatus,
    VolumeCreate,
    VolumeDelete,
    VolumeDeleteReply,
    VolumeGet,
    VolumeGrow,
    VolumeList,
    VolumeMount,
    VolumeMountReply,
    VolumeReport,
    VolumeSnapshot,
    VolumeTrim,
    VolumeTrimReply,
    VolumeUnmount,
    VolumeUnmountReply,
)
from guestagent.host.client.methods import Caller

__all__ = ("ThinMethods",)


class ThinMethods(Caller):
    """Part of ``GuestAgent``: pools and volumes."""

    def pool_open(self, request: PoolOpen, *, deadline_ms: int | None = None) -> PoolReport:
        """Open a pool; blank metadata makes a new one.

        Raises:
            CallError: ``conflict``, a disk is in use or holds what ``adopt`` does not admit;
                ``integrity``, the metadata is damaged. The hint says what to do.
        """
        return self.call(request, deadline_ms=deadline_ms)

    def pool_close(self, pool_id: str) -> PoolCloseReply:
        """Close a pool; ``busy`` names the volumes that are mounted."""
        return self.call(PoolClose(pool_id=pool_id))

    def pool_status(self, pool_id: str) -> PoolReport:
        """Return how a pool is now."""
        return self.call(PoolStatus(pool_id=pool_id))

    def pool_list(self) -> tuple[PoolReport, ...]:
        """Return every open pool."""
        return self.call(PoolList()).pools

    def pool_grow(self, pool_id: str, data_device: Device | None = None) -> PoolReport:
        """Take up what the disks of a pool have grown by, and append ``data_device``."""
        return self.call(PoolGrow(pool_id=pool_id, data_device=data_device))

    def volume_create(
        self, request: VolumeCreate, *, deadline_ms: int | None = None
    ) -> VolumeReport:
        """Make a volume; ``resource``, the pool has too little room left."""
        return self.call(request, deadline_ms=deadline_ms)

    def volume_snapshot(
        self, pool_id: str, volume_id: str, of: str, *, size_bytes: int | None = None
    ) -> VolumeReport:
        """Make a volume that begins with the content of the volume ``of``."""
        return self.call(
            VolumeSnapshot(pool_id=pool_id, volume_id=volume_id, of=of, size_bytes=size_bytes)
        )

    def volume_delete(
        self, pool_id: str, volume_id: str, *, deferred: bool = False
    ) -> VolumeDeleteReply:
        """Delete a volume; one in use is ``busy``, or goes after its last user (``deferred``)."""
        return self.call(VolumeDelete(pool_id=pool_id, volume_id=volume_id, deferred=deferred))

    def volume_list(self, pool_id: str) -> tuple[VolumeReport, ...]:
        """Return every volume of a pool."""
        return self.call(VolumeList(pool_id=pool_id)).volumes

    def volume_get(self, pool_id: str, volume_id: str) -> VolumeReport:
        """Return one volume; ``not_found`` if there is none."""
        return self.call(VolumeGet(pool_id=pool_id, volume_id=volume_id))

    def volume_mount(
        self, request: VolumeMount, *, deadline_ms: int | None = None
    ) -> VolumeMountReply:
        """Mount a volume for a holder; ``conflict``, it is mounted at another path."""
        return self.call(request, deadline_ms=deadline_ms)

    def volume_unmount(
        self, pool_id: str, volume_id: str, holder: str = "default"
    ) -> VolumeUnmountReply:
        """Let a holder go; the last one unmounts the volume, or is told ``busy``."""
        return self.call(VolumeUnmount(pool_id=pool_id, volume_id=volume_id, holder=holder))

    def volume_grow(self, pool_id: str, volume_id: str, size_bytes: int) -> VolumeReport:
        """Make a volume larger, and its file system."""
        request = VolumeGrow(pool_id=pool_id, volume_id=volume_id, size_bytes=size_bytes)
        return self.call(request)

    def volume_trim(self, pool_id: str, volume_id: str) -> VolumeTrimReply:
        """Give the free space of a mounted volume back to its pool."""
        return self.call(VolumeTrim(pool_id=pool_id, volume_id=volume_id))
