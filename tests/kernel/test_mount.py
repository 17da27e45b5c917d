"""Targets, mounts and unmounts against a real kernel, and the attacks on them.

Runs in User Mode Linux (6.1) and, as root, on any kernel with loop devices: the process gets a
mount namespace of its own first.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.storage import mount, syscalls
from guestagent.storage.fscontext import FsContextError, attach
from guestagent.storage.holders import find_holders
from guestagent.storage.kmsg import KernelLog
from guestagent.storage.mountinfo import find_mount, mounts_of_dev, read_mounts
from tests.beds import dmbed
from tests.beds.calls import at_once, call_error
from vsock.deadline import Deadline
from vsock.errors import CallError

pytestmark = pytest.mark.kernel

METHODS = ("fsconfig", "mount")
FILES = {"hello": b"hello, layer\n", "big": bytes(range(256)) * 64}


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    dmbed.isolate_mounts()
    with dmbed.no_leaks():
        yield


@pytest.fixture
def erofs(tmp_path: Path) -> Iterator[str]:
    with dmbed.loop_device(dmbed.erofs_image(tmp_path, "layer", FILES)) as node:
        yield node


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "target"
    path.mkdir()
    yield str(path)
    while find_mount(str(path)) is not None:
        mount.unmount(str(path))


# --- target directories -----------------------------------------------------------------------


def test_a_target_is_made_and_unmade(tmp_path: Path) -> None:
    root = str(tmp_path)
    (tmp_path / "kept").mkdir(mode=0o750)
    with mount.TargetDirectory(f"{root}/kept/a/b", root=root) as target:
        assert target.created == (f"{root}/kept/a", f"{root}/kept/a/b")
        assert os.stat(f"{root}/kept/a/b").st_mode & 0o777 == 0o700
        assert os.readlink(f"/proc/self/fd/{target.fd}") == f"{root}/kept/a/b"
    assert target.remove_created() == (f"{root}/kept/a/b", f"{root}/kept/a")
    assert target.remove_created() == ()
    assert os.listdir(f"{root}/kept") == []


def test_target_directory_in_use_is_not_removed(tmp_path: Path) -> None:
    with mount.TargetDirectory(f"{tmp_path}/a/b", root=str(tmp_path)) as target:
        (tmp_path / "a" / "other").mkdir()
        (tmp_path / "a" / "b" / "file").touch()
    assert target.remove_created() == ()
    (tmp_path / "a" / "b" / "file").unlink()
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("name", ["file", ".hidden"])
def test_a_target_with_entries_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).touch()
    before = os.listdir("/proc/self/fd")
    with call_error("conflict", match="not empty", object=f"{tmp_path}/a"):
        mount.TargetDirectory(f"{tmp_path}/a", root=str(tmp_path))
    assert os.listdir("/proc/self/fd") == before


def test_a_missing_root_is_made_in_its_directory(tmp_path: Path) -> None:
    root = f"{tmp_path}/root"
    with mount.TargetDirectory(f"{root}/a", root=root) as target:
        assert target.created == (root, f"{root}/a")
    assert target.remove_created() == (f"{root}/a", root)


def test_a_target_that_was_there_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with mount.TargetDirectory(f"{tmp_path}/a", root=str(tmp_path)) as target:
        assert target.created == ()
    assert target.remove_created() == ()
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("tail", ["", "/", "/../x", "/a/../b", "/./a", "/a//b", "/a/", "x/a"])
def test_targets_outside_the_root_are_refused(tmp_path: Path, tail: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with call_error("invalid", step="target"):
        mount.TargetDirectory(f"{root}{tail}", root=str(root))
    assert os.listdir(tmp_path) == ["root"]


@pytest.mark.parametrize("where", ["first", "first/middle", "first/middle/last"])
@pytest.mark.parametrize("destination", ["ABSOLUTE", ".", "../../outside", "nowhere"])
def test_links_on_the_way_are_refused(tmp_path: Path, where: str, destination: str) -> None:
    root = tmp_path / "root"
    (root / where).parent.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / where).symlink_to(tmp_path / "outside" if destination == "ABSOLUTE" else destination)
    with call_error("denied", errno=errno.ELOOP, object=f"{root}/{where}"):
        mount.TargetDirectory(f"{root}/first/middle/last", root=str(root))
    assert os.listdir(tmp_path / "outside") == []


def test_magic_links_are_refused() -> None:
    process = f"/proc/{os.getpid()}"
    for name in ("root", "cwd"):
        with call_error("denied"):
            mount.TargetDirectory(f"{process}/{name}/tmp", root=process, create=False)


def test_a_file_on_the_way_is_a_conflict(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("file", "file/below"):
        with call_error("conflict", errno=errno.ENOTDIR):
            mount.TargetDirectory(f"{tmp_path}/{path}", root=str(tmp_path))


def test_a_refused_target_leaves_no_directories(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to("/")
    with pytest.raises(CallError):
        mount.TargetDirectory(f"{tmp_path}/a/link/new", root=str(tmp_path))
    assert os.listdir(tmp_path / "a") == ["link"]
    with pytest.raises(FileNotFoundError):
        mount.TargetDirectory(f"{tmp_path}/a/new", root=str(tmp_path), create=False)


def test_a_missing_root_is_no_invitation(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mount.TargetDirectory(f"{tmp_path}/none/root/a", root=f"{tmp_path}/none/root")
    assert os.listdir(tmp_path) == []


def test_a_mount_point_is_a_conflict(erofs: str, target: str, tmp_path: Path) -> None:
    mount.mount_filesystem(source=erofs, target=target, filesystem="erofs")
    with call_error("conflict", match="mount point"):
        mount.TargetDirectory(target, root=str(tmp_path))


def test_targets_made_and_unmade_at_once(tmp_path: Path) -> None:
    """Each request removes the shared parent if it can, while others are on their way down."""

    def work(number: int) -> None:
        for _ in range(50):
            path = f"{tmp_path}/shared/{number}"
            with mount.TargetDirectory(path, root=str(tmp_path)) as target:
                assert os.path.isdir(path)
            target.remove_created()

    at_once(work, range(4))


def test_a_swapped_target_does_not_move_the_mount(erofs: str, tmp_path: Path) -> None:
    """Between opening and mounting somebody puts a link where the target was."""
    (tmp_path / "victim").mkdir()
    for method in METHODS:
        with mount.TargetDirectory(f"{tmp_path}/target", root=str(tmp_path)) as target:
            (tmp_path / "target").rename(tmp_path / "moved")
            (tmp_path / "target").symlink_to(tmp_path / "victim")
            mount.mount_filesystem(
                source=erofs, target=target.fd, filesystem="erofs", method=method
            )
        assert os.listdir(tmp_path / "victim") == []
        assert (tmp_path / "moved" / "hello").exists()
        mount.unmount(f"{tmp_path}/moved")
        (tmp_path / "target").unlink()
        (tmp_path / "moved").rmdir()


# --- mounting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_readonly_and_inert(
    erofs: str, target: str, tmp_path: Path, method: str
) -> None:
    with mount.TargetDirectory(target, root=str(tmp_path)) as directory:
        used = mount.mount_filesystem(
            source=erofs, target=directory.fd, filesystem="erofs", method=method
        )
    assert used == method
    found = find_mount(target)
    assert found is not None
    assert (found.filesystem, found.source, found.root) == ("erofs", erofs, "/")
    assert found.dev == dmbed.dev_of(erofs)
    assert {"ro", "nosuid", "nodev"} <= set(found.options)
    assert "ro" in found.super_options
    assert {name: Path(target, name).read_bytes() for name in os.listdir(target)} == FILES
    with pytest.raises(OSError, match="Read-only"):
        Path(target, "new").touch()
    assert mounts_of_dev(found.dev) == (found,)
    mount.unmount(target)
    assert find_mount(target) is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (("ro", "noexec"), {"ro", "noexec", "relatime"}),
        (("ro", "noatime", "nodiratime"), {"ro", "noatime", "nodiratime"}),
        (("nodev",), {"rw", "nodev", "relatime"}),
    ],
)
def test_flags(target: str, method: str, flags: tuple[str, ...], shown: set[str]) -> None:
    mount.mount_filesystem(
        source="scratch",
        target=target,
        filesystem="tmpfs",
        flags=flags,
        options=[("size", "1m"), ("mode", "0711")],
        method=method,
    )
    found = find_mount(target)
    assert found is not None
    assert set(found.options) == shown
    assert "size=1024k" in found.super_options


@pytest.mark.parametrize("method", METHODS)
def test_kernel_message_about_garbage_is_in_the_error(
    target: str, tmp_path: Path, method: str
) -> None:
    image = tmp_path / "garbage"
    image.write_bytes(b"garbage!" * 8192)
    log = KernelLog()
    mark = log.mark()
    with dmbed.loop_device(image) as node:
        with pytest.raises(FsContextError) as caught:
            mount.mount_filesystem(source=node, target=target, filesystem="erofs", method=method)
        lines = (*caught.value.log, *log.since(mark))
    log.close()
    assert caught.value.errno == errno.EINVAL
    assert caught.value.step == "mount-create"
    assert caught.value.filename == node
    assert any("erofs" in line and "superblock" in line for line in lines)
    assert find_mount(target) is None


@pytest.mark.parametrize("method", METHODS)
def test_refusals_have_a_step(target: str, tmp_path: Path, method: str) -> None:
    def refused(filesystem: str, *options: tuple[str, str | None], source: str = "none") -> str:
        with pytest.raises(FsContextError) as caught:
            mount.mount_filesystem(
                source=source,
                target=target,
                filesystem=filesystem,
                options=options,
                method=method,
            )
        return f"{caught.value.step} {errno.errorcode[caught.value.errno or 0]}"

    by_fsconfig = method == "fsconfig"
    assert refused("no-such-type") == f"mount-{'open' if by_fsconfig else 'create'} ENODEV"
    option_step = "mount-option" if by_fsconfig else "mount-create"
    assert refused("tmpfs", ("no-such-option", None)) == f"{option_step} EINVAL"
    assert refused("erofs", source=f"{tmp_path}/none") == "mount-create ENOENT"


def test_options_cannot_smuggle_options(target: str) -> None:
    with pytest.raises(ValueError, match="comma"):
        mount.mount_filesystem(
            source="t",
            target=target,
            filesystem="tmpfs",
            options=[("size", "1m,mode=777")],
            method="mount",
        )
    with pytest.raises(ValueError, match="null byte"):
        mount.mount_filesystem(source="t\0", target=target, filesystem="tmpfs")
    with pytest.raises(ValueError, match="flag"):
        mount.mount_filesystem(source="t", target=target, filesystem="tmpfs", flags=("suid",))


def test_options_past_one_page_are_refused_not_cut(target: str) -> None:
    with pytest.raises(OSError, match="4096 bytes") as caught:
        syscalls.mount("t", target, "tmpfs", 0, "x" * 4096)
    assert caught.value.errno == errno.E2BIG
    assert find_mount(target) is None


def test_a_detached_mount_is_nowhere_until_attached(erofs: str, target: str) -> None:
    fd = mount.open_detached(source=erofs, filesystem="erofs")
    try:
        assert mounts_of_dev(dmbed.dev_of(erofs)) == ()
        inner = os.open("hello", os.O_RDONLY, dir_fd=fd)
        assert os.read(inner, 100) == FILES["hello"]
        os.close(inner)
        attach(fd, target)
    finally:
        os.close(fd)
    assert len(mounts_of_dev(dmbed.dev_of(erofs))) == 1


# --- unmounting ---------------------------------------------------------------------------------


def test_a_busy_mount_is_not_detached_and_its_holders_are_named(erofs: str, target: str) -> None:
    mount.mount_filesystem(source=erofs, target=target, filesystem="erofs")
    fd = os.open(f"{target}/hello", os.O_RDONLY)
    with pytest.raises(OSError, match="umount2") as caught:
        mount.unmount(target)
    assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, target)
    holders = find_holders(dmbed.dev_of(erofs), Deadline(10), target=target)
    assert [holder.kind for holder in holders] == ["process"]
    assert f"[{os.getpid()}]" in holders[0].name
    assert f"fd {fd} ({target}/hello)" in holders[0].detail
    os.close(fd)
    assert find_holders(dmbed.dev_of(erofs), Deadline(10), target=target) == ()
    mount.unmount(target)


def test_find_holders_names_bind_mount_and_overlay_of_mount(
    erofs: str, target: str, tmp_path: Path
) -> None:
    mount.mount_filesystem(source=erofs, target=target, filesystem="erofs")
    other, merged = tmp_path / "other", tmp_path / "merged"
    other.mkdir()
    merged.mkdir()
    syscalls.mount(target, str(other), None, syscalls.MS_BIND)
    syscalls.mount("overlay", str(merged), "overlay", syscalls.MS_RDONLY, f"lowerdir={target}:/etc")
    found = find_holders(dmbed.dev_of(erofs), Deadline(10), target=target)
    assert {(holder.kind, holder.name) for holder in found} == {
        ("mount", str(other)),
        ("overlay", str(merged)),
    }
    mount.unmount(str(merged))
    mount.unmount(str(other))


def test_mounts_in_other_namespaces_are_seen(erofs: str, target: str) -> None:
    mount.mount_filesystem(source=erofs, target=target, filesystem="erofs")
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        os.write(ready[1], b"1")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    mount.unmount(target)  # ours is gone, theirs is not: the device is still in use
    found = find_holders(dmbed.dev_of(erofs), Deadline(10), target=target)
    os.write(done[1], b"1")
    os.waitpid(pid, 0)
    for fd in (*ready, *done):
        os.close(fd)
    assert [(holder.kind, holder.name) for holder in found] == [("mount", target)]
    assert f"process {pid}" in found[0].detail


def test_unmount_takes_the_topmost_and_follows_no_link(
    erofs: str, target: str, tmp_path: Path
) -> None:
    mount.mount_filesystem(source=erofs, target=target, filesystem="erofs")
    first = find_mount(target)
    mount.mount_filesystem(source="over", target=target, filesystem="tmpfs")
    second = find_mount(target)
    assert first is not None
    assert second is not None
    assert (first.filesystem, second.filesystem) == ("erofs", "tmpfs")
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(OSError, match="umount2"):
        mount.unmount(str(link))
    parent_link = tmp_path / "parent"
    parent_link.symlink_to(tmp_path)
    with pytest.raises(OSError, match="openat2") as caught:
        mount.unmount(f"{parent_link}/target")
    assert caught.value.errno == errno.ELOOP
    mount.unmount(target)
    assert find_mount(target) == first
    mount.unmount(target)
    with pytest.raises(OSError, match="umount2") as caught:
        mount.unmount(target)
    assert caught.value.errno == errno.EINVAL


def test_odd_names_come_back_whole(tmp_path: Path) -> None:
    name = os.fsdecode(b"sp ace\ttab\nline back\\slash \xff#hash")
    target = f"{tmp_path}/{name}"
    os.mkdir(target)
    mount.mount_filesystem(source="odd # source", target=target, filesystem="tmpfs")
    found = find_mount(target)
    assert found is not None
    assert (found.target, found.source) == (target, "odd # source")
    assert found in read_mounts()
    mount.unmount(target)


def test_two_requests_may_make_the_root_of_targets_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other request is played between our look and our mkdir, where no event can be awaited."""
    root = tmp_path / "layers"
    make = os.mkdir

    def make_after_another(path: str, *args: int, **options: int) -> None:
        if path == str(root):
            make(path)
        make(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", make_after_another)
    with mount.TargetDirectory(str(root / "a"), root=str(root)) as target:
        assert target.created == (str(root / "a"),)
