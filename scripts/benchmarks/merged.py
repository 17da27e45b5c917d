"""An image of many layers as one mount, beside one verity layer of it and beside an overlay of the
same layers, in turn. It needs a kernel that mounts such an image at once (Linux 6.4)."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from guestagent.api import LayersMount, LayerSpec, LayersUnmount, OverlaySpec
from guestagent.host.client import GuestAgent
from rootfs.image.images import build_image
from rootfs.pack.manifest import Manifest, image_spec, layer_spec
from rootfs.pack.pack import Pack, manifest_path_of
from scripts.benchmarks.rows import Row, print_rows, row, timed, write_rows
from tests.beds.agentbed import AgentProcess
from tests.beds.dmbed import loop_device

__all__ = ("merged_rows", "write_pack")

BED = "uml"

IMAGES = (64, 500)
FEATURE = "erofs-flattened"
ONE = "one verity layer"
#: The layers that are read; each has files in the same directories.
READ_LAYERS, READ_DIRECTORIES, READ_FILES = 64, 8, 4
READ_FILE_BYTES = 8192


def write_pack(directory: Path) -> Path:
    """Write a pack of small layers, and images of the first 64 and of all 500 of them."""
    pack_path = directory / "images.img"
    tree = directory / "tree"
    tree.mkdir()
    with Pack.create(pack_path) as pack:
        for number in range(max(IMAGES)):
            file = tree / f"file{number}"
            file.write_text(f"{number}\n" * 4000)
            image = directory / "layer"
            built = build_image(tree, image, verity=True)
            pack.add(image, f"layer{number}", verity=built.verity, position=number)
            file.unlink()
            image.unlink()
        for count in IMAGES:
            pack.merge(f"image{count}", [f"layer{number}" for number in range(count)])
    os.rmdir(tree)
    return pack_path


def merged_rows(
    bed: str, guest: GuestAgent, manifest: Manifest, device: dict[str, object], rounds: int
) -> list[Row]:
    """Return rows for an image of each size; none where the kernel has no such mount."""
    if FEATURE not in guest.hello.features:
        return []
    specs = {ONE: LayerSpec.from_wire(layer_spec(manifest.layers[0], device))}
    for image in manifest.images:
        name = f"image of {len(image.layers)} verity layers, one mount"
        specs[name] = LayerSpec.from_wire(image_spec(image, device))
    mounts: dict[str, list[float]] = {name: [] for name in specs}
    unmounts: dict[str, list[float]] = {name: [] for name in specs}
    for _ in range(rounds):
        for name, spec in specs.items():
            with timed(mounts[name]):
                guest.layer_mount(spec)
            with timed(unmounts[name]):
                guest.layer_unmount(spec.layer_id)
    rows = []
    for what, samples in (("mount", mounts), ("unmount", unmounts)):
        floor = samples.pop(ONE)
        rows.append(row(bed, f"{ONE}: {what}", "ms", floor))
        for name, times in samples.items():
            rows.append(row(bed, f"{name}: {what}", "ms", times, versus=ONE, floor=floor))
    return rows


def reading_rows(guest: GuestAgent, directory: Path, rounds: int) -> Iterator[Row]:
    """Look at every file, and read every file, with all caches dropped: of one mount of an image,
    and of an overlay of its layers."""
    pack_path = _write_read_pack(directory)
    manifest = Manifest.load(manifest_path_of(pack_path))
    with loop_device(pack_path) as node:
        device: dict[str, object] = {"kind": "path", "path": node}
        layers = [LayerSpec.from_wire(layer_spec(each, device)) for each in manifest.layers]
        image = LayerSpec.from_wire(image_spec(manifest.images[0], device))
        names = tuple(layer.layer_id for layer in layers)
        overlay = OverlaySpec(overlay_id="all", layers=names)
        guest.layers_mount(LayersMount(layers=tuple(layers), overlay=overlay))
        guest.layer_mount(image)
        roots = {"overlay": overlay.mount_point, "image": image.mount_point}
        files = {name: _files(root) for name, root in roots.items()}
        assert len(files["image"]) == READ_LAYERS * READ_DIRECTORIES * READ_FILES
        assert [path.removeprefix(roots["image"]) for path in files["image"]] == [
            path.removeprefix(roots["overlay"]) for path in files["overlay"]
        ]
        for what, look in (("find", lambda name: _files(roots[name])), ("read", _reader(files))):
            samples: dict[str, list[float]] = {"overlay": [], "image": []}
            for _ in range(rounds):
                for name, spent in samples.items():
                    Path("/proc/sys/vm/drop_caches").write_text("3")
                    with timed(spent):
                        look(name)
            floor = samples["overlay"]
            versus = f"overlay of {READ_LAYERS}: {what}"
            yield row(BED, versus, "ms", floor)
            line = f"image of {READ_LAYERS}: {what}"
            yield row(BED, line, "ms", samples["image"], versus=versus, floor=floor)
        guest.layer_unmount(image.layer_id)
        guest.layers_unmount(LayersUnmount(layers=names, overlay="all"))


def _write_read_pack(directory: Path) -> Path:
    pack_path, tree, built_path = directory / "read.img", directory / "read", directory / "built"
    with Pack.create(pack_path) as pack:
        names = [f"read{number}" for number in range(READ_LAYERS)]
        for position, name in enumerate(names):
            files = [
                tree / f"directory{number}" / f"{name}-{count}"
                for number in range(READ_DIRECTORIES)
                for count in range(READ_FILES)
            ]
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(os.urandom(READ_FILE_BYTES))
            built = build_image(tree, built_path, verity=True)
            pack.add(built_path, name, verity=built.verity, position=position)
            for file in (*files, built_path):
                file.unlink()
        pack.merge("read", names)
    return pack_path


def _files(root: str) -> list[str]:
    """Return the files below a directory, each of which is looked at, as find(1) does."""
    found: list[str] = []
    directories = [root]
    while directories:
        with os.scandir(directories.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                (directories if entry.is_dir(follow_symlinks=False) else found).append(entry.path)
    return sorted(found)


def _reader(files: dict[str, list[str]]) -> Callable[[str], object]:
    def read(name: str) -> None:
        for path in files[name]:
            with open(path, "rb", buffering=0) as file:
                file.readall()

    return read


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmarks.merged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        AgentProcess("log=error") as agent,
        agent.client(deadline_ms=120_000) as guest,
    ):
        if FEATURE not in guest.hello.features:
            parser.error(f"this kernel does not mount an image of layers at once ({FEATURE})")
        rows = list(reading_rows(guest, Path(name), arguments.rounds))
        image = write_pack(Path(name))
        with loop_device(image) as node:
            device: dict[str, object] = {"kind": "path", "path": node}
            manifest = Manifest.load(manifest_path_of(image))
            rows += merged_rows(BED, guest, manifest, device, arguments.rounds)
    print_rows(rows)
    if arguments.json:
        write_rows(rows, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
