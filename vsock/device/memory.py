"""The guest's memory, mapped from the descriptors that the front-end passes.

Every access names an address and a length and is checked against the regions before a single byte
is touched: a guest may write any number into a descriptor. The front-end is trusted not to shrink
the files behind the regions (it could kill this process with SIGBUS; it already owns the guest).

Source: QEMU docs/interop/vhost-user.rst, "Memory region description".
"""

import mmap
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ("GuestMemory", "MemoryFault", "Region", "RegionAddress")

_ADDRESS_LIMIT = 1 << 64


class MemoryFault(Exception):
    """An address range lies outside the guest's memory, or may not be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionAddress:
    """Where one region lies: guest-physical, in the front-end, and in the file behind it."""

    guest_address: int
    size_bytes: int
    user_address: int
    file_offset_bytes: int

    def __post_init__(self) -> None:
        if self.size_bytes <= 0:
            raise ValueError("memory region of no size")
        for start in (self.guest_address, self.user_address, self.file_offset_bytes):
            if start < 0 or start + self.size_bytes > _ADDRESS_LIMIT:
                raise ValueError(f"memory region wraps around: {self}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Region:
    """A mapped region. The mapping lives as long as a view of it does."""

    where: RegionAddress
    view: memoryview

    @classmethod
    def map(cls, where: RegionAddress, fd: int) -> "Region":
        """Map ``fd`` shared; read-only where it was opened so (a read-only NVDIMM, say).

        The caller keeps ``fd``. Raises OSError or ValueError when the file cannot be mapped.
        """
        # From offset 0, because huge pages demand more than page alignment of the offset.
        length = where.file_offset_bytes + where.size_bytes
        try:
            mapped = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except PermissionError:
            mapped = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ)
        except OverflowError as exc:
            raise ValueError(f"memory region cannot be mapped: {where}") from exc
        return cls(where=where, view=memoryview(mapped)[where.file_offset_bytes :])


class GuestMemory:
    """An immutable set of regions; ``guest`` and ``user`` translate the two kinds of address."""

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        """Raise ValueError when regions overlap in the guest's address space."""
        self.regions = tuple(sorted(regions, key=lambda region: region.where.guest_address))
        self._starts = [region.where.guest_address for region in self.regions]
        for low, high in zip(self.regions, self.regions[1:], strict=False):
            if low.where.guest_address + low.where.size_bytes > high.where.guest_address:
                raise ValueError(f"memory regions overlap: {low.where} and {high.where}")

    def guest(self, address: int, length: int, *, write: bool) -> list[memoryview]:
        """Return views of ``length`` bytes at a guest-physical address, in order.

        More than one view only where the range crosses into an adjacent region.

        Raises:
            MemoryFault: some byte is outside every region, or may not be written though ``write``.
        """
        views = []
        position = bisect_right(self._starts, address) - 1
        while length > 0:
            if not 0 <= position < len(self.regions):
                raise MemoryFault(f"no guest memory at {address:#x}")
            region = self.regions[position]
            start = address - region.where.guest_address
            view = region.view[start : start + length]
            # Adjacent regions only: past the first one, the address must be its very start.
            if start < 0 or start >= region.where.size_bytes:
                raise MemoryFault(f"no guest memory at {address:#x}")
            if write and view.readonly:
                raise MemoryFault(f"guest memory at {address:#x} is read-only")
            views.append(view)
            length -= len(view)
            address += len(view)
            position += 1
        return views

    def user(self, address: int, length: int) -> memoryview:
        """Return a writable view at an address of the front-end's own address space.

        Raises:
            MemoryFault: the range is not wholly in one writable region.
        """
        for region in self.regions:
            start = address - region.where.user_address
            if start >= 0 and start + length <= region.where.size_bytes:
                if region.view.readonly:
                    break
                return region.view[start : start + length]
        raise MemoryFault(
            f"no writable memory for {length} bytes at front-end address {address:#x}"
        )
