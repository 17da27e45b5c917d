"""Images and packs: built from sources of every kind, next to the programs that do parts of it.

mkfs.erofs makes the same file system of the same directory; it neither hashes what it reads nor
takes tars (1.5, of Debian 12). A pack is compared with copying the layer, its check with
``veritysetup verify`` of the layer.

The suite ``scale`` builds images of 1,000,000 entries from a tar that is made while it is read.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from rootfs.image.images import ImageResult, build_image
from rootfs.pack.pack import Pack
from scripts.benchmarks.contest import BED, Contender, contest
from scripts.benchmarks.rows import Row, row
from tests.beds.ctlbed import build_crowd

__all__ = ("images_rows", "scale_rows")

#: Many small files in many directories; those that this machine has.
SOURCES = (Path(sysconfig.get_path("stdlib")), Path("/usr/share/doc"), Path("/usr/share/zoneinfo"))
LAYER_BYTES = 256 << 20
CROWD_ENTRIES = 1_000_000


def images_rows() -> list[Row]:
    """Return the rows.

    Raises:
        RuntimeError: mkfs.erofs or veritysetup is not installed.
    """
    for program, package in (("mkfs.erofs", "erofs-utils"), ("veritysetup", "cryptsetup-bin")):
        if shutil.which(program) is None:
            raise RuntimeError(f"{program} is not installed (Debian: {package})")
    with tempfile.TemporaryDirectory(prefix="bench-images-", dir="/dev/shm") as name:
        directory = Path(name)
        return [*_build(directory), *_pack(directory)]


def scale_rows() -> list[Row]:
    """Return the rows of images with a hash tree of a million entries: seconds, and memory."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir="/dev/shm") as name:
        for filesystem in ("erofs", "ext4"):
            built = build_crowd(Path(name, "image"), CROWD_ENTRIES, filesystem)
            task = f"{filesystem} of {CROWD_ENTRIES} entries from a stream"
            rows.append(row(BED, task, "s", [built.seconds]))
            rows.append(row(BED, f"{task}, memory", "MiB", [built.peak_mib]))
    return rows


def _build(directory: Path) -> list[Row]:
    tree = directory / "tree"
    for number, source in enumerate(filter(Path.is_dir, SOURCES)):
        shutil.copytree(source, tree / str(number), symlinks=True, ignore_dangling_symlinks=True)
    sources = {"a directory": tree, **_archives(directory, tree)}
    output = directory / "image"
    inodes = build_image(tree, output).inode_count

    def mkfs() -> None:
        command = ["mkfs.erofs", "-T0", str(directory / "by-mkfs"), str(tree)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)

    contenders: dict[str, Contender] = {"mkfs.erofs": mkfs}
    contenders |= {f"from {name}": _builder(path, output) for name, path in sources.items()}
    task = f"erofs of {inodes} inodes"
    rows = contest(task, contenders, amount=inodes, unit="inodes", budget_seconds=20)
    shutil.rmtree(tree)
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return rows


def _builder(source: Path, output: Path) -> Contender:
    return lambda: build_image(source, output)


def _archives(directory: Path, tree: Path) -> dict[str, Path]:
    """Pack the tree as a tar, plain and compressed, and as the one layer of an OCI layout."""
    tar = directory / "tree.tar"
    subprocess.run(["tar", "--format=pax", "-cf", tar, "-C", tree, "."], check=True)
    packed = directory / "tree.tar.gz"
    with packed.open("wb") as file:
        subprocess.run(["gzip", "-1", "-c", tar], stdout=file, check=True)
    return {"a tar": tar, "a tar.gz": packed, "an OCI layout": _layout(directory / "oci", packed)}


def _layout(path: Path, layer: Path) -> Path:
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)
    media = "application/vnd.oci.image"

    def blob(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"{media}.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    data = layer.read_bytes()
    diff_id = "sha256:" + hashlib.sha256(gzip.decompress(data)).hexdigest()
    config = {"rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    manifest = {
        "schemaVersion": 2,
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": [blob(data, "layer.v1.tar+gzip")],
    }
    index = {"manifests": [blob(json.dumps(manifest).encode(), "manifest.v1+json")]}
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, **index}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return path


def _pack(directory: Path) -> list[Row]:
    source = directory / "noise"
    source.mkdir()
    with (source / "noise").open("wb") as file:
        for _ in range(LAYER_BYTES >> 20):
            file.write(os.urandom(1 << 20))
    layer = build_image(source, directory / "layer", verity=True)
    shutil.rmtree(source)
    size_mib = layer.size_bytes / (1 << 20)
    task = f"pack with a layer of {round(size_mib)} MiB"
    pack = directory / "pack"

    def add() -> None:
        for path in (pack, directory / "pack.json"):
            path.unlink(missing_ok=True)
        with Pack.create(pack) as made:
            made.add(layer.path, "layer", verity=layer.verity)

    def copy() -> None:
        subprocess.run(["cp", "--reflink=never", layer.path, directory / "copy"], check=True)
        (directory / "copy").unlink()

    rows = contest(f"{task}, add", {"cp": copy, "pack add": add}, amount=size_mib, unit="MiB")
    contenders: dict[str, Contender] = {
        "veritysetup verify": lambda: _verify(layer),
        "pack check": lambda: _check(pack),
    }
    return rows + contest(f"{task}, check", contenders, amount=size_mib, unit="MiB")


def _verify(layer: ImageResult) -> None:
    assert layer.verity is not None
    path = str(layer.path)
    command = ["veritysetup", "verify", path, path, layer.verity.root_digest.hex()]
    command.append(f"--hash-offset={layer.verity.hash_offset_bytes}")
    subprocess.run(command, check=True)


def _check(path: Path) -> None:
    with Pack.open(path) as pack:
        if not pack.check().is_sound:
            raise RuntimeError("the pack is damaged")
