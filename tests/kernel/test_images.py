"""Images against the kernel's own readers: every kind of inode, and whiteouts in a real overlay."""

import contextlib
import errno
import gzip
import itertools
import os
import socket
import stat
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from rootfs.image.ext4 import Ext4Image
from rootfs.image.ext4_directory import name_hash
from rootfs.image.images import build_image, build_layers
from rootfs.image.tartree import Whiteouts
from rootfs.image.tree import FdContent, Node
from rootfs.pack.pack import Pack
from tests.beds import dmbed
from tests.beds.calls import call_error
from tests.beds.imagebed import Layout, Member, directory, make_tar
from tests.beds.treebed import (
    assert_same,
    ext4_directory,
    file_facts,
    make_everything,
    mounted,
)

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", autouse=True)
def _own_mounts() -> None:
    dmbed.isolate_mounts()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    dmbed.isolate_mounts()
    with ext4_directory(tmp_path_factory.mktemp("everything")) as directory:
        yield make_everything(directory / "top")


@pytest.mark.parametrize("inline_tails", [True, False])
def test_every_kind_of_inode_in_erofs(
    tmp_path: Path, everything: Path, inline_tails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(everything / "socket"))
    monkeypatch.chdir(tmp_path)
    build_image(everything, tmp_path / "image", inline_tails=inline_tails)
    with mounted(tmp_path / "image", "erofs", tmp_path / "mnt") as target:
        assert_same(file_facts(target), file_facts(everything))
    (everything / "socket").unlink()


def test_every_kind_of_inode_in_ext4(tmp_path: Path, everything: Path) -> None:
    build_image(everything, tmp_path / "image", filesystem="ext4")
    with mounted(tmp_path / "image", "ext4", tmp_path / "mnt") as target:
        assert_same(file_facts(target), file_facts(everything))


#: Two names of one hash in a file system of this UUID.
COLLISION_UUID = uuid.UUID(int=5)
COLLIDING = (b"c046645", b"c111726")


def names_that_collide_across_blocks() -> list[bytes]:
    """Names whose order by hash puts the first of two equal hashes at the very end of a block."""
    seed = struct.unpack("<4I", COLLISION_UUID.bytes)
    lengths = [255] * 15 + [100]
    before = (b"%d" % number for number in itertools.count())
    names = []
    for length in lengths:
        padded = (name.ljust(length, b"x") for name in before)
        names.append(next(name for name in padded if name_hash(name, seed) < 0xEC75B48E))
    assert [name_hash(name, seed) for name in COLLIDING] == [0xEC75B48E] * 2
    assert sum(8 + -(-len(name) // 4) * 4 for name in (*names, COLLIDING[0])) == 4096 - 12
    return [*names, *COLLIDING]


def test_kernel_reads_directory_index_extent_tree_and_acls_of_ext4(tmp_path: Path) -> None:
    """The index of a directory is looked up by hash, the extent tree by block, an ACL by id."""

    def directory_of(names: Iterable[bytes]) -> Node:
        node = Node(stat.S_IFDIR | 0o755)
        node.children.update((name, Node(stat.S_IFREG | 0o644)) for name in names)
        return node

    directories = {
        # more than a group of full size has inodes
        b"one level": [b"%d" % number for number in range(33_000)],
        b"two levels": [(b"%d" % number).ljust(255, b"x") for number in range(9000)],
        b"collision": names_that_collide_across_blocks(),
    }
    root = Node(stat.S_IFDIR | 0o1777)
    root.children.update((name, directory_of(names)) for name, names in directories.items())
    piece, step, count = 5000, 16384, 1361
    data = os.urandom(piece * count)
    (tmp_path / "data").write_bytes(data)
    extents = tuple((4196 + step * n, piece, piece * n) for n in range(count))
    size = step * (count + 1)
    expected = bytearray(size)
    for offset, length, at in extents:
        expected[offset : offset + length] = data[at : at + length]
    no_id = 0xFFFFFFFF
    entries = (
        (1, 7, no_id),
        (2, 5, 70_000),
        (4, 5, no_id),
        (8, 6, 12),
        (16, 7, no_id),
        (32, 4, no_id),
    )
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    attributes = {b"system.posix_acl_access": acl, b"user.large": os.urandom(3000)}
    with (tmp_path / "data").open("rb") as source:
        root.children[b"holes"] = Node(
            stat.S_IFREG | 0o674,
            content=FdContent(source.fileno(), size, extents),
            xattrs=attributes,
        )
        with (tmp_path / "image").open("w+b") as output:
            Ext4Image(root, COLLISION_UUID).write(output.fileno())
    (tmp_path / "mnt").mkdir()
    dmbed.run("mount", "-t", "ext4", "-o", "loop", tmp_path / "image", tmp_path / "mnt")
    try:
        top = os.fsencode(tmp_path / "mnt")
        assert os.statvfs(top).f_flag & os.ST_RDONLY
        for name, names in directories.items():
            place = os.path.join(top, name)
            assert sorted(os.listdir(place)) == sorted(names)
            looked_up = {*names[::50], *names[-2:]}
            inodes = {os.stat(os.path.join(place, each)).st_ino for each in looked_up}
            assert len(inodes) == len(looked_up)
            assert not os.path.exists(os.path.join(place, b"absent"))
        holes = os.path.join(top, b"holes")
        assert Path(os.fsdecode(holes)).read_bytes() == expected
        assert os.stat(holes).st_blocks == 8 * (2 * count + 6 + 1)
        assert {name.encode() for name in os.listxattr(holes)} == set(attributes)
        for attribute, value in attributes.items():
            assert os.getxattr(holes, attribute) == value
    finally:
        dmbed.run("umount", tmp_path / "mnt")


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_every_kind_of_inode_in_squashfs(
    tmp_path: Path, everything: Path, compression: str | None
) -> None:
    build_image(everything, tmp_path / "image", filesystem="squashfs", compression=compression)
    with mounted(tmp_path / "image", "squashfs", tmp_path / "mnt") as target:
        image = file_facts(target, exact_times=False)
    source = file_facts(everything, exact_times=False)
    if not any(each["xattrs"] for each in image.values()):
        # this kernel's squashfs is built without attributes; unsquashfs sees them in tests/unit
        for each in source.values():
            each["xattrs"] = {}
    assert_same(image, source)


def test_a_tar_by_gnu_tar_makes_the_same_tree(tmp_path: Path, everything: Path) -> None:
    command = ["tar", "--format=pax", "--xattrs", "--xattrs-include=*", "--sparse"]
    dmbed.run(*command, "-cf", tmp_path / "all.tar", "-C", everything, ".")
    build_image(tmp_path / "all.tar", tmp_path / "image", whiteouts=Whiteouts.KEEP)
    with mounted(tmp_path / "image", "erofs", tmp_path / "mnt") as target:
        assert_same(file_facts(target), file_facts(everything))


@pytest.mark.parametrize("filesystem", ["erofs", "squashfs", "ext4"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path: Path, filesystem: str, packed: bool) -> None:
    tar = make_tar([Member("random", os.urandom(3 << 20))])
    (tmp_path / "layer.tar").write_bytes(gzip.compress(tar) if packed else tar)
    (tmp_path / "small").mkdir()
    dmbed.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "small")
    try:
        (tmp_path / "small/image").write_bytes(b"old")
        with call_error("resource"):
            build_image(tmp_path / "layer.tar", tmp_path / "small/image", filesystem=filesystem)
        assert [each.name for each in (tmp_path / "small").iterdir()] == ["image"]
        assert (tmp_path / "small/image").read_bytes() == b"old"
    finally:
        dmbed.run("umount", tmp_path / "small")


def test_a_disk_that_may_only_be_read(tmp_path: Path) -> None:
    (tmp_path / "layer.tar").write_bytes(make_tar([Member("file")]))
    (tmp_path / "closed").mkdir()
    dmbed.run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path / "closed")
    try:
        with call_error("denied", errno=errno.EROFS):
            build_image(tmp_path / "layer.tar", tmp_path / "closed/image")
    finally:
        dmbed.run("umount", tmp_path / "closed")


LOWER = [
    directory("etc"),
    Member("etc/kept", b"lower"),
    Member("etc/removed", b"lower"),
    Member("etc/replaced", b"lower"),
    directory("opaque", mode=0o700),
    Member("opaque/hidden", b"lower"),
    directory("anew"),
    Member("anew/hidden", b"lower"),
    directory("tmp", mode=0o1777),
    Member("tmp/lower", b"lower"),
    Member("whole/tree/gone", b"lower"),
]
UPPER = [
    directory("etc"),
    Member("etc/.wh.removed"),
    Member("etc/replaced", b"upper"),
    directory("opaque", mode=0o755),
    Member("opaque/.wh..wh..opq"),
    Member("opaque/shown", b"upper"),
    Member(".wh.anew"),
    directory("anew"),
    Member("anew/shown", b"upper"),
    Member("tmp/upper", b"upper"),
    Member(".wh.whole"),
]
SHOWN = {
    "etc/kept": b"lower",
    "etc/replaced": b"upper",
    "opaque/shown": b"upper",
    "anew/shown": b"upper",
    "tmp/lower": b"lower",
    "tmp/upper": b"upper",
}


def files(top: Path) -> dict[str, bytes]:
    found = (Path(parent, name) for parent, _, names in os.walk(top) for name in names)
    return {str(each.relative_to(top)): each.read_bytes() for each in found}


@pytest.mark.parametrize("whiteouts", [Whiteouts.OVERLAY, Whiteouts.OVERLAY_USER])
def test_an_overlay_of_layers_shows_what_the_image_means(
    tmp_path: Path, whiteouts: Whiteouts
) -> None:
    layout = Layout(tmp_path / "layout").layer(LOWER, "+gzip").layer(UPPER).finish()
    images = build_layers(layout, tmp_path, whiteouts=whiteouts)
    flat = build_image(layout, tmp_path / "flat")
    pack_path = tmp_path / "pack"
    with Pack.create(pack_path) as pack:
        for number, image in enumerate(images):
            pack.add(image.path, f"layer{number}")
        upper, lower = pack.layers
    (tmp_path / "overlay").mkdir()
    options = "userxattr," if whiteouts is Whiteouts.OVERLAY_USER else ""
    with (
        mounted(pack_path, "erofs", tmp_path / "lower", lower) as below,
        mounted(pack_path, "erofs", tmp_path / "upper", upper) as above,
        mounted(flat.path, "erofs", tmp_path / "merged") as merged,
    ):
        options += f"lowerdir={above}:{below}"
        dmbed.run("mount", "-t", "overlay", "-o", options, "overlay", tmp_path / "overlay")
        try:
            assert files(tmp_path / "overlay") == SHOWN
            assert (tmp_path / "overlay/tmp").stat().st_mode & 0o7777 == 0o1777
            assert not (tmp_path / "overlay/whole").exists()
            modes = {path: each["mode"] for path, each in file_facts(merged).items()}
            assert {
                path: each["mode"] for path, each in file_facts(tmp_path / "overlay").items()
            } == modes
        finally:
            dmbed.run("umount", tmp_path / "overlay")
        assert files(merged) == SHOWN


def test_a_packed_layer_through_linear_and_verity(tmp_path: Path) -> None:
    """What the manifest says is what device-mapper needs; dmsetup is the judge."""
    lower, upper = build_layers(
        Layout(tmp_path / "layout").layer(LOWER).layer(UPPER).finish(), tmp_path, verity=True
    )
    with Pack.create(tmp_path / "pack") as pack:
        pack.add(lower.path, "lower", verity=lower.verity)
        layer = pack.add(upper.path, "upper", verity=upper.verity)
    verity = layer.verity
    assert verity is not None
    with dmbed.loop_device(tmp_path / "pack") as node, contextlib.ExitStack() as undo:
        sectors = layer.size_bytes // 512
        table = f"0 {sectors} linear {node} {layer.offset_bytes // 512}"
        linear = device_mapper(undo, "images-linear", table)
        table = (
            f"0 {verity.data_size_bytes // 512} verity {verity.hash_type} {linear} {linear} "
            f"{verity.data_block_size} {verity.hash_block_size} {verity.data_blocks} "
            f"{verity.hash_start_block} {verity.algorithm} {verity.root_digest.hex()} "
            f"{verity.salt.hex()}"
        )
        mapped = device_mapper(undo, "images-verity", table)
        (tmp_path / "mnt").mkdir()
        dmbed.run("mount", "-t", "erofs", "-o", "ro", mapped, tmp_path / "mnt")
        undo.callback(dmbed.run, "umount", tmp_path / "mnt")
        assert (tmp_path / "mnt/etc/replaced").read_bytes() == b"upper"
        assert stat.S_ISCHR((tmp_path / "mnt/etc/removed").stat().st_mode)
        with open(mapped, "rb") as device:
            assert len(device.read()) == verity.data_size_bytes
        assert dmbed.run("dmsetup", "status", "images-verity").split()[-2:] != ["C", "-"]


def device_mapper(undo: contextlib.ExitStack, name: str, table: str) -> str:
    """Make a read-only device for the time of ``undo``; return its node."""
    dmbed.run("dmsetup", "create", "--noudevsync", "-r", name, "--table", table)
    undo.callback(dmbed.run, "dmsetup", "remove", "--noudevsync", "--retry", name)
    minor = dmbed.run("dmsetup", "info", "-c", "--noheadings", "-o", "minor", name).strip()
    return f"/dev/dm-{minor}"
