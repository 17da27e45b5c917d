"""Targets of thin provisioning: tables, status lines and messages of dm-thin. Pure; no kernel.

A pool has a metadata device and a data device, and gives blocks of data to thin devices as they are
written. Thin devices are made and deleted by messages to the pool, and are known by a number of 24
bits. A thin device is used through a dm device with a ``thin`` table.

Source: Documentation/admin-guide/device-mapper/thin-provisioning.rst, drivers/md/dm-thin.c (Linux
6.1).
"""

from guestagent.storage.devicemapper.targets import (
    Target,
    check_device,
    check_number,
    parse_number,
)
from vsock.record import Record

__all__ = (
    "BLOCK_SECTORS_MAX",
    "BLOCK_SECTORS_MIN",
    "DEVICE_ID_MAX",
    "METADATA_BLOCK_BYTES",
    "PoolStatus",
    "PoolTable",
    "ThinStatus",
    "ThinTable",
    "create_snap",
    "create_thin",
    "delete_thin",
    "parse_pool",
    "parse_pool_status",
    "parse_thin",
    "parse_thin_status",
    "set_transaction_id",
)

#: A block of data is a multiple of 64 KiB, at most 1 GiB.
BLOCK_SECTORS_MIN, BLOCK_SECTORS_MAX = 128, 2097152
METADATA_BLOCK_BYTES = 4096
DEVICE_ID_MAX = (1 << 24) - 1
_ERROR_IF_FULL = "error_if_no_space"
#: What a target says of itself once its metadata can neither be read nor written, and where the
#: kernel could not ask it.
_FAILED = ("Fail", "Error")


class PoolTable(Record):
    """The table of a pool. ``options`` are the words of dm-thin, such as error_if_no_space."""

    metadata_device: str
    data_device: str
    length_sectors: int
    block_sectors: int
    low_water_blocks: int
    options: tuple[str, ...] = ()

    def check(self) -> None:
        check_device("metadata_device", self.metadata_device)
        check_device("data_device", self.data_device)
        check_number("block_sectors", self.block_sectors, BLOCK_SECTORS_MIN, BLOCK_SECTORS_MAX)
        if self.block_sectors % BLOCK_SECTORS_MIN:
            raise ValueError(f"block_sectors {self.block_sectors} is not a multiple of 128")
        check_number("low_water_blocks", self.low_water_blocks, 0)

    @property
    def error_if_full(self) -> bool:
        """Whether a write fails once the pool is full, instead of waiting."""
        return _ERROR_IF_FULL in self.options

    def target(self) -> Target:
        words = [
            self.metadata_device,
            self.data_device,
            str(self.block_sectors),
            str(self.low_water_blocks),
        ]
        if self.options:
            words += [str(len(self.options)), *self.options]
        return Target(
            start_sectors=0,
            length_sectors=self.length_sectors,
            target_type="thin-pool",
            params=" ".join(words),
        )


class ThinTable(Record):
    """The table of a thin device. What was never written is read from ``origin_device``, if there
    is one, else as zeros."""

    pool_device: str
    device_id: int
    length_sectors: int
    origin_device: str | None = None

    def check(self) -> None:
        check_device("pool_device", self.pool_device)
        check_number("device_id", self.device_id, 0, DEVICE_ID_MAX)
        if self.origin_device is not None:
            check_device("origin_device", self.origin_device)

    def target(self) -> Target:
        words = [self.pool_device, str(self.device_id)]
        if self.origin_device is not None:
            words.append(self.origin_device)
        return Target(
            start_sectors=0,
            length_sectors=self.length_sectors,
            target_type="thin",
            params=" ".join(words),
        )


class PoolStatus(Record):
    """What a pool says of itself. Metadata is counted in blocks of 4 KiB.

    ``mode`` is rw, ro, out_of_data_space or failed; a failed pool says nothing else.
    ``held_root_block`` is where the snapshot of the metadata is, None where there is none.
    """

    mode: str
    transaction_id: int = 0
    used_metadata_blocks: int = 0
    total_metadata_blocks: int = 0
    used_data_blocks: int = 0
    total_data_blocks: int = 0
    held_root_block: int | None = None
    discard_passdown: bool = False
    error_if_full: bool = False
    needs_check: bool = False
    metadata_low_water_blocks: int | None = None


class ThinStatus(Record):
    """What a thin device says of itself: how much of it has blocks, and the last sector that has.

    ``failed`` says that the metadata of its pool cannot be read.
    """

    mapped_sectors: int = 0
    highest_mapped_sector: int | None = None
    failed: bool = False


def create_thin(device_id: int) -> str:
    """Return the message that makes an empty thin device: EEXIST, the id is taken."""
    check_number("device_id", device_id, 0, DEVICE_ID_MAX)
    return f"create_thin {device_id}"


def create_snap(device_id: int, origin_id: int) -> str:
    """Return the message that makes a snapshot: EEXIST, the id is taken; ENODATA, no origin.

    An origin that is active must be suspended meanwhile.
    """
    check_number("device_id", device_id, 0, DEVICE_ID_MAX)
    check_number("origin_id", origin_id, 0, DEVICE_ID_MAX)
    return f"create_snap {device_id} {origin_id}"


def delete_thin(device_id: int) -> str:
    """Return the message that deletes a thin device: EBUSY, it is active; ENODATA, none."""
    check_number("device_id", device_id, 0, DEVICE_ID_MAX)
    return f"delete {device_id}"


def set_transaction_id(old: int, new: int) -> str:
    """Return the message that moves the pool's transaction id: EINVAL, it is not ``old``."""
    check_number("old", old, 0)
    check_number("new", new, 0)
    return f"set_transaction_id {old} {new}"


def parse_pool(target: Target) -> PoolTable:
    """Read the fields of a pool's target back.

    Raises:
        ValueError: it is no such target.
    """
    words = _words_of(target, "thin-pool", 4)
    options = tuple(words[5:])
    if len(words) > 4 and parse_number("option count", words[4]) != len(options):
        raise ValueError(f"pool option count {words[4]} does not fit {options!r}")
    return PoolTable(
        metadata_device=words[0],
        data_device=words[1],
        length_sectors=target.length_sectors,
        block_sectors=parse_number("block size", words[2]),
        low_water_blocks=parse_number("low water mark", words[3]),
        options=options,
    )


def parse_thin(target: Target) -> ThinTable:
    """Read the fields of a thin device's target back.

    Raises:
        ValueError: it is no such target.
    """
    words = _words_of(target, "thin", 2)
    return ThinTable(
        pool_device=words[0],
        device_id=parse_number("device id", words[1]),
        length_sectors=target.length_sectors,
        origin_device=words[2] if len(words) > 2 else None,
    )


def parse_pool_status(status: str) -> PoolStatus:
    """Parse the status of a pool: TRANSACTION USED/TOTAL USED/TOTAL HELD-ROOT MODE DISCARDS
    WHEN-FULL CHECK [LOW-WATER], metadata before data.

    Raises:
        ValueError: it is no such status.
    """
    words = status.split()
    if words and words[0] in _FAILED:
        return PoolStatus(mode="failed")
    if len(words) < 7 or words[4] not in ("rw", "ro", "out_of_data_space"):
        raise ValueError(f"not the status of a thin pool: {status!r}")
    used_metadata, total_metadata = _fraction("metadata", words[1])
    used_data, total_data = _fraction("data", words[2])
    return PoolStatus(
        mode=words[4],
        transaction_id=parse_number("transaction id", words[0]),
        used_metadata_blocks=used_metadata,
        total_metadata_blocks=total_metadata,
        used_data_blocks=used_data,
        total_data_blocks=total_data,
        held_root_block=None if words[3] == "-" else parse_number("held root", words[3]),
        discard_passdown=words[5] == "discard_passdown",
        error_if_full=words[6] == _ERROR_IF_FULL,
        needs_check=words[7:8] == ["needs_check"],
        metadata_low_water_blocks=parse_number("low water", words[8]) if len(words) > 8 else None,
    )


def parse_thin_status(status: str) -> ThinStatus:
    """Parse the status of a thin device: MAPPED-SECTORS HIGHEST-MAPPED-SECTOR, or ``-``.

    Raises:
        ValueError: it is no such status.
    """
    words = status.split()
    if words and words[0] in _FAILED:
        return ThinStatus(failed=True)
    if len(words) != 2:
        raise ValueError(f"not the status of a thin device: {status!r}")
    return ThinStatus(
        mapped_sectors=parse_number("mapped sectors", words[0]),
        highest_mapped_sector=None if words[1] == "-" else parse_number("highest", words[1]),
    )


def _words_of(target: Target, target_type: str, least: int) -> list[str]:
    words = target.params.split()
    if target.target_type != target_type or len(words) < least or target.start_sectors:
        raise ValueError(f"not a whole {target_type} target: {target.line()!r}")
    return words


def _fraction(name: str, word: str) -> tuple[int, int]:
    used, slash, total = word.partition("/")
    if not slash:
        raise ValueError(f"{name} must be USED/TOTAL, got {word!r}")
    return parse_number(name, used), parse_number(name, total)
