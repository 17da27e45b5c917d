"""An image of many layers as one mount, beside one verity layer of it, in turn."""

import os
from pathlib import Path

from guestagent.api import LayerSpec
from guestagent.host.client import GuestAgent
from rootfs.image.images import build_image
from rootfs.pack.manifest import Manifest, image_spec, layer_spec
from rootfs.pack.pack import Pack
from scripts.benchmarks.rows import Row, row, timed

__all__ = ("merged_rows", "write_pack")

IMAGES = (64, 500)
FEATURE = "erofs-flattened"
ONE = "one verity layer"


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
