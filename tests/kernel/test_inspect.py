"""Looking into real layers: verified, stacked, corrupt, hostile; through the agent as a process."""

import contextlib
import hashlib
import io
import os
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import LayerSpec, PathDevice, TmpfsScratch, Verity
from guestagent.host.client import GuestAgent
from guestagent.storage import syscalls
from guestagent.storage.verity import VerityTerms
from rootfs.image.images import build_image
from rootfs.verity.formatter import format_image
from tests.beds.agentbed import AgentProcess, layer_on, overlay
from tests.beds.calls import call_error, run
from tests.beds.dmbed import loop_device
from tests.beds.imagebed import Member, make_tar
from vsock.errors import CallError

BLOCK_BYTES = 4096
GIB = 1 << 30
MARKER = b"a block that is easy to find in an image "


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


@pytest.fixture
def guest(agent: AgentProcess) -> Iterator[GuestAgent]:
    with agent.client() as handle:
        yield handle
        for report in handle.overlay_list():
            handle.overlay_unmount(report.overlay_id)
        for layer in handle.layer_list():
            handle.layer_unmount(layer.layer_id)


def make_source(directory: Path) -> Path:
    """A tree with one of everything that a layer may hold."""
    source = directory / "source"
    (source / "etc" / "deep").mkdir(parents=True)
    (source / "etc" / "motd").write_bytes(b"hello\n")
    (source / "etc" / "motd").chmod(0o640)
    (source / "etc" / "deep" / "blocks").write_bytes(MARKER.ljust(BLOCK_BYTES, b".") * 40)
    (source / "link").symlink_to("/etc/motd")
    (source / "out").symlink_to("/proc/self/root/proc/self/environ")
    (source / "hard").hardlink_to(source / "etc" / "motd")
    (source / os.fsdecode(b"na\xffme")).write_bytes(b"odd")
    (source / ("n" * 200)).mkdir()
    (source / ("n" * 200) / ("m" * 200)).write_bytes(b"far")
    os.mkfifo(source / "fifo")
    os.mknod(source / "kmsg", 0o600 | stat.S_IFCHR, os.makedev(1, 11))
    os.mknod(source / "disk", 0o600 | stat.S_IFBLK, os.makedev(7, 0))
    for path, _, files in os.walk(source):
        for name in (".", *files):
            os.utime(os.path.join(path, name), (1, 1), follow_symlinks=False)
    return source


def make_image(source: Path, image: Path, *options: str) -> Path:
    # it prints names, and not all of them are text
    run("mkfs.erofs", *options, image, source)
    os.truncate(image, -(-image.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES)
    return image


@contextlib.contextmanager
def attached(image: Path, layer_id: str) -> Iterator[LayerSpec]:
    """Format and attach an image; yields the request that mounts it."""
    made = format_image(image, terms=VerityTerms(salt=b"salt"), workers=1)
    os.truncate(image, -(-image.stat().st_size // 512) * 512)
    with loop_device(image) as node:
        yield layer_on(node, layer_id, verity=Verity(root_digest=made.root_digest))


@contextlib.contextmanager
def mounted(guest: GuestAgent, image: Path, layer_id: str = "base") -> Iterator[LayerSpec]:
    with attached(image, layer_id) as spec:
        guest.layer_mount(spec)
        try:
            yield spec
        finally:
            for report in guest.overlay_list():
                guest.overlay_unmount(report.overlay_id)
            guest.layer_unmount(layer_id)


def below(top: Path) -> dict[bytes, os.stat_result]:
    found = {}
    for directory, directories, files in os.walk(os.fsencode(top)):
        for name in directories + files:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, os.fsencode(top))] = os.lstat(path)
    return found


def digests(top: Path) -> dict[bytes, str | None]:
    return {
        path: hashlib.sha256((top / os.fsdecode(path)).read_bytes()).hexdigest()
        if stat.S_ISREG(status.st_mode)
        else None
        for path, status in below(top).items()
    }


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_verified_layer_holds_what_its_source_held(guest: GuestAgent, tmp_path: Path) -> None:
    source = make_source(tmp_path)
    with mounted(guest, make_image(source, tmp_path / "image")):
        entries = guest.fs_checksums(layer_id="base")
        assert {path: entry.digest for path, entry in entries.items()} == digests(source)
        assert entries[b"kmsg"].device == "1:11"
        assert entries[b"link"].target == "/etc/motd"
        assert {entry.path for entry in guest.fs_find(layer_id="base")} == set(entries)
        usage = guest.fs_du(layer_id="base")
        assert usage.size_bytes == 40 * BLOCK_BYTES + len(b"hello\n" + b"odd" + b"far")
        room = guest.fs_statvfs(layer_id="base")
        assert (room.filesystem, room.readonly) == ("erofs", True)
        ours, theirs = guest.fs_lstat("etc/motd", layer_id="base"), os.lstat(source / "etc/motd")
        assert (ours.mode, ours.size_bytes, ours.links) == (0o640, 6, 2)
        assert ours.mtime_ns == theirs.st_mtime_ns


def test_an_archive_of_a_layer_unpacks_to_its_source(guest: GuestAgent, tmp_path: Path) -> None:
    source = make_source(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    with mounted(guest, make_image(source, tmp_path / "image")):
        blob = io.BytesIO()
        guest.fs_tar_out("/", blob, layer_id="base")
    subprocess.run(["tar", "-xpf", "-", "-C", copy], input=blob.getvalue(), check=True)
    there, here = below(copy), below(source)
    assert set(there) == set(here)
    assert digests(copy) == digests(source)
    for path, status in here.items():
        assert (there[path].st_mode, there[path].st_rdev) == (status.st_mode, status.st_rdev)
        assert int(there[path].st_mtime) == int(status.st_mtime)
    with tarfile.open(fileobj=io.BytesIO(blob.getvalue())) as archive:
        assert sum(member.islnk() for member in archive) == 1


def test_attributes_and_lists_of_a_layer(guest: GuestAgent, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    nobody = 0xFFFFFFFF
    acl = [(1, 6, nobody), (2, 5, 1000), (4, 4, nobody), (16, 5, nobody), (32, 0, nobody)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in acl)
    try:
        os.setxattr(source / "file", "trusted.key", b"\0\xff")
        os.setxattr(source / "file", "system.posix_acl_access", value)
    except OSError as error:
        pytest.skip(f"this file system has no attributes: {source}: {error}")
    with mounted(guest, make_image(source, tmp_path / "image")):
        found = guest.fs_getxattrs("file", layer_id="base")
        assert found[b"trusted.key"] == b"\0\xff"
        text = guest.fs_acl_get_file("file", layer_id="base").text
        assert text.split() == [
            "user::rw-", "user:1000:r-x", "group::r--", "mask::r-x", "other::---",
        ]  # fmt: skip
        blob = io.BytesIO()
        guest.fs_tar_out("/", blob, layer_id="base")
        with tarfile.open(fileobj=io.BytesIO(blob.getvalue())) as archive:
            headers = archive.getmember("./file").pax_headers
        assert headers["SCHILY.acl.access"] == (
            "user::rw-,user:1000:r-x,group::r--,mask::r-x,other::---"
        )


def test_numbers_past_64_bits_are_told_as_the_nearest(guest: GuestAgent, tmp_path: Path) -> None:
    """An image may state any time and size: seconds of 64 bits, and sums of sizes."""
    size, most = 123_456_789, (1 << 63) - 1
    members = [
        Member(".", kind=tarfile.DIRTYPE, mode=0o755, mtime=most),
        Member("future", mtime=most),
        Member("past", mtime=-(1 << 62)),
        *(Member(name, bytes(size % 4096), mtime=5, uid=70_000) for name in "abc"),
    ]
    (tmp_path / "tar").write_bytes(make_tar(members))
    image = tmp_path / "image"
    build_image(tmp_path / "tar", image)
    stated = struct.pack("<Q", size % 4096)
    assert image.read_bytes().count(stated) == 3
    image.write_bytes(image.read_bytes().replace(stated, struct.pack("<Q", most)))
    with mounted(guest, image):
        times = {entry.name: entry.mtime_ns for entry in guest.fs_readdir("/", layer_id="base")}
        bounds = (-(1 << 63), (1 << 64) - 1)
        assert (times[b"past"], times[b"future"], times[b"a"]) == (*bounds, 5_000_000_000)
        assert guest.fs_lstat("future", layer_id="base").mtime_ns == bounds[1]
        assert guest.fs_du("/", layer_id="base").size_bytes == bounds[1]
        report = guest.overlay_mount(overlay("o", "base", scratch=TmpfsScratch(size_bytes=1 << 20)))
        assert report.state == "mounted"


def test_nothing_of_a_hostile_layer_is_opened_or_followed_out(
    guest: GuestAgent, tmp_path: Path
) -> None:
    source = make_source(tmp_path)
    with mounted(guest, make_image(source, tmp_path / "image")):
        for path in ("fifo", "kmsg", "disk", "etc", "link/../../etc"):
            with call_error("invalid"):
                guest.fs_read_file(path, layer_id="base")
        for path in ("out", "/proc/self/environ", "../../../../etc/passwd"):
            with call_error("not_found"):
                guest.fs_read_file(path, layer_id="base")
        assert guest.fs_read_file("../../link", layer_id="base") == b"hello\n"


def test_an_overlay_shows_layers_and_changes_and_no_mounts_inside(
    guest: GuestAgent, tmp_path: Path
) -> None:
    source = make_source(tmp_path)
    with mounted(guest, make_image(source, tmp_path / "image")):
        spec = overlay("all", "base", scratch=TmpfsScratch(size_bytes=8 << 20))
        target = Path(guest.overlay_mount(spec).target)
        (target / "new").write_bytes(b"new")
        (target / "etc" / "motd").write_bytes(b"changed\n")
        (target / "link").unlink()
        (target / "mnt").mkdir()
        syscalls.mount("inner", str(target / "mnt"), "tmpfs")
        try:
            (target / "mnt" / "hidden").write_bytes(b"not of the overlay")
            found = guest.fs_checksums(overlay_id="all")
            assert found[b"etc/motd"].digest == hashlib.sha256(b"changed\n").hexdigest()
            assert b"new" in found
            assert b"link" not in found
            assert b"mnt/hidden" not in found
            assert not guest.fs_exists("/mnt/hidden", overlay_id="all")
        finally:
            syscalls.umount2(str(target / "mnt"))
        assert guest.fs_read_file("/etc/motd", layer_id="base") == b"hello\n"


def corrupt_block(image: Path, number: int) -> None:
    """Change a byte in the block of the file ``blocks`` that bears this number."""
    data = image.read_bytes()
    start = data.index(MARKER.ljust(BLOCK_BYTES, b".") * 40) + number * BLOCK_BYTES
    with open(image, "r+b") as file:
        file.seek(start + 100)
        file.write(b"!")


@contextlib.contextmanager
def corrupt_layer(guest: GuestAgent, tmp_path: Path, number: int) -> Iterator[str]:
    """Mount a layer whose one file has a corrupt block; yields its device."""
    image = make_image(make_source(tmp_path), tmp_path / "image")
    with attached(image, "base") as spec:
        corrupt_block(image, number)
        # the loop device may have read the block already
        assert isinstance(spec.device, PathDevice)
        run("blockdev", "--flushbufs", spec.device.path)
        guest.layer_mount(spec)
        try:
            yield spec.device.path
        finally:
            for report in guest.overlay_list():
                guest.overlay_unmount(report.overlay_id)
            guest.layer_unmount("base")


def test_a_corrupt_block_is_told_with_layer_and_byte(guest: GuestAgent, tmp_path: Path) -> None:
    with corrupt_layer(guest, tmp_path, 33):
        path = "/etc/deep/blocks"
        for read in (guest.fs_read_file, guest.fs_checksum):
            with pytest.raises(CallError) as refused:
                read(path, layer_id="base")
            error = refused.value
            assert (error.code, error.object) == ("integrity", "base")
            assert f"'{path}' at byte {33 * BLOCK_BYTES} of layer 'base'" in error.message
        with call_error("integrity", match="blocks"):
            guest.fs_checksums(layer_id="base")
        with call_error("integrity"):
            guest.fs_tar_out_stream(layer_id="base").drain()
        # everything else can still be read
        assert guest.fs_read_file("/etc/motd", layer_id="base") == b"hello\n"
        assert len(guest.fs_pread(path, 0, 32768, layer_id="base")) == 32768


def test_a_corrupt_layer_below_an_overlay_is_named(guest: GuestAgent, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"fine")
    with (
        mounted(guest, make_image(other, tmp_path / "other.img"), "good"),
        corrupt_layer(guest, tmp_path, 0),
    ):
        guest.overlay_mount(overlay("all", "good", "base"))
        with call_error("integrity", object="base", match="at byte 0 of overlay 'all'"):
            guest.fs_read_file("/etc/deep/blocks", overlay_id="all")
        assert guest.fs_read_file("/file", overlay_id="all") == b"fine"


def test_a_corrupt_device_is_told_with_layer_and_byte(guest: GuestAgent, tmp_path: Path) -> None:
    with corrupt_layer(guest, tmp_path, 3):
        node = next(d.node for d in guest.layer_get("base").dm if d.target_type == "verity")
        with call_error("integrity", object="base", match="at byte"):
            guest.fs_checksum_device(node)


def test_a_disk_that_fails_is_no_matter_of_integrity(guest: GuestAgent, tmp_path: Path) -> None:
    image = make_image(make_source(tmp_path), tmp_path / "image")
    start = image.read_bytes().index(MARKER) // 512
    sectors = image.stat().st_size // 512
    with loop_device(image) as node:
        table = (
            f"0 {start} linear {node} 0\n{start} 8 error\n"
            f"{start + 8} {sectors - start - 8} linear {node} {start + 8}\n"
        )
        done = subprocess.run(
            ["dmsetup", "create", "failing", "--readonly", "--noudevsync"],
            input=table, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        try:
            number = run("dmsetup", "info", "-c", "--noheadings", "-o", "minor", "failing")
            device = PathDevice(path=f"/dev/dm-{number.strip()}")
            guest.layer_mount(LayerSpec(layer_id="plain", device=device, filesystem="erofs"))
            with call_error("device", match="at byte 0 of layer 'plain'") as refused:
                guest.fs_checksum("/etc/deep/blocks", layer_id="plain")
            assert "EIO" in refused.value.message
            guest.layer_unmount("plain")
        finally:
            run("dmsetup", "remove", "--retry", "failing")


def test_a_layer_that_is_looked_at_is_busy_and_then_goes(guest: GuestAgent, tmp_path: Path) -> None:
    with attached(make_image(make_source(tmp_path), tmp_path / "image"), "base") as spec:
        guest.layer_mount(spec)
        guest.overlay_mount(overlay("all", "base", scratch=TmpfsScratch(size_bytes=8 << 20)))
        with open(Path(guest.overlay_list()[0].target) / "sparse", "wb") as file:
            file.truncate(100 * GIB)
        with guest.fs_download_stream("sparse", overlay_id="all") as pieces:
            next(pieces)
            with call_error("busy"):
                guest.overlay_unmount("all")
        guest.overlay_unmount("all")
        guest.layer_unmount("base")
        assert guest.dm_list().devices == ()


def test_memory_stays_flat(agent: AgentProcess, guest: GuestAgent, tmp_path: Path) -> None:
    assert agent.process is not None
    with mounted(guest, make_image(make_source(tmp_path), tmp_path / "image")):
        spec = overlay("all", "base", scratch=TmpfsScratch(size_bytes=64 << 20))
        target = Path(guest.overlay_mount(spec).target)
        with open(target / "sparse", "wb") as file:
            file.truncate(100 * GIB)
        (target / "crowd").mkdir()
        for number in range(5000):
            os.mknod(target / "crowd" / f"entry number {number}")
        guest.fs_checksums("/etc", overlay_id="all")
        guest.fs_ls("/crowd", overlay_id="all").drain()
        before = rss_bytes(agent.process.pid)
        assert sum(1 for _ in guest.fs_readdir("/crowd", overlay_id="all")) == 5000
        guest.fs_download_stream("sparse", overlay_id="all", size_bytes=64 << 20).drain()
        with call_error("timeout"):
            guest.fs_checksum("sparse", overlay_id="all", deadline_ms=500)
        guest.fs_tar_out_stream("/crowd", overlay_id="all").drain()
        grown = rss_bytes(agent.process.pid) - before
        assert grown < 1 << 20, f"{grown} bytes more"


# --- devices


def test_devices_and_what_is_on_them(guest: GuestAgent, tmp_path: Path) -> None:
    uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    erofs = make_image(make_source(tmp_path), tmp_path / "erofs", f"-U{uuid}")
    ext4 = tmp_path / "ext4"
    with open(ext4, "wb") as file:
        file.truncate(4 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-L", "a label", "-U", uuid, ext4)
    blank = tmp_path / "blank"
    blank.write_bytes(bytes(1 << 20))
    with loop_device(erofs) as a, loop_device(ext4, readonly=False) as b, loop_device(blank) as c:
        listed = {info.node: info for info in guest.fs_list_devices()}
        assert {a, b, c} <= set(listed)
        assert listed[a].size_bytes == erofs.stat().st_size
        filesystems = guest.fs_list_filesystems()
        assert (filesystems[a], filesystems[b], filesystems[c]) == ("erofs", "ext4", "unknown")
        assert [guest.fs_vfs_type(node) for node in (a, b)] == ["erofs", "ext4"]
        assert [guest.fs_vfs_uuid(node) for node in (a, b)] == [uuid, uuid]
        assert [guest.fs_vfs_label(node) for node in (a, b, c)] == ["", "a label", ""]
        assert guest.fs_blockdev_getsize64(b) == 4 << 20
        assert [guest.fs_blockdev_getro(node) for node in (a, b)] == [True, False]
        digest = hashlib.sha256(erofs.read_bytes()).hexdigest()
        assert guest.fs_checksum_device(a).digest == digest


@pytest.mark.parametrize(
    ("device", "code"),
    [("/dev/null", "invalid"), ("/dev/nothing", "not_found"), ("/dev/../etc", "refused")],
)
def test_path_that_is_no_block_device_is_refused(guest: GuestAgent, device: str, code: str) -> None:
    if code == "refused":
        with pytest.raises(ValueError, match="normal"):
            guest.fs_checksum_device(device)
        return
    for ask in (guest.fs_vfs_type, guest.fs_blockdev_getro, guest.fs_checksum_device):
        with call_error(code):
            ask(device)


def test_mounts_features_and_versions(guest: GuestAgent, tmp_path: Path) -> None:
    with mounted(guest, make_image(make_source(tmp_path), tmp_path / "image")):
        report = guest.layer_get("base")
        mount = next(m for m in guest.fs_mountpoints() if m.target == report.target)
        assert (mount.filesystem, mount.dev, mount.mount_id) == (
            "erofs",
            report.dev,
            report.mount_id,
        )
    reply = guest.fs_available("dm-verity", "flying")
    assert (reply.available, reply.missing) == (("dm-verity",), ("flying",))
    version = guest.fs_version()
    assert (version.kernel, version.agent) == (os.uname().release, guest.hello.agent)
