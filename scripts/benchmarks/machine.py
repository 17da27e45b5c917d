"""The agent in a real machine: boot, memory, round trips, mounts one by one and in batches.

The machine is QEMU's; under TCG absolute times say little, ratios between rows of one run do.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from guestagent.api import LayersMount, LayerSpec, LayersUnmount, OverlaySpec
from guestagent.api.net import Interface, InterfaceMatch, NetConfigure
from guestagent.host.client import GuestAgent
from guestagent.storage.verity import VerityTerms
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel, cached_kernel
from rootfs.image.images import build_image
from rootfs.machine.qemu import Machine, MachineSpec, PmemSpec
from rootfs.machine.qemu_command import NetworkSpec
from rootfs.pack.manifest import Manifest, ManifestLayer, layer_spec
from rootfs.pack.pack import Pack, manifest_path_of
from rootfs.verity.formatter import format_image
from scripts.benchmarks.merged import merged_rows, write_pack
from scripts.benchmarks.rows import Row, milliseconds, row, timed
from scripts.uml_bed.kernels import kernel_cache

__all__ = ("machine_rows",)

BED = "qemu"
CACHE = Path(__file__).resolve().parents[2] / ".cache"
FEATURES = ("pmem", "verity", "erofs", "overlay", "vsock")
LAYERS = 64
_BOOT_SECONDS = 120.0
#: A machine with neighbours is twice as fast in one second as in the next.
_BATCH_ROUNDS = 9


def machine_rows(boots: int = 3, rounds: int = 20) -> list[Row]:
    """Boot a few machines and measure in the last of them."""
    kernel = cached_kernel(kernel_cache())
    initramfs = build_initramfs(InitramfsSpec(kernel=kernel, features=FEATURES))
    directory = Path(tempfile.mkdtemp(prefix="bench-machine-"))
    try:
        layers = _pack(directory)
        images = write_pack(directory)
        spec = MachineSpec(
            kernel=kernel.image,
            initrd=initramfs.path,
            memory_mib=1024,
            pmem=(PmemSpec(path=directory / "pack.img"), PmemSpec(path=images)),
        )
        rows = [row(BED, "initramfs", "MiB", [initramfs.size_bytes / 2**20])]
        replies: list[float] = []
        uptimes: list[float] = []
        for boot in range(boots):
            with Machine(spec) as machine, machine.while_up() as up:
                with timed(replies):
                    guest = GuestAgent(
                        machine.agent_address(), connect_seconds=_BOOT_SECONDS, until=up
                    )
                with guest:
                    uptimes.append(_number(guest.hello.boot["ready_uptime_ms"]))
                    if boot + 1 == boots:
                        measured = _measure(guest, layers, rounds)
                        measured += merged_rows(
                            BED,
                            guest,
                            Manifest.load(manifest_path_of(images)),
                            {"kind": "pmem", "number": 1},
                            rounds,
                        )
        rows.append(row(BED, f"QEMU ({machine.accel}) started to first reply", "ms", replies))
        rows.append(row(BED, "guest uptime when the agent serves", "ms", uptimes))
        switches = [_switch_root(kernel.image, initramfs.path, directory) for _ in range(boots)]
        rows.append(row(BED, "guest uptime at switch_root to a verified root", "ms", switches))
        return [*rows, *measured, *_network(kernel)]
    finally:
        shutil.rmtree(directory)


def _pack(directory: Path) -> tuple[ManifestLayer, ...]:
    with Pack.create(directory / "pack.img") as pack:
        for number in range(LAYERS):
            tree = directory / f"tree{number}"
            tree.mkdir()
            (tree / f"file{number}").write_text(f"{number}\n" * 4000)
            image = directory / f"layer{number}"
            built = build_image(tree, image)
            formatted = format_image(
                image, terms=VerityTerms(salt=built.verity_salt), uuid=built.verity_uuid
            )
            pack.add(image, f"layer{number}", verity=formatted.parameters, position=number)
        return pack.layers


def _switch_root(kernel: Path, initrd: Path, directory: Path) -> float:
    """Boot into a verified root of one program; return the guest's uptime at the switch."""
    pack = directory / "root.img"
    if not pack.exists():
        _root_pack(directory / "root", pack)
    with Pack.open(pack) as opened:
        layer = opened.layers[0]
    assert layer.verity is not None
    words = [f"pmem:0,offset={layer.offset_bytes},size={layer.size_bytes}", "id=root"]
    words.append(f"root={layer.verity.root_digest.hex()}")
    cmdline = f"guestagent.layer={','.join(words)} guestagent.agent=stay"
    spec = MachineSpec(
        kernel=kernel, initrd=initrd, memory_mib=512, pmem=(PmemSpec(path=pack),), cmdline=cmdline
    )
    with (
        Machine(spec) as machine,
        machine.while_up() as up,
        GuestAgent(machine.agent_address(), connect_seconds=_BOOT_SECONDS, until=up) as guest,
    ):
        return _number(guest.hello.boot["switch_root_uptime_ms"])


def _root_pack(tree: Path, pack: Path) -> None:
    for name in ("proc", "sys", "dev", "run", "bin", "sbin"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    init = tree / "sbin/init"
    init.write_text("#!/bin/busybox sh\nexec /bin/busybox sleep 600\n")
    init.chmod(0o755)
    image = tree.with_suffix(".erofs")
    built = build_image(tree, image)
    formatted = format_image(
        image, terms=VerityTerms(salt=built.verity_salt), uuid=built.verity_uuid
    )
    with Pack.create(pack) as opened:
        opened.add(image, "root", verity=formatted.parameters)


def _measure(guest: GuestAgent, layers: tuple[ManifestLayer, ...], rounds: int) -> list[Row]:
    specs = [LayerSpec.from_wire(layer_spec(one, {"kind": "pmem", "number": 0})) for one in layers]
    rows = [row(BED, "round trip, no work", "ms", milliseconds(lambda: guest.cancel(0), 200))]
    rows += _single_mounts(guest, specs[0], rounds)
    rows.append(row(BED, "memory after a verity mount", "MiB", [guest.status().rss_bytes / 2**20]))
    rows += _batches(guest, specs)
    rows.append(row(BED, "memory at the end", "MiB", [guest.status().rss_bytes / 2**20]))
    return rows


def _network(kernel: Kernel) -> list[Row]:
    """Set up a network again and again: what the agent keeps of it, and what its child takes."""
    features = (*FEATURES, "net")
    initramfs = build_initramfs(InitramfsSpec(kernel=kernel, features=features))
    mac = "52:54:00:00:00:01"
    spec = MachineSpec(kernel=kernel.image, initrd=initramfs.path, networks=(NetworkSpec(mac=mac),))
    memory: list[float] = []
    times: list[float] = []
    with (
        Machine(spec) as machine,
        machine.while_up() as up,
        GuestAgent(machine.agent_address(), connect_seconds=_BOOT_SECONDS, until=up) as guest,
    ):
        before = guest.status().rss_bytes / 2**20
        for number in range(10):
            interface = Interface(
                match=InterfaceMatch(mac=mac), addresses=(f"10.0.0.{number + 1}/24",)
            )
            with timed(times):
                guest.net_configure(NetConfigure(interfaces=(interface,)))
            memory.append(guest.status().rss_bytes / 2**20)
    return [
        row(BED, "net.configure", "ms", times),
        row(BED, "memory before net.configure", "MiB", [before]),
        row(BED, "memory after net.configure", "MiB", memory),
        row("here", "memory of the child of net.configure, at most", "MiB", [_child_mib()]),
    ]


def _child_mib() -> float:
    """Return the most memory that what the child imports takes on this machine."""
    code = (
        f"import sys; sys.path += {sys.path!r}\n"
        "import guestagent.net.child, guestagent.net.configure\n"
        "print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(said.partition("VmHWM:")[2].split()[0]) / 1024


def _single_mounts(guest: GuestAgent, spec: LayerSpec, rounds: int) -> list[Row]:
    kinds = {
        "linear": spec.replace(verity=None),
        "linear + verity": spec,
    }
    rows = []
    for name, kind in kinds.items():
        mounts: list[float] = []
        unmounts: list[float] = []
        for _ in range(rounds):
            with timed(mounts):
                guest.layer_mount(kind)
            with timed(unmounts):
                guest.layer_unmount(kind.layer_id)
        rows.append(row(BED, f"{name}: mount", "ms", mounts))
        rows.append(row(BED, f"{name}: unmount, devices gone", "ms", unmounts))
    return rows


def _batches(guest: GuestAgent, specs: list[LayerSpec]) -> list[Row]:
    """64 layers one by one and at once, in the same run."""
    ids = tuple(spec.layer_id for spec in specs)
    single_up: list[float] = []
    single_down: list[float] = []
    batch_up: list[float] = []
    batch_down: list[float] = []
    overlay: list[float] = []
    for _ in range(_BATCH_ROUNDS):
        with timed(single_up):
            for spec in specs:
                guest.layer_mount(spec)
        with timed(overlay):
            guest.overlay_mount(OverlaySpec(overlay_id="all", layers=ids))
        guest.overlay_unmount("all")
        with timed(single_down):
            for layer_id in ids:
                guest.layer_unmount(layer_id)
        with timed(batch_up):
            guest.layers_mount(LayersMount(layers=tuple(specs)))
        with timed(batch_down):
            guest.layers_unmount(LayersUnmount(layers=ids))
    count = len(specs)
    each = f"{count} requests"
    what = f"{count} verity layers"
    return [
        row(BED, f"{what}, one by one: mount", "ms", single_up),
        row(BED, f"{what}, one batch: mount", "ms", batch_up, versus=each, floor=single_up),
        row(BED, f"overlay of {count}", "ms", overlay),
        row(BED, f"{what}, one by one: unmount", "ms", single_down),
        row(BED, f"{what}, one batch: unmount", "ms", batch_down, versus=each, floor=single_down),
    ]


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
