"""Virtual machines for tests: the boot image, layers in a pack, a machine with the agent in it."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from guestagent.api import LayersMount, LayerSpec, OverlaySpec, TmpfsScratch
from guestagent.host.client import GuestAgent
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel, cached_kernel
from rootfs.image.images import build_image
from rootfs.machine.qemu import DiskSpec, Machine, MachineSpec, PmemSpec
from rootfs.pack.manifest import ManifestLayer, layer_spec
from rootfs.pack.pack import Pack
from rootfs.verity.formatter import format_image
from scripts.uml_bed.kernels import kernel_cache
from vsock.deadline import Deadline

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache"
BOOT_SECONDS = 60.0
#: An emulated machine boots in 4 s when this one is idle, and in many times that when it is not.
TEST_SECONDS = 300

#: What the layers hold: layer id -> path -> content. The last one has no hash tree.
LAYERS = {
    "top": {"etc/motd": b"from the top\n", "top/only": b"t"},
    "base": {"etc/motd": b"from the base\n", "base/large": bytes(range(256)) * 4096},
    "plain": {"plain/file": b"no verity here\n"},
}


#: The machines of ``start_machine`` that run.
_running: list[Machine] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say with a test that failed what the machines have on their consoles."""
    report = yield
    if call.excinfo is not None and report.failed:
        report.sections += [("console of a machine", each.console.tail()) for each in _running]
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


class PackedLayers:
    """A pack image and what is in it: ``path``, and ``layers`` by id."""

    def __init__(self, path: Path, layers: tuple[ManifestLayer, ...]) -> None:
        self.path = path
        self.layers = {layer.layer_id: layer for layer in layers}


def mount_root(machine: Machine, pack: PackedLayers, *, connect_seconds: float) -> None:
    """Mount the layers top and base, and the overlay root of them, which can be written to."""
    device = {"kind": "pmem", "number": 0}
    specs = [LayerSpec.from_wire(layer_spec(pack.layers[name], device)) for name in ("top", "base")]
    overlay = OverlaySpec(
        overlay_id="root", layers=("top", "base"), scratch=TmpfsScratch(size_bytes=1 << 20)
    )
    with (
        machine.while_up() as up,
        GuestAgent(machine.agent_address(), connect_seconds=connect_seconds, until=up) as guest,
    ):
        guest.layers_mount(LayersMount(layers=tuple(specs), overlay=overlay))


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    return cached_kernel(kernel_cache())


@pytest.fixture(scope="session")
def initramfs(kernel: Kernel) -> Path:
    """The boot image with the agent and all default features."""
    return build_initramfs(InitramfsSpec(kernel=kernel), cache_dir=CACHE_DIR).path


@pytest.fixture(scope="session")
def layer_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """EROFS images of ``LAYERS``, without hash trees."""
    directory = tmp_path_factory.mktemp("layers")
    images = {}
    for layer_id, files in LAYERS.items():
        for name, content in files.items():
            path = directory / layer_id / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        images[layer_id] = directory / f"{layer_id}.erofs"
        build_image(directory / layer_id, images[layer_id])
    return images


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory, layer_images: dict[str, Path]) -> PackedLayers:
    """A pack of all layers, topmost first; all but ``plain`` with a hash tree."""
    directory = tmp_path_factory.mktemp("pack")
    with Pack.create(directory / "layers.img") as pack:
        for position, (layer_id, source) in enumerate(layer_images.items()):
            image = directory / source.name
            image.write_bytes(source.read_bytes())
            verity = None if layer_id == "plain" else format_image(image).parameters
            pack.add(image, layer_id, verity=verity, position=position)
        return PackedLayers(pack.path, pack.layers)


@pytest.fixture(scope="module")
def start_machine(kernel: Kernel, initramfs: Path) -> Iterator[Callable[..., Machine]]:
    """A factory: ``start_machine(pmem=..., disks=...)`` takes the fields of ``MachineSpec``.

    The machines end with the module.
    """
    with ExitStack() as stack:

        def start(**fields: object) -> Machine:
            spec = MachineSpec(**{"kernel": kernel.image, "initrd": initramfs, **fields})  # type: ignore[arg-type]
            machine = stack.enter_context(Machine(spec, cache_dir=CACHE_DIR))
            _running.append(machine)
            stack.callback(_running.remove, machine)
            return machine

        yield start


@pytest.fixture(scope="module")
def machine(
    start_machine: Callable[..., Machine], pack: PackedLayers, layer_images: dict[str, Path]
) -> Machine:
    """A machine with the agent, whose /dev/pmem0 is the pack.

    It also has the layer ``plain`` as virtio disk with serial ``plain`` and as SCSI LUN 1, a
    virtio-serial port ``guestagent``, and two free PCIe ports.
    """
    plain = layer_images["plain"]
    return start_machine(
        pmem=(PmemSpec(path=pack.path),),
        disks=(
            DiskSpec(path=plain, serial="plain"),
            DiskSpec(path=plain, serial="plain-scsi", bus="scsi", lun=1),
        ),
        pcie_root_ports=2,
        serial_ports=("guestagent",),
    )


@pytest.fixture
def agent(machine: Machine) -> Iterator[GuestAgent]:
    """A connection to the agent of ``machine``, made anew for each test."""
    with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as agent:
        yield agent


@pytest.fixture
def deadline() -> Iterator[Deadline]:
    """A generous deadline for one wait in a test."""
    with closing(Deadline(BOOT_SECONDS)) as deadline:
        yield deadline
