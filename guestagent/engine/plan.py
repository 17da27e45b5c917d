"""From a request and what is known of its device to the ordered steps that bring a layer up.

Pure: nothing here touches the kernel, so a plan can be printed instead of executed, and every
refusal that can be foreseen is made before anything exists.
"""

import functools
from collections.abc import Sequence

from guestagent.api import (
    ByteRange,
    LabelDevice,
    LayerSpec,
    PathDevice,
    PmemDevice,
    ScsiDevice,
    VirtioBlkDevice,
)
from guestagent.api.devices import Device, VmbusScsiDevice
from guestagent.api.layers import DroppedOption
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.devicemapper.targets import (
    Target,
    VerityTable,
    first_lines,
    linear_table,
)
from guestagent.storage.hashing import new_hash
from guestagent.storage.verity import VerityParameters
from vsock.errors import CallError
from vsock.record import Record

__all__ = (
    "PRESETS",
    "SIGNATURES_SINCE",
    "LayerPlan",
    "LinearStep",
    "MountStep",
    "Source",
    "VerityOptions",
    "VerityStep",
    "Version",
    "check_target",
    "device_tag",
    "dm_names",
    "dm_uuid",
    "plan_layer",
    "signature_description",
    "source_of",
    "verity_options",
)

Version = tuple[int, int, int]

#: Options of each preset with the version of the verity target that is sure to have them
#: (panic_on_error came with Linux 6.12 and no version of its own; 1.10.0 is the next above).
PRESETS: dict[str, tuple[tuple[str, Version], ...]] = {
    "default": (),
    "strict": (("panic_on_corruption", (1, 7, 0)), ("panic_on_error", (1, 10, 0))),
    "fast": (("try_verify_in_tasklet", (1, 9, 0)), ("ignore_zero_blocks", (1, 3, 0))),
}
#: root_hash_sig_key_desc came with Linux 5.4.
SIGNATURES_SINCE: Version = (1, 5, 0)
#: dm names have at most 127 characters (include/uapi/linux/dm-ioctl.h, DM_NAME_LEN).
_DM_NAME_MAX = 127


class Source(Record):
    """Where a layer's bytes come from: ``size_bytes`` of a block device, and the device of its hash
    tree where that is another. ``made_readonly`` (MAJOR:MINOR) were writable before layers came.
    Which bytes they are the request says."""

    device: BlockDevice
    size_bytes: int
    hash_device: BlockDevice | None = None
    made_readonly: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[BlockDevice, ...]:
        """Every device that must stay as it is while the layer is mounted."""
        return (self.device,) if self.hash_device is None else (self.device, self.hash_device)

    @property
    def dev(self) -> str:
        """MAJOR:MINOR of the device that holds the data."""
        return self.device.dev

    @property
    def node(self) -> str:
        return self.device.node


class LinearStep(Record):
    """Map byte ranges of a packed device, one after the other, as a device of its own.

    The ranges are the request's: a journal has them once.
    """

    name: str
    uuid: str
    dev: str

    def targets(self, ranges: Sequence[ByteRange]) -> tuple[Target, ...]:
        return linear_table(self.dev, [(part.offset_bytes, part.size_bytes) for part in ranges])

    def describe(self, ranges: Sequence[ByteRange]) -> str:
        return f"create {self.name}: {first_lines(self.targets(ranges))}"


class VerityOptions(Record):
    """The optional arguments of a verity table, and what was asked for but cannot be had."""

    arguments: tuple[str, ...] = ()
    dropped: tuple[DroppedOption, ...] = ()


class VerityStep(Record):
    """Verify what is below; ``dev`` is None when that is the linear device of the same plan.

    ``source`` says where the parameters came from: request, superblock or both.
    """

    name: str
    uuid: str
    dev: str | None
    hash_dev: str | None
    parameters: VerityParameters
    source: str
    options: VerityOptions

    def target(self, under: str) -> Target:
        return VerityTable(
            parameters=self.parameters,
            data_device=under,
            hash_device=self.hash_dev or under,
            options=self.options.arguments,
        ).target()

    def describe(self, under: str) -> str:
        """``under`` is the name of the linear device, which has no number yet."""
        line = self.target(self.dev or f"/{under}").line()
        return f"create {self.name}: {line.replace(f' /{under}', f' {under}')}"


class MountStep(Record):
    """Mount what the steps before have made, or the device itself."""

    target: str
    filesystem: str
    options: tuple[str, ...]

    def describe(self) -> str:
        options = ",".join(("ro", "nodev", "nosuid", *self.options))
        return f"mount {self.filesystem} on {self.target} ({options})"


class LayerPlan(Record):
    layer_id: str
    linear: LinearStep | None
    verity: VerityStep | None
    mount: MountStep

    def describe(self, ranges: Sequence[ByteRange]) -> tuple[str, ...]:
        """Return one line for each step, in order: what a dry run prints. A device that is still to
        be made has its name in place of its number."""
        lines = [self.mount.describe()]
        if self.verity is not None:
            under = self.linear.name if self.linear is not None else ""
            lines.insert(0, self.verity.describe(under))
        if self.linear is not None:
            lines.insert(0, self.linear.describe(ranges))
        return tuple(lines)

    @property
    def dm_names(self) -> tuple[str, ...]:
        """The device-mapper devices, topmost first: the order in which they can go."""
        steps = (self.verity, self.linear)
        return tuple(step.name for step in steps if step is not None)


def source_of(ranges: Sequence[ByteRange], device: BlockDevice) -> Source:
    """Return what a layer takes of its device: the ranges of its mapping, or all of it.

    Raises:
        CallError: ``invalid``, a range ends past the device.
    """
    for number, part in enumerate(ranges):
        if part.end_bytes > device.size_bytes:
            what = "mapping" if len(ranges) == 1 else f"mapping[{number}]"
            raise CallError(
                "invalid",
                f"{what} ends at byte {part.end_bytes}, past {device.node} of "
                f"{device.size_bytes} bytes",
                step="device",
                object=f"params.{what}",
            )
    size_bytes = sum(part.size_bytes for part in ranges) if ranges else device.size_bytes
    return Source(device=device, size_bytes=size_bytes)


def signature_description(layer_id: str) -> str:
    """Return the name under which the kernel finds the signature of a layer's root digest."""
    return f"guestagent-signature-{layer_id}"


def check_target(target: str, roots: tuple[str, ...], what: str = "target") -> str:
    """Return the allowed root that a mount point is strictly below.

    That no link leads out of it is seen when it is opened.

    Raises:
        CallError: ``invalid``, it is below none of them.
    """
    for root in roots:
        if target.startswith(root.rstrip("/") + "/"):
            return root
    raise CallError(
        "invalid",
        f"{what} {target!r} is not below {' or '.join(map(repr, roots))}",
        step="claim",
        object=f"params.{what}",
    )


@functools.lru_cache(maxsize=64)
def verity_options(preset: str, version: Version, signature_key: str | None) -> VerityOptions:
    """Choose the optional arguments that the kernel's verity target ``version`` understands.

    What a preset asks for beyond that is dropped and reported. A signature never is.

    Raises:
        CallError: ``unsupported``, this kernel's target knows no signatures.
    """
    if signature_key is not None and version < SIGNATURES_SINCE:
        raise CallError(
            "unsupported",
            f"the kernel's verity target {version} knows no signatures of root digests",
            step="version",
            object="params.verity.signature",
        )
    arguments: list[str] = []
    dropped: list[DroppedOption] = []
    for option, since in PRESETS[preset]:
        if version >= since:
            arguments.append(option)
        else:
            has, needs = (".".join(map(str, v)) for v in (version, since))
            reason = f"the kernel's verity target is {has}, this needs {needs}"
            dropped.append(DroppedOption(option=option, reason=reason))
    if signature_key is not None:
        arguments += ["root_hash_sig_key_desc", signature_key]
    return VerityOptions(arguments=tuple(arguments), dropped=tuple(dropped))


def device_tag(device: Device) -> str:
    """Return the part of a dm name that says which device (names as hcsshim's where it has one)."""
    match device:
        case PmemDevice():
            return f"pmem{device.number}"
        case ScsiDevice():
            return f"scsi-contr{device.controller}-lun{device.lun}-p{device.partition}"
        case VmbusScsiDevice():
            return f"vmbus-{device.guid.lower()}-lun{device.lun}-p{device.partition}"
        case VirtioBlkDevice():
            return f"virtio-blk-{device.serial}"
        case LabelDevice():
            return f"label-{device.label}"
        case PathDevice():
            plain = (c if c.isalnum() or c in "._-" else "_" for c in device.path[len("/dev/") :])
            return "".join(plain)[-32:]


def dm_names(spec: LayerSpec, *, unique: bool) -> tuple[str, str]:
    """Return the names of the linear and the verity device.

    They are hcsshim's, which two layers on the same range or of the same content would share;
    ``unique`` names carry the layer's id instead. Of a list of ranges the names tell their number
    and a digest of them.
    """
    root = spec.verity.root_digest.hex() if spec.verity else ""
    if unique:
        linear, verity = f"dm-linear-{spec.layer_id}", f"dm-verity-{spec.layer_id}-{root[:16]}"
    else:
        ranges, tag = spec.ranges, device_tag(spec.device)
        if len(ranges) > 1:
            tag = f"{tag}-{len(ranges)}x-{_digest_of(ranges)}"
            linear, verity = f"dm-linear-{tag}", f"dm-verity-{tag}-{root}"
        else:
            where = f"{ranges[0].offset_bytes}-{ranges[0].size_bytes}" if ranges else "whole"
            linear, verity = f"dm-linear-{tag}-{where}", f"dm-verity-{tag}-{root}"
    return linear[:_DM_NAME_MAX], verity[:_DM_NAME_MAX]


def _digest_of(ranges: Sequence[ByteRange]) -> str:
    """Return 16 hexadecimal digits that tell lists of ranges apart for a reader of names. Two
    layers whose names collide all the same get unique names."""
    text = ":".join(f"{part.offset_bytes}+{part.size_bytes}" for part in ranges)
    hasher = new_hash("sha256")
    hasher.update(text.encode("ascii"))
    return hasher.hexdigest()[:16]


def dm_uuid(kind: str, layer_id: str, prefix: str = "guestagent-") -> str:
    """Return the uuid of a layer's ``linear`` or ``verity`` device, by which the agent knows it.

    ``prefix`` is that of the agent: of several agents each knows its own devices.
    """
    return f"{prefix}{kind}-{layer_id}"


def plan_layer(
    spec: LayerSpec,
    source: Source,
    *,
    names: tuple[str, ...],
    uuid_prefix: str = "guestagent-",
    parameters: VerityParameters | None = None,
    parameters_from: str = "",
    options: VerityOptions | None = None,
) -> LayerPlan:
    """Order the steps for one layer. ``names`` are those of the linear and the verity device;
    ``parameters_from`` is the ``source`` of a ``VerityStep``."""
    linear = None
    if spec.mapping is not None:
        linear = LinearStep(
            name=names[0],
            uuid=dm_uuid("linear", spec.layer_id, uuid_prefix),
            dev=source.dev,
        )
    verity = None
    if parameters is not None:
        verity = VerityStep(
            name=names[1],
            uuid=dm_uuid("verity", spec.layer_id, uuid_prefix),
            dev=None if linear else source.dev,
            hash_dev=source.hash_device.dev if source.hash_device else None,
            parameters=parameters,
            source=parameters_from,
            options=options or VerityOptions(),
        )
    mount = MountStep(target=spec.mount_point, filesystem=spec.filesystem, options=spec.options)
    return LayerPlan(layer_id=spec.layer_id, linear=linear, verity=verity, mount=mount)
