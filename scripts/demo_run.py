"""The main job, end to end: directories become verified layers of a virtual machine.

    scripts/demo [--keep]

Builds three layers and a pack, boots a machine with the agent as its PID 1, drives it as an
orchestrator would, and compares every file that the guest sees with where it came from: in an
overlay of the layers, and, where the kernel has that, in one mount of their merged image. The exit
status is 0 only if everything held.
"""

import argparse
import contextlib
import hashlib
import io
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from guestagent.api import LayerReport, LayerSpec, OverlaySpec
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.style import plain, table, words_of
from guestagent.storage.verity import VerityTerms
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import cached_kernel
from rootfs.image.images import build_image
from rootfs.machine.qemu import Machine, MachineSpec, PmemSpec
from rootfs.pack.manifest import Manifest, ManifestImage, ManifestLayer, layer_spec
from rootfs.pack.mounting import OVERLAY, plan_image_mount
from rootfs.pack.pack import Pack, manifest_path_of
from rootfs.verity.formatter import format_image
from rootfs.verity.verifier import read_layer
from scripts.uml_bed.kernels import kernel_cache
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("main",)

CACHE = Path(__file__).resolve().parent.parent / ".cache"
FEATURES = ("pmem", "verity", "erofs", "overlay", "vsock")
#: Topmost first. The top layer is made here; it overrides and whites out what is below it.
SOURCES = {
    "docs": Path("/usr/share/doc"),
    "stdlib": Path(f"/usr/lib/python3.{sys.version_info.minor}"),
}
OVERRIDDEN, WHITED_OUT = "os.py", ("this.py", "wsgiref")
_BOOT_SECONDS = 120.0
_POWER_OFF_SECONDS = 30.0

#: path -> (type letter, digest of a file's content or target of a link)
Tree = dict[str, tuple[str, str]]


class DemoError(Exception):
    """A check of the demo failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The pack, its good layers, the image of them, and two layers with one flipped bit each."""

    pack: Path
    manifest: Manifest
    good: tuple[ManifestLayer, ...]
    image: ManifestImage
    flipped_first: ManifestLayer
    flipped_later: ManifestLayer


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the machine up until Ctrl-C")
    keep: bool = parser.parse_args().keep
    try:
        _run(keep)
    except (DemoError, CallError) as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        return 1
    print("demo: everything held")
    return 0


def _run(keep: bool) -> None:
    directory = CACHE / "demo"
    directory.mkdir(parents=True, exist_ok=True)
    kernel = cached_kernel(kernel_cache())
    with _progress("initramfs"):
        initramfs = build_initramfs(InitramfsSpec(kernel=kernel, features=FEATURES))
    print(initramfs.describe())
    layers = _build_layers(directory)
    with _progress("digests of the source trees"):
        expected = _expected_tree(directory / "site.tar")
    spec = MachineSpec(
        kernel=kernel.image,
        initrd=initramfs.path,
        memory_mib=1024,
        pmem=(PmemSpec(path=layers.pack),),
        console_path=directory / "console.log",
    )
    with Machine(spec) as machine, machine.while_up() as up:
        print(f"  accelerator: {machine.accel} ({machine.accel_reason})")
        with _progress("boot to the agent's first reply"):
            guest = GuestAgent(machine.agent_address(), connect_seconds=_BOOT_SECONDS, until=up)
        with guest:
            _drive(guest, layers, expected)
            if keep:
                _keep(machine)
            guest.shutdown("poweroff")
        with _progress("power-off"), contextlib.closing(Deadline(_POWER_OFF_SECONDS)) as deadline:
            status = machine.wait(deadline)
        _require(status == 0, f"QEMU ended with {status}, not in order")


# --- layers -----------------------------------------------------------------------------------


def _build_layers(directory: Path) -> Layers:
    """Build, format and pack the layers, topmost first."""
    pack_path = directory / "pack.img"
    for path in (pack_path, manifest_path_of(pack_path)):
        path.unlink(missing_ok=True)
    _write_top_layer(directory / "site.tar")
    sources = {"site": directory / "site.tar", **SOURCES}
    with Pack.create(pack_path) as pack:
        for position, (layer_id, source) in enumerate(sources.items()):
            with _progress(f"layer {layer_id} from {source}"):
                _add_layer(pack, layer_id, source, directory / f"{layer_id}.erofs", position)
        good = pack.layers
        with _progress("one image merged of the layers"):
            image = pack.merge("site-image", list(sources))
        top = directory / "site.erofs"
        _add_copy(pack, "flipped-first", top)
        _add_copy(pack, "flipped-later", top)
        manifest = pack.manifest
    with Pack.open(pack_path) as pack:
        found = {layer.layer_id: layer for layer in pack.layers}
    first, later = found["flipped-first"], found["flipped-later"]
    _flip_bit(pack_path, first.offset_bytes + 1024)  # of the EROFS superblock
    assert later.verity is not None
    _flip_bit(pack_path, later.offset_bytes + later.verity.data_size_bytes // 2)
    return Layers(
        pack=pack_path,
        manifest=manifest,
        good=good,
        image=image,
        flipped_first=first,
        flipped_later=later,
    )


def _add_layer(pack: Pack, layer_id: str, source: Path, image: Path, position: int) -> None:
    image.unlink(missing_ok=True)
    result = build_image(source, image)
    formatted = format_image(
        image, terms=VerityTerms(salt=result.verity_salt), uuid=result.verity_uuid
    )
    pack.add(
        image,
        layer_id,
        verity=formatted.parameters,
        source_digest=result.source_digest,
        position=position,
    )


def _add_copy(pack: Pack, layer_id: str, image: Path) -> None:
    pack.add(image, layer_id, verity=read_layer(image).parameters, position=len(pack.layers))


def _flip_bit(path: Path, offset_bytes: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset_bytes)
        byte = file.read(1)[0]
        file.seek(offset_bytes)
        file.write(bytes([byte ^ 0x10]))


def _write_top_layer(path: Path) -> None:
    """Write a tar as container images have: it replaces a file and removes others by whiteouts."""
    notice = "# This file comes from the topmost layer.\n" * 500
    files = {OVERRIDDEN: notice, "etc/motd": "Verified, layer by layer.\n"}
    files.update({f".wh.{name}": "" for name in WHITED_OUT})
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, text in files.items():
            data = text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            tar.addfile(info, io.BytesIO(data))


# --- what the guest must see --------------------------------------------------------------------


def _expected_tree(site: Path) -> Tree:
    """Merge the source trees as the overlay must, from the sources alone."""
    tree: Tree = {}
    for source in reversed(SOURCES.values()):
        tree.update(_read_tree(source))
    for name in WHITED_OUT:
        for path in [path for path in tree if path == name or path.startswith(name + "/")]:
            del tree[path]
    with tarfile.open(site) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None and not os.path.basename(member.name).startswith(".wh."):
                tree[member.name] = ("f", hashlib.sha256(content.read()).hexdigest())
                parent = os.path.dirname(member.name)
                if parent:
                    tree[parent] = ("d", "")
    return tree


def _read_tree(root: Path) -> Tree:
    tree: Tree = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory, name)
            relative = str(path.relative_to(root))
            if path.is_symlink():
                tree[relative] = ("l", os.readlink(path))
            elif path.is_dir():
                tree[relative] = ("d", "")
            elif path.is_file():
                with open(path, "rb") as file:
                    tree[relative] = ("f", hashlib.file_digest(file, "sha256").hexdigest())
    return tree


# --- as an orchestrator would ---------------------------------------------------------------------


def _drive(guest: GuestAgent, layers: Layers, expected: Tree) -> None:
    hello = guest.hello
    print(f"  agent {hello.agent} on Linux {hello.kernel}, protocol version {hello.version}")
    for name, value in hello.boot.items():
        print(f"  {name:20} {words_of(value)}")
    reports = [guest.layer_mount(_spec(layer)) for layer in layers.good]
    for report in reports:
        _check_stack(report)
    overlay = guest.overlay_mount(
        OverlaySpec(overlay_id="root", layers=tuple(layer.layer_id for layer in layers.good))
    )
    _require(overlay.layers == tuple(layer.layer_id for layer in layers.good), "layers in order")
    with _progress(f"digests of {len(expected)} entries in the guest"):
        seen = _seen_tree(guest, overlay_id="root")
    _compare(seen, expected)
    print(_timings(reports, overlay.timings_ms))
    _show_image(guest, layers, expected)
    _show_refusals(guest, layers)
    _take_down(guest, layers)


def _show_image(guest: GuestAgent, layers: Layers, expected: Tree) -> None:
    """Mount the merged image of the same layers and compare it, where the kernel can."""
    plan = plan_image_mount(
        layers.manifest,
        layers.image,
        {"kind": "pmem", "number": 0},
        features=guest.hello.features,
        kernel=guest.hello.kernel,
    )
    print(f"  image {plan.image_id}: {plan.reason}")
    if plan.form == OVERLAY:
        return  # that of above is the one
    (spec,) = plan.layers
    report = guest.layer_mount(spec)
    _check_stack(report)
    with _progress(f"digests of {len(expected)} entries in the one mount"):
        seen = _seen_tree(guest, layer_id=report.layer_id)
    _compare(seen, expected)
    print(_timings([report]))
    guest.layer_unmount(report.layer_id)


def _spec(layer: ManifestLayer) -> LayerSpec:
    return LayerSpec.from_wire(layer_spec(layer, {"kind": "pmem", "number": 0}))


def _check_stack(report: LayerReport) -> None:
    kinds = [device.target_type for device in report.dm]
    _require(kinds == ["verity", "linear"], f"{report.layer_id}: devices are {kinds}")
    _require(report.verity is not None and report.verity.status == "V", "verity status V")
    _require("ro" in report.options, f"{report.layer_id} is not read-only")


def _seen_tree(
    guest: GuestAgent, *, overlay_id: str | None = None, layer_id: str | None = None
) -> Tree:
    entries = guest.fs_checksums(overlay_id=overlay_id, layer_id=layer_id)
    return {
        os.fsdecode(path): (entry.kind, entry.digest or entry.target or "")
        for path, entry in entries.items()
    }


def _compare(seen: Tree, expected: Tree) -> None:
    different = [path for path in expected if seen.get(path) != expected[path]]
    different += [path for path in seen if path not in expected]
    for path in different[:10]:
        wanted, found = words_of(expected.get(path)), words_of(seen.get(path))
        print(f"  {plain(path)}: expected {wanted}, guest has {found}")
    _require(not different, f"{len(different)} entries differ between the sources and the guest")
    files = sum(kind == "f" for kind, _ in expected.values())
    print(f"  all {len(expected)} entries, {files} files among them, are what the sources say")


def _timings(reports: list[LayerReport], overlay_ms: Mapping[str, float] | None = None) -> str:
    columns = {report.layer_id: dict(report.timings_ms) for report in reports}
    if overlay_ms is not None:
        columns["overlay"] = dict(overlay_ms)
    steps = list(dict.fromkeys(step for column in columns.values() for step in column))
    rows = [
        [step, *(f"{column[step]:.2f}" if step in column else "" for column in columns.values())]
        for step in steps
    ]
    total = [f"{sum(column.values()):.2f}" for column in columns.values()]
    return table(["MILLISECONDS", *columns], [*rows, ["total", *total]])


def _show_refusals(guest: GuestAgent, layers: Layers) -> None:
    first = _spec(layers.flipped_first)
    _refused("a layer with one bit flipped in its first block", lambda: guest.layer_mount(first))
    wrong = _spec(layers.good[0])
    assert wrong.verity is not None
    wrong_digest = bytes([wrong.verity.root_digest[0] ^ 1]) + wrong.verity.root_digest[1:]
    wrong = wrong.replace(
        layer_id="wrong-digest", verity=wrong.verity.replace(root_digest=wrong_digest)
    )
    _refused("a wrong root digest", lambda: guest.layer_mount(wrong))
    guest.layer_mount(_spec(layers.flipped_later))
    found = guest.layer_verify("flipped-later")
    _require(len(found.corrupt_blocks) == 1 and found.status == "C", f"corrupt block: {found}")
    print(f"  found by layer.verify: one bit flipped in data block {found.corrupt_blocks[0]}")
    guest.layer_unmount("flipped-later")


def _refused(what: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except CallError as error:
        _require(error.code == "integrity", f"{what} was refused with {error}")
        print(f"  refused: {what}: {error}")
        return
    raise DemoError(f"{what} was accepted")


def _take_down(guest: GuestAgent, layers: Layers) -> None:
    guest.overlay_unmount("root")
    for layer in layers.good:
        guest.layer_unmount(layer.layer_id)
    left = guest.dm_list().devices
    _require(not left, f"dm devices are left: {left}")
    _require(not guest.layer_list() and not guest.overlay_list(), "layers or overlays are left")
    status = guest.status()
    _require(status.state == "ready", f"the agent has problems: {status.problems}")
    print(
        f"  unmounted: no mount and no dm device is left; the agent has {status.threads} threads, "
        f"{status.rss_bytes / 2**20:.1f} MiB"
    )


# --- telling -----------------------------------------------------------------------------------


def _keep(machine: Machine) -> None:
    print(f"  the machine stays up: guestctl --connect {machine.agent_address()} status")
    print("  Ctrl-C powers it off")
    with contextlib.suppress(KeyboardInterrupt):
        machine.wait(Deadline())


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    begin = time.perf_counter()
    print(f"demo: {what} ...", end="", flush=True)
    try:
        yield
    except BaseException:
        print(" failed")
        raise
    print(f" {time.perf_counter() - begin:.1f} s")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise DemoError(what)


if __name__ == "__main__":
    sys.exit(main())
