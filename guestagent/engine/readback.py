"""What the kernel really has: reports are read back, never recited from what was asked."""

import errno
from collections.abc import Mapping, Sequence

from guestagent.api import LayerReport
from guestagent.api.devices import LayerMapping
from guestagent.api.layers import SHOWN_PARTS, DmDevice, LayerSpec, VerityReport
from guestagent.engine.dmview import described
from guestagent.engine.inventory import LayerClaim, LiveLayer
from guestagent.engine.plan import VerityStep, plan_layer
from guestagent.engine.state import EngineState
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.devicemapper.targets import (
    Target,
    is_same_table,
    parse_verity,
    parse_verity_status,
)
from guestagent.storage.mountinfo import Mount, find_mount, whereabouts
from vsock.errors import CallError
from vsock.record import Record

__all__ = (
    "LayerSeen",
    "absent_report",
    "ignored_report",
    "report_of",
    "see_layer",
    "table_problem",
    "verity_status",
)


class LayerSeen(Record):
    """What the kernel has of a layer: its mount, and its dm devices, topmost first."""

    live: LiveLayer
    mount: Mount
    dm: tuple[DmDevice, ...]
    #: The dm device whose table is not the layer's; empty where all are as they were planned.
    changed: str
    verity: VerityReport | None
    readonly: bool


def verity_status(control: Control, name: str) -> str:
    """Return V or C of a verity device; nothing where it is being removed, its table gone."""
    found = control.status(name)
    return parse_verity_status(found[0].status).state if found and found[0].status else ""


def see_layer(
    control: Control,
    live: LiveLayer,
    mounts: Mapping[str, Mount] | None = None,
    tables: Mapping[str, Sequence[Target]] = {},
) -> LayerSeen:
    """Look at a layer in the kernel.

    ``mounts`` is a fresh result of ``mounts_by_target``, for callers that look at many layers;
    ``tables`` are the linear tables that the caller has just loaded, by name.

    Raises:
        CallError: ``not_found``, its mount or its devices are not there any more.
    """
    target = live.spec.mount_point
    mount = find_mount(target) if mounts is None else mounts.get(target)
    if mount is None or not _is_of(mount, live):
        raise _gone(live, whereabouts(target, live.dev, live.mount_id))
    found = {}
    for name in live.plan.dm_names:
        try:
            found[name] = described(control, name)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            mount = find_mount(target)  # an unmount takes the devices away after the mount
            if mount is None or not _is_of(mount, live):
                raise _gone(live, f"without its device {name!r}") from error
    for device, targets in found.values():
        # the kernel takes the table first and the device a moment later
        if not targets or (targets[0].target_type == "verity" and not device.status):
            raise _gone(live, f"without the table of its device {device.name!r}")
    changed = _changed(live, found, tables)
    verity = live.plan.verity
    report = None
    if verity is not None and verity.name in found and changed != verity.name:
        report = _verity_report(live, verity, *found[verity.name])
    return LayerSeen(
        live=live,
        mount=mount,
        dm=tuple(device for device, _ in found.values()),
        changed=changed,
        verity=report,
        readonly=all(map(_is_readonly, live.source.devices)),
    )


def _is_of(mount: Mount, live: LiveLayer) -> bool:
    return (mount.dev, mount.mount_id) == (live.dev, live.mount_id)


def _changed(
    live: LiveLayer,
    found: Mapping[str, tuple[DmDevice, tuple[Target, ...]]],
    tables: Mapping[str, Sequence[Target]],
) -> str:
    """Return the name of the topmost device that is missing, or whose table is not as planned."""
    changed, plan, dev = "", live.plan, live.source.dev
    if plan.linear is not None:
        device, targets = found.get(plan.linear.name, (None, ()))
        planned = tables.get(plan.linear.name) or plan.linear.targets(live.spec.ranges)
        if not is_same_table(planned, targets):
            changed = plan.linear.name
        dev = device.dev if device is not None else ""
    if plan.verity is not None:
        _, targets = found.get(plan.verity.name, (None, ()))
        if not dev or not is_same_table((plan.verity.target(dev),), targets):
            changed = plan.verity.name
    return changed


def _is_readonly(device: BlockDevice) -> bool:
    try:
        return blockdev.is_readonly(device.name)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise
        return True  # it is gone, and so is never written to


def _first_ranges(spec: LayerSpec) -> LayerMapping | None:
    return spec.mapping[:SHOWN_PARTS] if isinstance(spec.mapping, tuple) else spec.mapping


def table_problem(layer_id: str) -> str:
    """Return the key of the problem that a dm device of a layer has a foreign table."""
    return f"table of layer {layer_id}"


def report_of(
    state: EngineState,
    seen: LayerSeen,
    *,
    timings_ms: Mapping[str, float] | None = None,
    already: bool = False,
) -> LayerReport:
    """Report a layer as seen in the kernel, with what the inventory has on it and other layers.

    The layers of the same batch must be in the inventory before.
    """
    live, spec = seen.live, seen.live.spec
    layer_state = live.state
    if layer_state == "mounted" and seen.changed:
        layer_state = "changed"
    elif layer_state == "mounted" and seen.verity is not None and seen.verity.status == "C":
        layer_state = "corrupted"
    if seen.changed:
        text = f"layer {spec.layer_id!r}: the table of {seen.changed} is not the one it was given"
        state.inventory.note_problem(table_problem(spec.layer_id), text)
    else:
        state.inventory.settle_problem(table_problem(spec.layer_id))
    return _report(state, live, layer_state, seen, timings_ms=timings_ms, already=already)


def absent_report(state: EngineState, live: LiveLayer, layer_state: str) -> LayerReport:
    """Report a layer that cannot be seen as it was mounted: what is known of it, and its state."""
    return _report(state, live, layer_state, None)


def ignored_report(
    state: EngineState, claim: LayerClaim, timings_ms: Mapping[str, float]
) -> LayerReport:
    """Report a layer that its policy leaves out."""
    plan = plan_layer(claim.spec, claim.source, names=claim.reservation.dm_names)
    live = LiveLayer(spec=claim.spec, source=claim.source, plan=plan, created=(), timings_ms={})
    return _report(state, live, "ignored", None, timings_ms=timings_ms)


def _report(
    state: EngineState,
    live: LiveLayer,
    layer_state: str,
    seen: LayerSeen | None,
    *,
    timings_ms: Mapping[str, float] | None = None,
    already: bool = False,
) -> LayerReport:
    spec = live.spec
    return LayerReport(
        layer_id=spec.layer_id,
        state=layer_state,
        target=spec.mount_point,
        device=spec.device,
        device_node=live.source.node,
        dev=live.dev,
        mapping=_first_ranges(spec),
        range_count=len(spec.ranges),
        dm=seen.dm if seen else (),
        verity=seen.verity if seen else None,
        filesystem=seen.mount.filesystem if seen else live.plan.mount.filesystem,
        mount_id=live.mount_id,
        options=_options(seen.mount) if seen else (),
        readonly=seen.readonly if seen else all(map(_is_readonly, live.source.devices)),
        size_bytes=live.source.size_bytes,
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
        hint="another program removed it; unmount it here to clean up",
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
    try:
        table = parse_verity(targets[0])
    except ValueError as error:
        raise CallError(
            "device",
            f"layer {live.spec.layer_id!r}: the table of its device {device.name!r} is damaged",
            step="read back",
            object=live.spec.layer_id,
        ) from error
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
