"""Overlays of layers, and batches of both."""

from collections.abc import Mapping

from guestagent.api.checks import MAX_BYTES, check_choice, check_path, check_range, check_word
from guestagent.api.devices import Device
from guestagent.api.layers import DmDevice, LayerReport, LayerSpec, UnmountReply
from guestagent.api.request import Request
from vsock.record import Record

#: File systems a scratch device may have; each is a row of ``guestagent.storage.filesystems``.
SCRATCH_FILESYSTEMS = ("ext4", "xfs")
#: What becomes of a file system on a scratch device, and of changes in a scratch directory.
DEVICE_EXISTING = ("refuse", "adopt", "fresh")
DIRECTORY_EXISTING = ("refuse", "adopt")
#: Values of options of overlayfs, by Documentation/filesystems/overlayfs.rst of the kernel.
METACOPY = ("on", "off")
REDIRECT_DIR = ("on", "off", "follow", "nofollow")
XINO = ("on", "off", "auto")


class TmpfsScratch(Record):
    """Changes are kept in memory, at most ``size_bytes``, and lost at unmount."""

    kind: str = "tmpfs"
    size_bytes: int

    def check(self) -> None:
        check_range("size_bytes", self.size_bytes, 4096, MAX_BYTES)


class DeviceScratch(Record):
    """Changes are kept on a block device; ``ensure_filesystem`` formats it if it is blank.

    ``existing`` says what becomes of a file system that is there: ``refuse`` it, ``adopt`` it with
    its content, or make a ``fresh`` one in its place, whatever is on the device.

    ``encrypted`` puts dm-crypt over the device, with a key that the guest makes for this time and
    tells nobody; the file system on it is always new, and lost when the last overlay is unmounted.
    ``shared`` lets other overlays that ask for the same use the device at the same time, each in a
    directory overlays/OVERLAY_ID of its file system. ``existing`` then says what becomes of the
    file system for the first of them, and of such a directory for a later one: ``fresh`` empties
    it. ``discard`` tells the device of blocks that become unused, at once; on an encrypted scratch
    it shows the host which blocks are unused.
    """

    kind: str = "device"
    device: Device
    filesystem: str = "ext4"
    ensure_filesystem: bool = False
    existing: str = "refuse"
    encrypted: bool = False
    shared: bool = False
    discard: bool = False

    def check(self) -> None:
        check_choice("filesystem", self.filesystem, SCRATCH_FILESYSTEMS)
        check_choice("existing", self.existing, DEVICE_EXISTING)
        if self.encrypted and self.existing == "adopt":
            raise ValueError("encrypted excludes existing=adopt: the key of before is gone")


class DirectoryScratch(Record):
    """Changes are kept in a directory below the allowed root, which stays with them.

    It and the directories that lead to it must be root's, and written by root alone or sticky.
    ``existing`` says what becomes of an earlier overlay's changes there: ``refuse`` or ``adopt``.
    ``create`` makes the directory if it is missing, and those that lead to it.
    """

    kind: str = "directory"
    path: str
    existing: str = "refuse"
    create: bool = False

    def check(self) -> None:
        check_path("path", self.path)
        check_choice("existing", self.existing, DIRECTORY_EXISTING)


class ThinScratch(Record):
    """Changes are kept in a new volume of an open pool, which is deleted at unmount.

    ``encrypted`` puts dm-crypt over the volume, as over a scratch device. It passes discards on, so
    that space comes back to the pool: the host sees which blocks are unused.
    """

    kind: str = "thin"
    pool_id: str
    size_bytes: int
    filesystem: str = "ext4"
    encrypted: bool = False

    def check(self) -> None:
        check_word("pool_id", self.pool_id)
        check_range("size_bytes", self.size_bytes, 1024**2, MAX_BYTES)
        if self.size_bytes % 4096:
            raise ValueError(f"size_bytes {self.size_bytes} is not a multiple of 4096")
        check_choice("filesystem", self.filesystem, SCRATCH_FILESYSTEMS)


Scratch = TmpfsScratch | DeviceScratch | DirectoryScratch | ThinScratch


class OverlayOptions(Record):
    """Options of overlayfs; None leaves the kernel's default.

    ``suid`` lets set-uid programs and file capabilities take effect, which most images for
    containers need, and ``dev`` device nodes; an overlay is nosuid and nodev without.
    """

    metacopy: str | None = None
    redirect_dir: str | None = None
    xino: str | None = None
    volatile: bool = False
    userxattr: bool = False
    suid: bool = False
    dev: bool = False

    def check(self) -> None:
        check_choice("metacopy", self.metacopy, METACOPY)
        check_choice("redirect_dir", self.redirect_dir, REDIRECT_DIR)
        check_choice("xino", self.xino, XINO)
        if self.userxattr and (self.metacopy == "on" or self.redirect_dir == "on"):
            raise ValueError("userxattr excludes metacopy=on and redirect_dir=on")


class ScratchReport(Record):
    """Where changes go, and how full it is.

    ``dm`` is the crypt device of an encrypted scratch, ``options`` are those of the mount of a
    scratch device or an encrypted volume, and ``shared_with`` the other overlays on it.
    """

    kind: str
    path: str
    filesystem: str
    size_bytes: int
    free_bytes: int
    formatted: bool
    dm: tuple[DmDevice, ...] = ()
    options: tuple[str, ...] = ()
    shared_with: tuple[str, ...] = ()


class OverlayReport(Record):
    """An overlay as the kernel has it. ``method`` is fsconfig or mount, whichever carried it.

    ``state`` is mounted, read_only (it has a scratch and the kernel writes to it no more),
    device_lost (a disk of it or of its layers is gone) or unmounted (another program unmounted,
    moved or covered it).
    """

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


class OverlaySpec(Request[OverlayReport], method="overlay.mount"):
    """Overlay mounted layers, topmost first; read-only unless there is a scratch.

    ``target`` defaults to /run/overlays/OVERLAY_ID.
    """

    overlay_id: str
    layers: tuple[str, ...]
    target: str | None = None
    scratch: Scratch | None = None
    options: OverlayOptions = OverlayOptions()

    def check(self) -> None:
        check_word("overlay_id", self.overlay_id)
        if not self.layers:
            raise ValueError("layers is empty")
        if len(self.layers) > 500:
            raise ValueError(f"{len(self.layers)} layers; the kernel takes at most 500")
        for layer_id in self.layers:
            check_word("layers", layer_id)
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers names a layer twice")
        if self.target is not None:
            check_path("target", self.target)
        if self.options.volatile and self.scratch is None:
            raise ValueError("option volatile needs a scratch")

    @property
    def mount_point(self) -> str:
        return self.target or f"/run/overlays/{self.overlay_id}"


class OverlayUnmount(Request[UnmountReply], method="overlay.unmount"):
    """Unmount an overlay.

    The layers stay; ``force`` also removes what is half gone, never what is in use.
    """

    overlay_id: str
    force: bool = False

    def check(self) -> None:
        check_word("overlay_id", self.overlay_id)


class TrimReply(Record):
    """How many bytes of the scratch's file system its device was told to be unused."""

    trimmed_bytes: int
    timings_ms: Mapping[str, float]


class OverlayTrim(Request[TrimReply], method="overlay.trim"):
    """Tell the device of a scratch which blocks are unused (FITRIM).

    An overlay without a scratch device or an encrypted volume is refused, and a device that does
    not take discards: an encrypted scratch device takes them only with ``discard``.
    """

    overlay_id: str

    def check(self) -> None:
        check_word("overlay_id", self.overlay_id)


class OverlayListReply(Record):
    overlays: tuple[OverlayReport, ...]


class OverlayList(Request[OverlayListReply], method="overlay.list"):
    """List the overlays."""


class LayersMountReply(Record):
    layers: tuple[LayerReport, ...]
    overlay: OverlayReport | None
    timings_ms: Mapping[str, float]


class LayersMount(Request[LayersMountReply], method="layers.mount"):
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
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise ValueError(f"{name} {twice!r} is named twice")
        for layer in self.layers:
            if self.overlay is not None and layer.layer_id in self.overlay.layers:
                layer.check_whiteouts(userxattr=self.overlay.options.userxattr)


class LayersUnmountReply(Record):
    layers: Mapping[str, UnmountReply]
    overlay: UnmountReply | None
    timings_ms: Mapping[str, float]


class LayersUnmount(Request[LayersUnmountReply], method="layers.unmount"):
    """Unmount an overlay and layers in parallel, all or nothing; what is not named stays."""

    layers: tuple[str, ...] = ()
    overlay: str | None = None
    force: bool = False

    def check(self) -> None:
        for layer_id in self.layers:
            check_word("layers", layer_id)
        if self.overlay is not None:
            check_word("overlay", self.overlay)
        if not self.layers and self.overlay is None:
            raise ValueError("nothing is named to unmount")
