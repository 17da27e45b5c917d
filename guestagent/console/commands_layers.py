"""Commands about layers, overlays, and the devices below them."""

from guestagent.api.agent import PROTOCOL_VERSIONS, AgentHello, AgentStatus
from guestagent.api.devicemapper import DmList
from guestagent.api.devices import ranges_of
from guestagent.api.inspect_devices import (
    DeviceInfo,
    FsListDevices,
    FsListFilesystems,
    FsListPartitions,
    FsMountpoints,
)
from guestagent.api.layers import LayerGet, LayerList, LayerReport
from guestagent.api.overlays import OverlayList, OverlayReport
from guestagent.api.texts import layer_from_text
from guestagent.console.command import Access, Group, Run, Usage, not_found
from guestagent.console.screen import size_text

__all__ = ("LAYERS", "block_devices", "mounted_ids")

#: A dry run waits this long for a device that is not there.
_PLAN_SECONDS = 3.0
_HOLDERS_SECONDS = 10.0


def block_devices(access: Access) -> tuple[DeviceInfo, ...]:
    """Return the disks and their partitions."""
    return (*access.ask(FsListDevices).devices, *access.ask(FsListPartitions).devices)


def mounted_ids(access: Access) -> list[str]:
    """Return the ids of the layers, then those of the overlays."""
    return [*_layer_ids(access), *_overlay_ids(access)]


def _layer_ids(access: Access, _word: str = "") -> list[str]:
    return [layer.layer_id for layer in access.ask(LayerList).layers]


def _overlay_ids(access: Access, _word: str = "") -> list[str]:
    return [overlay.overlay_id for overlay in access.ask(OverlayList).overlays]


LAYERS = Group(
    "Layers, overlays and their devices",
    {
        "LAYER": _layer_ids,
        "ID": lambda access, word: mounted_ids(access),
        "OVERLAY": _overlay_ids,
        "NAME": lambda access, word: [device.name for device in access.ask(DmList).devices],
        "DEVICE": lambda access, word: [
            *(info.node for info in block_devices(access)),
            *_layer_ids(access),
        ],
    },
)


@LAYERS.command("layers [LAYER...]", "list the layers, or describe some")
def _layers(run: Run) -> None:
    if run.words:
        for layer_id in run.words:
            _describe_layer(run, run.ask(LayerGet, layer_id=layer_id))
        return
    reports = run.ask(LayerList).layers
    header = ("LAYER", "STATE", "SIZE", "TYPE", "VERITY", "DEVICE", "USED BY", "TARGET")
    rows = [
        (
            report.layer_id,
            report.state,
            size_text(report.size_bytes),
            report.filesystem,
            report.verity.status if report.verity else "no",
            report.device_node,
            ",".join(report.used_by) or "-",
            report.target,
        )
        for report in reports
    ]
    run.screen.table(header, rows)
    missing = run.ask(AgentStatus).layers - len(reports)
    if missing > 0:
        run.screen.line(f"{missing} more are not in the kernel; see reconcile --dry-run")


def _describe_layer(run: Run, report: LayerReport) -> None:
    ranges = ranges_of(report.mapping)
    if len(ranges) == 1:
        where = f"bytes {ranges[0].offset_bytes}+{ranges[0].size_bytes}"
    else:
        where = f"{report.range_count} ranges" if ranges else "whole"
    run.screen.fields(
        [
            ("layer", report.layer_id),
            ("state", report.state),
            ("target", report.target),
            ("device", f"{report.device_node} ({where})"),
            ("size", size_text(report.size_bytes)),
            ("filesystem", f"{report.filesystem} on {report.dev}, mount {report.mount_id}"),
            ("options", ",".join(report.options)),
            ("used by", ", ".join(report.used_by)),
            ("overlaps", ", ".join(report.overlaps)),
        ]
    )
    if report.verity is not None:
        verity = report.verity
        run.screen.fields(
            [
                ("verity", f"{verity.status}, {verity.algorithm}, {verity.data_blocks} blocks"),
                ("root digest", verity.root_digest),
                ("salt", verity.salt),
                ("parameters", f"from {verity.source}{', signed' if verity.signed else ''}"),
            ]
        )
    for device in report.dm:
        deferred = ", goes with its last user" if device.deferred_remove else ""
        run.screen.line(f"dm {device.name} ({device.dev}, open {device.open_count}{deferred})")
        run.screen.line(f"   {device.table}")


@LAYERS.command("overlays [OVERLAY...]", "list the overlays, or describe some")
def _overlays(run: Run) -> None:
    reports = run.ask(OverlayList).overlays
    if run.words:
        by_id = {report.overlay_id: report for report in reports}
        for overlay_id in run.words:
            if overlay_id not in by_id:
                raise not_found(f"there is no overlay {overlay_id!r}", "`overlays` lists them")
            _describe_overlay(run, by_id[overlay_id])
        return
    header = ("OVERLAY", "STATE", "LAYERS", "SCRATCH", "FREE", "TARGET")
    rows = [
        (
            report.overlay_id,
            report.state,
            str(len(report.layers)),
            report.scratch.kind if report.scratch else "read-only",
            size_text(report.scratch.free_bytes) if report.scratch else "-",
            report.target,
        )
        for report in reports
    ]
    run.screen.table(header, rows)


def _describe_overlay(run: Run, report: OverlayReport) -> None:
    scratch = report.scratch
    room = "none: read-only"
    if scratch is not None:
        room = (
            f"{scratch.kind} {scratch.path} ({scratch.filesystem}), "
            f"{size_text(scratch.free_bytes)} free of {size_text(scratch.size_bytes)}"
        )
    run.screen.fields(
        [
            ("overlay", report.overlay_id),
            ("state", report.state),
            ("target", report.target),
            ("scratch", room),
            ("method", report.method),
            ("mount", report.mount_id),
            ("options", ",".join(report.options)),
        ]
    )
    for position, (layer_id, directory) in enumerate(
        zip(report.layers, report.lowerdirs, strict=False), 1
    ):
        run.screen.line(f"  {position:3} {layer_id}  {directory}")


@LAYERS.command("devices", "list the block devices and what is at their start")
def _devices(run: Run) -> None:
    types = run.ask(FsListFilesystems).filesystems
    header = ("NODE", "DEV", "SIZE", "KIND", "ACCESS", "HOLDS", "SERIAL")
    rows = [
        (
            info.node,
            info.dev,
            size_text(info.size_bytes),
            info.kind,
            "ro" if info.readonly else "rw",
            types.get(info.node, "unknown"),
            info.serial or "-",
        )
        for info in sorted(block_devices(run), key=lambda info: info.node)
    ]
    run.screen.table(header, rows)


@LAYERS.command("tables [NAME...]", "print tables and status of the dm devices")
def _tables(run: Run) -> None:
    found = run.ask(DmList).devices
    if run.words:
        found = tuple(device for device in found if device.name in run.words)
        unknown = set(run.words) - {device.name for device in found}
        if unknown:
            raise not_found(f"there is no dm device {min(unknown)!r}", "`tables` lists them")
    for device in found:
        access = "ro" if device.readonly else "rw"
        run.screen.line(f"{device.name}  {device.dev} {access} open {device.open_count}")
        run.screen.line(f"  uuid   {device.uuid}")
        run.screen.line(f"  table  {device.table}")
        run.screen.line(f"  status {device.status}")
    if not found:
        run.screen.line("none")


@LAYERS.command("mounts", "list everything that is mounted")
def _mounts(run: Run) -> None:
    header = ("TARGET", "TYPE", "DEV", "SOURCE", "OPTIONS")
    rows = [
        (mount.target, mount.filesystem, mount.dev, mount.source, ",".join(mount.options))
        for mount in run.ask(FsMountpoints).mounts
    ]
    run.screen.table(header, rows)


@LAYERS.command(
    "plan LAYER...", "print the steps of a layer's mount, a dry run if it is not mounted"
)
def _plan(run: Run) -> None:
    for word in run.words:
        if len(run.words) > 1:
            run.screen.line(f"{word}:")
        steps = run.guest.debug.plan_of(word)
        if steps is None:
            if "," not in word and ":" not in word and not word.startswith("/"):
                raise not_found(
                    f"there is no layer {word!r}",
                    "a layer that is not mounted is told as DEVICE,root=HEX[,offset=N,size=N]",
                )
            try:
                spec = layer_from_text(word, "plan")
            except ValueError as error:
                raise Usage(str(error)) from None
            with run.deadline.part(_PLAN_SECONDS) as limit:
                steps = run.guest.debug.plan(spec, limit)
        run.screen.lines(f"  {step}" for step in steps)


@LAYERS.command("holders DEVICE", "list what uses a device")
def _holders(run: Run) -> None:
    word = run.words[0]
    dev = _dev_of(run, word)
    with run.deadline.part(_HOLDERS_SECONDS) as limit:
        holders = run.guest.debug.holders(dev, limit)
    run.deadline.check("look for holders")
    rows = [(holder.kind, holder.name, holder.detail) for holder in holders]
    run.screen.line(f"{word} is {dev}")
    run.screen.table(("KIND", "NAME", "DETAIL"), rows)


def _dev_of(run: Run, word: str) -> str:
    """Return MAJOR:MINOR of a device node, a dm device, a layer, or of itself."""
    major, colon, minor = word.partition(":")
    if colon and major.isdigit() and minor.isdigit() and len(word) < 16:
        return word
    for device in run.ask(DmList).devices:
        if word in (device.name, f"/dev/mapper/{device.name}"):
            return device.dev
    for layer in run.ask(LayerList).layers:
        if word == layer.layer_id:
            return layer.dev
    for info in block_devices(run):
        if word == info.node:
            return info.dev
    raise not_found(
        f"there is no device {word!r}", "a node of `devices`, a name of `tables`, a layer, MAJ:MIN"
    )


@LAYERS.command("timings [ID...]", "say how long each step of boot and of each mount took")
def _timings(run: Run) -> None:
    boot = [
        (name, value)
        for name, value in run.ask(AgentHello, versions=PROTOCOL_VERSIONS).boot.items()
        if name.endswith("_ms") and isinstance(value, (int, float))
    ]
    if not run.words:
        run.screen.line("boot:")
        for name, value in boot:
            run.screen.line(f"  {name.removesuffix('_ms').replace('_', ' '):24} {value:10.3f} ms")
    made = [(f"layer {r.layer_id}", r.timings_ms) for r in run.ask(LayerList).layers]
    made += [(f"overlay {r.overlay_id}", r.timings_ms) for r in run.ask(OverlayList).overlays]
    for title, timings in made:
        if run.words and title.partition(" ")[2] not in run.words:
            continue
        run.screen.line(f"{title}: {sum(timings.values()):.3f} ms")
        for step, spent_ms in timings.items():
            run.screen.line(f"  {step:24} {spent_ms:10.3f} ms")


@LAYERS.command(
    "reconcile [--dry-run]", "compare journal, inventory, kernel; undo what none accounts for"
)
def _reconcile(run: Run) -> int | None:
    status, problem = 0, None
    for problem, outcome, has_failed in run.guest.debug.reconcile(
        run.deadline, dry_run="dry-run" in run.options
    ):
        run.screen.lines((problem, f"  {outcome}"))
        status = max(status, int(has_failed))
    if problem is None:
        run.screen.line("journal, inventory and kernel agree")
    return status
