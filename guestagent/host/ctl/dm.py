"""``guestctl dm`` and ``guestctl device``: the guest's device-mapper devices, and its disks."""

import click

from guestagent.api.devicemapper import DmList, DmStatus, DmTable
from guestagent.api.devices import DeviceRemove, DeviceRemoveReply
from guestagent.host.ctl.completion import complete_devices
from guestagent.host.ctl.layer import parse_device
from guestagent.host.ctl.session import Session, pass_session
from guestagent.host.ctl.style import plain, table

__all__ = ("device", "dm")


@click.group()
def dm() -> None:
    """Device-mapper devices of a guest."""


@dm.command("list")
@pass_session
def list_devices(session: Session) -> None:
    """List every device, whether the agent made it or not."""
    reply = session.ask(DmList)
    header = ("NAME", "DEV", "TYPE", "OPEN", "STATUS", "UUID")
    rows = [
        (each.name, each.dev, each.target_type, str(each.open_count), each.status, each.uuid)
        for each in reply.devices
    ]
    session.show(reply, lambda: table(header, rows))


@dm.command("table")
@click.argument("name", shell_complete=complete_devices)
@pass_session
def print_table(session: Session, name: str) -> None:
    """Print a device's table, as dmsetup does."""
    reply = session.ask(DmTable, name=name)
    session.show(reply, lambda: "\n".join(map(plain, reply.lines)))


@dm.command("status")
@click.argument("name", shell_complete=complete_devices)
@pass_session
def status(session: Session, name: str) -> None:
    """Print a device's status, as dmsetup does."""
    reply = session.ask(DmStatus, name=name)
    session.show(reply, lambda: "\n".join(map(plain, reply.lines)))


@click.group()
def device() -> None:
    """Disks of a guest."""


@device.command("remove")
@click.argument("text", metavar="DEVICE")
@pass_session
def remove(session: Session, text: str) -> None:
    """Have a guest let go of a SCSI disk that nothing uses, before the host detaches it.

    DEVICE is scsi:CONTROLLER:LUN, vmbus:GUID:LUN or /dev/...
    """
    session.tell(DeviceRemove, _describe, device=parse_device(text))


def _describe(reply: DeviceRemoveReply) -> str:
    if reply.already:
        return "no such disk is there"
    return plain(f"{' '.join(reply.removed)} removed by {reply.written}")
