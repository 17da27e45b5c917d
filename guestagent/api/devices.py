"""Where a layer's bytes are, and what they must prove to be."""

from guestagent.api.checks import MAX_BYTES, check_choice, check_path, check_range, check_word
from vsock.record import Record

#: Digest length of each hash algorithm that dm-verity layers may use.
DIGEST_BYTES = {"sha1": 20, "sha256": 32, "sha512": 64}
VERITY_PRESETS = ("default", "strict", "fast")
SECTOR_BYTES = 512


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


class PathDevice(Record):
    """A block device by its node, /dev/..."""

    kind: str = "path"
    path: str

    def check(self) -> None:
        check_path("path", self.path)
        if not self.path.startswith("/dev/"):
            raise ValueError(f"path must lie below /dev, got {self.path!r}")


Device = PmemDevice | VirtioBlkDevice | ScsiDevice | PathDevice


class ByteRange(Record):
    """The byte range of a packed device that holds one layer; whole sectors."""

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


class Verity(Record):
    """What to verify a layer against. Only ``root_digest`` is needed when there is a superblock.

    What is left out is read from the superblock; what is given must equal it.
    ``hash_offset_bytes`` is where the superblock starts (or the tree itself, where ``superblock``
    is false), counted from the start of the mapping, or of ``hash_device`` where that is given
    (and then 0 unless said).
    ``signature`` is a detached PKCS#7 over the hexadecimal root digest, for the kernel's keyring.
    ``allow_sha1`` admits an algorithm that is refused otherwise.
    """

    root_digest: bytes
    salt: bytes | None = None
    algorithm: str | None = None
    hash_type: int | None = None
    data_blocks: int | None = None
    data_block_size: int | None = None
    hash_block_size: int | None = None
    hash_offset_bytes: int | None = None
    superblock: bool = True
    hash_device: Device | None = None
    preset: str = "default"
    signature: bytes | None = None
    allow_sha1: bool = False

    def check(self) -> None:
        if self.algorithm is None:
            if len(self.root_digest) not in DIGEST_BYTES.values():
                raise ValueError(f"root_digest has {len(self.root_digest)} bytes")
        else:
            check_choice("algorithm", self.algorithm, tuple(DIGEST_BYTES))
            expected = DIGEST_BYTES[self.algorithm]
            if len(self.root_digest) != expected:
                raise ValueError(f"root_digest has {len(self.root_digest)} bytes, not {expected}")
        check_range("salt length", len(self.salt or b""), 0, 256)
        check_range("hash_type", self.hash_type, 0, 1)
        check_range("data_blocks", self.data_blocks, 1, 1 << 54)
        for name, size in (
            ("data_block_size", self.data_block_size),
            ("hash_block_size", self.hash_block_size),
        ):
            if size is not None and (size & (size - 1) or not 512 <= size <= 4096):
                raise ValueError(f"{name} must be a power of two in 512..4096, got {size}")
        check_range("hash_offset_bytes", self.hash_offset_bytes, 0, MAX_BYTES)
        check_choice("preset", self.preset, VERITY_PRESETS)
        check_range("signature length", len(self.signature or b""), 0, 64 * 1024)
        self._check_without_superblock()

    def _check_without_superblock(self) -> None:
        if self.superblock:
            return
        for name in ("salt", "algorithm", "data_blocks", "data_block_size", "hash_block_size"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is needed where there is no superblock to read it from")
        if self.hash_type is None:
            raise ValueError("hash_type is needed where there is no superblock to read it from")
