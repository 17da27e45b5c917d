"""``guestctl pool`` and ``guestctl volume``: thin provisioning in a guest."""

import click

from guestagent.api import thin as api
from guestagent.api.devices import Device
from guestagent.api.overlays import SCRATCH_FILESYSTEMS
from guestagent.host.ctl.layer import parse_device
from guestagent.host.ctl.session import Session, pass_session
from guestagent.host.ctl.style import described, human_bytes, plain, spent, table

__all__ = ("pool", "volume")

_NO_FILESYSTEM = "none"


def _device(_context: click.Context, _option: click.Parameter, text: str | None) -> Device | None:
    return None if text is None else parse_device(text)


@click.group()
def pool() -> None:
    """Pools of thin volumes, each on a metadata disk and data disks."""


@pool.command("open")
@click.argument("pool_id")
@click.option(
    "--metadata",
    "metadata_device",
    callback=_device,
    required=True,
    metavar="DEVICE",
    help="The metadata disk.",
)
@click.option(
    "--data",
    "data",
    required=True,
    multiple=True,
    metavar="DEVICE",
    help="The data disk; again for each that the pool was grown by, in order.",
)
@click.option("--block-size", "block_size_bytes", type=int, metavar="BYTES")
@click.option("--on-full", type=click.Choice(api.ON_FULL), default="error", show_default=True)
@click.option("--low-water", "low_water_bytes", type=int, metavar="BYTES")
@click.option("--min-free", "min_free_percent", type=int, default=10, show_default=True)
@click.option(
    "--adopt",
    type=click.Choice(api.ADOPT),
    default="never",
    show_default=True,
    help="What the disks may hold already.",
)
@pass_session
def open_pool(session: Session, /, data: tuple[str, ...], **fields: object) -> None:
    """Open a pool; a blank metadata disk makes a new one."""
    first, *more = map(parse_device, data)
    session.tell(
        api.PoolOpen, _describe_pool, data_device=first, more_data_devices=tuple(more), **fields
    )


@pool.command("close")
@click.argument("pool_id")
@pass_session
def close_pool(session: Session, pool_id: str) -> None:
    """Close a pool whose volumes are not mounted; its disks keep everything."""
    reply = session.ask(api.PoolClose, pool_id=pool_id)
    gone = plain(", ".join(reply.removed_devices))
    session.show(reply, lambda: f"gone: {gone}" if gone else "there was no such pool")


@pool.command("status")
@click.argument("pool_id")
@pass_session
def pool_status(session: Session, pool_id: str) -> None:
    """Say how a pool is: space, mode, waiting deletions."""
    session.tell(api.PoolStatus, _describe_pool, pool_id=pool_id)


@pool.command("list")
@pass_session
def list_pools(session: Session) -> None:
    """List the open pools."""
    reply = session.ask(api.PoolList)
    header = ("POOL", "MODE", "VOLUMES", "DATA", "OF", "METADATA", "OF")
    rows = [
        (
            each.pool_id,
            each.mode,
            str(each.volumes),
            *(
                human_bytes(size_bytes)
                for space in (each.data, each.metadata)
                for size_bytes in (space.used_bytes, space.total_bytes)
            ),
        )
        for each in reply.pools
    ]
    session.show(reply, lambda: table(header, rows))


@pool.command("grow")
@click.argument("pool_id")
@click.option("--data", "data_device", callback=_device, metavar="DEVICE", help="Append this disk.")
@pass_session
def grow_pool(session: Session, /, **fields: object) -> None:
    """Take up what the disks of a pool have grown by, and append a disk."""
    session.tell(api.PoolGrow, _describe_pool, **fields)


def _describe_pool(report: api.PoolReport) -> str:
    spaces = (("data", report.data), ("metadata", report.metadata))
    facts = [
        (name, f"{human_bytes(space.used_bytes)} of {human_bytes(space.total_bytes)} used")
        for name, space in spaces
    ]
    facts += [
        ("blocks", f"{human_bytes(report.block_size_bytes)}, on full: {report.on_full}"),
        ("volumes", f"{report.volumes} (transaction id {report.transaction_id})"),
        ("devices", " ".join(report.devices)),
    ]
    if report.deleting:
        facts.append(("deleting", " ".join(report.deleting)))
    if report.foreign_ids:
        facts.append(("foreign", " ".join(map(str, report.foreign_ids))))
    if report.needs_check:
        facts.append(("check", "the metadata needs thin_check"))
    facts.append(("ms", spent(report.timings_ms)))
    return described("pool", report.pool_id, report.mode, facts)


@click.group()
def volume() -> None:
    """Thin volumes of a pool."""


@volume.command("create")
@click.argument("pool_id")
@click.argument("volume_id")
@click.option("--size", "size_bytes", type=int, required=True, metavar="BYTES")
@click.option(
    "--filesystem",
    type=click.Choice((*SCRATCH_FILESYSTEMS, _NO_FILESYSTEM)),
    default="ext4",
    show_default=True,
)
@click.option(
    "--origin",
    callback=_device,
    metavar="DEVICE",
    help="Read what was never written from this disk.",
)
@pass_session
def create(session: Session, /, filesystem: str, **fields: object) -> None:
    """Make a volume."""
    wanted = None if filesystem == _NO_FILESYSTEM else filesystem
    session.tell(api.VolumeCreate, _describe_volume, filesystem=wanted, **fields)


@volume.command("snapshot")
@click.argument("pool_id")
@click.argument("volume_id")
@click.option("--of", required=True, metavar="VOLUME_ID", help="The volume to begin with.")
@click.option("--size", "size_bytes", type=int, metavar="BYTES", help="Default: that of the other.")
@pass_session
def snapshot(session: Session, /, **fields: object) -> None:
    """Make a volume with the content of another."""
    session.tell(api.VolumeSnapshot, _describe_volume, **fields)


@volume.command("delete")
@click.argument("pool_id")
@click.argument("volume_id")
@click.option("--deferred", is_flag=True, help="One in use is deleted after its last user.")
@pass_session
def delete(session: Session, /, **fields: object) -> None:
    """Delete a volume."""
    reply = session.ask(api.VolumeDelete, **fields)
    what = "deleted" if reply.deleted else "waits until it is not in use"
    session.show(reply, lambda: "there was no such volume" if reply.already else what)


@volume.command("list")
@click.argument("pool_id")
@pass_session
def list_volumes(session: Session, pool_id: str) -> None:
    """List the volumes of a pool."""
    reply = session.ask(api.VolumeList, pool_id=pool_id)
    header = ("VOLUME", "ID", "SIZE", "MAPPED", "FS", "ORIGIN", "HOLDERS", "MOUNTS")
    rows = [
        (
            each.volume_id + (" (deleting)" if each.deleting else ""),
            str(each.device_id),
            human_bytes(each.size_bytes),
            "-" if each.mapped_sectors is None else human_bytes(each.mapped_sectors * 512),
            each.filesystem or "-",
            each.origin or each.external_origin or "-",
            " ".join(each.holders) or "-",
            " ".join(each.mounts) or "-",
        )
        for each in reply.volumes
    ]
    session.show(reply, lambda: table(header, rows))


@volume.command("get")
@click.argument("pool_id")
@click.argument("volume_id")
@pass_session
def get(session: Session, /, **fields: object) -> None:
    """Describe a volume, without activating it."""
    session.tell(api.VolumeGet, _describe_volume, **fields)


@volume.command("mount")
@click.argument("pool_id")
@click.argument("volume_id")
@click.argument("path")
@click.option("--holder", default="default", show_default=True, help="Who has it mounted.")
@click.option("--rootfs", is_flag=True, help="Make a directory rootfs and a file id in it.")
@click.option("--suid", is_flag=True, help="Let set-uid programs take effect.")
@click.option("--dev", is_flag=True, help="Let device nodes take effect.")
@pass_session
def mount(session: Session, /, **fields: object) -> None:
    """Mount a volume at PATH for a holder; it stays until its last holder unmounts it."""
    reply = session.ask(api.VolumeMount, **fields)
    holders = plain(", ".join(reply.holders))
    session.show(reply, lambda: f"{plain(reply.root)} on {plain(reply.node)}, held by {holders}")


@volume.command("unmount")
@click.argument("pool_id")
@click.argument("volume_id")
@click.option("--holder", default="default", show_default=True)
@pass_session
def unmount(session: Session, /, **fields: object) -> None:
    """Remove a holder of a volume; the last one unmounts it."""
    reply = session.ask(api.VolumeUnmount, **fields)
    if reply.already:
        text = f"{fields['holder']} had not mounted it"
    elif reply.holders:
        text = f"held by {', '.join(reply.holders)}"
    else:
        text = f"gone: {reply.unmounted}" + (", deleted" if reply.deleted else "")
    session.show(reply, lambda: plain(text))


@volume.command("grow")
@click.argument("pool_id")
@click.argument("volume_id")
@click.option("--size", "size_bytes", type=int, required=True, metavar="BYTES")
@pass_session
def grow(session: Session, /, **fields: object) -> None:
    """Make a volume and its file system larger, mounted or not."""
    session.tell(api.VolumeGrow, _describe_volume, **fields)


@volume.command("trim")
@click.argument("pool_id")
@click.argument("volume_id")
@pass_session
def trim(session: Session, /, **fields: object) -> None:
    """Give the free space of a mounted volume back to its pool."""
    reply = session.ask(api.VolumeTrim, **fields)
    text = f"{human_bytes(reply.trimmed_bytes)} trimmed"
    text += f", {human_bytes(reply.freed_bytes)} back in the pool"
    session.show(reply, lambda: text)


def _describe_volume(report: api.VolumeReport) -> str:
    mapped = report.mapped_sectors
    facts = [
        ("size", f"{report.size_bytes} bytes ({human_bytes(report.size_bytes)})"),
        ("mapped", "unknown" if mapped is None else human_bytes(mapped * 512)),
        ("filesystem", report.filesystem or "none"),
        ("device id", f"{report.device_id} (transaction id {report.transaction_id})"),
    ]
    origin = report.origin or report.external_origin
    if origin:
        facts.append(("origin", origin))
    facts += [("mounted at", path) for path in report.mounts]
    if report.holders:
        facts.append(("held by", ", ".join(report.holders)))
    facts.append(("ms", spent(report.timings_ms)))
    state = "deleting" if report.deleting else "active" if report.active else "inactive"
    return described("volume", report.volume_id, state, facts)
