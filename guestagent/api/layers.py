"""Layers: what is asked for, and what the kernel then has."""

from collections.abc import Mapping

from guestagent.api.checks import check_choice, check_path, check_word
from guestagent.api.devices import (
    ByteRange,
    Device,
    LayerMapping,
    Verity,
    check_mapping,
    ranges_of,
)
from guestagent.api.request import Request
from vsock.record import Record

#: Targets lie below these directories unless the agent's configuration allows others.
TARGET_ROOTS = ("/run/layers", "/run/overlays")
#: File systems a layer may have; each is a row of ``guestagent.storage.filesystems``.
LAYER_FILESYSTEMS = ("erofs", "squashfs", "ext4")
#: What a request may say: "auto" asks for detection by magic number.
FILESYSTEMS = (*LAYER_FILESYSTEMS, "auto")
#: Per-layer mount options a request may ask for, beside ro,nodev,nosuid which always hold.
MOUNT_OPTIONS = ("noexec", "noatime", "nodiratime", "dax")
#: Ranges of a layer, and lines of a dm device's table and status, that a report shows.
SHOWN_PARTS = 16
#: What becomes of a layer whose device the kernel would let programs write to.
READONLY_POLICIES = {
    "error": "the layer is refused with `denied`",
    "read": "the device is set read-only in the kernel while layers are on it",
    "write": "the device stays writable; the layer's mount is read-only all the same",
    "ignore": "the layer is left out: nothing is made, and the state in the reply is `ignored`",
}
#: Which attribute marks the opaque directories of a layer: ``trusted.overlay.opaque``, for
#: overlays; ``user.overlay.opaque``, for overlays mounted with userxattr. A layer without such
#: directories suits either, one with both kinds neither.
WHITEOUT_KINDS = ("none", "trusted", "user", "both")


class DmDevice(Record):
    """A device-mapper device as the kernel describes it. ``dev`` is MAJOR:MINOR.

    ``table`` and ``status`` have the lines of the first 16 of its ``target_count`` targets, parted
    by "; "; the method ``dm.table`` prints all lines.
    """

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
    target_count: int = 1


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
    """A layer as the kernel has it, read back. ``timings_ms`` has one entry for each step of its
    own, and none for what a batch does once for many.

    ``state`` is mounted, corrupted, device_lost, unmounted (another program unmounted, moved or
    covered it), damaged (a device of it is missing) or changed (a dm device has another table
    than it was given; ``verity`` is None where that is the verity device's) or ignored (its
    ``readonly_policy`` has left it out, and nothing was made). ``mapping`` has the first 16 of its
    ``range_count`` ranges, which is 0 where the layer is a whole device. The tables are compared
    with all ranges. ``readonly`` says whether the kernel refuses writes to its devices.
    ``overlaps`` names layers whose mappings
    share bytes with this one's; ``used_by`` names overlays.
    """

    layer_id: str
    state: str
    target: str
    device: Device
    device_node: str
    dev: str
    mapping: LayerMapping | None
    dm: tuple[DmDevice, ...]
    verity: VerityReport | None
    filesystem: str
    mount_id: int
    options: tuple[str, ...]
    readonly: bool
    size_bytes: int
    used_by: tuple[str, ...]
    overlaps: tuple[str, ...]
    timings_ms: Mapping[str, float]
    already: bool
    range_count: int = 0


class LayerSpec(Request[LayerReport], method="layer.mount"):
    """Mount a read-only layer.

    ``mapping`` is the byte range of ``device`` that holds the layer, or a list of up to 4,096
    ranges that are put together in that order. Ranges of a list may overlap and repeat; a list of
    one range is that range. ``target`` defaults to /run/layers/LAYER_ID.
    ``readonly_policy`` is for a device that is writable, that of the hash tree included.
    ``whiteouts`` says how the layer was built; an overlay that would not see what it removes is
    refused. None is not known, and not checked.
    """

    layer_id: str
    device: Device
    filesystem: str
    mapping: LayerMapping | None = None
    verity: Verity | None = None
    target: str | None = None
    options: tuple[str, ...] = ()
    readonly_policy: str = "read"
    whiteouts: str | None = None

    def check(self) -> None:
        check_word("layer_id", self.layer_id)
        check_choice("filesystem", self.filesystem, FILESYSTEMS)
        if self.target is not None:
            check_path("target", self.target)
        check_mapping(self.mapping)
        if isinstance(self.mapping, tuple) and len(self.mapping) == 1:
            self.__dict__["mapping"] = self.mapping[0]  # so that the two compare as equal
        for option in self.options:
            check_choice("option", option, MOUNT_OPTIONS)
        check_choice("readonly_policy", self.readonly_policy, READONLY_POLICIES)
        check_choice("whiteouts", self.whiteouts, WHITEOUT_KINDS)
        if "dax" in self.options and self.verity is not None:
            raise ValueError("option dax cannot be had through dm-verity")

    @property
    def mount_point(self) -> str:
        return self.target or f"/run/layers/{self.layer_id}"

    @property
    def ranges(self) -> tuple[ByteRange, ...]:
        """The ranges of the mapping in order; none where the layer is the whole device."""
        return ranges_of(self.mapping)

    def check_whiteouts(self, *, userxattr: bool) -> None:
        """Refuse an overlay with or without ``userxattr`` in which names that the layer removes
        would be back.

        Raises:
            ValueError: its whiteouts are of another kind.
        """
        if self.whiteouts in ("both", "trusted" if userxattr else "user"):
            raise ValueError(
                f"an overlay {'with' if userxattr else 'without'} userxattr does not see all "
                f"whiteouts of layer {self.layer_id!r}, which are of the kind {self.whiteouts}"
            )


class Holder(Record):
    """What keeps a mount or device busy: kind is process, mount, dm, loop, overlay or swap."""

    kind: str
    name: str
    detail: str


class UnmountReply(Record):
    """What is gone. ``already`` when nothing of that id was there."""

    unmounted: tuple[str, ...]
    removed_devices: tuple[str, ...]
    timings_ms: Mapping[str, float]
    already: bool


class LayerUnmount(Request[UnmountReply], method="layer.unmount"):
    """Unmount a layer.

    ``force`` also removes a layer whose device is lost or whose parts are half gone; never one
    that is in use.
    """

    layer_id: str
    force: bool = False

    def check(self) -> None:
        check_word("layer_id", self.layer_id)


class LayerListReply(Record):
    layers: tuple[LayerReport, ...]


class LayerList(Request[LayerListReply], method="layer.list"):
    """List the layers, read back from the kernel."""


class LayerGet(Request[LayerReport], method="layer.get"):
    """Describe one layer."""

    layer_id: str

    def check(self) -> None:
        check_word("layer_id", self.layer_id)


class VerifyReply(Record):
    layer_id: str
    read_bytes: int
    corrupt_blocks: tuple[int, ...]
    status: str
    timings_ms: Mapping[str, float]


class LayerVerify(Request[VerifyReply], method="layer.verify"):
    """Read a whole layer through its verity device; progress comes as notifications."""

    layer_id: str

    def check(self) -> None:
        check_word("layer_id", self.layer_id)
