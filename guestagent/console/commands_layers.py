"""Commands about layers, overlays, and the devices below them."""

from guestagent.api import LayerReport, OverlayReport
from guestagent.api.texts import layer_from_text
from guestagent.console.command import Group, Guest, Run, Usage, not_found
from guestagent.storage.holders import find_holders
from vsock.deadline import Deadline

__all__ = ("LAYERS",)


#: A dry run waits this long for a device that is not there.
_PLAN_SECONDS = 3.0
_HOLDERS_SECONDS = 10.0


def size_text(size_bytes: int) -> str:
    """Return a size with the largest binary unit that leaves a number of one digit or more."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            return f"{int(value)} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def _complete_layer(guest: Guest, word: str, deadline: Deadline) -> tuple[str, ...]:
    return guest.debug.layer_ids()


def _complete_device(guest: Guest, word: str, deadline: Deadline) -> tuple[str, ...]:
    devices = guest.inspection.devices
    infos = (*devices.list_devices().devices, *devices.list_partitions().devices)
    return (*(info.node for info in infos), *guest.debug.layer_ids())


LAYERS = Group(
    "Layers, overlays and their devices",
    {
        "LAYER": _complete_layer,
        "ID": _complete_layer,
        "OVERLAY": lambda guest, word, deadline: guest.debug.overlay_ids(),
        "NAME": lambda guest, word, deadline: [n for n, _ in guest.debug.dm_devices()],
        "DEVICE": _complete_device,
    },
)


@LAYERS.command("layers [LAYER...]", "list the layers, or describe some")
def _layers(run: Run) -> int | None:
    if run.words:
        for layer_id in run.words:
            _describe_layer(run, run.engine.layers.get(layer_id))
        return None
    reports = run.engine.layers.list()
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
    missing = set(run.guest.debug.layer_ids()) - {report.layer_id for report in reports}
    for layer_id in sorted(missing):
        run.screen.line(f"{layer_id}: in the books, not in the kernel; see reconcile --dry-run")
    return None


def _describe_layer(run: Run, report: LayerReport) -> None:
    mapping = report.mapping
    where = f"bytes {mapping.offset_bytes}+{mapping.size_bytes}" if mapping else "whole"
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
def _overlays(run: Run) -> int | None:
    reports = run.engine.overlays.list()
    if run.words:
        by_id = {report.overlay_id: report for report in reports}
        for overlay_id in run.words:
            if overlay_id not in by_id:
                raise not_found(f"there is no overlay {overlay_id!r}", "`overlays` lists them")
            _describe_overlay(run, by_id[overlay_id])
        return None
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
    return None


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
def _devices(run: Run) -> int | None:
    devices = run.guest.inspection.devices
    types = devices.list_filesystems(run.operation()).filesystems
    infos = (*devices.list_devices().devices, *devices.list_partitions().devices)
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
        for info in sorted(infos, key=lambda info: info.node)
    ]
    run.screen.table(header, rows)
    return None


@LAYERS.command("tables [NAME...]", "print tables and status of the dm devices")
def _tables(run: Run) -> int | None:
    found = run.engine.dm.list()
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
    return None


@LAYERS.command("mounts", "list everything that is mounted")
def _mounts(run: Run) -> int | None:
    header = ("TARGET", "TYPE", "DEV", "SOURCE", "OPTIONS")
    rows = [
        (mount.target, mount.filesystem, mount.dev, mount.source, ",".join(mount.options))
        for mount in run.guest.inspection.devices.mountpoints().mounts
    ]
    run.screen.table(header, rows)
    return None


@LAYERS.command(
    "plan LAYER...", "print the steps of a layer's mount, a dry run if it is not mounted"
)
def _plan(run: Run) -> int | None:
    for word in run.words:
        if len(run.words) > 1:
            run.screen.line(f"{word}:")
        plan = run.guest.debug.plan_of(word)
        if plan is None:
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
                plan = run.guest.debug.plan(spec, run.engine.operation(limit))
        run.screen.lines([f"  {step}" for step in plan.describe()])
    return None


@LAYERS.command("holders DEVICE", "say who keeps a device busy")
def _holders(run: Run) -> int | None:
    word = run.words[0]
    dev = _dev_of(run, word)
    with run.deadline.part(_HOLDERS_SECONDS) as limit:
        holders = find_holders(dev, limit)
    run.deadline.check("look for holders")
    rows = [(holder.kind, holder.name, holder.detail) for holder in holders]
    run.screen.line(f"{word} is {dev}")
    run.screen.table(("KIND", "NAME", "DETAIL"), rows)
    return None


def _dev_of(run: Run, word: str) -> str:
    """Return MAJOR:MINOR of a device node, a dm device, a layer, or of itself."""
    major, colon, minor = word.partition(":")
    if colon and major.isdigit() and minor.isdigit() and len(word) < 16:
        return word
    for name, dev in run.guest.debug.dm_devices():
        if word in (name, f"/dev/mapper/{name}"):
            return dev
    dev_of_layer = run.guest.debug.dev_of_layer(word)
    if dev_of_layer:
        return dev_of_layer
    devices = run.guest.inspection.devices
    for info in (*devices.list_devices().devices, *devices.list_partitions().devices):
        if info.node == word:
            return info.dev
    raise not_found(
        f"there is no device {word!r}", "a node of `devices`, a name of `tables`, a layer, MAJ:MIN"
    )


@LAYERS.command("timings [ID...]", "say how long each step of boot and of each mount took")
def _timings(run: Run) -> int | None:
    boot = [
        (name, value)
        for name, value in run.guest.boot.items()
        if name.endswith("_ms") and isinstance(value, (int, float))
    ]
    if not run.words:
        run.screen.line("boot:")
        for name, value in boot:
            run.screen.line(f"  {name.removesuffix('_ms').replace('_', ' '):24} {value:10.3f} ms")
    made = [(f"layer {r.layer_id}", r.timings_ms) for r in run.engine.layers.list()]
    made += [(f"overlay {r.overlay_id}", r.timings_ms) for r in run.engine.overlays.list()]
    for title, timings in made:
        if run.words and title.partition(" ")[2] not in run.words:
            continue
        run.screen.line(f"{title}: {sum(timings.values()):.3f} ms")
        for step, spent_ms in timings.items():
            run.screen.line(f"  {step:24} {spent_ms:10.3f} ms")
    return None


@LAYERS.command(
    "reconcile [--dry-run]", "compare journal, inventory, kernel; undo what none accounts for"
)
def _reconcile(run: Run) -> int | None:
    reconciliation = run.guest.debug.reconciliation
    op = run.operation()
    findings = reconciliation.look(op)
    if not findings:
        run.screen.line("journal, inventory and kernel agree")
        return None
    is_dry = "dry-run" in run.options
    status = 0
    for finding in findings:
        run.screen.line(f"{finding.kind} {finding.name} {finding.problem}")
        if is_dry:
            run.screen.line(f"  would {finding.action or 'leave it: nothing can be done'}")
            continue
        outcome = reconciliation.settle(finding, op)
        detail = f": {outcome.detail}" if outcome.detail else ""
        run.screen.line(f"  {finding.action or 'no action'}: {outcome.result}{detail}")
        status = max(status, int(outcome.result == "failed"))
    return status
