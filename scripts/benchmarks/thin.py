"""Volumes of a pool on loop devices: made, made with a file system, snapshotted, mounted."""

from collections.abc import Iterator
from pathlib import Path

from guestagent.api.thin import VolumeCreate, VolumeMount
from guestagent.host.client import GuestAgent
from scripts.benchmarks.rows import Row, row, timed
from tests.beds.thinbed import MIB, POOL, pool_disks

__all__ = ("thin_rows",)

_NAMES = ("create, blank", "create, ext4", "snapshot", "mount", "unmount", "delete")


def thin_rows(guest: GuestAgent, directory: Path, rounds: int, *, bed: str) -> Iterator[Row]:
    """Measure each request on a volume of 64 MiB; the pool is made and closed here."""
    spent: dict[str, list[float]] = {name: [] for name in _NAMES}
    with pool_disks(directory, data_bytes=256 * MIB) as disks:
        guest.pool_open(disks.spec())
        for _ in range(rounds):
            for name, filesystem in (("create, blank", None), ("create, ext4", "ext4")):
                request = VolumeCreate(
                    pool_id=POOL,
                    volume_id=filesystem or "blank",
                    size_bytes=64 * MIB,
                    filesystem=filesystem,
                )
                with timed(spent[name]):
                    guest.volume_create(request)
            with timed(spent["snapshot"]):
                guest.volume_snapshot(POOL, "copy", "ext4")
            path = "/run/layers/volume"
            with timed(spent["mount"]):
                guest.volume_mount(VolumeMount(pool_id=POOL, volume_id="copy", path=path))
            with timed(spent["unmount"]):
                guest.volume_unmount(POOL, "copy")
            for volume_id in ("copy", "ext4", "blank"):
                with timed(spent["delete"]):
                    guest.volume_delete(POOL, volume_id)
        guest.pool_close(POOL)
    for name, samples in spent.items():
        yield row(bed, f"volume {name}", "ms", samples)
