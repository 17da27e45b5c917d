"""Pools of thin volumes on loop devices, and what dmsetup and thin_check say of them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guestagent.api.devices import PathDevice
from guestagent.api.thin import (
    PoolClose,
    PoolGrow,
    PoolList,
    PoolOpen,
    PoolReport,
    PoolStatus,
    VolumeCreate,
    VolumeDelete,
    VolumeDeleteReply,
    VolumeGet,
    VolumeList,
    VolumeMount,
    VolumeMountReply,
    VolumeReport,
    VolumeSnapshot,
    VolumeUnmount,
    VolumeUnmountReply,
)
from guestagent.engine.engine import Engine
from guestagent.engine.state import Rules
from guestagent.storage import blockdev
from guestagent.thin.part import Thin
from tests.beds.agentbed import EngineBed
from tests.beds.dmbed import loop_device, run

MIB = 1024**2
POOL = "p"


class Disks:
    """The two disks of a pool as files, attached."""

    def __init__(self, metadata: str, data: str, files: tuple[Path, Path]) -> None:
        self.metadata, self.data = metadata, data
        self.metadata_file, self.data_file = files

    def spec(self, pool_id: str = POOL, **fields: Any) -> PoolOpen:
        return PoolOpen(
            pool_id=pool_id,
            metadata_device=PathDevice(path=self.metadata),
            data_device=PathDevice(path=self.data),
        ).replace(**fields)

    def matching(self, **fields: Any) -> PoolOpen:
        return self.spec(adopt="matching", **fields)

    def blank(self) -> None:
        """Clear what makes a disk a pool's, for the next test."""
        for node in (self.metadata, self.data):
            fd = os.open(node, os.O_WRONLY)
            os.pwrite(fd, bytes(128 * 1024), 0)
            os.fsync(fd)
            os.close(fd)

    def thin_check(self) -> None:
        """Have thin_check judge the metadata of a pool that is closed."""
        blockdev.flush(self.metadata)
        run("thin_check", self.metadata)

    def thin_ids(self) -> list[int]:
        """Return the thin devices that thin_dump finds in a pool that is closed."""
        blockdev.flush(self.metadata)
        lines = run("thin_dump", self.metadata).splitlines()
        return [int(line.split('"')[1]) for line in lines if "<device " in line]


@contextlib.contextmanager
def disk(path: Path, size_bytes: int) -> Iterator[str]:
    """A disk of zeros; yields its node."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    with loop_device(path, readonly=False) as node:
        yield node


@contextlib.contextmanager
def pool_disks(
    directory: Path, *, metadata_bytes: int = 4 * MIB, data_bytes: int = 64 * MIB
) -> Iterator[Disks]:
    directory.mkdir(parents=True, exist_ok=True)
    files = directory / "metadata.img", directory / "data.img"
    with disk(files[0], metadata_bytes) as metadata, disk(files[1], data_bytes) as data:
        yield Disks(metadata, data, files)


class ThinBed(EngineBed):
    """An engine with pools and volumes, each request by one call."""

    def __init__(self, directory: Path, rules: Rules | None = None) -> None:
        self.thin: Thin
        super().__init__(directory, rules)

    def _open(self) -> Engine:
        engine = super()._open()
        self.thin = Thin(engine)
        return engine

    def open(self, spec: PoolOpen) -> PoolReport:
        with self.operation() as op:
            return self.thin.pools.open(spec, op)

    def close(self, pool_id: str = POOL) -> Any:
        with self.operation() as op:
            return self.thin.pools.close(PoolClose(pool_id=pool_id), op)

    def pools(self) -> tuple[PoolReport, ...]:
        with self.operation() as op:
            return self.thin.pools.list(PoolList(), op).pools

    def status(self, pool_id: str = POOL) -> PoolReport:
        with self.operation() as op:
            return self.thin.pools.status(PoolStatus(pool_id=pool_id), op)

    def grow_pool(self, **fields: Any) -> PoolReport:
        with self.operation() as op:
            return self.thin.pools.grow(PoolGrow(pool_id=POOL, **fields), op)

    def create(self, volume_id: str, size_bytes: int = 16 * MIB, **fields: Any) -> VolumeReport:
        request = VolumeCreate(pool_id=POOL, volume_id=volume_id, size_bytes=size_bytes, **fields)
        with self.operation() as op:
            return self.thin.volumes.create(request, op)

    def snapshot(self, volume_id: str, of: str, **fields: Any) -> VolumeReport:
        request = VolumeSnapshot(pool_id=POOL, volume_id=volume_id, of=of, **fields)
        with self.operation() as op:
            return self.thin.volumes.snapshot(request, op)

    def delete(self, volume_id: str, *, deferred: bool = False) -> VolumeDeleteReply:
        request = VolumeDelete(pool_id=POOL, volume_id=volume_id, deferred=deferred)
        with self.operation() as op:
            return self.thin.volumes.delete(request, op)

    def get(self, volume_id: str) -> VolumeReport:
        with self.operation() as op:
            return self.thin.volumes.get(VolumeGet(pool_id=POOL, volume_id=volume_id), op)

    def volumes(self) -> dict[str, VolumeReport]:
        with self.operation() as op:
            reply = self.thin.volumes.list(VolumeList(pool_id=POOL), op)
        return {each.volume_id: each for each in reply.volumes}

    def mount(self, volume_id: str, path: str = "", **fields: Any) -> VolumeMountReply:
        request = VolumeMount(
            pool_id=POOL, volume_id=volume_id, path=path or f"/run/volumes/{volume_id}", **fields
        )
        with self.operation() as op:
            return self.thin.mounts.mount(request, op)

    def unmount(self, volume_id: str, holder: str = "default") -> VolumeUnmountReply:
        request = VolumeUnmount(pool_id=POOL, volume_id=volume_id, holder=holder)
        with self.operation() as op:
            return self.thin.mounts.unmount(request, op)
