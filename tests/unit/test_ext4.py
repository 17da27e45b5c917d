"""ext4 images against e2fsprogs: what e2fsck finds sound, debugfs reads back as it was given."""

import contextlib
import os
import random
import re
import stat
import struct
import subprocess
import tarfile
import uuid as uuid_module
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from rootfs.image.crc32c import crc32c, crc32c_of_rows
from rootfs.image.ext4 import Ext4Image
from rootfs.image.images import build_image
from rootfs.image.tree import Extent, FdContent, Node
from tests.beds.calls import call_error, run
from tests.beds.imagebed import EPOCH, Member, directory, hard_link, make_tar, symlink
from vsock.deadline import Deadline
from vsock.errors import CallError

UUID = uuid_module.UUID("8f5bfa83-1c7a-4b61-a24a-1ad8dbf8e3c2")
BLOCK = 4096
ACL_NAMES = ("system.posix_acl_access", "system.posix_acl_default")


def file(data_fd: int = -1, size: int = 0, extents: tuple[Extent, ...] = (), **facts: int) -> Node:
    return Node(stat.S_IFREG | 0o644, content=FdContent(data_fd, size, extents), **facts)


def tree(children: Mapping[bytes, Node], **facts: int) -> Node:
    node = Node(stat.S_IFDIR | 0o755, **facts)
    node.children.update(children)
    return node


def debugfs(image: Path, request: str) -> str:
    return run("debugfs", "-R", request, image)


def write(root: Node, path: Path) -> Ext4Image:
    """Write an image that e2fsck must find nothing wrong with."""
    image = Ext4Image(root, UUID)
    with path.open("w+b") as output:
        image.write(output.fileno())
    assert path.stat().st_size == image.size_bytes
    run("e2fsck", "-fn", path)
    return image


def read(image: Path, name: str) -> bytes:
    return subprocess.run(["debugfs", "-R", f"cat {name}", image], stdout=-1, check=True).stdout


def names_in(image: Path, place: str) -> set[str]:
    listed = debugfs(image, f"ls -p {place}")
    # the blocks of an index look like entries without a name
    return {line.split("/")[5] for line in listed.splitlines() if line} - {"", ".", ".."}


@contextlib.contextmanager
def random_file(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    data = random.Random(size).randbytes(size)
    path.write_bytes(data)
    with path.open("rb") as source:
        yield source.fileno(), data


MEMBERS = [
    directory(".", mode=0o711, uid=5, mtime=EPOCH - 1),
    directory("d", mode=0o1777, uid=70_000, gid=80_000),
    Member("d/file", os.urandom(9000), mode=0o4750, uid=3_000_000, mtime=EPOCH + 5),
    Member("attributes", b"x", uid=5, xattrs={"user.binary": bytes(range(256)), "trusted.x": b""}),
    Member("null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
    Member("disk", kind=tarfile.BLKTYPE, device=(259, 70000), mode=0o640),
    Member("whiteout", kind=tarfile.CHRTYPE, mode=0),
    Member("pipe", kind=tarfile.FIFOTYPE),
    symlink("fast", "f" * 59),
    symlink("slow", "s" * 60),
    symlink("longest", "l" * 4095),
    hard_link("hard", "d/file"),
    hard_link("hardlink", "fast"),
    hard_link("harddisk", "disk"),
]


def test_owners_devices_links_times_and_attributes(tmp_path: Path) -> None:
    (tmp_path / "layer.tar").write_bytes(make_tar(MEMBERS))
    result = build_image(tmp_path / "layer.tar", tmp_path / "image", filesystem="ext4")
    image = result.path
    run("e2fsck", "-fn", image)

    def stat_of(name: str) -> str:
        return debugfs(image, f"stat {name}")

    found = stat_of("/d/file")
    assert re.search(r"Mode: +04750", found)
    assert re.search(r"User: +3000000 ", found)
    assert re.search(r"Links: 2 ", found)
    assert f"mtime: 0x{EPOCH + 5:08x}:00000000" in found
    assert read(image, "/hard") == MEMBERS[2].data
    assert re.search(r"Mode: +0711", stat_of("/"))
    assert re.search(r"User: +70000 +Group: +80000 ", stat_of("/d"))
    assert "Device major/minor number: 01:03" in stat_of("/null")
    for name in ("/disk", "/harddisk"):
        assert re.search(r"Type: block special", stat_of(name))
        assert "Links: 2 " in stat_of(name)
        assert "(New-style) Device major/minor number: 259:70000" in stat_of(name).replace("\n", "")
    assert re.search(r"Type: FIFO", stat_of("/pipe"))
    for name in ("fast", "hardlink"):
        assert f'link dest: "{"f" * 59}"' in stat_of(f"/{name}")
    assert read(image, "/slow") == b"s" * 60
    assert read(image, "/longest") == b"l" * 4095
    assert "Links: 2 " in stat_of("/hardlink")
    names = debugfs(image, "ea_list /attributes")
    assert "user.binary (256)" in names
    assert "trusted.x (0)" in names
    assert names_in(image, "/") == {m.name for m in MEMBERS if "/" not in m.name} - {"."}


def test_superblock_has_the_expected_fields(tmp_path: Path) -> None:
    write(tree({}), tmp_path / "image")
    facts = run("dumpe2fs", "-h", tmp_path / "image")
    assert re.search(r"Filesystem UUID: +" + str(UUID), facts)
    assert re.search(r"Errors behavior: +Continue", facts)
    assert re.search(r"Free blocks: +0\n", facts)
    features = re.search(r"Filesystem features: +(.*)", facts)
    assert features is not None
    assert features[1].split() == [
        "ext_attr",
        "dir_index",
        "sparse_super2",
        "filetype",
        "extent",
        "flex_bg",
        "large_file",
        "huge_file",
        "dir_nlink",
        "extra_isize",
        "metadata_csum",
        "read-only",
    ]


def test_neither_clock_nor_environment_leaves_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "layer.tar").write_bytes(make_tar(MEMBERS))
    first = build_image(tmp_path / "layer.tar", tmp_path / "1", filesystem="ext4")
    for name in ("SOURCE_DATE_EPOCH", "E2FSPROGS_FAKE_TIME"):
        monkeypatch.setenv(name, "99")
    monkeypatch.setenv("PATH", str(tmp_path))  # no program is needed
    (tmp_path / "a place").mkdir()
    second = build_image(tmp_path / "layer.tar", tmp_path / "a place/2", filesystem="ext4")
    assert second.path.read_bytes() == first.path.read_bytes()


@pytest.mark.parametrize("seconds", [-(1 << 31), -1, 0, (1 << 31) - 1, 1 << 31, 1 << 32])
@pytest.mark.parametrize("nanoseconds", [0, 999_999_999])
def test_times_of_every_epoch(tmp_path: Path, seconds: int, nanoseconds: int) -> None:
    write(tree({b"f": file(mtime_ns=seconds * 10**9 + nanoseconds)}), tmp_path / "image")
    found = re.findall(
        r"(\w+): 0x([0-9a-f]{8}):([0-9a-f]{8})", debugfs(tmp_path / "image", "stat /f")
    )
    found = [each for each in found if each[0] != "Version"]
    assert {name for name, _, _ in found} == {"ctime", "atime", "mtime", "crtime"}
    for _, low, extra in found:
        signed = struct.unpack(">i", bytes.fromhex(low))[0]
        assert signed + (int(extra, 16) & 3) * (1 << 32) == seconds
        assert int(extra, 16) >> 2 == nanoseconds


@pytest.mark.parametrize("name", ["lost+found", "a b", 'a"b', "a\\b", "a\nb", "a\rb", "\x7f", "é"])
def test_a_name_is_a_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "t").write_bytes(make_tar([Member(name, xattrs={f"user.{name}": b"value"})]))
    build_image(tmp_path / "t", tmp_path / "image", filesystem="ext4")
    run("e2fsck", "-fn", tmp_path / "image")
    (tmp_path / "out").mkdir()
    run("debugfs", "-R", f"rdump / {tmp_path}/out", tmp_path / "image")
    assert os.listdir(tmp_path / "out") == [name]


def test_contents_of_every_size(tmp_path: Path) -> None:
    sizes = (0, 1, 59, 60, 4095, 4096, 4097, 12_345, 3 << 20)
    with random_file(tmp_path / "source", max(sizes)) as (fd, data):
        root = tree({b"%d" % size: file(fd, size, ((0, size, 0),)) for size in sizes})
        write(root, tmp_path / "image")
    for size in sizes:
        assert read(tmp_path / "image", f"/{size}") == data[:size], size


@pytest.mark.parametrize("count", [1, 4, 5, 340, 341, 1361])
def test_holes_and_an_extent_tree_of_every_depth(tmp_path: Path, count: int) -> None:
    """Pieces that start and end anywhere in a block, holes between them and at both ends."""
    piece, step = 5000, 4 * BLOCK
    with random_file(tmp_path / "source", piece * count) as (fd, data):
        extents = tuple((BLOCK + 100 + step * n, piece, piece * n) for n in range(count))
        size = step * (count + 1) + 7
        write(tree({b"f": file(fd, size, extents)}), tmp_path / "image")
    expected = bytearray(size)
    for offset, length, at in extents:
        expected[offset : offset + length] = data[at : at + length]
    assert read(tmp_path / "image", "/f") == expected
    blocks = re.search(r"Blockcount: (\d+)", debugfs(tmp_path / "image", "stat /f"))
    assert blocks is not None
    tree_blocks = {1: 0, 4: 0, 5: 1, 340: 1, 341: 2, 1361: 6}[count]
    assert int(blocks[1]) == 8 * (2 * count + tree_blocks)


def test_pieces_that_share_a_block_or_are_empty(tmp_path: Path) -> None:
    with random_file(tmp_path / "source", 3000) as (fd, data):
        extents = ((5, 1000, 0), (1010, 0, 0), (1020, 80, 1000), (4096, 10, 1080), (9000, 0, 0))
        write(tree({b"f": file(fd, 20_000, extents)}), tmp_path / "image")
    expected = bytearray(20_000)
    expected[5:1005], expected[1020:1100], expected[4096:4106] = (
        data[:1000],
        data[1000:1080],
        data[1080:1090],
    )
    assert read(tmp_path / "image", "/f") == expected


def test_a_file_of_more_than_one_full_extent(tmp_path: Path) -> None:
    size = (128 << 20) + BLOCK + 1
    with (tmp_path / "source").open("w+b") as source:
        source.truncate(size)
        source.seek(size - 3)
        source.write(b"end")
        source.flush()
        image = write(
            tree({b"f": file(source.fileno(), size, ((0, size, 0),))}), tmp_path / "image"
        )
    assert image.data_size_bytes == size
    listed = debugfs(tmp_path / "image", "ex /f")
    assert re.findall(r" (\d+) - +(\d+) ", listed)[::2] == [("0", "32767"), ("32768", "32769")]
    assert read(tmp_path / "image", "/f")[-4:] == b"\0end"


@pytest.mark.parametrize("count", [*range(336, 345), 9000])
@pytest.mark.parametrize("length", [4, 255])
def test_directories_with_and_without_an_index(tmp_path: Path, count: int, length: int) -> None:
    """At 255 bytes, 9000 names need an index of two levels."""
    names = [f"{number:04}".ljust(length, "x") for number in range(count)]
    write(tree({name.encode(): file() for name in names}), tmp_path / "image")
    assert names_in(tmp_path / "image", "/") == set(names)
    is_indexed = "0x81000" in debugfs(tmp_path / "image", "stat /")
    assert is_indexed == (length == 255 or count > 338)


def test_more_inodes_than_a_group_of_full_size_has(tmp_path: Path) -> None:
    count = 40_000
    image = write(tree({b"%d" % number: file() for number in range(count)}), tmp_path / "image")
    assert image.inode_count == count + 1
    facts = run("dumpe2fs", "-h", tmp_path / "image")
    assert re.search(r"Blocks per group: +2048\n", facts)
    assert image.size_bytes < count * 300


def test_a_last_group_with_free_blocks(tmp_path: Path) -> None:
    """65 inodes: four groups have tables of two blocks, five of one, which is less in all.

    Of the blocks that the smaller tables save, some are free, as the fifth group has one at least.
    """
    used = 1 + 1 + 2 * 4 + 2 * 4 + 1
    size = (4 * 32_768 + 1 - used) * BLOCK
    others = {b"%d" % number: file() for number in range(65 - 11)}
    with (tmp_path / "source").open("w+b") as source:
        source.truncate(size)
        content = file(source.fileno(), size, ((0, size, 0),))
        write(tree({b"f": content, **others}), tmp_path / "image")
    facts = run("dumpe2fs", "-h", tmp_path / "image")
    assert re.search(r"Free blocks: +1\n", facts)
    assert re.search(r"Inode count: +80\n", facts)


def test_links_of_a_directory_with_very_many_directories(tmp_path: Path) -> None:
    """The count says 1 past 65,000; made of directories that are one, as only they are counted."""
    for count, links in ((64_998, 65_000), (64_999, 1)):
        root = tree({})
        image = Ext4Image(root, UUID)
        image._inodes[0].settle(count + 2, {}, (1, 2, 3, 4))
        assert struct.unpack_from("<H", image._inodes[0].pack(), 0x1A) == (links,)


def test_a_file_of_65000_names(tmp_path: Path) -> None:
    node = file()
    write(tree({b"%d" % number: node for number in range(65_000)}), tmp_path / "image")
    with pytest.raises(CallError, match="65001 names, limit 65000"):
        Ext4Image(tree({b"%d" % number: node for number in range(65_001)}), UUID)


def attributes(image: Path, name: str, output: Path) -> dict[str, bytes]:
    listed = debugfs(image, f"ea_list {name}")
    found = {}
    for attribute in re.findall(r"^  (\S+) \(\d+\)", listed, re.M):
        debugfs(image, f"ea_get -f {output} {name} {attribute}")
        found[attribute] = output.read_bytes()
    return found


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


#: Only users and groups have an id; debugfs says 0 for the others.
NO_ID = 0
ACL = acl((1, 7, NO_ID), (2, 5, 70_000), (4, 5, NO_ID), (8, 6, 12), (16, 7, NO_ID), (32, 4, NO_ID))


@pytest.mark.parametrize(
    "xattrs",
    [
        {"user.a": b"1"},
        {"user.a": b""},
        {"user.in": b"x" * 67, "user.in2": b""},
        {"security.capability": bytes(20), "security.selinux": b"system_u:object_r:bin_t:s0\0"},
        {f"user.{'n' * length}": b"v" * length for length in range(1, 55)},
        {"user." + "n" * 255: b"long name"},
        {"user.value": bytes(range(250)) * 16},
        {
            "trusted.z": b"1" * 100,
            "user.b": b"2" * 99,
            "user.ab": b"3" * 98,
            "security.y": b"4" * 97,
        },
        {"system.posix_acl_access": ACL, "system.posix_acl_default": ACL},
        {
            "system.posix_acl_access": acl((1, 7, NO_ID), (4, 5, NO_ID), (32, 4, NO_ID)),
            "user.a": b"1",
        },
    ],
)
def test_attributes_in_the_inode_and_in_a_block(tmp_path: Path, xattrs: dict[str, bytes]) -> None:
    nodes = {b"f": file(), b"d": tree({}), b"l": Node(stat.S_IFLNK | 0o777, target=b"t" * 20)}
    for node in nodes.values():
        node.xattrs = {name.encode(): value for name, value in xattrs.items()}
    write(tree(nodes), tmp_path / "image")
    for name in nodes:
        assert attributes(tmp_path / "image", f"/{name.decode()}", tmp_path / "value") == xattrs


def node_with(**facts: object) -> Node:
    node = file()
    for name, value in facts.items():
        setattr(node, name, value)
    return node


def device(major: int, minor: int) -> Node:
    return Node(stat.S_IFCHR | 0o600, rdev=os.makedev(major, minor))


@pytest.mark.parametrize(
    ("node", "what"),
    [
        (node_with(mtime_ns=-((1 << 31) + 1) * 10**9), "1901 to 2446"),
        (node_with(mtime_ns=((1 << 34) - (1 << 31)) * 10**9), "1901 to 2446"),
        (node_with(uid=1 << 32), "the owner 4294967296:0"),
        (node_with(gid=-1), "the owner 0:-1"),
        (
            node_with(content=FdContent(-1, 1 << 44, ())),
            "17592186044416 bytes, limit 17592186040320",
        ),
        (device(1 << 12, 0), "the device number 4096:0, limits 4095:1048575"),
        (device(0, 1 << 20), "the device number 0:1048576"),
        (Node(stat.S_IFLNK | 0o777, target=b""), "a target of 0 bytes"),
        (Node(stat.S_IFLNK | 0o777, target=b"x" * 4096), "a target of 4096 bytes, limit 4095"),
        (Node(stat.S_IFLNK | 0o777, target=b"x\0y"), "a zero in its target"),
        (node_with(xattrs={b"user." + b"x" * 256: b""}), r"user\.x+' \(261 bytes\)"),
        (node_with(xattrs={b"user.": b""}), "the attribute b'user.'"),
        (node_with(xattrs={b"user.a\0b": b""}), "the attribute"),
        (node_with(xattrs={b"com.apple.quarantine": b""}), "com.apple.quarantine"),
        (node_with(xattrs={b"system.data": b""}), "system.data"),
        (node_with(xattrs={b"user.large": bytes(4048)}), "4072 bytes of attributes.*limit 4060"),
        (node_with(xattrs={b"system.posix_acl_access": b"\1\0\0\0"}), "no list of access rights"),
        (node_with(xattrs={b"system.posix_acl_access": b"\2\0\0\0\0"}), "no list of access rights"),
        (node_with(xattrs={b"system.posix_acl_default": acl((64, 0, 0))}), "unknown tag 0x40"),
    ],
)
def test_ext4_image_refuses_unsupported_node_and_names_it(node: Node, what: str) -> None:
    with call_error(
        "unsupported", match=f"cannot put 'd/x' into an ext4 image: it has .*{what}", object="d/x"
    ):
        Ext4Image(tree({b"d": tree({b"x": node})}), UUID)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"n" * 256])
def test_names_that_no_file_can_have(name: bytes) -> None:
    with call_error("unsupported", match="cannot put 'd/.*a name"):
        Ext4Image(tree({b"d": tree({name: file()})}), UUID)


def test_the_path_in_an_error_is_bounded_and_quoted() -> None:
    node = tree({b"\x1b[2J\n": node_with(uid=-1)})
    for _ in range(50):
        node = tree({b"d" * 250: node})
    with pytest.raises(CallError) as caught:
        Ext4Image(node, UUID)
    assert len(caught.value.message) < 400
    assert "\x1b" not in caught.value.message
    assert "\n" not in caught.value.message


def test_an_attribute_name_runs_no_command(tmp_path: Path) -> None:
    """A program that is given a script cuts such a name into lines, and may run the second."""
    proof = tmp_path / "proof"
    for length in range(8000, 8192):
        attribute = "user." + "a" * length + f"!touch${{IFS}}{proof}"
        (tmp_path / "t").write_bytes(make_tar([Member("x", xattrs={attribute: b"v"})]))
        with pytest.raises(CallError, match="attribute") as caught:
            build_image(tmp_path / "t", tmp_path / "image", filesystem="ext4")
        assert not proof.exists()
        assert caught.value.code == "unsupported"


def test_a_source_that_became_shorter(tmp_path: Path) -> None:
    with random_file(tmp_path / "source", 9000) as (fd, _):
        image = Ext4Image(tree({b"f": file(fd, 10_000, ((0, 10_000, 0),))}), UUID)
        with (tmp_path / "image").open("w+b") as output, pytest.raises(CallError) as caught:
            image.write(output.fileno())
    assert (caught.value.code, caught.value.object) == ("conflict", "f")


def test_progress_and_cancel(tmp_path: Path) -> None:
    with random_file(tmp_path / "source", 3 << 20) as (fd, _):
        image = Ext4Image(tree({b"f": file(fd, 3 << 20, ((0, 3 << 20, 0),))}), UUID)
        steps: list[tuple[int, int]] = []
        with (tmp_path / "image").open("w+b") as output:
            image.write(output.fileno(), progress=lambda done, total: steps.append((done, total)))
            assert steps == [(n << 20, 3 << 20) for n in (1, 2, 3)]
            deadline = Deadline(60)
            deadline.cancel()
            with pytest.raises(CallError) as caught:
                image.write(output.fileno(), cancel=deadline)
            deadline.close()
    assert caught.value.code == "cancelled"


@pytest.mark.parametrize("rows", [1, 2, 7, 256])
def test_checksums_of_rows_equal_those_of_single_rows(rows: int) -> None:
    data = random.Random(rows).randbytes(40 * rows)
    columns = crc32c_of_rows((data[at::40] for at in range(40)), rows, 0x12345678)
    found = [
        int.from_bytes(bytes(column[row] for column in columns), "little") for row in range(rows)
    ]
    assert found == [crc32c(data[at : at + 40], 0x12345678) for at in range(0, 40 * rows, 40)]
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
