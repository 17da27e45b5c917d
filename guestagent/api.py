"""The contract between a host and the agent: every request, reply and event, with its checks.

One frozen record for each method's parameters and for its reply; ``METHODS`` lists them all.
Imported by host and guest alike. A record that exists is valid by itself: what can be judged
without the kernel is judged here, and a refusal names the field (see ``vsock.record``).

Conventions: sizes and offsets are in bytes unless the name says sectors or blocks; digests and
salts travel as binary or hexadecimal text in requests and as hexadecimal text in replies; layers
of an overlay are listed topmost first, as in the kernel's ``lowerdir``.
"""

from collections.abc import Mapping

from vsock.record import Record

__all__ = (
    "AGENT_PORT",
    "DIGEST_BYTES",
    "EVENT_KINDS",
    "FILESYSTEMS",
    "METHODS",
    "PROTOCOL_VERSIONS",
    "TARGET_ROOT",
    "VERITY_PRESETS",
    "ByteRange",
    "CancelReply",
    "CancelRequest",
    "Device",
    "DeviceScratch",
    "DirectoryScratch",
    "DmDevice",
    "DmListReply",
    "DmName",
    "DmStatusReply",
    "DmTableReply",
    "DroppedOption",
    "Empty",
    "Event",
    "EventsReply",
    "EventsRequest",
    "HelloReply",
    "HelloRequest",
    "Holder",
    "LayerId",
    "LayerListReply",
    "LayerReport",
    "LayerSpec",
    "LayerUnmountRequest",
    "LayersMountReply",
    "LayersMountRequest",
    "LayersUnmountReply",
    "LayersUnmountRequest",
    "Method",
    "OverlayListReply",
    "OverlayOptions",
    "OverlayReport",
    "OverlaySpec",
    "OverlayUnmountRequest",
    "PathDevice",
    "PmemDevice",
    "Scratch",
    "ScratchReport",
    "ScsiDevice",
    "ShutdownRequest",
    "StatusReply",
    "SubscribeReply",
    "TmpfsScratch",
    "UnmountReply",
    "VerifyReply",
    "VerifyRequest",
    "Verity",
    "VerityReport",
    "VirtioBlkDevice",
)

#: Versions of this contract that the agent speaks, newest first.
PROTOCOL_VERSIONS = (1,)
#: The vsock port that the agent listens on unless configured otherwise.
AGENT_PORT = 1024
#: Targets lie below this directory unless the agent's configuration allows another.
TARGET_ROOT = "/run"
#: File systems a layer may have; "auto" asks for detection by magic number.
FILESYSTEMS = ("erofs", "squashfs", "ext4", "auto")
#: Digest length of each hash algorithm that dm-verity layers may use.
DIGEST_BYTES = {"sha1": 20, "sha256": 32, "sha512": 64}
VERITY_PRESETS = ("default", "strict", "fast")
#: Per-layer mount options a request may ask for, beside ro,nodev,nosuid which always hold.
MOUNT_OPTIONS = ("noexec", "noatime", "nodiratime", "dax")
EVENT_KINDS = (
    "agent_started",
    "layer_mounted",
    "layer_unmounted",
    "layer_failed",
    "layer_corrupted",
    "layer_device_lost",
    "overlay_mounted",
    "overlay_unmounted",
    "overlay_failed",
    "device_appeared",
    "device_vanished",
)

_ID_MAX = 64
_PATH_MAX = 1024
_WORD = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_PATH = _WORD | frozenset("/@+=")
_MAX_BYTES = (1 << 63) - 1
SECTOR_BYTES = 512


def _check_word(name: str, value: str, longest: int = _ID_MAX) -> None:
    """Identifiers end up in dm names, uuids and file names: one plain word, no dot first."""
    if not 0 < len(value) <= longest:
        raise ValueError(f"{name} must have 1 to {longest} characters, got {len(value)}")
    if not _WORD.issuperset(value) or value[0] in ".-":
        raise ValueError(f"{name} must be letters, digits, '.', '_' or '-', got {value!r}")


def _check_path(name: str, value: str) -> None:
    """Paths may end up in mount options: absolute, normal, from a plain alphabet."""
    if not value.startswith("/") or len(value) > _PATH_MAX:
        raise ValueError(f"{name} must be absolute and at most {_PATH_MAX} long, got {value!r}")
    if not _PATH.issuperset(value):
        raise ValueError(f"{name} may hold letters, digits and '._-/@+=' only, got {value!r}")
    parts = value[1:].split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name} must be normal: no '//', '.', '..' or final '/', got {value!r}")
    if any(len(part) > 255 for part in parts):
        raise ValueError(f"{name} has a component of over 255 characters")


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {value}")


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


# --- where a layer's bytes are ----------------------------------------------------------------


class PmemDevice(Record):
    """A VPMem or NVDIMM device, /dev/pmemNUMBER; NFIT and virtio-pmem alike."""

    kind: str = "pmem"
    number: int

    def check(self) -> None:
        _check_range("number", self.number, 0, 255)


class VirtioBlkDevice(Record):
    """A virtio-blk disk, by the serial that the host gave it (at most 20 bytes)."""

    kind: str = "virtio-blk"
    serial: str

    def check(self) -> None:
        _check_word("serial", self.serial, 20)


class ScsiDevice(Record):
    """A SCSI disk or its partition: host adapter number, LUN, partition (0 is the whole disk)."""

    kind: str = "scsi"
    controller: int
    lun: int
    partition: int = 0

    def check(self) -> None:
        _check_range("controller", self.controller, 0, 255)
        _check_range("lun", self.lun, 0, 16383)
        _check_range("partition", self.partition, 0, 255)


class PathDevice(Record):
    """A block device by its node, /dev/..."""

    kind: str = "path"
    path: str

    def check(self) -> None:
        _check_path("path", self.path)
        if not self.path.startswith("/dev/"):
            raise ValueError(f"path must lie below /dev, got {self.path!r}")


Device = PmemDevice | VirtioBlkDevice | ScsiDevice | PathDevice


class ByteRange(Record):
    """The byte range of a packed device that holds one layer; whole sectors."""

    offset_bytes: int
    size_bytes: int

    def check(self) -> None:
        _check_range("offset_bytes", self.offset_bytes, 0, _MAX_BYTES)
        _check_range("size_bytes", self.size_bytes, 1, _MAX_BYTES)
        for name, value in (("offset_bytes", self.offset_bytes), ("size_bytes", self.size_bytes)):
            if value % SECTOR_BYTES:
                raise ValueError(f"{name} {value} is not a multiple of {SECTOR_BYTES}")
        if self.offset_bytes + self.size_bytes > _MAX_BYTES:
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
            _check_choice("algorithm", self.algorithm, tuple(DIGEST_BYTES))
            expected = DIGEST_BYTES[self.algorithm]
            if len(self.root_digest) != expected:
                raise ValueError(f"root_digest has {len(self.root_digest)} bytes, not {expected}")
        _check_range("salt length", len(self.salt or b""), 0, 256)
        _check_range("hash_type", self.hash_type, 0, 1)
        _check_range("data_blocks", self.data_blocks, 1, 1 << 54)
        for name, size in (
            ("data_block_size", self.data_block_size),
            ("hash_block_size", self.hash_block_size),
        ):
            if size is not None and (size & (size - 1) or not 512 <= size <= 4096):
                raise ValueError(f"{name} must be a power of two in 512..4096, got {size}")
        _check_range("hash_offset_bytes", self.hash_offset_bytes, 0, _MAX_BYTES)
        _check_choice("preset", self.preset, VERITY_PRESETS)
        _check_range("signature length", len(self.signature or b""), 0, 64 * 1024)
        self._check_without_superblock()

    def _check_without_superblock(self) -> None:
        if self.superblock:
            return
        for name in ("salt", "algorithm", "data_blocks", "data_block_size", "hash_block_size"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is needed where there is no superblock to read it from")
        if self.hash_type is None:
            raise ValueError("hash_type is needed where there is no superblock to read it from")


# --- layers -----------------------------------------------------------------------------------


class LayerSpec(Record):
    """A layer to mount, read-only. ``target`` defaults to /run/layers/LAYER_ID."""

    layer_id: str
    device: Device
    filesystem: str
    mapping: ByteRange | None = None
    verity: Verity | None = None
    target: str | None = None
    options: tuple[str, ...] = ()

    def check(self) -> None:
        _check_word("layer_id", self.layer_id)
        _check_choice("filesystem", self.filesystem, FILESYSTEMS)
        if self.target is not None:
            _check_path("target", self.target)
        for option in self.options:
            _check_choice("option", option, MOUNT_OPTIONS)
        if "dax" in self.options and self.verity is not None:
            raise ValueError("option dax cannot be had through dm-verity")

    @property
    def mount_point(self) -> str:
        return self.target or f"{TARGET_ROOT}/layers/{self.layer_id}"


class LayerId(Record):
    layer_id: str

    def check(self) -> None:
        _check_word("layer_id", self.layer_id)


class LayerUnmountRequest(Record):
    """``force`` also removes a layer whose device is lost or whose parts are half gone; never one
    that is in use."""

    layer_id: str
    force: bool = False

    def check(self) -> None:
        _check_word("layer_id", self.layer_id)


class DmDevice(Record):
    """A device-mapper device as the kernel describes it. ``dev`` is MAJOR:MINOR."""

    name: str
    uuid: str
    dev: str
    node: str
    target_type: str
    table: str
    status: str
    readonly: bool
    deferred_remove: bool
    open_count: int


class DroppedOption(Record):
    option: str
    reason: str


class VerityReport(Record):
    """The verity parameters in force; ``source`` says where they came from: request, superblock or
    both. ``status`` is V (no corruption seen) or C."""

    root_digest: str
    salt: str
    algorithm: str
    hash_type: int
    data_blocks: int
    data_block_size: int
    hash_block_size: int
    hash_offset_bytes: int
    superblock: bool
    source: str
    status: str
    signed: bool
    preset: str
    options: tuple[str, ...]
    dropped: tuple[DroppedOption, ...]


class LayerReport(Record):
    """A layer as the kernel has it, read back. ``timings_ms`` has one entry for each step.

    ``state`` is mounted, corrupted or device_lost. ``overlaps`` names layers whose mappings share
    bytes with this one's; ``used_by`` names overlays.
    """

    layer_id: str
    state: str
    target: str
    device: Device
    device_node: str
    dev: str
    mapping: ByteRange | None
    dm: tuple[DmDevice, ...]
    verity: VerityReport | None
    filesystem: str
    mount_id: int
    options: tuple[str, ...]
    size_bytes: int
    used_by: tuple[str, ...]
    overlaps: tuple[str, ...]
    timings_ms: Mapping[str, float]
    already: bool


class LayerListReply(Record):
    layers: tuple[LayerReport, ...]


class Holder(Record):
    """Who keeps something busy: kind is process, mount, dm, overlay or swap."""

    kind: str
    name: str
    detail: str


class UnmountReply(Record):
    """What is gone. ``already`` when nothing of that id was there."""

    unmounted: tuple[str, ...]
    removed_devices: tuple[str, ...]
    timings_ms: Mapping[str, float]
    already: bool


class VerifyRequest(Record):
    """Read a whole layer through its verity device; progress comes as notifications."""

    layer_id: str

    def check(self) -> None:
        _check_word("layer_id", self.layer_id)


class VerifyReply(Record):
    layer_id: str
    read_bytes: int
    corrupt_blocks: tuple[int, ...]
    status: str
    timings_ms: Mapping[str, float]


# --- overlays ---------------------------------------------------------------------------------


class TmpfsScratch(Record):
    """Changes are kept in memory, at most ``size_bytes``, and lost at unmount."""

    kind: str = "tmpfs"
    size_bytes: int

    def check(self) -> None:
        _check_range("size_bytes", self.size_bytes, 4096, _MAX_BYTES)


class DeviceScratch(Record):
    """Changes are kept on a block device; ``ensure_filesystem`` formats it if it has none."""

    kind: str = "device"
    device: Device
    filesystem: str = "ext4"
    ensure_filesystem: bool = False

    def check(self) -> None:
        _check_choice("filesystem", self.filesystem, ("ext4", "xfs"))


class DirectoryScratch(Record):
    """Changes are kept in an existing directory below the allowed root."""

    kind: str = "directory"
    path: str

    def check(self) -> None:
        _check_path("path", self.path)


Scratch = TmpfsScratch | DeviceScratch | DirectoryScratch


class OverlayOptions(Record):
    """Options of overlayfs; None leaves the kernel's default."""

    metacopy: str | None = None
    redirect_dir: str | None = None
    xino: str | None = None
    volatile: bool = False
    userxattr: bool = False

    def check(self) -> None:
        _check_choice("metacopy", self.metacopy, ("on", "off"))
        _check_choice("redirect_dir", self.redirect_dir, ("on", "off", "follow", "nofollow"))
        _check_choice("xino", self.xino, ("on", "off", "auto"))
        if self.userxattr and (self.metacopy == "on" or self.redirect_dir == "on"):
            raise ValueError("userxattr excludes metacopy=on and redirect_dir=on")


class OverlaySpec(Record):
    """An overlay of mounted layers, topmost first; read-only unless there is a scratch.

    ``target`` defaults to /run/overlays/OVERLAY_ID.
    """

    overlay_id: str
    layers: tuple[str, ...]
    target: str | None = None
    scratch: Scratch | None = None
    options: OverlayOptions = OverlayOptions()

    def check(self) -> None:
        _check_word("overlay_id", self.overlay_id)
        if not self.layers:
            raise ValueError("layers is empty")
        if len(self.layers) > 500:
            raise ValueError(f"{len(self.layers)} layers; the kernel takes at most 500")
        for layer_id in self.layers:
            _check_word("layers", layer_id)
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers names a layer twice")
        if self.target is not None:
            _check_path("target", self.target)
        if self.options.volatile and self.scratch is None:
            raise ValueError("option volatile needs a scratch")

    @property
    def mount_point(self) -> str:
        return self.target or f"{TARGET_ROOT}/overlays/{self.overlay_id}"


class OverlayUnmountRequest(Record):
    overlay_id: str
    force: bool = False

    def check(self) -> None:
        _check_word("overlay_id", self.overlay_id)


class ScratchReport(Record):
    """Where changes go, and how full it is."""

    kind: str
    path: str
    filesystem: str
    size_bytes: int
    free_bytes: int
    formatted: bool


class OverlayReport(Record):
    """An overlay as the kernel has it. ``method`` is fsconfig or mount, whichever carried it."""

    overlay_id: str
    state: str
    target: str
    layers: tuple[str, ...]
    lowerdirs: tuple[str, ...]
    scratch: ScratchReport | None
    method: str
    mount_id: int
    options: tuple[str, ...]
    timings_ms: Mapping[str, float]
    already: bool


class OverlayListReply(Record):
    overlays: tuple[OverlayReport, ...]


class LayersMountRequest(Record):
    """Mount layers in parallel, then the overlay if one is given: all or nothing."""

    layers: tuple[LayerSpec, ...]
    overlay: OverlaySpec | None = None

    def check(self) -> None:
        if not self.layers or len(self.layers) > 500:
            raise ValueError(f"layers must have 1 to 500 entries, got {len(self.layers)}")
        ids = [layer.layer_id for layer in self.layers]
        targets = [layer.mount_point for layer in self.layers]
        if self.overlay is not None:
            targets.append(self.overlay.mount_point)
        for name, values in (("layer_id", ids), ("target", targets)):
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{name} {twice[0]!r} is named twice")


class LayersMountReply(Record):
    layers: tuple[LayerReport, ...]
    overlay: OverlayReport | None
    timings_ms: Mapping[str, float]


class LayersUnmountRequest(Record):
    """Take an overlay and layers down in parallel; what is not named stays."""

    layers: tuple[str, ...] = ()
    overlay: str | None = None
    force: bool = False

    def check(self) -> None:
        for layer_id in self.layers:
            _check_word("layers", layer_id)
        if self.overlay is not None:
            _check_word("overlay", self.overlay)
        if not self.layers and self.overlay is None:
            raise ValueError("nothing is named to unmount")


class LayersUnmountReply(Record):
    layers: Mapping[str, UnmountReply]
    overlay: UnmountReply | None
    timings_ms: Mapping[str, float]


# --- the agent itself -------------------------------------------------------------------------


class Empty(Record):
    """No parameters, or nothing to say."""


class HelloRequest(Record):
    versions: tuple[int, ...]
    client: str = ""

    def check(self) -> None:
        if not self.versions:
            raise ValueError("versions is empty")
        _check_range("client length", len(self.client), 0, 256)


class HelloReply(Record):
    """``features`` are names that a client may test for; ``limits`` are those of the wire."""

    version: int
    agent: str
    kernel: str
    features: tuple[str, ...]
    limits: Mapping[str, int]
    boot: Mapping[str, object]


class StatusReply(Record):
    """``state`` is ready or degraded; ``problems`` says why."""

    state: str
    problems: tuple[str, ...]
    uptime_seconds: float
    pid: int
    restarts: int
    layers: int
    overlays: int
    dm_devices: int
    requests_in_flight: int
    connections: int
    rss_bytes: int
    threads: int
    event_sequence: int


class CancelRequest(Record):
    msgid: int


class CancelReply(Record):
    """``cancelled`` is false when no such request was in flight on this connection."""

    cancelled: bool


class ShutdownRequest(Record):
    """``mode``: poweroff or reboot the machine (only as PID 1), or exit the agent alone.

    Layers and overlays are unmounted first; ``force`` goes on when some are busy.
    """

    mode: str = "poweroff"
    force: bool = False

    def check(self) -> None:
        _check_choice("mode", self.mode, ("poweroff", "reboot", "exit"))


class DmName(Record):
    """The name of a device-mapper device (kernel: at most 127 bytes)."""

    name: str

    def check(self) -> None:
        _check_word("name", self.name, 127)


class DmListReply(Record):
    devices: tuple[DmDevice, ...]


class DmTableReply(Record):
    """Table lines as ``dmsetup table`` prints them: start, length, type, arguments."""

    name: str
    lines: tuple[str, ...]


class DmStatusReply(Record):
    name: str
    device: DmDevice
    lines: tuple[str, ...]


class Event(Record):
    """Something that happened. ``sequence`` grows by one with each event of one agent life, and
    goes on across a restart of the agent."""

    sequence: int
    kind: str
    unix_ms: int
    layer_id: str | None = None
    overlay_id: str | None = None
    device: str | None = None
    block: int | None = None
    detail: str = ""
    traceparent: str | None = None

    def check(self) -> None:
        _check_choice("kind", self.kind, EVENT_KINDS)


class SubscribeReply(Record):
    """Events after ``sequence`` come as notifications ``agent.event`` on this connection."""

    sequence: int


class EventsRequest(Record):
    since: int = 0


class EventsReply(Record):
    """``dropped`` counts events after ``since`` that are no longer kept."""

    events: tuple[Event, ...]
    dropped: int
    sequence: int


class Method(Record):
    """One row of the contract. ``quick`` methods never wait and are answered at once."""

    name: str
    request: object
    reply: object
    quick: bool
    summary: str


def _methods() -> dict[str, Method]:
    rows = (
        ("agent.hello", HelloRequest, HelloReply, True, "agree on a version"),
        ("agent.status", Empty, StatusReply, True, "say how the agent is"),
        ("agent.cancel", CancelRequest, CancelReply, True, "stop a waiting request"),
        ("agent.shutdown", ShutdownRequest, Empty, False, "unmount all, then end"),
        ("agent.subscribe", Empty, SubscribeReply, True, "send events to this connection"),
        ("agent.events", EventsRequest, EventsReply, True, "list events since a sequence number"),
        ("layer.mount", LayerSpec, LayerReport, False, "mount a read-only layer"),
        ("layer.unmount", LayerUnmountRequest, UnmountReply, False, "unmount a layer"),
        ("layer.list", Empty, LayerListReply, False, "list the layers, read back from the kernel"),
        ("layer.get", LayerId, LayerReport, False, "describe one layer"),
        ("layer.verify", VerifyRequest, VerifyReply, False, "read a layer through verity"),
        ("layers.mount", LayersMountRequest, LayersMountReply, False, "mount many, all or nothing"),
        ("layers.unmount", LayersUnmountRequest, LayersUnmountReply, False, "unmount many"),
        ("overlay.mount", OverlaySpec, OverlayReport, False, "overlay mounted layers"),
        ("overlay.unmount", OverlayUnmountRequest, UnmountReply, False, "unmount an overlay"),
        ("overlay.list", Empty, OverlayListReply, False, "list the overlays"),
        ("dm.list", Empty, DmListReply, False, "list every device-mapper device"),
        ("dm.table", DmName, DmTableReply, False, "print a device's table"),
        ("dm.status", DmName, DmStatusReply, False, "print a device's status"),
    )
    return {
        name: Method(name=name, request=request, reply=reply, quick=quick, summary=summary)
        for name, request, reply, quick, summary in rows
    }


#: Every method of the contract by name.
METHODS = _methods()
