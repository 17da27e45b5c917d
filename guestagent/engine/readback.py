"""What the kernel really has: reports are read back, never recited from what was asked."""

import errno
from collections.abc import Mapping

from guestagent.api import LayerReport
from guestagent.api.layers import DmDevice, VerityReport
from guestagent.engine.inventory import LiveLayer
from guestagent.engine.plan import VerityStep
from guestagent.engine.state import EngineState
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.devicemapper.targets import (
    Target,
    parse_verity,
    parse_verity_status,
)
from guestagent.storage.mountinfo import Mount, find_mount
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("DmView", "LayerSeen", "dm_device", "report_of", "see_layer", "verity_status")


class LayerSeen(Record):
    """What the kernel has of a layer: its mount, and its dm devices, topmost first."""

    live: LiveLayer
    mount: Mount
    dm: tuple[DmDevice, ...]
    verity: VerityReport | None


def dm_device(control: Control, name: str) -> DmDevice:
    """Describe one dm device.

    Raises:
        OSError: ENXIO, there is none.
    """
    return _described(control, name)[0]


def _described(control: Control, name: str) -> tuple[DmDevice, tuple[Target, ...]]:
    info, table, status = control.describe(name)
    device = DmDevice(
        name=info.name,
        uuid=info.uuid,
        dev=info.dev,
        node=info.node,
        target_type=table[0].target_type if table else "",
        table="; ".join(target.line() for target in table),
        status="; ".join(target.status for target in status),
        readonly=info.readonly,
        deferred_remove=info.deferred_remove,
        open_count=info.open_count,
    )
    return device, table


class DmView:
    """The device-mapper as it stands, the agent's devices and others'. Looks, never touches."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def list(self) -> tuple[DmDevice, ...]:
        """Describe every device; one that vanishes meanwhile is left out."""
        found = []
        for name, _dev, _uuid in self._control.list_devices():
            try:
                found.append(dm_device(self._control, name))
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
        return tuple(found)

    def table(self, name: str) -> tuple[str, ...]:
        """Return the table lines of a device.

        Raises:
            CallError: ``not_found``.
        """
        self._device(name)
        return tuple(target.line() for target in self._control.table(name))

    def status(self, name: str) -> tuple[DmDevice, tuple[str, ...]]:
        """Return a device and its status lines.

        Raises:
            CallError: ``not_found``.
        """
        device = self._device(name)
        return device, tuple(target.line() for target in self._control.status(name))

    def _device(self, name: str) -> DmDevice:
        try:
            return dm_device(self._control, name)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            raise CallError(
                "not_found", f"there is no dm device {name!r}", errno=error.errno, object=name
            ) from None


def verity_status(control: Control, name: str) -> str:
    """Return V or C of a verity device; nothing where it is being removed, its table gone."""
    found = control.status(name)
    return parse_verity_status(found[0].status).state if found and found[0].status else ""


def see_layer(
    control: Control, live: LiveLayer, mounts: Mapping[str, Mount] | None = None
) -> LayerSeen:
    """Look at a layer in the kernel.

    ``mounts`` is what ``mounts_by_target`` just said, for whoever looks at many layers.

    Raises:
        CallError: ``not_found``, its mount or its devices are not there any more.
    """
    target = live.spec.mount_point
    mount = find_mount(target) if mounts is None else mounts.get(target)
    if mount is None or mount.dev != live.dev:
        raise _gone(live, f"no longer mounted at {live.spec.mount_point!r}")
    try:
        found = [_described(control, name) for name in live.plan.dm_names]
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise _gone(live, f"without its device {error.filename!r}") from error
    for device, targets in found:
        # the kernel takes the table first and the device a moment later
        if not targets or (targets[0].target_type == "verity" and not device.status):
            raise _gone(live, f"without the table of its device {device.name!r}")
    return LayerSeen(
        live=live,
        mount=mount,
        dm=tuple(device for device, _ in found),
        verity=_verity_report(live, live.plan.verity, *found[0]) if live.plan.verity else None,
    )


def report_of(
    state: EngineState,
    seen: LayerSeen,
    *,
    timings_ms: Mapping[str, float] | None = None,
    already: bool = False,
) -> LayerReport:
    """Say of a layer what was seen in the kernel, and what the books say of it and others.

    Those that came with it have to be in the books by then.
    """
    live, spec, mount = seen.live, seen.live.spec, seen.mount
    corrupted = seen.verity is not None and seen.verity.status == "C"
    return LayerReport(
        layer_id=spec.layer_id,
        state="corrupted" if corrupted and live.state == "mounted" else live.state,
        target=mount.target,
        device=spec.device,
        device_node=live.source.node,
        dev=mount.dev,
        mapping=spec.mapping,
        dm=seen.dm,
        verity=seen.verity,
        filesystem=mount.filesystem,
        mount_id=mount.mount_id,
        options=_options(mount),
        size_bytes=live.source.range.size_bytes,
        used_by=state.inventory.users_of(spec.layer_id),
        overlaps=state.inventory.overlapping(live),
        timings_ms=live.timings_ms if timings_ms is None else timings_ms,
        already=already,
    )


def _gone(live: LiveLayer, what: str) -> CallError:
    return CallError(
        "not_found",
        f"layer {live.spec.layer_id!r} is {what}",
        step="read back",
        object=live.spec.layer_id,
        hint="somebody else took it away; unmount it here to clean up",
    )


def _options(mount: Mount) -> tuple[str, ...]:
    """Return the options of the mount, then those of the file system that it does not repeat."""
    return (
        *mount.options,
        *(option for option in mount.super_options if option not in mount.options),
    )


def _verity_report(
    live: LiveLayer, step: VerityStep, device: DmDevice, targets: tuple[Target, ...]
) -> VerityReport:
    """Report the table that the kernel has, in the words of the contract."""
    table = parse_verity(targets[0])
    found, request = table.parameters, live.spec.verity
    assert request is not None
    return VerityReport(
        root_digest=found.root_digest.hex(),
        salt=found.salt.hex(),
        algorithm=found.algorithm,
        hash_type=found.hash_type,
        data_blocks=found.data_blocks,
        data_block_size=found.data_block_size,
        hash_block_size=found.hash_block_size,
        hash_offset_bytes=step.parameters.hash_offset_bytes,
        superblock=step.parameters.superblock,
        source=step.source,
        status=parse_verity_status(device.status).state,
        signed="root_hash_sig_key_desc" in table.options,
        preset=request.preset,
        options=table.options,
        dropped=step.options.dropped,
    )
