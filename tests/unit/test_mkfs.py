"""squashfs and compressed EROFS: what the programs made is what was asked for, every time."""

import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from rootfs.image import mkfs
from rootfs.image.images import BuildOptions, build_image
from rootfs.imagefile import program
from tests.beds.calls import call_error, run
from tests.beds.imagebed import EPOCH, Member, directory, hard_link, make_tar, symlink
from vsock.deadline import Deadline

MEMBERS = [
    directory(".", mode=0o711, uid=5, mtime=EPOCH - 1),
    directory("d", mode=0o1777, uid=70_000, gid=80_000),
    Member("d/file", os.urandom(9000), mode=0o4750, uid=3_000_000, mtime=EPOCH + 5),
    Member("d/zeros", bytes(300_000)),
    Member("attributes", b"x", uid=5, xattrs={"user.binary": bytes(range(256)), "trusted.x": b""}),
    Member("null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
    Member("disk", kind=tarfile.BLKTYPE, device=(259, 70000), mode=0o640),
    Member("whiteout", kind=tarfile.CHRTYPE, mode=0),
    Member("pipe", kind=tarfile.FIFOTYPE),
    symlink("link", "d/file"),
    hard_link("hard", "d/file"),
]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    (tmp_path / "layer.tar").write_bytes(make_tar(MEMBERS))
    return tmp_path / "layer.tar"


def test_squashfs_has_owners_devices_times_and_attributes(tmp_path: Path, tar: Path) -> None:
    result = build_image(tar, tmp_path / "image", filesystem="squashfs", compression="gzip")
    assert result.size_bytes % 4096 == 0
    env = {**os.environ, "TZ": "UTC"}
    listed = run("unsquashfs", "-llnumeric", tmp_path / "image", env=env)
    lines = {line.split()[-1]: line for line in listed.splitlines() if "squashfs-root" in line}
    assert lines["squashfs-root"].startswith("drwx--x--x 5/0")
    assert "2020-09-13 12:26" in lines["squashfs-root"]
    assert lines["squashfs-root/d"].startswith("drwxrwxrwt 70000/80000")
    assert lines["squashfs-root/d/file"].startswith("-rwsr-x--- 3000000/0")
    assert re.match(r"crw-rw-rw- 0/0 +1, +3", lines["squashfs-root/null"])
    assert lines["squashfs-root/disk"].startswith("brw-r----- 0/0")  # its number: tests/kernel
    subprocess.run(
        ["unsquashfs", "-q", "-n", "-d", tmp_path / "out", tmp_path / "image", "attributes", "d"],
        stdout=-1,
    )
    assert os.getxattr(tmp_path / "out/attributes", "user.binary") == bytes(range(256))
    assert (tmp_path / "out/d/file").read_bytes() == MEMBERS[2].data


def test_the_clock_leaves_no_trace(tmp_path: Path, tar: Path) -> None:
    kinds = [("squashfs", None), ("squashfs", "zstd")]
    if os.geteuid() == 0:  # mkfs.erofs 1.5 reads directories only, which takes root
        kinds.append(("erofs", "lz4hc"))

    def build(name: str) -> list[bytes]:
        (tmp_path / name).mkdir()
        for filesystem, compression in kinds:
            output = tmp_path / name / f"{filesystem}-{compression}"
            build_image(tar, output, filesystem=filesystem, compression=compression)
        return [each.read_bytes() for each in sorted((tmp_path / name).iterdir())]

    first = build("first")
    time.sleep(1.01 - time.time() % 1)  # to the next second of the clock, which is the point
    assert build("second") == first
    assert len(first) == len(kinds)


def test_more_owners_than_fit_one_block_of_squashfs_ids(tmp_path: Path) -> None:
    members = [Member(f"f{number}", uid=number) for number in range(1, 3000)]
    (tmp_path / "t").write_bytes(make_tar([*members, directory(".", uid=2999, gid=0)]))
    build_image(tmp_path / "t", tmp_path / "image", filesystem="squashfs")
    listed = run("unsquashfs", "-llnumeric", tmp_path / "image")
    assert re.search(r"^drwxr-xr-x 2999/0 .*squashfs-root$", listed, re.M)


OWNERS = {
    "files of one user": [Member("f", uid=1000, gid=1001)],
    "files of root": [Member("f")],
    "files of the builders": [Member("f", uid=65534), Member("g", gid=65533), Member("h")],
    "a root of its own": [directory(".", uid=77, gid=78), Member("f", uid=5, gid=5)],
    "attributes": [
        *(Member(f"f{n}", uid=9, xattrs={"user.a": b"%d" % n}) for n in range(1100)),
        Member("g", uid=10, xattrs={"user.b": b"long" * 500, "trusted.c": b""}),
    ],
    "two blocks of ids": [Member(f"f{number}", uid=number, gid=2) for number in range(1, 2049)],
}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("what", OWNERS)
def test_image_built_by_an_ordinary_user_equals_one_built_by_root(
    tmp_path: Path, what: str, compression: str | None
) -> None:
    (tmp_path / "t").write_bytes(make_tar(OWNERS[what]))
    images = []
    for user in (0, 65534):
        directory_path = Path(tempfile.mkdtemp(prefix="build-"))
        shutil.copy(tmp_path / "t", directory_path)
        os.chown(directory_path, user, user)
        pid = os.fork()
        if not pid:
            try:
                os.setgroups([])
                os.setresgid(user and 65533, user and 65533, user and 65533)
                os.setresuid(user, user, user)
                build_image(
                    directory_path / "t",
                    directory_path / "image",
                    filesystem="squashfs",
                    compression=compression,
                )
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        images.append((directory_path / "image").read_bytes())
        shutil.rmtree(directory_path)
    assert images[0] == images[1]
    (tmp_path / "image").write_bytes(images[0])
    run("unsquashfs", "-q", "-n", "-d", tmp_path / "out", tmp_path / "image")
    for member in OWNERS[what]:
        facts = (tmp_path / "out" / member.name).lstat()
        assert (facts.st_uid, facts.st_gid) == (member.uid, member.gid), member.name
        for name, value in member.xattrs.items():
            assert os.getxattr(tmp_path / "out" / member.name, name) == value


def test_the_environment_leaves_no_trace(
    tmp_path: Path, tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        for filesystem in ("erofs", "squashfs", "ext4"):
            build_image(tar, tmp_path / f"{name}.{filesystem}", filesystem=filesystem)
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        monkeypatch.setenv("E2FSPROGS_FAKE_TIME", "1700000000")
        monkeypatch.setenv("E2FSPROGS_LIBMAGIC_SUPPRESS", "1")
        monkeypatch.setenv("TZ", "Asia/Tokyo")
    for filesystem in ("erofs", "squashfs", "ext4"):
        images = [(tmp_path / f"{name}.{filesystem}").read_bytes() for name in ("first", "second")]
        assert images[0] == images[1], filesystem


@pytest.mark.skipif(os.geteuid() != 0, reason="mkfs.erofs 1.5 reads directories, as root only")
@pytest.mark.parametrize(
    ("member", "what"),
    [
        (Member("x", mtime=-5), "a time"),
        (Member("x", mtime=1 << 40), "cannot have"),
        (Member("x", mtime=1 << 63), "a time"),
        (Member("x", uid=(1 << 32) - 1), "cannot have"),
        (Member("x", gid=1 << 32), "the owner"),
        (Member("n" * 255), "255 bytes"),
    ],
)
def test_tree_that_compressed_erofs_would_change_is_refused(
    tmp_path: Path, member: Member, what: str
) -> None:
    if "--tar" in mkfs._help("mkfs.erofs"):
        pytest.skip("this mkfs.erofs reads no directory")
    (tmp_path / "layer.tar").write_bytes(make_tar([member]))
    with call_error("unsupported", match=what) as caught:
        build_image(tmp_path / "layer.tar", tmp_path / "image", compression="lz4hc")
    assert member.name[:50] in caught.value.message


@pytest.mark.parametrize(
    ("filesystem", "member", "what"),
    [
        ("squashfs", Member("x", mtime=-1), "time"),
        ("squashfs", Member("x", uid=1 << 32), "the owner 4294967296:0"),
        ("squashfs", Member("x", gid=(1 << 33) + 7), "the owner"),
        ("squashfs", Member("x", kind=b"3", device=(4096, 1)), "device number"),
        ("squashfs", Member("x", kind=b"3", device=(1, 1 << 20)), "device number"),
        ("ext4", Member("x", kind=b"3", device=(4096, 1)), "device number"),
        ("ext4", Member("x", uid=1 << 32), "the owner"),
        ("squashfs", Member("x", xattrs={"system.posix_acl_access": b"\2\0\0\0"}), "posix_acl"),
        ("squashfs", Member("n" * 256 + "/x"), "a name of 256 bytes"),
        ("squashfs", Member("d/.wh." + "n" * 256), "a name of 256 bytes"),
        ("squashfs", Member("x", xattrs={"user." + "n" * 251: b""}), "a name of 256 bytes"),
        ("squashfs", Member("x", xattrs={"user.x": bytes(65537)}), "a value of 65537 bytes"),
        ("erofs", Member("n" * 256 + "/x"), "a name of 256 bytes"),
        ("ext4", Member("n" * 256 + "/x"), "name"),
    ],
)
def test_member_that_a_format_cannot_hold_is_unsupported(
    tmp_path: Path, filesystem: str, member: Member, what: str
) -> None:
    (tmp_path / "layer.tar").write_bytes(make_tar([member]))
    with call_error("unsupported", match=what):
        build_image(tmp_path / "layer.tar", tmp_path / "image", filesystem=filesystem)
    assert [each.name for each in tmp_path.iterdir()] == ["layer.tar"]


@pytest.mark.parametrize("more", [{"filesystem": "squashfs"}, {"compression": "lz4hc"}])
def test_holes_that_a_program_would_read_as_zeros_are_bounded(
    tmp_path: Path, more: BuildOptions
) -> None:
    """A sparse member of a few bytes may be a file of exabytes."""
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x"}
    records["GNU.sparse.realsize"] = str(1 << 50)
    info = tarfile.TarInfo("x")
    data = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
    info.size, info.pax_headers = len(data), records
    with tarfile.open(tmp_path / "layer.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(data))
    with call_error("resource", match="holes"):
        build_image(tmp_path / "layer.tar", tmp_path / "image", **more)
    assert [each.name for each in tmp_path.iterdir()] == ["layer.tar"]


def test_a_compressed_erofs_without_root_says_what_to_do(
    tmp_path: Path, tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--tar" in mkfs._help("mkfs.erofs"):
        pytest.skip("this mkfs.erofs takes a tar, and needs no privilege")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with call_error("unsupported", match="only root") as caught:
        build_image(tar, tmp_path / "image", compression="lz4hc")
    assert caught.value.hint is not None


def test_a_program_that_is_missing_is_named(
    tmp_path: Path, tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with call_error("unsupported", match="no program sqfstar"):
        build_image(tar, tmp_path / "image", filesystem="squashfs")


def test_a_program_that_fails_is_quoted() -> None:
    with call_error("device", match="status 3: cannot do it"):
        program.run(["sh", "-c", "echo cannot do it >&2; exit 3"], None)
    with call_error("resource"):
        program.run(["sh", "-c", "echo write: No space left on device; exit 1"], None)


def test_a_program_ends_with_the_deadline() -> None:
    deadline = Deadline(0.2)
    before = time.monotonic()
    with call_error("timeout"):
        program.run([shutil.which("sleep") or "sleep", "60"], deadline)
    assert time.monotonic() - before < 20
    deadline.close()
