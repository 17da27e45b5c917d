"""The device-mapper as it stands: the agent's devices and all others."""

from guestagent.api.checks import check_word
from guestagent.api.layers import DmDevice
from guestagent.api.request import Request
from vsock.record import Record

_NAME_MAX_BYTES = 127  # DM_NAME_LEN with its NUL is 128, linux/dm-ioctl.h


class DmName(Record):
    """The name of a device-mapper device (kernel: at most 127 bytes)."""

    name: str

    def check(self) -> None:
        check_word("name", self.name, _NAME_MAX_BYTES)


class DmListReply(Record):
    devices: tuple[DmDevice, ...]


class DmList(Request[DmListReply], method="dm.list"):
    """List every device-mapper device."""


class DmTableReply(Record):
    """Table lines as ``dmsetup table`` prints them: start, length, type, arguments."""

    name: str
    lines: tuple[str, ...]


class DmTable(Request[DmTableReply], DmName, method="dm.table"):
    """Print a device's table."""


class DmStatusReply(Record):
    name: str
    device: DmDevice
    lines: tuple[str, ...]


class DmStatus(Request[DmStatusReply], DmName, method="dm.status"):
    """Print a device's status."""
