"""Where a layer's bytes are, and what they must prove to be."""

import functools
from collections.abc import Mapping

from guestagent.api.checks import (
    MAX_BYTES,
    FieldError,
    check_choice,
    check_path,
    check_range,
    check_word,
)
from guestagent.api.request import Request
from vsock.record import Record

#: Digest length of each hash algorithm that dm-verity layers may use.
DIGEST_BYTES = {"sha1": 20, "sha256": 32, "sha512": 64}
#: What a hash tree is made of beside its root digest; the digest vouches for none of it.
TREE_FIELDS = (
    "salt",
    "algorithm",
    "hash_type",
    "data_blocks",
    "data_block_size",
    "hash_block_size",
)
#: Bytes of a data or a hash block: what a kernel with pages of 4 KiB can map.
BLOCK_SIZES = (512, 1024, 2048, 4096)
MAX_SALT_BYTES = 256
MAX_SIGNATURE_BYTES = 64 * 1024
#: The salt follows the block in the hash, digests lie end to end.
HASH_TYPE_CHROMEOS = 0
#: The salt precedes the block, each digest starts at a power of two.
HASH_TYPE_NORMAL = 1
VERITY_PRESETS = ("default", "strict", "fast")
SECTOR_BYTES = 512
#: Ranges of one layer; a request of so many fits the limits of the wire.
MAX_RANGES = 4096
_HEX = frozenset("0123456789abcdefABCDEF")
MAX_LABEL = 64
_LABEL = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


class PmemDevice(Record):
    """A VPMem or NVDIMM device, /dev/pmemNUMBER; NFIT and virtio-pmem alike."""

    kind: str = "pmem"
    number: int

    def check(self) -> None:
        check_range("number", self.number, 0, 255)


class VirtioBlkDevice(Record):
    """A virtio-blk disk, by the serial that the host gave it (at most 20 bytes)."""

    kind: str = "virtio-blk"
    serial: str

    def check(self) -> None:
        check_word("serial", self.serial, 20)


class LabelDevice(Record):
    """A disk by a name that the host gave it: letters, digits, ``-`` and ``_``, at most 64.

    That is the serial of a virtio-blk disk, the serial or the WWN of a SCSI disk, the name in the
    label of an NVDIMM namespace, or the unique id of its DIMM. What two disks have is refused.
    """

    kind: str = "label"
    label: str

    def check(self) -> None:
        if not is_label(self.label):
            raise ValueError(
                f"label must be 1 to {MAX_LABEL} letters, digits, '-' or '_', got {self.label!r}"
            )


class ScsiDevice(Record):
    """A SCSI disk or its partition: host adapter number, LUN, partition (0 is the whole disk)."""

    kind: str = "scsi"
    controller: int
    lun: int
    partition: int = 0

    def check(self) -> None:
        check_range("controller", self.controller, 0, 255)
        check_range("lun", self.lun, 0, 16383)
        check_range("partition", self.partition, 0, 255)


class VmbusScsiDevice(Record):
    """A SCSI disk of Hyper-V or its partition: the VMBus GUID of its controller, LUN, partition.

    The host knows the GUID; the number that Linux gives to the controller it does not.
    """

    kind: str = "vmbus-scsi"
    guid: str
    lun: int
    partition: int = 0

    def check(self) -> None:
        parts = self.guid.split("-")
        if [len(part) for part in parts] != [8, 4, 4, 4, 12] or not _HEX.issuperset("".join(parts)):
            raise ValueError(f"guid must be 8-4-4-4-12 hexadecimal digits, got {self.guid!r}")
        check_range("lun", self.lun, 0, 16383)
        check_range("partition", self.partition, 0, 255)


class PathDevice(Record):
    """A block device by its node, /dev/..."""

    kind: str = "path"
    path: str

    def check(self) -> None:
        check_path("path", self.path)
        if not self.path.startswith("/dev/"):
            raise ValueError(f"path must lie below /dev, got {self.path!r}")


Device = PmemDevice | VirtioBlkDevice | LabelDevice | ScsiDevice | VmbusScsiDevice | PathDevice


class DeviceRemoveReply(Record):
    """What was done: ``written`` is the file that "1" was written to, by which the kernel let go
    of the devices ``removed``, the disk and its partitions. With ``already`` no such disk was
    there, and nothing was done."""

    removed: tuple[str, ...]
    written: str
    timings_ms: Mapping[str, float]
    already: bool


class DeviceRemove(Request[DeviceRemoveReply], method="device.remove"):
    """Have the kernel let go of a SCSI disk that nothing uses, before the host detaches it.

    Its cached data is written out before, and the reply comes when it is gone. ``busy`` names what
    uses it. A later request for the device looks for it again, by a rescan of its controller.
    """

    device: Device

    def check(self) -> None:
        if isinstance(self.device, (ScsiDevice, VmbusScsiDevice)) and self.device.partition:
            raise ValueError("device: partition must be 0, a disk goes as a whole")


def is_label(text: str) -> bool:
    """Return whether a device can be named by ``text``: no other name of a host is a label."""
    return 0 < len(text) <= MAX_LABEL and _LABEL.issuperset(text)


class ByteRange(Record):
    """A byte range of a packed device that holds a layer or a part of it; whole sectors."""

    offset_bytes: int
    size_bytes: int

    def check(self) -> None:
        check_range("offset_bytes", self.offset_bytes, 0, MAX_BYTES)
        check_range("size_bytes", self.size_bytes, 1, MAX_BYTES)
        for name, value in (("offset_bytes", self.offset_bytes), ("size_bytes", self.size_bytes)):
            if value % SECTOR_BYTES:
                raise ValueError(f"{name} {value} is not a multiple of {SECTOR_BYTES}")
        if self.offset_bytes + self.size_bytes > MAX_BYTES:
            raise ValueError("offset_bytes + size_bytes exceeds 63 bits")

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.size_bytes


#: One range, or several in the order in which they are put together.
LayerMapping = ByteRange | tuple[ByteRange, ...]


def ranges_of(mapping: LayerMapping | None) -> tuple[ByteRange, ...]:
    """Return the ranges of a mapping in order; none of a layer that is a whole device."""
    if mapping is None:
        return ()
    return mapping if isinstance(mapping, tuple) else (mapping,)


def check_mapping(mapping: LayerMapping | None) -> None:
    """Refuse a list of ranges that no layer can have.

    Raises:
        ValueError: it is empty or too long, or the ranges together exceed 63 bits.
    """
    if not isinstance(mapping, tuple):
        return
    if not 0 < len(mapping) <= MAX_RANGES:
        raise ValueError(f"mapping must have 1 to {MAX_RANGES} ranges, got {len(mapping)}")
    if sum(part.size_bytes for part in mapping) > MAX_BYTES:
        raise ValueError("the sizes of the ranges of mapping together exceed 63 bits")


class VerityTerms(Record):
    """What defines a dm-verity hash tree over its data, as far as it is said; None is left open.

    Block sizes are in bytes, ``data_blocks`` counts blocks of ``data_block_size``.
    ``hash_offset_bytes`` is where the superblock starts, or the tree itself where ``superblock`` is
    false. The limits here are the only ones: what is read from a disk or from the kernel is held to
    them as well (``guestagent.storage.verity``).
    """

    root_digest: bytes | None = None
    salt: bytes | None = None
    algorithm: str | None = None
    hash_type: int | None = None
    data_blocks: int | None = None
    data_block_size: int | None = None
    hash_block_size: int | None = None
    hash_offset_bytes: int | None = None
    superblock: bool = True

    def check(self) -> None:
        """Refuse a value that no layer can have.

        Raises:
            FieldError: ``field`` is the first value that is wrong.
        """
        if self.algorithm is not None and self.algorithm not in DIGEST_BYTES:
            known = ", ".join(DIGEST_BYTES)
            raise FieldError("algorithm", f"{self.algorithm!r} is none of {known}")
        if self.root_digest is not None:
            _check_digest(self.root_digest, self.algorithm)
        _check_tree(
            self.hash_type,
            self.data_blocks,
            self.data_block_size,
            self.hash_block_size,
            len(self.salt or b""),
            self.hash_offset_bytes,
        )


class WholeVerityTerms(VerityTerms):
    """All that defines a hash tree: nothing is left open. ``hash_offset_bytes`` leads to the
    superblock, or to the tree where there is none."""

    root_digest: bytes
    salt: bytes
    algorithm: str
    hash_type: int
    data_blocks: int
    data_block_size: int
    hash_block_size: int
    hash_offset_bytes: int
    superblock: bool


class Verity(VerityTerms):
    """What to verify a layer against. Only ``root_digest`` is needed when there is a superblock.

    What is left out is read from the superblock; what is given must equal it.
    ``hash_offset_bytes`` is where the superblock starts (or the tree itself, where ``superblock``
    is false), counted from the start of the mapping, or of ``hash_device`` where that is given
    (and then 0 unless said).
    ``signature`` is a detached PKCS#7 over the hexadecimal root digest, for the kernel's keyring.
    ``allow_sha1`` admits an algorithm that is refused otherwise.
    """

    root_digest: bytes
    hash_device: Device | None = None
    preset: str = "default"
    signature: bytes | None = None
    allow_sha1: bool = False

    def check(self) -> None:
        super().check()
        check_choice("preset", self.preset, VERITY_PRESETS)
        if self.signature is not None:
            check_range("signature length", len(self.signature), 1, MAX_SIGNATURE_BYTES)
        if self.superblock:
            return
        for name in TREE_FIELDS:
            if getattr(self, name) is None:
                text = "needed where there is no superblock to read it from"
                raise FieldError(name, text)


def _check_digest(root_digest: bytes, algorithm: str | None) -> None:
    lengths = tuple(DIGEST_BYTES.values()) if algorithm is None else (DIGEST_BYTES[algorithm],)
    if len(root_digest) not in lengths:
        expected = " or ".join(map(str, lengths))
        raise FieldError("root_digest", f"has {len(root_digest)} bytes, not {expected}")


@functools.lru_cache(maxsize=64)
def _check_tree(
    hash_type: int | None,
    data_blocks: int | None,
    data_block_size: int | None,
    hash_block_size: int | None,
    salt_bytes: int,
    hash_offset_bytes: int | None,
) -> None:
    if hash_type not in (None, HASH_TYPE_CHROMEOS, HASH_TYPE_NORMAL):
        raise FieldError("hash_type", f"{hash_type} is neither 0 nor 1")
    low, high = BLOCK_SIZES[0], BLOCK_SIZES[-1]
    for field, size in (("data_block_size", data_block_size), ("hash_block_size", hash_block_size)):
        if size is not None and size not in BLOCK_SIZES:
            raise FieldError(field, f"must be a power of two in {low}..{high}, got {size}")
    if data_blocks is not None:
        if data_blocks < 1:
            raise FieldError("data_blocks", f"{data_blocks} is not positive")
        if data_blocks * (data_block_size or low) > MAX_BYTES:
            raise FieldError("data_blocks", f"{data_blocks} blocks exceed {MAX_BYTES} bytes")
    if salt_bytes > MAX_SALT_BYTES:
        raise FieldError("salt", f"has {salt_bytes} bytes, at most {MAX_SALT_BYTES}")
    if hash_offset_bytes is not None and not 0 <= hash_offset_bytes <= MAX_BYTES:
        raise FieldError("hash_offset_bytes", f"{hash_offset_bytes} is not in 0..{MAX_BYTES}")
