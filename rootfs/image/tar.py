"""Reading tar archives: ustar, GNU and PAX, from a seekable file, without unpacking.

Stricter than extractors: an archive that ends without its end marker, a wrong checksum anywhere, a
number that is no number or a size that runs past the end is an error with the offset where it is,
never a shorter listing. Names, targets and attributes are bytes. (A subclass of tarfile.TarInfo
that raises where tarfile ends early still took 232 of 6000 changed archives that this refuses, and
times only as floats: numbers, PAX records, sparse maps and limits would be written again.)

Source: POSIX.1-2017 pax (ustar and pax interchange format); GNU tar manual, "Basic Tar Format" and
"Storing Sparse Files".
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from rootfs.image.pax import PaxRecords, parse_decimal
from rootfs.image.tree import Extent
from vsock.errors import CallError

__all__ = ("BLOCK_BYTES", "TarEntry", "TarReader")

BLOCK_BYTES = 512
#: PAX headers and long names: more than any kernel takes for a name, all attributes included.
_MAX_HEADER_DATA_BYTES = 1 << 20
#: Of all of them together, as a listing may be kept in memory.
_MAX_ALL_HEADER_BYTES = 256 << 20
_MAX_MEMBERS = 4 << 20
#: Each member pays for these; real archives have one or two.
_MAX_GLOBAL_RECORDS = 256
#: Of one member, and of all together.
_MAX_SPARSE_EXTENTS = 1 << 20
_MAX_SIZE_BYTES = (1 << 63) - 1
_MAX_DEVICE_NUMBER = (1 << 31) - 1
#: No longer line of a sparse map can hold a number.
_MAX_LINE_BYTES = 32
_ZERO_BLOCK = bytes(BLOCK_BYTES)

_TYPES = {
    b"0": stat.S_IFREG,
    b"\0": stat.S_IFREG,
    b"7": stat.S_IFREG,
    b"S": stat.S_IFREG,
    b"1": 0,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}


@dataclass(slots=True, kw_only=True)
class TarEntry:
    """A member. ``file_type`` is the S_IFMT bits, 0 for a hard link to ``target``; ``extents`` are
    in the archive's file."""

    name: bytes
    file_type: int
    permissions: int
    uid: int
    gid: int
    mtime_ns: int
    target: bytes
    rdev: int
    size_bytes: int
    extents: tuple[Extent, ...]
    xattrs: dict[bytes, bytes]
    offset_bytes: int


class TarReader:
    """The members of an archive in ``size_bytes`` bytes at ``start_bytes`` of ``fd`` (borrowed).

    ``needs_end`` refuses an archive without end marker or with something behind it; without it such
    an archive is taken as it is, for where a digest already says that it is whole (umoci 0.4
    leaves out the padding of the last member, too).
    """

    def __init__(
        self, fd: int, *, start_bytes: int = 0, size_bytes: int, needs_end: bool = True
    ) -> None:
        self._fd = fd
        self._start = start_bytes
        self._end = start_bytes + size_bytes
        self._at = start_bytes
        self._needs_end = needs_end
        self._header_bytes = 0
        self._members = 0
        self._sparse_extents = 0
        self._global = PaxRecords()

    def __iter__(self) -> Iterator[TarEntry]:
        """Yield the members in their order.

        Raises:
            CallError: ``integrity``, the archive is damaged or cut; ``unsupported``, a member of a
                kind that is not known; ``resource``, a header of over 1 MiB, over 256 MiB of
                them, over 4 Mi members, or over 1 Mi pieces of sparse ones.
        """
        local = PaxRecords()
        long_name: bytes | None = None
        long_target: bytes | None = None
        while True:
            header_at = self._at
            block = self._next_header()
            if block is None:
                if local or long_name is not None or long_target is not None:
                    raise self._damaged(header_at, "ends after an extended header")
                return
            kind = block[156:157]
            if kind in (b"x", b"X", b"g"):
                records = PaxRecords.parse(self._header_data(block), header_at - self._start)
                if kind == b"g":
                    self._global = self._global.merged(records)
                    if len(self._global) > _MAX_GLOBAL_RECORDS:
                        raise self._too_much(header_at, "global records", _MAX_GLOBAL_RECORDS)
                else:
                    local = local.merged(records)
            elif kind == b"L":
                long_name = self._header_data(block).partition(b"\0")[0]
            elif kind == b"K":
                long_target = self._header_data(block).partition(b"\0")[0]
            elif kind == b"V":
                local, long_name, long_target = PaxRecords(), None, None
            else:
                self._members += 1
                if self._members > _MAX_MEMBERS:
                    raise self._too_much(header_at, "more members", _MAX_MEMBERS)
                records = self._global.merged(local)
                yield self._member(block, header_at, records, long_name, long_target)
                local, long_name, long_target = PaxRecords(), None, None

    def _next_header(self) -> bytes | None:
        """Return the next header, checked; None at the end of the archive."""
        block = self._read(BLOCK_BYTES)
        if not block:
            if self._needs_end:
                raise self._damaged(self._at, "ends without an end marker: it is cut short")
            return None
        if len(block) < BLOCK_BYTES:
            raise self._damaged(self._at - len(block), "ends in the middle of a header")
        if block == _ZERO_BLOCK:
            self._check_end()
            return None
        self._check_sum(block)
        return block

    def _check_sum(self, block: bytes) -> None:
        at = self._at - BLOCK_BYTES
        stored = self._number(block, 148, 8, "checksum", at)
        field = block[148:156]
        unsigned = sum(block) - sum(field) + 8 * 32
        if stored == unsigned:
            return
        # ancient writers summed signed characters
        signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if stored != signed:
            raise self._damaged(at, f"has a header with checksum {stored}, computed {unsigned}")

    def _check_end(self) -> None:
        if not self._needs_end:
            return
        at = self._at
        while at < self._end:
            piece = os.pread(self._fd, min(1 << 20, self._end - at), at)
            if not piece:
                return
            if piece.count(0) != len(piece):
                raise self._damaged(at, "goes on after its end marker")
            at += len(piece)

    def _header_data(self, block: bytes) -> bytes:
        at = self._at - BLOCK_BYTES
        size = self._number(block, 124, 12, "size", at)
        if not 0 <= size <= _MAX_HEADER_DATA_BYTES:
            raise self._too_much(at, f"an extended header of {size} bytes", _MAX_HEADER_DATA_BYTES)
        self._header_bytes += size
        if self._header_bytes > _MAX_ALL_HEADER_BYTES:
            raise self._too_much(at, "extended headers of more bytes", _MAX_ALL_HEADER_BYTES)
        data = self._read(size)
        if len(data) < size:
            raise self._damaged(at, "ends in an extended header")
        self._skip(-size % BLOCK_BYTES, at)
        return data

    def _member(
        self,
        block: bytes,
        at: int,
        records: PaxRecords,
        long_name: bytes | None,
        long_target: bytes | None,
    ) -> TarEntry:
        kind = block[156:157]
        name = records.name or records.text(b"path") or long_name or _ustar_name(block)
        if kind not in _TYPES:
            raise CallError(
                "unsupported",
                f"cannot read the tar: member {os.fsdecode(name)!r} at byte {at - self._start} is "
                f"of type {kind!r}",
                step="read the tar",
                object=os.fsdecode(name),
            )
        file_type = _TYPES[kind]
        if kind == b"\0" and name.endswith(b"/"):
            file_type = stat.S_IFDIR
        size, extents = self._content(block, at, records, file_type)
        return TarEntry(
            name=name,
            file_type=file_type,
            permissions=self._number(block, 100, 8, "mode", at) & 0o7777,
            uid=records.number(b"uid", self._number(block, 108, 8, "uid", at)),
            gid=records.number(b"gid", self._number(block, 116, 8, "gid", at)),
            mtime_ns=records.time_ns(self._number(block, 136, 12, "mtime", at)),
            target=records.text(b"linkpath") or long_target or _field(block, 157, 100),
            rdev=self._device(block, at, file_type),
            size_bytes=size,
            extents=extents,
            xattrs=records.xattrs(),
            offset_bytes=at - self._start,
        )

    def _device(self, block: bytes, at: int, file_type: int) -> int:
        if file_type not in (stat.S_IFCHR, stat.S_IFBLK):
            return 0
        major = self._number(block, 329, 8, "devmajor", at)
        minor = self._number(block, 337, 8, "devminor", at)
        if not (0 <= major <= _MAX_DEVICE_NUMBER and 0 <= minor <= _MAX_DEVICE_NUMBER):
            raise self._damaged(at, f"has a device with the number {major}:{minor}")
        return os.makedev(major, minor)

    def _content(
        self, block: bytes, at: int, records: PaxRecords, file_type: int
    ) -> tuple[int, tuple[Extent, ...]]:
        """Return the size of a member's file and where its data is, and go past the data."""
        stored = records.number(b"size", self._number(block, 124, 12, "size", at))
        if file_type != stat.S_IFREG:
            stored = 0  # only regular files have data here, whatever size the others state
        if not 0 <= stored <= _MAX_SIZE_BYTES:
            raise self._damaged(at, f"has a member of {stored} bytes")
        sparse: list[tuple[int, int]] | None = None
        real_size = stored
        if block[156:157] == b"S":
            sparse, real_size = self._old_sparse(block, at)
        data_at = self._at
        if records.is_sparse_1_0:
            sparse = self._sparse_map(stored, at)
        elif records.is_sparse:
            sparse = records.sparse_map()
        if records.is_sparse:
            real_size = records.sparse_size()
        if not 0 <= real_size <= _MAX_SIZE_BYTES:
            raise self._damaged(at, f"has a sparse member of {real_size} bytes")
        if data_at + stored > self._end:
            raise self._damaged(at, f"ends before the {stored} bytes of a member")
        if sparse is None:
            extents: tuple[Extent, ...] = ((0, stored, data_at),) if stored else ()
        else:
            extents = self._place(sparse, real_size, data_at + stored, at)
        self._at = data_at
        self._skip(round_to_block(stored), at)
        return real_size, extents

    def _place(
        self, sparse: list[tuple[int, int]], real_size: int, data_end: int, at: int
    ) -> tuple[Extent, ...]:
        """Return a sparse map with where each piece is in the archive, checked against its size."""
        self._sparse_extents += len(sparse)
        if self._sparse_extents > _MAX_SPARSE_EXTENTS:
            raise self._too_much(at, "sparse members of more pieces", _MAX_SPARSE_EXTENTS)
        extents = []
        end, source = 0, self._at
        for offset, length in sparse:
            if length < 0 or offset < end or offset + length > real_size:
                raise self._damaged(at, f"has a sparse map with {length} bytes at {offset}")
            if length:
                extents.append((offset, length, source))
            end, source = offset + length, source + length
        if source != data_end:
            raise self._damaged(at, "has a sparse map that does not fit its data")
        return tuple(extents)

    def _old_sparse(self, block: bytes, at: int) -> tuple[list[tuple[int, int]], int]:
        """Read the map of a GNU ``S`` member: four pieces in the header, 21 in each block after."""
        pieces = self._sparse_pieces(block, 386, 4, at)
        more = block[482]
        real_size = self._number(block, 483, 12, "realsize", at)
        while more:
            if len(pieces) > _MAX_SPARSE_EXTENTS:
                raise self._damaged(at, f"has a sparse map of over {_MAX_SPARSE_EXTENTS} pieces")
            extension = self._read(BLOCK_BYTES)
            if len(extension) < BLOCK_BYTES:
                raise self._damaged(at, "ends in a sparse map")
            pieces += self._sparse_pieces(extension, 0, 21, at)
            more = extension[504]
        return pieces, real_size

    def _sparse_pieces(
        self, block: bytes, start: int, count: int, at: int
    ) -> list[tuple[int, int]]:
        pieces = []
        for place in range(start, start + 24 * count, 24):
            if not block[place]:
                break
            offset = self._number(block, place, 12, "sparse offset", at)
            pieces.append((offset, self._number(block, place + 12, 12, "sparse length", at)))
        return pieces

    def _sparse_map(self, stored: int, at: int) -> list[tuple[int, int]]:
        """Read the map of a GNU sparse 1.0 member: decimal lines in whole blocks, then the data."""
        lines: list[bytes] = []
        buffer = b""
        start = self._at
        wanted = 1
        while len(lines) < wanted:
            piece = self._read(BLOCK_BYTES)
            if len(piece) < BLOCK_BYTES or self._at - start > stored:
                raise self._damaged(at, "ends in a sparse map")
            *complete, buffer = (buffer + piece).split(b"\n")
            if len(buffer) > _MAX_LINE_BYTES and len(lines) + len(complete) < wanted:
                raise self._damaged(at, "has a sparse map that is no list of numbers")
            lines += complete
            if wanted == 1 and lines:
                wanted = 1 + 2 * parse_decimal(lines[0], "GNU.sparse map")
                if wanted > 2 * _MAX_SPARSE_EXTENTS:
                    raise self._damaged(at, f"has a sparse map of {wanted // 2} pieces")
        numbers = [parse_decimal(line, "GNU.sparse map") for line in lines[1:wanted]]
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def _number(self, block: bytes, offset: int, size: int, what: str, at: int) -> int:
        """Parse an octal field, or a GNU base-256 one (top bit set, then two's complement)."""
        field = block[offset : offset + size]
        if field[0] & 0x80:
            value = int.from_bytes(field, "big") & (1 << (8 * size - 1)) - 1
            return value - (1 << (8 * size - 1)) if field[0] & 0x40 else value
        text = field.partition(b"\0")[0].strip(b" ")
        if not text:
            return 0
        if text.strip(b"01234567"):
            raise self._damaged(at, f"has a header with the {what} {field!r}")
        return int(text, 8)

    def _read(self, size: int) -> bytes:
        data = os.pread(self._fd, min(size, self._end - self._at), self._at)
        self._at += len(data)
        return data

    def _skip(self, size: int, at: int) -> None:
        if self._at + size > self._end and self._needs_end:
            raise self._damaged(at, "ends before the padding of a member")
        self._at = min(self._at + size, self._end)

    def _too_much(self, at: int, what: str, limit: int) -> CallError:
        return CallError(
            "resource",
            f"cannot read the tar: it has {what} (at byte {at - self._start}); limit {limit}",
            step="read the tar",
        )

    def _damaged(self, at: int, what: str) -> CallError:
        return CallError(
            "integrity",
            f"cannot read the tar: it {what} (at byte {at - self._start})",
            step="read the tar",
        )


def round_to_block(size: int) -> int:
    """Return ``size`` rounded up to whole blocks."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _field(block: bytes, offset: int, size: int) -> bytes:
    return block[offset : offset + size].partition(b"\0")[0]


def _ustar_name(block: bytes) -> bytes:
    name = _field(block, 0, 100)
    prefix = _field(block, 345, 155) if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name
