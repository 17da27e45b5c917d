"""EROFS images: the tools of erofs-utils find in them what was put in, and the bytes never vary."""

import gzip
import os
import re
import stat
import subprocess
import tarfile
import time
from pathlib import Path
from uuid import UUID

import pytest

from rootfs.image.directory import DirectorySource
from rootfs.image.erofs import ErofsImage
from rootfs.image.images import ImageResult, build_image, build_layers
from rootfs.image.spool import spooled
from rootfs.image.tartree import Whiteouts
from rootfs.image.tree import Node
from tests.beds.calls import call_error, run
from tests.beds.imagebed import (
    Layout,
    Member,
    directory,
    docker_archive,
    hard_link,
    make_tar,
    symlink,
    tar_of,
    zstd,
)
from tests.beds.loopbed import sparse_file
from vsock.deadline import Deadline
from vsock.errors import CallError


def fsck(image: Path, into: Path | None = None) -> None:
    options = [] if into is None else [f"--extract={into}", "--no-preserve-owner"]
    done = subprocess.run(["fsck.erofs", *options, image], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<E>" not in done.stderr


def dump(image: Path, path: str) -> dict[str, str]:
    """Return what dump.erofs says of an inode."""
    done = subprocess.run(
        ["dump.erofs", f"--path={path}", image], capture_output=True, text=True, check=True
    )
    text = done.stdout
    found = dict(re.findall(r"(Size|Layout|Inode size|Links|Xattr size|Uid|Gid): +(\d+)", text))
    found["Access"] = re.search(r"Access: (\d+)/", text)[1]  # type: ignore[index]
    found["Nid"] = re.search(r"NID: (\d+)", text)[1]  # type: ignore[index]
    return found


def tree_of(path: Path) -> dict[str, object]:
    """Return path -> what can be compared of an extracted tree without privilege."""
    found: dict[str, object] = {}
    for parent, directories, files in os.walk(path):
        for name in directories + files:
            each = Path(parent, name)
            content: object = None
            if stat.S_ISLNK(each.lstat().st_mode):
                content = os.readlink(each)
            elif each.is_file():
                content = each.read_bytes()
            found[str(each.relative_to(path))] = (stat.S_IFMT(each.lstat().st_mode), content)
    return found


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A tree with the sizes at which a layout changes."""
    top = tmp_path / "sample"
    (top / "many").mkdir(parents=True)
    (top / "empty").mkdir()
    for size in (0, 1, 4031, 4032, 4033, 4063, 4064, 4065, 4095, 4096, 4097, 12345, 1 << 20):
        (top / f"size{size}").write_bytes(os.urandom(size))
    for number in range(250):
        (top / "many" / f"file{number:04}").write_text(str(number))
    for name in ("!first", "-", "...", "~", "n" * 255, "new\nline", "é"):
        (top / "many" / name).write_text(name)
    (top / "link").symlink_to("t" * 4000)
    (top / "short").symlink_to("many")
    os.link(top / "size1", top / "many/hard")
    return top


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small").mkdir()
    (tmp_path / "small/file").write_bytes(b"x" * 5000)
    return tmp_path / "small"


def test_a_directory_comes_out_as_it_went_in(tmp_path: Path, sample: Path) -> None:
    result = build_image(sample, tmp_path / "image")
    assert result.size_bytes == (tmp_path / "image").stat().st_size
    assert result.size_bytes % 4096 == 0
    fsck(tmp_path / "image", tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(sample)
    facts = dump(tmp_path / "image", "/size1")
    assert facts["Links"] == "2"
    assert dump(tmp_path / "image", "/many/hard")["Nid"] == facts["Nid"]
    assert dump(tmp_path / "image", "/")["Links"] == "4"


def test_the_digest_of_a_source_does_not_depend_on_what_is_made_of_it(
    tmp_path: Path, sample: Path
) -> None:
    """One is taken while the image is written, the other before."""
    with (sample / "sparse").open("wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"in the middle")
    sparse_file((sample / "holes"), 70_000)
    while_written = build_image(sample, tmp_path / "image")
    before = build_image(sample, tmp_path / "other", filesystem="squashfs", compression="gzip")
    assert while_written.source_digest == before.source_digest
    again = build_layers(sample, tmp_path)[0]
    assert again.source_digest == while_written.source_digest
    assert again.path.read_bytes() == (tmp_path / "image").read_bytes()


def test_without_inline_tails_every_file_has_blocks_of_its_own(
    tmp_path: Path, sample: Path
) -> None:
    build_image(sample, tmp_path / "dax", inline_tails=False)
    fsck(tmp_path / "dax", tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(sample)
    assert dump(tmp_path / "dax", "/size1")["Layout"] == "0"
    build_image(sample, tmp_path / "image")
    assert dump(tmp_path / "image", "/size1")["Layout"] == "2"


def test_the_image_is_no_larger_than_that_of_mkfs(tmp_path: Path, sample: Path) -> None:
    (sample / "many" / ("n" * 255)).unlink()  # mkfs.erofs 1.5 cuts such a name
    build_image(sample, tmp_path / "ours")
    run("mkfs.erofs", "--quiet", tmp_path / "theirs", sample)
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    assert ours.stat().st_size <= theirs.stat().st_size * 1.02 + 8192


def test_one_byte_or_one_mode_makes_another_image(tmp_path: Path, sample: Path) -> None:
    def build(name: str) -> tuple[ImageResult, bytes]:
        result = build_image(sample, tmp_path / name)
        return result, (tmp_path / name).read_bytes()

    first, again = build("a"), build("b")
    assert first[1] == again[1]
    assert first[0].verity_salt == again[0].verity_salt
    (sample / "size0").chmod(0o600)
    moded = build("c")
    times = (sample / "size1").stat()
    (sample / "size1").write_bytes(bytes([(sample / "size1").read_bytes()[0] ^ 1]))
    os.utime(sample / "size1", ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = build("d")
    digests = {each[0].source_digest for each in (first, moded, changed)}
    assert len(digests) == len({each[0].uuid for each in (first, moded, changed)}) == 3
    assert first[1] != moded[1] != changed[1]


def test_holes_take_no_room_and_read_as_zeros(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    with (top / "sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"middle")
        file.truncate(20 << 20)
    (top / "holeonly").touch()
    os.truncate(top / "holeonly", 1 << 20)
    result = build_image(top, tmp_path / "image")
    assert result.size_bytes < 64 << 10
    fsck(tmp_path / "image")
    # fsck.erofs 1.5 extracts holes wrongly; the kernel's reading is compared in tests/kernel
    place = place_of(tmp_path / "image", "/sparse", 5 << 20)
    assert (tmp_path / "image").read_bytes()[place : place + 4096] == b"middle".ljust(4096, b"\0")
    assert dump(tmp_path / "image", "/holeonly")["Size"] == str(1 << 20)


def place_of(image: Path, path: str, offset: int) -> int:
    """Return where in the image the block at an offset of a file is."""
    command = ["dump.erofs", "-e", f"--path={path}", image]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(rf"\b{offset}\.\. *\d+ \| +\d+ : +(\d+)\.\.", text)
    assert found is not None
    return int(found[1])


def test_chunks_grow_with_the_file(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    with (top / "huge").open("wb") as file:
        file.truncate(1 << 40)
        file.seek((1 << 40) - 3)
        file.write(b"end")
    result = build_image(make_sparse_tar(top, tmp_path), tmp_path / "image")
    assert result.size_bytes < 32 << 20
    assert dump(tmp_path / "image", "/huge")["Size"] == str(1 << 40)


def make_sparse_tar(top: Path, beside: Path) -> Path:
    run("tar", "--sparse", "-cf", beside / "s.tar", "-C", top, ".")
    return beside / "s.tar"


MEMBERS = [
    directory("dev", uid=7, gid=8, mode=0o1777, mtime=-100),
    Member("dev/null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
    Member("dev/disk", kind=tarfile.BLKTYPE, device=(259, 65536), mode=0o660),
    Member("dev/pipe", kind=tarfile.FIFOTYPE),
    Member("dev/whiteout", kind=tarfile.CHRTYPE, device=(0, 0), mode=0),
    Member("owned", b"x", uid=4_000_000_000, gid=70_000, mode=0o6755),
    Member("labelled", b"x" * 5000, xattrs={"security.selinux": b"system_u:object_r:bin_t:s0\0"}),
    Member("attributes", xattrs={f"user.{n}": b"v" * 60_000 for n in range(3)}),
    symlink("sh", "/bin/busybox"),
    hard_link("again", "owned"),
]


def test_a_tar_needs_no_privilege_for_owners_and_devices(tmp_path: Path) -> None:
    (tmp_path / "layer.tar").write_bytes(make_tar(MEMBERS))
    result = build_image(tmp_path / "layer.tar", tmp_path / "image")
    image = tmp_path / "image"
    fsck(image)
    assert result.inode_count == 10
    owned = dump(image, "/owned")
    assert (owned["Uid"], owned["Gid"], owned["Access"]) == ("4000000000", "70000", "0755")
    assert owned["Links"] == "2"
    assert dump(image, "/dev")["Access"] == "0777"
    assert int(dump(image, "/attributes")["Xattr size"]) > 180_000
    assert dump(image, "/dev/disk")["Access"] == "0660"


def test_the_same_tar_gives_the_same_image_however_it_is_packed(tmp_path: Path) -> None:
    tar = make_tar(MEMBERS)
    forms = {"plain": tar, "gzip": gzip.compress(tar), "zstd": zstd(tar)}
    forms["two members"] = gzip.compress(tar[:5000]) + gzip.compress(tar[5000:]) + bytes(100)
    images = set()
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        result = build_image(tmp_path / name, tmp_path / "image")
        images.add(((tmp_path / "image").read_bytes(), result.source_digest))
    assert len(images) == 1


def test_a_tar_from_the_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "layer.tar").write_bytes(make_tar(MEMBERS))
    expected = build_image(tmp_path / "layer.tar", tmp_path / "expected")
    with subprocess.Popen(["cat", tmp_path / "layer.tar"], stdout=subprocess.PIPE) as program:
        monkeypatch.setattr("sys.stdin", program.stdout)
        result = build_image("-", tmp_path / "image", cancel=Deadline(20))
    assert result.source_digest == expected.source_digest
    assert (tmp_path / "image").read_bytes() == (tmp_path / "expected").read_bytes()


# --- container images


BASE = [
    directory("etc", mode=0o755),
    Member("etc/hosts", b"base"),
    Member("etc/removed", b"base"),
    directory("tmp", mode=0o1777, uid=3),
    Member("tmp/old", b"old"),
    directory("opt"),
    Member("opt/a", b"a"),
]
UPPER = [
    directory("etc"),
    Member("etc/hosts", b"upper"),
    Member("etc/.wh.removed"),
    Member("tmp/new", b"new"),  # without an entry for its directory
    directory("opt"),
    Member("opt/.wh..wh..opq"),
    Member("opt/b", b"b"),
]
MERGED = {"etc/hosts": b"upper", "tmp/old": b"old", "tmp/new": b"new", "opt/b": b"b"}


def make_layout(path: Path) -> Path:
    return Layout(path).layer(BASE, "+gzip").layer(UPPER, "+zstd").finish()


def extracted(image: Path, into: Path) -> dict[str, bytes]:
    fsck(image, into)
    return {
        str(each.relative_to(into)): each.read_bytes() for each in into.rglob("*") if each.is_file()
    }


def test_a_container_image_becomes_one_image(tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "layout")
    archive = tar_of(layout, tmp_path / "layout.tar")
    (tmp_path / "layout.tar.gz").write_bytes(gzip.compress(archive.read_bytes()))
    docker = docker_archive(tmp_path / "docker.tar", [make_tar(BASE), make_tar(UPPER)])
    results = [
        build_image(source, tmp_path / f"image{number}")
        for number, source in enumerate((layout, archive, tmp_path / "layout.tar.gz", docker))
    ]
    assert extracted(tmp_path / "image0", tmp_path / "out") == MERGED
    assert len({(tmp_path / f"image{number}").read_bytes() for number in range(4)}) == 1
    assert len({result.source_digest for result in results}) == 1
    assert dump(tmp_path / "image0", "/tmp")["Access"] == "0777"


def test_each_layer_becomes_an_image_with_overlay_whiteouts(tmp_path: Path) -> None:
    lower, upper = build_layers(make_layout(tmp_path / "layout"), tmp_path)
    assert lower.path.name == make_layout_diff_id(BASE) + ".erofs"
    fsck(upper.path)
    # the directory that the upper layer only passes through looks as it does below
    assert dump(upper.path, "/tmp")["Access"] == "0777"
    assert dump(upper.path, "/tmp")["Uid"] == "3"
    assert int(dump(upper.path, "/opt")["Xattr size"]) > 0
    listed = subprocess.run(
        ["dump.erofs", "--ls", "--path=/etc", upper.path], capture_output=True, text=True
    ).stdout
    assert re.search(r"\b3 +removed", listed)  # 3 is a character device


def make_layout_diff_id(members: list[Member]) -> str:
    import hashlib

    return hashlib.sha256(make_tar(members)).hexdigest()


def test_a_layer_that_comes_twice_is_built_once_for_its_highest_place(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(BASE).layer(UPPER).layer(BASE).finish()
    first, second = build_layers(layout, tmp_path)
    assert first.path.name.startswith(make_layout_diff_id(UPPER))
    assert second.path.name.startswith(make_layout_diff_id(BASE))


# --- what is refused, and what is left behind then


def refused(code: str, source: Path, output: Path, **options: object) -> CallError:
    beside = sorted(output.parent.iterdir()) if output.parent.is_dir() else []
    with call_error(code) as caught:
        build_image(source, output, **options)  # type: ignore[arg-type]
    if output.parent.is_dir():
        assert sorted(output.parent.iterdir()) == beside
    return caught.value


def test_cut_and_damaged_streams(tmp_path: Path) -> None:
    tar = make_tar([Member("random", os.urandom(300_000))])
    for name, packed in (("gzip", gzip.compress(tar)), ("zstd", zstd(tar))):
        for what, data in {
            "cut": packed[: len(packed) // 2],
            "cut late": packed[:-3],
            "flipped": packed[:1000] + bytes([packed[1000] ^ 0xFF]) + packed[1001:],
            "followed by junk": packed + b"junk that is no frame",
        }.items():
            source = tmp_path / "source"
            source.write_bytes(data)
            problem = refused("integrity", source, tmp_path / "image")
            assert name in problem.message or "tar" in problem.message, what


def test_a_source_from_a_pipe_leaves_no_descriptor(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(2):
        reader, writer = os.pipe()
        os.write(writer, zstd(make_tar([Member("f")])))
        os.close(writer)
        with spooled(reader, directory=tmp_path) as spool:
            assert spool.compression == "zstd"
        os.close(reader)
    assert os.listdir("/proc/self/fd") == before


def test_frames_of_zstd_are_read_over_skippable_ones(tmp_path: Path) -> None:
    tar = make_tar([Member("random", os.urandom(300_000))])
    skippable = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"extra"
    whole = skippable + zstd(tar[:100_000]) + skippable + zstd(tar[100_000:]) + skippable
    (tmp_path / "tar").write_bytes(tar)
    (tmp_path / "source").write_bytes(whole)
    build_image(tmp_path / "tar", tmp_path / "plain")
    build_image(tmp_path / "source", tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == (tmp_path / "plain").read_bytes()
    for what, data in {
        "cut in the last skippable frame": whole[:-2],
        "cut in its header": whole[: 6 - len(skippable)],
        "cut in a frame": whole[: -len(skippable) - 1],
        "followed by zeros": whole + bytes(64),
        "a window of 1 GiB": b"\x28\xb5\x2f\xfd\x00\xa0" + whole,
    }.items():
        (tmp_path / "source").write_bytes(data)
        problem = refused("integrity", tmp_path / "source", tmp_path / "other")
        assert "zstd" in problem.message, what


ATTRIBUTES = {"com.apple.provenance": b"\1\2", "user.overlay.origin": b"", "user.kept": b"1"}


@pytest.mark.parametrize("filesystem", ["erofs", "squashfs", "ext4"])
def test_attributes_can_be_left_out(tmp_path: Path, filesystem: str) -> None:
    files = [Member("f", b"x", xattrs=ATTRIBUTES), directory("d", xattrs=ATTRIBUTES)]
    kept = [Member("f", b"x", xattrs={"user.kept": b"1"}), directory("d", xattrs=files[1].xattrs)]
    kept[1].xattrs = {"user.kept": b"1"}
    (tmp_path / "source").write_bytes(make_tar(files))
    (tmp_path / "kept").write_bytes(make_tar(kept))
    layout = Layout(tmp_path / "l").layer(files).layer(files[1:]).finish()
    for some in ((), ("com.*",), ("user.overlay.*",), ("COM.APPLE.*", "user.overlay.*")):
        for source in (tmp_path / "source", layout):
            with pytest.raises(CallError) as caught:
                build_image(source, tmp_path / "image", filesystem=filesystem, drop_xattrs=some)
            assert caught.value.hint is not None
            assert "--drop-xattrs" in caught.value.hint
    both = ("com.apple.*", "user.overlay.*")
    build_image(tmp_path / "source", tmp_path / "a", filesystem=filesystem, drop_xattrs=both)
    build_image(tmp_path / "kept", tmp_path / "b", filesystem=filesystem)
    build_image(layout, tmp_path / "image", filesystem=filesystem, drop_xattrs=both)
    build_layers(layout, tmp_path, filesystem=filesystem, drop_xattrs=both)
    if filesystem == "squashfs":  # its UUID is not of the source
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_attributes_of_a_directory_can_be_left_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "d").mkdir(parents=True)
        (tmp_path / name / "d/f").write_bytes(b"x")
        for path in (tmp_path / name / "d/f", tmp_path / name / "d", tmp_path / name):
            if name == "a":
                os.setxattr(path, "user.dropped", b"1")
            os.utime(path, (1, 1))
    digests = [
        build_image(tmp_path / name, tmp_path / "image", drop_xattrs=("user.d*",)).source_digest
        for name in ("a", "b")
    ]
    assert digests[0] == digests[1]
    assert build_image(tmp_path / "a", tmp_path / "image").source_digest != digests[0]


def test_a_file_deeper_than_one_path_reaches(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    fd = os.open(tmp_path / "top", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("n" * 250, dir_fd=fd)
        below = os.open("n" * 250, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    file = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    os.write(file, b"deep" * 5000)
    os.close(file)
    os.close(fd)
    build_image(tmp_path / "top", tmp_path / "image")
    assert b"deep" * 1024 in (tmp_path / "image").read_bytes()
    done = subprocess.run(["fsck.erofs", tmp_path / "image"], capture_output=True, text=True)
    # erofs-utils 1.8 checks no path of over 4,095 bytes
    assert done.returncode == 0 or "the path is too long" in done.stderr, done.stderr


def test_a_bomb_ends_at_the_limit(tmp_path: Path) -> None:
    bomb = make_tar([Member("zeros", bytes(8 << 20))])
    for packed in (gzip.compress(bomb), zstd(bomb), bomb):
        (tmp_path / "bomb").write_bytes(packed)
        problem = refused("resource", tmp_path / "bomb", tmp_path / "image", max_bytes=1 << 20)
        assert "1048576" in problem.message


def test_an_unknown_compression_is_named(tmp_path: Path) -> None:
    import bz2

    (tmp_path / "x").write_bytes(bz2.compress(make_tar(BASE)))
    assert "bzip2" in refused("unsupported", tmp_path / "x", tmp_path / "image").message


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"filesystem": "xfs"}, "invalid"),
        ({"compression": "brotli"}, "unsupported"),
        ({"filesystem": "ext4", "compression": "zstd"}, "unsupported"),
        ({"source_format": "oci"}, "invalid"),
        ({"source_format": "zip"}, "invalid"),
    ],
)
def test_wrong_choices(tmp_path: Path, small: Path, options: dict[str, str], code: str) -> None:
    refused(code, small, tmp_path / "image", **options)


def test_missing_source_and_output_directory(tmp_path: Path, small: Path) -> None:
    refused("not_found", tmp_path / "nothing", tmp_path / "image")
    refused("not_found", small, tmp_path / "nowhere/image")


def test_an_output_directory_that_cannot_be_written(small: Path) -> None:
    with call_error("not_found", step="create"):
        build_image(small, "/proc/image")  # takes no files, not even from root


def test_a_source_that_may_not_be_read(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pid = os.fork()
        if not pid:
            os.setresuid(65534, 65534, 65534)
            os._exit(_refused_to_nobody(tmp_path))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    else:
        (tmp_path / "closed").mkdir(mode=0o000)
        refused("denied", tmp_path / "closed", tmp_path / "image")


def _refused_to_nobody(tmp_path: Path) -> int:
    try:
        build_image("/root", tmp_path / "image")
    except CallError as problem:
        return int(problem.code != "denied")
    except OSError:
        return 2
    return 3


def test_a_full_disk(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    problem = refused("resource", small, tmp_path / "image")
    assert problem.errno == errno.ENOSPC


def test_an_old_image_stays_when_the_new_one_fails(tmp_path: Path, small: Path) -> None:
    (tmp_path / "image").write_bytes(b"old")
    (tmp_path / "bad.tar").write_bytes(make_tar(BASE)[:700])
    refused("integrity", tmp_path / "bad.tar", tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == b"old"


def test_cancelling(tmp_path: Path, sample: Path) -> None:
    deadline = Deadline()
    deadline.cancel()
    refused("cancelled", sample, tmp_path / "image", cancel=deadline)

    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if total and len(seen) > 20:
            later.cancel()

    later = Deadline()
    refused("cancelled", sample, tmp_path / "image", cancel=later, progress=progress)
    assert seen == sorted(seen)


def test_a_file_that_changes_meanwhile(tmp_path: Path, sample: Path) -> None:
    with DirectorySource(sample) as source:
        root = source.read_tree()
        (sample / "size4097").write_bytes(b"shorter")
        image = ErofsImage(root)
        fd = os.memfd_create("image")
        try:
            with pytest.raises(CallError, match="changed") as caught:
                image.write(fd, lambda: UUID(int=1))
        finally:
            os.close(fd)
    assert caught.value.code == "conflict"


def test_erofs_image_refuses_unsupported_node_and_names_it() -> None:
    root = Node(stat.S_IFDIR | 0o755)
    root.children[b"x"] = Node(stat.S_IFREG | 0o644, xattrs={b"nfs4.acl": b"?"})
    with call_error("unsupported", match="'x'.*nfs4", object="x"):
        ErofsImage(root)
    root.children[b"x"] = Node(stat.S_IFREG | 0o644, uid=1 << 32)
    with pytest.raises(CallError, match="32-bit"):
        ErofsImage(root)


def test_whiteouts_of_a_plain_tar_are_a_choice(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(make_tar([Member(".wh.x")]))
    build_image(tmp_path / "t", tmp_path / "image", whiteouts=Whiteouts.KEEP)
    assert dump(tmp_path / "image", "/.wh.x")["Size"] == "0"
    build_image(tmp_path / "t", tmp_path / "image")
    assert dump(tmp_path / "image", "/x")["Access"] == "0000"


def test_many_empty_gzip_members_take_time_by_their_number_only(tmp_path: Path) -> None:
    tar = make_tar(BASE)
    members = gzip.compress(b"", mtime=0) * 400_000
    (tmp_path / "t.gz").write_bytes(members + gzip.compress(tar))
    start = time.process_time()
    result = build_image(tmp_path / "t.gz", tmp_path / "image")
    assert time.process_time() - start < 4  # copying the rest for each took 10 s
    assert result.source_digest == "sha256:" + make_layout_diff_id(BASE)
