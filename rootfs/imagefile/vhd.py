"""The footer of a fixed VHD, and the layer files that end in one: file system, hash area, footer.

Hyper-V attaches such a file as a disk, which ends before the footer. hcsshim lays out its layers
so: ext4, verity superblock and tree, footer.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0, "Hard Disk Footer Format".
"""

import os
import struct
import uuid as uuid_module
from dataclasses import dataclass

from guestagent.api.devices import SECTOR_BYTES
from vsock.errors import CallError

__all__ = (
    "FOOTER_BYTES",
    "VhdFooter",
    "append_footer",
    "find_footer",
)

FOOTER_BYTES = 512
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
_CHECKSUM_OFFSET = 64
_COOKIE = b"conectix"
_FEATURES = 2
_VERSION = 0x00010000
_NO_OFFSET = (1 << 64) - 1
_FIXED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class VhdFooter:
    """``size_bytes`` is what the disk holds, without the footer; a whole number of sectors.
    ``timestamp`` counts seconds from the year 2000."""

    size_bytes: int
    uuid: uuid_module.UUID
    timestamp: int = 0

    def __post_init__(self) -> None:
        if self.size_bytes <= 0 or self.size_bytes % SECTOR_BYTES:
            raise ValueError(f"{self.size_bytes} bytes are no whole number of sectors")
        if not 0 <= self.timestamp < 1 << 32:
            raise ValueError(f"timestamp {self.timestamp} is no 32-bit number")

    def pack(self) -> bytes:
        """Return the 512 bytes."""
        cylinders, heads, sectors = _geometry(self.size_bytes // SECTOR_BYTES)
        raw = _FOOTER.pack(
            _COOKIE,
            _FEATURES,
            _VERSION,
            _NO_OFFSET,
            self.timestamp,
            b"\0\0\0\0",
            0,
            b"\0\0\0\0",
            self.size_bytes,
            self.size_bytes,
            cylinders,
            heads,
            sectors,
            _FIXED,
            0,
            self.uuid.bytes,
            0,
        )
        at = _CHECKSUM_OFFSET
        return raw[:at] + struct.pack(">I", _checksum(raw)) + raw[at + 4 :]

    @classmethod
    def parse(cls, raw: bytes) -> "VhdFooter":
        """Read a footer.

        Raises:
            CallError: ``not_found``, there is none; ``integrity``, its checksum is wrong;
                ``unsupported``, not of a fixed disk.
        """
        if len(raw) != FOOTER_BYTES or not raw.startswith(_COOKIE):
            raise _refused("not_found", "there is no VHD footer")
        fields = _FOOTER.unpack(raw)
        version, timestamp, size_bytes, kind, checksum = (fields[i] for i in (2, 4, 9, 13, 14))
        if checksum != _checksum(raw):
            raise _refused("integrity", f"the checksum is {checksum:#x}, not {_checksum(raw):#x}")
        if version >> 16 != _VERSION >> 16 or kind != _FIXED:
            raise _refused("unsupported", f"version {version:#x}, type {kind}: no fixed disk")
        try:
            return cls(
                size_bytes=size_bytes, uuid=uuid_module.UUID(bytes=fields[15]), timestamp=timestamp
            )
        except ValueError as problem:
            raise _refused("integrity", str(problem)) from None


def append_footer(fd: int, uuid: uuid_module.UUID) -> VhdFooter:
    """Put a footer behind the content of ``fd`` (borrowed).

    Raises:
        CallError: ``invalid``, the content is no whole number of sectors.
        OSError: as write(2).
    """
    size_bytes = os.fstat(fd).st_size
    try:
        footer = VhdFooter(size_bytes=size_bytes, uuid=uuid)
    except ValueError as problem:
        raise _refused("invalid", str(problem)) from None
    os.pwrite(fd, footer.pack(), size_bytes)
    return footer


def find_footer(fd: int) -> VhdFooter | None:
    """Return the footer that ``fd`` (borrowed) ends with, None if it is no VHD.

    Raises:
        CallError: as ``VhdFooter.parse``; ``integrity``, the file does not end with the footer's
            disk.
        OSError: as read(2).
    """
    disk_bytes = os.lseek(fd, 0, os.SEEK_END) - FOOTER_BYTES
    raw = os.pread(fd, FOOTER_BYTES, max(disk_bytes, 0))
    if not raw.startswith(_COOKIE):
        return None
    footer = VhdFooter.parse(raw)
    if footer.size_bytes != disk_bytes:
        raise _refused("integrity", f"{disk_bytes} bytes, not {footer.size_bytes}")
    return footer


def _checksum(raw: bytes) -> int:
    at = _CHECKSUM_OFFSET
    return ~(sum(raw[:at]) + sum(raw[at + 4 :])) & 0xFFFFFFFF


def _geometry(total_sectors: int) -> tuple[int, int, int]:
    """Return cylinders, heads and sectors a track, as the appendix of the specification has it."""
    total_sectors = min(total_sectors, 65535 * 16 * 255)
    if total_sectors >= 65535 * 16 * 63:
        sectors, heads = 255, 16
        return total_sectors // sectors // heads, heads, sectors
    sectors = 17
    tracks = total_sectors // sectors
    heads = max((tracks + 1023) // 1024, 4)
    if tracks >= heads * 1024 or heads > 16:
        sectors, heads = 31, 16
        tracks = total_sectors // sectors
    if tracks >= heads * 1024:
        sectors, heads = 63, 16
        tracks = total_sectors // sectors
    return tracks // heads, heads, sectors


def _refused(code: str, what: str) -> CallError:
    return CallError(code, f"cannot use the VHD footer: {what}", step="read the VHD footer")
