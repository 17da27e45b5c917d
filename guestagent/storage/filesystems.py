"""The file systems of layers and scratches: one row says all that there is to know of a type.

Only a few types are admitted, since each is kernel code that parses bytes of a stranger. Detection
reads magic numbers and refuses what looks like two at once; sizes claimed by a superblock are
compared with the device before the kernel is asked to mount it.

A new type is a row here and its name in ``guestagent.api``. Sources of the superblocks:
fs/erofs/erofs_fs.h, fs/squashfs/squashfs_fs.h, fs/ext4/ext4.h, fs/xfs/libxfs/xfs_format.h (Linux
6.1).
"""

import errno
import itertools
import os
import struct
from collections.abc import Callable

from vsock.errors import CallError
from vsock.record import Record

__all__ = (
    "HEAD_BYTES",
    "TABLE",
    "Filesystem",
    "check_size",
    "check_superblock",
    "claimed_size_bytes",
    "detect",
    "has_flattened_erofs",
    "label_of",
    "layer_type",
    "mount_options",
    "refusal",
    "registered",
    "uuid_of",
)

ReadAt = Callable[[int, int], bytes]  # (offset_bytes, length_bytes) -> exactly so many bytes
Options = tuple[tuple[str, str | None], ...]

#: As much of the start of a device as holds every superblock.
HEAD_BYTES = 2048
_UUID_BYTES = 16
_EROFS_INCOMPAT_DEVICE_TABLE = 0x8
_EROFS_INCOMPAT_48BIT = 0x80
#: struct erofs_deviceslot: tag, blocks_lo, uniaddr_lo, blocks_hi, uniaddr_hi (the last two since
#: Linux 6.15, of images with 48-bit addresses; zero before).
_EROFS_SLOT = struct.Struct("<64x3IH50x")
#: Slots that are read at once.
_EROFS_SLOTS = 512
_EXT4_INCOMPAT_64BIT = 0x80


class Filesystem(Record):
    """A type. Offsets are in bytes from the start of the device.

    ``size`` takes the head of a device and returns the bytes that the superblock claims.
    ``layer_options`` and ``scratch_options`` are None where the type is not mounted as such.
    ``mkfs`` is the program for a scratch and its arguments. ``kernel`` is the version of Linux that
    had the type first, ``modules`` are what has to be loaded where it is not built in.
    ``uuid_at`` and ``label`` (offset, longest) are None where the type has none. ``check_more``
    takes the head, a reader and the bytes of the device, and refuses what else the kernel must not
    be given.
    """

    name: str
    magic_at: int
    magic: bytes
    size: Callable[[bytes], int]
    kernel: str
    modules: tuple[str, ...]
    layer_options: Options | None = None
    scratch_options: Options | None = None
    has_dax: bool = False
    mkfs: tuple[str, ...] = ()
    uuid_at: int | None = None
    label: tuple[int, int] | None = None
    check_more: Callable[[bytes, ReadAt, int], None] | None = None

    def is_at(self, head: bytes) -> bool:
        """Say whether the magic number is there."""
        return head[self.magic_at : self.magic_at + len(self.magic)] == self.magic


def _block_bits(bits: int, low: int, high: int, filesystem: str) -> int:
    if not low <= bits <= high:
        text = f"the {filesystem} superblock claims blocks of 2^{bits} bytes"
        raise CallError("mount", text, step="check-filesystem")
    return bits


def _erofs_size(head: bytes) -> int:
    """struct erofs_super_block: blkszbits at 12, blocks at 36."""
    bits = _block_bits(head[1024 + 12], 9, 16, "erofs")
    (blocks,) = struct.unpack_from("<I", head, 1024 + 36)
    (incompat,) = struct.unpack_from("<I", head, 1024 + 80)
    if incompat & _EROFS_INCOMPAT_48BIT:
        blocks |= struct.unpack_from("<H", head, 1024 + 14)[0] << 32
    return int(blocks) << bits


def _check_erofs_devices(head: bytes, read_at: ReadAt, device_bytes: int) -> None:
    """Refuse an image with extra devices where the kernel cannot find them on the one device that
    there is, and where one ends past it or has no address: the kernel would read such a device's
    blocks from the start of the image.

    Source: erofs_scan_devices in fs/erofs/super.c. Without the option ``device=`` the kernel mounts
    such an image since Linux 6.4 (commit 8b465fecc35a), and answered ENOENT before.
    """
    incompat, _, count, slot = struct.unpack_from("<IHHH", head, 1024 + 80)
    if not incompat & _EROFS_INCOMPAT_DEVICE_TABLE or not count:
        return
    if not has_flattened_erofs():
        raise CallError(
            "unsupported",
            f"the erofs image has a table of {count} devices, which needs Linux 6.4; "
            f"this is {os.uname().release}",
            step="check-filesystem",
            object="erofs-flattened",
            hint="mount the layers one by one",
        )
    bits = _block_bits(head[1024 + 12], 9, 16, "erofs")
    table_bytes = slot * _EROFS_SLOT.size
    if table_bytes + count * _EROFS_SLOT.size > device_bytes:
        raise _bad_erofs_table(f"{count} devices at byte {table_bytes}", device_bytes)
    for first in range(0, count, _EROFS_SLOTS):
        number_of_slots = min(_EROFS_SLOTS, count - first)
        offset_bytes = table_bytes + first * _EROFS_SLOT.size
        slots = read_at(offset_bytes, number_of_slots * _EROFS_SLOT.size)
        for number, fields in enumerate(_EROFS_SLOT.iter_unpack(slots), first):
            blocks, start, blocks_high, start_high = fields
            if incompat & _EROFS_INCOMPAT_48BIT:
                blocks, start = blocks | blocks_high << 32, start | start_high << 32
            if not start or (start + blocks) << bits > device_bytes:
                what = f"device {number} of {blocks << bits} bytes at byte {start << bits}"
                raise _bad_erofs_table(what, device_bytes)


def _bad_erofs_table(what: str, device_bytes: int) -> CallError:
    return CallError(
        "mount",
        f"the erofs device table claims {what}, the device has {device_bytes}",
        step="check-filesystem",
    )


def has_flattened_erofs() -> bool:
    """Say whether the kernel mounts erofs images whose extra devices lie on the same device.

    Nothing in /sys/fs/erofs/features tells, so that the version decides.
    """
    major, _, rest = os.uname().release.partition(".")
    minor = "".join(itertools.takewhile(str.isdigit, rest))
    return (int(major), int(minor or 0)) >= (6, 4)


def _squashfs_size(head: bytes) -> int:
    """struct squashfs_super_block: bytes_used at 40."""
    return int(struct.unpack_from("<Q", head, 40)[0])


def _ext4_size(head: bytes) -> int:
    """struct ext4_super_block: counts at 4 and 0x150, log_block_size at 24."""
    (blocks,) = struct.unpack_from("<I", head, 1024 + 4)
    bits = _block_bits(struct.unpack_from("<I", head, 1024 + 24)[0] + 10, 10, 16, "ext4")
    (incompat,) = struct.unpack_from("<I", head, 1024 + 96)
    if incompat & _EXT4_INCOMPAT_64BIT:
        blocks |= struct.unpack_from("<I", head, 1024 + 0x150)[0] << 32
    return int(blocks) << bits


def _xfs_size(head: bytes) -> int:
    """struct xfs_dsb, big-endian: blocksize at 4, dblocks at 8."""
    block_size, blocks = struct.unpack_from(">IQ", head, 4)
    if block_size & (block_size - 1):
        text = f"the xfs superblock claims blocks of {block_size} bytes"
        raise CallError("mount", text, step="check-filesystem")
    _block_bits(block_size.bit_length() - 1, 9, 16, "xfs")
    return int(block_size * blocks)


_ROWS = (
    Filesystem(
        name="erofs",
        magic_at=1024,
        magic=b"\xe2\xe1\xf5\xe0",
        size=_erofs_size,
        kernel="5.4",
        modules=("erofs",),
        layer_options=(),
        has_dax=True,
        uuid_at=1024 + 48,
        label=(1024 + 64, 16),
        check_more=_check_erofs_devices,
    ),
    Filesystem(
        name="squashfs",
        magic_at=0,
        magic=b"hsqs",
        size=_squashfs_size,
        kernel="2.6.29",
        modules=("squashfs",),
        layer_options=(),
    ),
    Filesystem(
        name="ext4",
        magic_at=1024 + 56,
        magic=b"\x53\xef",
        size=_ext4_size,
        kernel="2.6.28",
        modules=("ext4",),
        # a journal that is replayed would be written to, or, where that cannot be, fail; and an
        # image that says errors=panic must not end the guest
        layer_options=(("noload", None), ("errors", "remount-ro")),
        scratch_options=(("errors", "remount-ro"),),
        has_dax=True,
        # discard is left to the mount, the journal to the default
        mkfs=("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1"),
        uuid_at=1024 + 104,
        label=(1024 + 120, 16),
    ),
    Filesystem(
        name="xfs",
        magic_at=0,
        magic=b"XFSB",
        size=_xfs_size,
        kernel="2.6.12",
        modules=("xfs",),
        # a second file system of the same uuid is refused otherwise
        scratch_options=(("nouuid", None),),
        mkfs=("mkfs.xfs", "-q"),
        uuid_at=32,
        label=(108, 12),
    ),
)
#: Every type that is known, by name.
TABLE = {row.name: row for row in _ROWS}


def detect(read_at: ReadAt) -> str | None:
    """Return the type whose magic number is there; None if none is.

    Raises:
        CallError: ``mount``, two types fit at once: two readers would see two things.
    """
    head = read_at(0, HEAD_BYTES)
    found = [row.name for row in _ROWS if row.is_at(head)]
    if len(found) > 1:
        text = f"the first bytes are those of {' and '.join(found)} at once"
        raise CallError("mount", text, step="detect-filesystem")
    return found[0] if found else None


def layer_type(filesystem: str, read_at: ReadAt) -> str:
    """Return the type of a layer as a request says it, ``auto`` resolved by magic number.

    Raises:
        CallError: ``mount``, no type that a layer may have is there, or two are.
    """
    if filesystem != "auto":
        return filesystem
    found = detect(read_at)
    if found is None or TABLE[found].layer_options is None:
        known = ", ".join(row.name for row in _ROWS if row.layer_options is not None)
        text = f"the first bytes are those of {found or 'no known type'}, not of {known}"
        raise CallError("mount", text, step="detect-filesystem")
    return found


def claimed_size_bytes(filesystem: str, read_at: ReadAt) -> int:
    """Return how large the superblock says that the file system is.

    Raises:
        CallError: ``mount``, the magic number is not there or a block size is absurd.
    """
    row = _row(filesystem)
    head = read_at(0, HEAD_BYTES)
    if not row.is_at(head):
        raise CallError("mount", f"there is no {filesystem} superblock", step="check-filesystem")
    return row.size(head)


def check_size(filesystem: str, read_at: ReadAt, device_bytes: int) -> int:
    """Return the size that the superblock claims, after comparing it with the device's.

    Raises:
        CallError: ``mount``, the file system is larger than the device (cut short, or a mapping
            of the wrong length), or of size 0.
    """
    claimed = claimed_size_bytes(filesystem, read_at)
    if not 0 < claimed <= device_bytes:
        raise CallError(
            "mount",
            f"the {filesystem} superblock claims {claimed} bytes, the device has {device_bytes}",
            step="check-filesystem",
        )
    return claimed


def check_superblock(filesystem: str, read_at: ReadAt, device_bytes: int) -> None:
    """Refuse a superblock that the running kernel must not be given.

    Raises:
        CallError: as ``check_size``; ``mount``, a device table is not within the device;
            ``unsupported``, this kernel cannot mount what it describes.
    """
    head = read_at(0, HEAD_BYTES)
    check_size(filesystem, lambda _offset_bytes, _length_bytes: head, device_bytes)
    check_more = TABLE[filesystem].check_more
    if check_more is not None:
        check_more(head, read_at, device_bytes)


def mount_options(filesystem: str, *, readonly: bool = True, dax: bool = False) -> Options:
    """Return the options (key, value or None) to mount that type with, as a layer (``readonly``)
    or as a scratch.

    Raises:
        CallError: ``unsupported``, a type that is not mounted as such, or a type without dax.
    """
    row = _row(filesystem)
    options = row.layer_options if readonly else row.scratch_options
    if options is None:
        text = f"file system {filesystem!r} is not for {'layers' if readonly else 'scratches'}"
        raise CallError("unsupported", text, step="mount-options", object=filesystem)
    if not dax:
        return options
    if not row.has_dax:
        raise CallError("unsupported", f"{filesystem} has no dax", step="mount-options")
    return (*options, ("dax", "always"))


def refusal(filesystem: str, node: str, error: OSError) -> CallError | None:
    """Return what it means that the kernel did not mount a type from a device, as far as the errno
    says it: ``unsupported``, it lacks the type; ``mount``, it does not accept what is there."""
    row = _row(filesystem)
    if error.errno == errno.ENODEV:
        return CallError(
            "unsupported",
            f"this kernel has no file system {row.name}",
            errno=error.errno,
            hint=f"load the module {row.modules[0]}, of Linux {row.kernel} or later",
        )
    if error.errno in (errno.EINVAL, errno.EUCLEAN, errno.EBADMSG):
        return CallError(
            "mount",
            f"the kernel does not accept the {row.name} file system on {node}: {error.strerror}",
            errno=error.errno,
            object=node,
            hint="it is damaged, or has features that this kernel lacks; kernel_log may say which",
        )
    return None


def uuid_of(filesystem: str, head: bytes) -> str:
    """Return the uuid in the usual form, the empty text where there is none."""
    row = TABLE.get(filesystem)
    if row is None or row.uuid_at is None:
        return ""
    digits = head[row.uuid_at : row.uuid_at + _UUID_BYTES].hex()
    if not digits.strip("0"):
        return ""
    cuts = (0, 8, 12, 16, 20, 32)
    return "-".join(digits[a:b] for a, b in itertools.pairwise(cuts))


def label_of(filesystem: str, head: bytes) -> str:
    """Return the label, bytes that are no text escaped."""
    row = TABLE.get(filesystem)
    if row is None or row.label is None:
        return ""
    start, longest = row.label
    label = head[start : start + longest].split(b"\0", 1)[0]
    return label.decode("utf-8", "backslashreplace")


def registered(path: str = "/proc/filesystems") -> frozenset[str]:
    """Return the types that the kernel has now; one in a module is missing until it is loaded."""
    with open(path, encoding="ascii") as file:
        return frozenset(line.split()[-1] for line in file if line.strip())


def _row(filesystem: str) -> Filesystem:
    row = TABLE.get(filesystem)
    if row is None:
        text = f"file system {filesystem!r} is not one of {', '.join(TABLE)}"
        raise CallError("unsupported", text, object=filesystem)
    return row
