"""Merged images: what the merged metadata shows is what an overlay of the layers shows."""

import functools
import os
import re
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rootfs.image.directory import DirectorySource
from rootfs.image.erofs import PART_BYTES
from rootfs.image.erofs_format import (
    BLOCK_BYTES,
    SUPERBLOCK_OFFSET_BYTES,
    Superblock,
    superblock_checksum,
)
from rootfs.image.erofs_merge import LayerFile, merge_layers
from rootfs.image.erofs_reader import ErofsReader
from rootfs.image.tree import Node, link_counts
from tests.beds.calls import call_error, run
from tests.beds.mergebed import (
    EPOCH_NS,
    DrawnContent,
    Facts,
    layers,
    model,
    opened,
    read_facts,
    write_images,
    write_layer,
    write_unified,
)
from tests.beds.treebed import assert_same, node_facts
from vsock.deadline import Deadline
from vsock.errors import CallError

EXAMPLES = int(os.environ.get("MERGE_EXAMPLES", "100"))

#: What an option of mkfs.erofs has to be named as in its help, where not every version has it.
MKFS_OPTIONS = {
    "default": ([], ""),
    "extended": (["-Eforce-inode-extended"], ""),
    "compact": (["-Eforce-inode-compact", "-T1"], ""),
    "no tails": (["-Enoinline_data"], ""),
    "all attributes shared": (["-x1"], ""),
    "no attributes": (["-x-1"], ""),
    "chunks": (["--chunksize=4096"], "--chunksize"),
    "large chunks": (["--chunksize=65536"], "--chunksize"),
    "chunk indexes": (["--chunksize=4096", "-Eforce-chunk-indexes"], "--chunksize"),
    "long prefixes": (["--xattr-prefix=user.lo", "--xattr-prefix=user.s", "-x1"], "--xattr-prefix"),
    "aligned data": (["--dsunit=16"], "--dsunit"),
    "a label": (["-L", "label"], "volume-label"),
}


@functools.cache
def mkfs_help() -> str:
    done = subprocess.run(["mkfs.erofs", "--help"], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def mkfs(directory: Path, image: Path, *options: str) -> LayerFile:
    run("mkfs.erofs", "--quiet", *options, image, directory)
    size_bytes = -(-image.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES
    os.truncate(image, size_bytes)
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    return LayerFile(name=image.name, fd=fd, size_bytes=size_bytes)


@pytest.fixture
def files() -> Iterator[ExitStack]:
    """Closes the descriptors of layers."""
    with ExitStack() as stack:
        yield stack


def kept(files: ExitStack, layer: LayerFile) -> LayerFile:
    files.callback(os.close, layer.fd)
    return layer


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A directory with every size at which a layout changes."""
    top = tmp_path / "sample"
    (top / "many").mkdir(parents=True)
    for size in (0, 1, 4031, 4032, 4033, 4063, 4064, 4065, 4095, 4096, 4097, 12345, 300_000):
        (top / f"size{size}").write_bytes(os.urandom(size))
    for number in range(300):
        (top / "many" / f"file{number:04}").write_text(str(number))
        os.setxattr(top / "many" / f"file{number:04}", "user.long.name", b"the same value")
    for name in ("!first", "-", "...", "~", "n" * 254, "é"):
        (top / "many" / name).write_text(name)
    os.setxattr(top / "size1", "user.large", os.urandom(3000))
    os.setxattr(top / "size1", "user.short", b"")
    (top / "link").symlink_to("t" * 4000)
    os.link(top / "size1", top / "many/hard")
    os.mkfifo(top / "fifo")
    with (top / "sparse").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(500_000)
        file.write(b"in the middle")
    for parent, directories, names in os.walk(top, topdown=False):
        for name in (*directories, *names, "."):
            # mkfs.erofs 1.9 drops the nanoseconds of times in the second in which it runs
            path = os.path.join(parent, name)
            os.utime(path, ns=(0, EPOCH_NS + len(path)), follow_symlinks=False)
    return top


# --- reading


@pytest.mark.parametrize("name", MKFS_OPTIONS)
def test_the_reader_finds_what_mkfs_erofs_wrote(
    tmp_path: Path, sample: Path, files: ExitStack, name: str
) -> None:
    options, needed = MKFS_OPTIONS[name]
    if needed not in mkfs_help():
        pytest.skip(f"this mkfs.erofs has no {needed}")
    layer = kept(files, mkfs(sample, tmp_path / "image", *options))
    tree = ErofsReader(layer).tree(1000)
    with DirectorySource(sample) as source:
        expected = source.read_tree()
        facts, wanted = node_facts(tree), node_facts(expected)
    if name in ("compact", "no attributes"):  # without the times, without the attributes
        at = 3 if name == "compact" else 6
        facts, wanted = (
            {path: (*each[:at], *each[at + 1 :]) for path, each in both.items()}  # type: ignore[index]
            for both in (facts, wanted)
        )
    assert facts == wanted
    counts = link_counts(expected)
    assert tree.children[b"size1"].links == 2  # type: ignore[attr-defined]
    assert tree.children[b"size1"] is tree.children[b"many"].children[b"hard"]
    assert tree.links == counts[id(expected)]


def test_an_image_in_the_middle_of_a_file(tmp_path: Path, sample: Path, files: ExitStack) -> None:
    alone = kept(files, mkfs(sample, tmp_path / "image", "-T1"))
    (tmp_path / "pack").write_bytes(
        os.urandom(8192) + (tmp_path / "image").read_bytes() + os.urandom(4096)
    )
    fd = os.open(tmp_path / "pack", os.O_RDONLY | os.O_CLOEXEC)
    packed = kept(
        files,
        LayerFile(name="image", fd=fd, size_bytes=alone.size_bytes, offset_bytes=8192),
    )
    assert read_facts(packed) == read_facts(alone)
    merge_layers([alone], tmp_path / "a")
    merge_layers([packed], tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class _CheckedLayer(LayerFile):
    """A layer whose bytes come from ``read`` alone; its descriptor has none."""

    content: bytes

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        return self.content[offset_bytes : offset_bytes + size_bytes]


def test_every_byte_of_a_layer_is_read_by_its_read(
    tmp_path: Path, small: LayerFile, files: ExitStack
) -> None:
    """So that a caller can check what is read, say with the hash tree of the layer."""
    image = whole(small)
    empty = kept(files, in_memory(bytes(BLOCK_BYTES)))
    checked = _CheckedLayer(
        name=small.name, fd=empty.fd, size_bytes=small.size_bytes, content=image
    )
    merge_layers([checked], tmp_path / "a")
    merge_layers([small], tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def refused(code: str, layer: LayerFile, output: Path, **options: object) -> str:
    with call_error(code) as caught:
        merge_layers([layer], output, **options)  # type: ignore[arg-type]
    assert repr(layer.name) in caught.value.message
    assert not output.exists()
    return caught.value.message


def patched(image: bytes | bytearray, **fields: int) -> LayerFile:
    """Return an image of other bytes, with some fields of the superblock and the checksum set."""
    data = bytearray(image)
    end = SUPERBLOCK_OFFSET_BYTES + len(Superblock().pack())
    superblock = Superblock.unpack(bytes(data[SUPERBLOCK_OFFSET_BYTES:end]))._replace(**fields)  # type: ignore[arg-type]
    checksum = superblock_checksum(superblock, bytes(data[:BLOCK_BYTES]))
    data[SUPERBLOCK_OFFSET_BYTES:end] = superblock._replace(checksum=checksum).pack()
    return in_memory(bytes(data))


def whole(layer: LayerFile) -> bytes:
    return layer.read(0, layer.size_bytes)


def in_memory(data: bytes, name: str = "hostile") -> LayerFile:
    fd = os.memfd_create(name)
    os.pwrite(fd, data, 0)
    return LayerFile(name=name, fd=fd, size_bytes=len(data))


def small_tree() -> Node:
    root = Node(stat.S_IFDIR | 0o755, mtime_ns=EPOCH_NS)
    root.children[b"directory"] = below = Node(stat.S_IFDIR | 0o755, xattrs={b"user.x": b"1"})
    for name, content in (
        (b"file", DrawnContent(9000, ((0, 9000, 0),))),
        (b"tail", DrawnContent(100, ((0, 100, 0),))),
        (b"sparse", DrawnContent(50_000, ((20_000, 20_000, 0),))),
    ):
        below.children[name] = Node(stat.S_IFREG | 0o644, content=content)
    below.children[b"link"] = Node(stat.S_IFLNK | 0o777, target=b"file")
    root.children[b"device"] = Node(stat.S_IFBLK | 0o600, rdev=os.makedev(8, 1))
    root.children[b"empty"] = Node(stat.S_IFREG | 0o644, xattrs={b"trusted.y": b"2" * 100})
    return root


@pytest.fixture(scope="module")
def small() -> LayerFile:
    return write_layer(small_tree(), "small")


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"magic": 0xEF53}, "integrity", "no EROFS superblock"),
        ({"block_bits": 9}, "unsupported", "2^9 bytes"),
        ({"block_bits": 255}, "unsupported", "2^255 bytes"),
        ({"feature_incompat": 0x80}, "unsupported", "0x80"),
        ({"feature_incompat": 0x104}, "unsupported", "0x104"),
        ({"extra_devices": 1}, "unsupported", "the device 1"),
        ({"extra_devices": 65535}, "integrity", "after the end"),
        ({"directory_block_bits": 1}, "unsupported", "directories"),
        ({"blocks": 1 << 31}, "integrity", "is cut"),
        ({"build_time_nsec": 10**9}, "integrity", "time"),
        ({"root_nid": 65535}, "integrity", "inode 65535"),
        ({"meta_block": 0xFFFFFFFF}, "integrity", "after the end"),
        ({"prefix_count": 1, "prefix_start": 0xFFFFFFFF}, "integrity", "after the end"),
        ({"prefix_count": 255, "prefix_start": 1024 // 4}, "integrity", "prefix"),
    ],
)
def test_superblocks_that_are_refused(
    tmp_path: Path,
    small: LayerFile,
    files: ExitStack,
    fields: dict[str, int],
    code: str,
    said: str,
) -> None:
    layer = kept(files, patched(whole(small), **fields))
    assert said in refused(code, layer, tmp_path / "merged")


def test_cut_changed_or_empty_image_is_refused(
    tmp_path: Path, small: LayerFile, files: ExitStack
) -> None:
    data = bytearray(whole(small))
    cut = kept(files, in_memory(bytes(data[:-BLOCK_BYTES])))
    assert "is cut" in refused("integrity", cut, tmp_path / "merged")
    data[SUPERBLOCK_OFFSET_BYTES + 50] ^= 1  # of the UUID
    flipped = kept(files, in_memory(bytes(data)))
    assert "checksum" in refused("integrity", flipped, tmp_path / "merged")
    shrunk = kept(files, in_memory(bytes(small.size_bytes)))
    os.ftruncate(shrunk.fd, 100)
    assert "shorter" in refused("conflict", shrunk, tmp_path / "merged")
    for size_bytes, offset_bytes in ((0, 0), (4095, 0), (4096, -1)):
        with call_error("invalid"):
            LayerFile(name="x", fd=small.fd, size_bytes=size_bytes, offset_bytes=offset_bytes)
    with call_error("invalid"):
        merge_layers([], tmp_path / "merged")


def test_compressed_layers_are_refused_by_name(
    tmp_path: Path, sample: Path, files: ExitStack
) -> None:
    (sample / "many/compressible").write_bytes(b"x" * 100_000)
    layer = kept(files, mkfs(sample, tmp_path / "image", "-zlz4"))
    said = refused("unsupported", layer, tmp_path / "merged")
    assert re.search(r"inode \d+ \('[^']+'\): it is compressed", said)


def test_a_layer_with_data_in_another_file_is_refused(
    tmp_path: Path, sample: Path, files: ExitStack
) -> None:
    options = ["--chunksize=4096", f"--blobdev={tmp_path / 'blob'}"]
    (tmp_path / "blob").touch()
    layer = kept(files, mkfs(sample, tmp_path / "image", *options))
    assert "another file" in refused("unsupported", layer, tmp_path / "merged")


def test_directories_in_a_circle_or_twice_are_refused(tmp_path: Path, files: ExitStack) -> None:
    root = Node(stat.S_IFDIR | 0o755)
    for name in (b"one", b"two"):
        root.children[name] = Node(stat.S_IFDIR | 0o755)
        root.children[name].children[b"below"] = Node(stat.S_IFDIR | 0o755)
    layer = kept(files, write_layer(root, "layer"))
    tree = ErofsReader(layer).tree(100)
    nids = {name: tree.children[name].nid for name in (b"one", b"two")}  # type: ignore[attr-defined]
    data = whole(layer)
    below = tree.children[b"one"].children[b"below"].nid  # type: ignore[attr-defined]
    for target in (tree.nid, nids[b"one"], nids[b"two"]):
        changed = data.replace(struct.pack("<Q", below), struct.pack("<Q", target))
        assert changed != data
        said = refused("integrity", kept(files, patched(changed)), tmp_path / "merged")
        assert "two names" in said


def test_directories_that_overlap_end_at_the_size_of_the_image(
    tmp_path: Path, files: ExitStack
) -> None:
    """Each of 300 directories claims the blocks of the largest one."""
    root = Node(stat.S_IFDIR | 0o755)
    for number in range(300):
        root.children[b"%04d" % number] = Node(stat.S_IFDIR | 0o755)
    root.children[b"large"] = large = Node(stat.S_IFDIR | 0o755)
    for number in range(2000):
        large.children[(b"%d" % number).ljust(255, b"x")] = Node(stat.S_IFREG | 0o644)
    layer = kept(files, write_layer(root, "layer"))
    data = bytearray(whole(layer))
    tree = ErofsReader(layer).tree(3000)
    source = tree.children[b"large"].nid * 32  # type: ignore[attr-defined]
    for number in range(300):
        at = tree.children[b"%04d" % number].nid * 32  # type: ignore[attr-defined]
        data[at : at + 32] = data[source : source + 32]
    said = refused("integrity", kept(files, patched(data)), tmp_path / "merged")
    assert "overlaps" in said


def test_names_have_a_limit(tmp_path: Path, small: LayerFile) -> None:
    merge_layers([small], tmp_path / "merged", max_names=7)
    (tmp_path / "merged").unlink()
    assert "more than 6 names" in refused("resource", small, tmp_path / "merged", max_names=6)
    with call_error("resource"):
        merge_layers([small, small], tmp_path / "merged", max_names=13)


def test_a_cancelled_merge_leaves_nothing(tmp_path: Path, small: LayerFile) -> None:
    cancel = Deadline(60)
    cancel.cancel()
    with call_error("cancelled"):
        merge_layers([small], tmp_path / "merged", cancel=cancel)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module", params=["ours", "of mkfs.erofs"])
def sound_image(
    request: pytest.FixtureRequest, small: LayerFile, tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    if request.param == "ours":
        return whole(small)
    directory = tmp_path_factory.mktemp("sound")
    (directory / "top/below").mkdir(parents=True)
    for number, size in enumerate((0, 10, 5000, 20_000)):
        (directory / f"top/below/{number}").write_bytes(os.urandom(size))
        os.setxattr(directory / f"top/below/{number}", "user.same", b"value")
    (directory / "top/link").symlink_to("below")
    options = ["--chunksize=4096", "-Eforce-chunk-indexes", "-x1"]
    layer = mkfs(directory / "top", directory / "image", *options)
    os.close(layer.fd)
    return (directory / "image").read_bytes()


@given(st.data())
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
def test_hostile_images_end_as_errors_that_name_them(
    tmp_path: Path, small: LayerFile, sound_image: bytes, data: st.DataObject
) -> None:
    """Whatever bytes of the metadata are others: an error, or an image whose blocks are within."""
    image = bytearray(sound_image)
    last = min(len(image), 3 * BLOCK_BYTES) - 1
    places = st.integers(SUPERBLOCK_OFFSET_BYTES, last)
    values = st.sampled_from([0, 1, 2, 4, 8, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)
    for at, value in data.draw(st.lists(st.tuples(places, values), min_size=1, max_size=6)):
        image[at] = value
    with ExitStack() as stack:
        layer = kept(stack, patched(image))
        found = None
        try:
            merged = merge_layers([layer, small], tmp_path / "merged")
        except CallError as problem:
            found = (problem.step, problem.object)
        else:
            unified = write_unified(merged, [layer, small], tmp_path / "unified")
            ErofsReader(kept(stack, unified)).tree(1000)
        assert found is None or found[0] == "lay out the image" or found[1] == "hostile"


# --- merging


def merged_facts(
    trees: list[Node], directory: Path, *, userxattr: bool = False, inline_tails: bool = True
) -> Facts:
    with ExitStack() as stack:
        images = [
            kept(stack, write_layer(tree, f"layer{number}", inline_tails=inline_tails))
            for number, tree in enumerate(trees)
        ]
        merged = merge_layers(images, directory / "merged", userxattr=userxattr)
        return read_facts(kept(stack, write_unified(merged, images, directory / "unified")))


@given(layers(), st.booleans(), st.booleans())
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_merged_image_shows_what_the_model_of_an_overlay_shows(
    tmp_path: Path, trees: list[Node], userxattr: bool, inline_tails: bool
) -> None:
    found = merged_facts(trees, tmp_path, userxattr=userxattr, inline_tails=inline_tails)
    assert_same(found, model(trees, userxattr=userxattr))


def test_the_same_layers_give_the_same_bytes(tmp_path: Path, small: LayerFile) -> None:
    other = Node(stat.S_IFDIR | 0o700)
    other.children[b"other"] = Node(stat.S_IFREG | 0o644)
    with ExitStack() as stack:
        upper = kept(stack, write_layer(other, "upper"))
        results = {}
        for name, images in (("a", [upper, small]), ("b", [upper, small]), ("c", [small, upper])):
            uuid = merge_layers(images, tmp_path / name).uuid
            results[name] = (uuid, (tmp_path / name).read_bytes())
    assert results["a"] == results["b"]
    assert results["a"][0] != results["c"][0]


def fsck(merged: Path, images: list[Path]) -> None:
    devices = [f"--device={image}" for image in images]
    done = subprocess.run(["fsck.erofs", *devices, merged], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<E>" not in done.stderr


@given(layers())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fsck_erofs_finds_nothing_wrong(tmp_path: Path, trees: list[Node]) -> None:
    paths = write_images(trees, tmp_path)
    with opened(paths) as images:
        merge_layers(images, tmp_path / "merged")
    fsck(tmp_path / "merged", paths)


def test_the_parts_are_where_the_table_of_devices_says(tmp_path: Path, files: ExitStack) -> None:
    """Topmost first, each at a multiple of 512 KiB, after the metadata."""
    trees = []
    for count in (1, 6, 5):
        tree = Node(stat.S_IFDIR | 0o755)
        for number in range(count):
            content = DrawnContent(100_000, ((0, 100_000, number),))
            tree.children[b"%d" % number] = Node(stat.S_IFREG | 0o644, content=content)
        trees.append(tree)
    images = [kept(files, write_layer(tree, f"layer{n}")) for n, tree in enumerate(trees)]
    merged = merge_layers(images, tmp_path / "merged")
    at = 0
    for part in merged.parts:
        assert part.start_bytes == at
        assert at % PART_BYTES == part.padded_bytes % PART_BYTES == 0
        at += part.padded_bytes
    assert merged.unified_bytes == at
    assert [part.name for part in merged.parts] == ["metadata", "layer0", "layer1", "layer2"]
    assert [part.padded_bytes // PART_BYTES for part in merged.parts] == [1, 1, 2, 1]
    head = (tmp_path / "merged").read_bytes()
    assert len(head) == PART_BYTES
    superblock = Superblock.unpack(head[1024:1152])
    assert superblock.uuid == merged.uuid.bytes
    assert superblock.blocks * BLOCK_BYTES == merged.parts[0].size_bytes
    assert (superblock.extra_devices, superblock.feature_incompat) == (3, 8)
    for number, part in enumerate(merged.parts[1:]):
        slot = head[superblock.device_table_slot * 128 + number * 128 :][:128]
        blocks, first_block = struct.unpack_from("<II", slot, 64)
        assert (blocks * BLOCK_BYTES, first_block * BLOCK_BYTES) == (
            part.size_bytes,
            part.start_bytes,
        )


def test_a_tail_without_room_beside_its_inode_gets_a_block(tmp_path: Path) -> None:
    """A compact inode of a layer becomes an extended one, where most files have another time."""
    size = 2 * BLOCK_BYTES + 4064
    lower = Node(stat.S_IFDIR | 0o755, mtime_ns=EPOCH_NS)
    for name, whole in ((b"large", size), (b"small", 4064)):
        content = DrawnContent(whole, ((0, whole, 0),))
        lower.children[name] = Node(stat.S_IFREG | 0o644, mtime_ns=EPOCH_NS, content=content)
    upper = Node(stat.S_IFDIR | 0o755)
    for number in range(9):
        upper.children[b"%d" % number] = Node(stat.S_IFREG | 0o644)
    assert_same(merged_facts([upper, lower], tmp_path), model([upper, lower]))
    superblock = Superblock.unpack((tmp_path / "merged").read_bytes()[1024:1152])
    assert superblock.feature_incompat & 4  # chunks


def test_a_file_of_a_tebibyte(tmp_path: Path) -> None:
    root = Node(stat.S_IFDIR | 0o755)
    size = 1 << 40
    content = DrawnContent(size, ((size // 2, 5000, 0), (size - 3, 3, 5000)))
    root.children[b"large"] = Node(stat.S_IFREG | 0o644, content=content)
    with ExitStack() as stack:
        layer = kept(stack, write_layer(root, "layer"))
        merged = merge_layers([layer], tmp_path / "merged")
        unified = kept(stack, write_unified(merged, [layer], tmp_path / "unified"))
        found = ErofsReader(unified).tree(10).children[b"large"].content
        assert found.size_bytes == size
        with content.open() as drawn:
            for offset, length, place in content.extents:
                starts = [
                    source + offset - at
                    for at, count, source in found.extents
                    if at <= offset and offset + length <= at + count
                ]
                assert os.pread(unified.fd, length, starts[0]) == os.pread(drawn, length, place)


@pytest.mark.parametrize("attribute", [b"redirect", b"metacopy"])
def test_attribute_that_refers_to_another_layer_is_refused(
    tmp_path: Path, files: ExitStack, attribute: bytes
) -> None:
    kind = stat.S_IFDIR if attribute == b"redirect" else stat.S_IFREG
    for own, userxattr in ((b"trusted.overlay.", False), (b"user.overlay.", True)):
        root = Node(stat.S_IFDIR | 0o755)
        root.children[b"moved"] = Node(kind | 0o755, xattrs={own + attribute: b"/elsewhere"})
        layer = kept(files, write_layer(root, "upper"))
        said = refused("unsupported", layer, tmp_path / "merged", userxattr=userxattr)
        assert attribute.decode() in said
        merge_layers([layer], tmp_path / "merged", userxattr=not userxattr)
        (tmp_path / "merged").unlink()


def test_escaped_attributes_of_overlays_stay(tmp_path: Path) -> None:
    root = Node(stat.S_IFDIR | 0o755)
    names = [b"trusted.overlay.overlay.opaque", b"trusted.overlay.opaque", b"user.overlay.opaque"]
    root.children[b"nested"] = Node(stat.S_IFDIR | 0o755, xattrs=dict.fromkeys(names, b"y"))
    found = merged_facts([root], tmp_path)["nested"]["xattrs"]
    assert set(found) == {"trusted.overlay.overlay.opaque", "user.overlay.opaque"}  # type: ignore[call-overload]


def test_blocks_have_32_bit_addresses(tmp_path: Path, small: LayerFile, files: ExitStack) -> None:
    large = kept(files, in_memory(whole(small)))
    size_bytes = 6 << 40
    os.ftruncate(large.fd, size_bytes)
    layer = LayerFile(name="large", fd=large.fd, size_bytes=size_bytes)
    merged = merge_layers([layer, layer], tmp_path / "merged")
    assert merged.unified_bytes == PART_BYTES + 2 * size_bytes
    with call_error("unsupported", match="blocks"):
        merge_layers([layer] * 3, tmp_path / "merged")


def test_a_table_of_many_devices(tmp_path: Path, small: LayerFile) -> None:
    merged = merge_layers([small] * 500, tmp_path / "merged")
    unified = write_unified(merged, [small] * 500, tmp_path / "unified")
    try:
        assert set(read_facts(unified)) == set(read_facts(small))
    finally:
        os.close(unified.fd)
    with call_error("unsupported"):
        merge_layers([small] * 16_001, tmp_path / "merged")
