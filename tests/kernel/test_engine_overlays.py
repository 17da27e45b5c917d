"""Overlays: up to 500 layers in the right order, scratches of every kind, options, full disks."""

import contextlib
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import (
    DeviceScratch,
    DirectoryScratch,
    LayersMount,
    LayerSpec,
    LayersUnmount,
    OverlayOptions,
    OverlayReport,
    OverlaySpec,
    PathDevice,
    TmpfsScratch,
)
from guestagent.engine.state import Rules
from guestagent.storage.mountinfo import find_mount
from tests.beds.agentbed import EngineBed, Pack, overlay, who
from tests.beds.calls import call_error, run
from tests.beds.dmbed import loop_device
from tests.beds.loopbed import sparse_file
from vsock.errors import CallError

PACK_LAYERS = 3
MANY = 500


@pytest.fixture
def bed(tmp_path: Path, pack: Pack) -> Iterator[EngineBed]:
    """An engine with three layers."""
    with EngineBed(tmp_path / "state") as bed:
        request = LayersMount(layers=tuple(pack.spec(number) for number in range(3)))
        bed.ask(bed.engine.batches.mount, request)
        yield bed


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    image = sparse_file(tmp_path / "disk.img", 8 << 20)
    with loop_device(image, readonly=False) as node:
        yield node


def mount(bed: EngineBed, spec: OverlaySpec) -> OverlayReport:
    return bed.ask(bed.engine.overlays.mount, spec)


def unmount(bed: EngineBed, name: str = "o") -> None:
    bed.ask(bed.engine.overlays.unmount, name)


def refused(bed: EngineBed, spec: OverlaySpec) -> CallError:
    error = bed.refusal(lambda op: bed.engine.overlays.mount(spec, op))
    assert error.step
    return error


def test_read_only_topmost_first(bed: EngineBed, pack: Pack) -> None:
    report = mount(bed, overlay("o", "layer2", "layer0", "layer1"))
    assert who(report.target) == pack.layers[2].marker
    assert report.lowerdirs == tuple(f"/run/layers/layer{n}" for n in (2, 0, 1))
    assert "ro" in report.options
    with pytest.raises(OSError, match="Read-only"):
        Path(report.target, "new").write_text("")
    assert mount(bed, overlay("o", "layer2", "layer0", "layer1")).already
    assert refused(bed, overlay("o", "layer0")).code == "conflict"


def test_a_single_layer(bed: EngineBed, pack: Pack) -> None:
    report = mount(bed, overlay("o", "layer1"))
    assert who(report.target) == pack.layers[1].marker
    assert report.lowerdirs == ("/run/layers/layer1",)


def test_layers_are_shared_and_stay_until_the_last(bed: EngineBed) -> None:
    mount(bed, overlay("o", "layer0", "layer1"))
    mount(bed, overlay("p", "layer1", "layer2"))
    assert bed.engine.layers.get("layer1").used_by == ("o", "p")
    unmount(bed, "o")
    with bed.operation() as op, call_error("busy"):
        bed.engine.layers.unmount("layer1", op, force=True)
    unmount(bed, "p")
    with bed.operation() as op:
        assert bed.engine.layers.unmount("layer1", op).unmounted


def test_tmpfs_scratch(bed: EngineBed) -> None:
    report = mount(bed, overlay("o", "layer0", scratch=TmpfsScratch(size_bytes=65536)))
    assert report.scratch is not None
    assert (report.scratch.kind, report.scratch.size_bytes) == ("tmpfs", 65536)
    assert find_mount(report.scratch.path) is not None
    Path(report.target, "who").write_text("changed")
    assert who("/run/layers/layer0") != b"changed"
    with pytest.raises(OSError, match="No space left"):
        Path(report.target, "large").write_bytes(bytes(1 << 20))
    (told,) = bed.engine.overlays.list()
    assert told.scratch is not None
    assert told.scratch.free_bytes == 0
    unmount(bed)
    assert find_mount(report.scratch.path) is None
    fresh = mount(bed, overlay("o", "layer0", scratch=TmpfsScratch(size_bytes=65536)))
    assert Path(fresh.target, "who").read_bytes() != b"changed"


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_device_scratch_keeps_what_was_written(
    bed: EngineBed, tmp_path: Path, filesystem: str
) -> None:
    image = sparse_file(tmp_path / "disk.img", (8 if filesystem == "ext4" else 320) << 20)
    with loop_device(image, readonly=False) as node:
        scratch = DeviceScratch(
            device=PathDevice(path=node), filesystem=filesystem, ensure_filesystem=True
        )
        first = mount(bed, overlay("o", "layer0", scratch=scratch))
        assert first.scratch is not None
        assert (first.scratch.formatted, first.scratch.filesystem) == (True, filesystem)
        Path(first.target, "kept").write_text("kept")
        unmount(bed)
        refusal = refused(bed, overlay("o", "layer0", scratch=scratch))
        assert (refusal.code, refusal.step) == ("conflict", "format")
        adopted = scratch.replace(existing="adopt")
        again = mount(bed, overlay("o", "layer0", scratch=adopted))
        assert again.scratch is not None
        assert not again.scratch.formatted
        assert Path(again.target, "kept").read_text() == "kept"
        unmount(bed)
        fresh = mount(bed, overlay("o", "layer0", scratch=scratch.replace(existing="fresh")))
        assert fresh.scratch is not None
        assert fresh.scratch.formatted
        assert not Path(fresh.target, "kept").exists()
        unmount(bed)


def test_directory_scratch(bed: EngineBed) -> None:
    directory = Path("/run/changes")
    directory.mkdir()
    scratch = DirectoryScratch(path=str(directory))
    report = mount(bed, overlay("o", "layer0", scratch=scratch))
    Path(report.target, "new").write_text("new")
    refusal = refused(bed, overlay("p", "layer1", scratch=scratch))
    assert refusal.code == "conflict"
    assert "'o'" in refusal.message
    unmount(bed)
    assert (directory / "upper/new").read_text() == "new"
    refusal = refused(bed, overlay("o", "layer0", scratch=scratch))
    assert (refusal.code, refusal.object) == ("conflict", f"{directory}/upper")
    adopted = mount(bed, overlay("o", "layer0", scratch=scratch.replace(existing="adopt")))
    assert Path(adopted.target, "new").read_text() == "new"
    unmount(bed)
    for name in ("upper/new", "work/work", "work/index", "upper", "work", ""):
        path = directory / name
        if path.is_file():
            path.unlink()
        elif path.is_dir():
            path.rmdir()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"target": "/run/changes/merged"}, "conflict"),
        ({"target": "/run/layers/layer1"}, "conflict"),
        ({"target": "/run/layers/layer1/inside"}, "conflict"),
        ({"scratch": DirectoryScratch(path="/run/no-such")}, "mount"),
        ({"scratch": DirectoryScratch(path="/run/layers/layer0")}, "conflict"),
        ({"scratch": DirectoryScratch(path="/etc")}, "invalid"),
        ({"scratch": DeviceScratch(device=PathDevice(path="/dev/null"))}, "invalid"),
    ],
)
def test_contradicting_overlay_options_are_refused(
    bed: EngineBed, fields: dict[str, object], code: str
) -> None:
    directory = Path("/run/changes")
    directory.mkdir()
    try:
        base: dict[str, object] = {"scratch": DirectoryScratch(path=str(directory))}
        assert refused(bed, overlay("o", "layer0", **{**base, **fields})).code == code
    finally:
        directory.rmdir()


def test_a_link_in_a_scratch_is_not_followed(bed: EngineBed) -> None:
    directory = Path("/run/changes")
    directory.mkdir()
    (directory / "upper").symlink_to("/etc")
    scratch = DirectoryScratch(path=str(directory))
    try:
        assert refused(bed, overlay("o", "layer0", scratch=scratch)).code == "denied"
    finally:
        (directory / "upper").unlink()
        directory.rmdir()


def test_ensure_filesystem_keeps_existing_data_of_scratch_disk(bed: EngineBed, disk: str) -> None:
    with open(disk, "r+b") as file:
        file.write(b"data of somebody")
    scratch = DeviceScratch(device=PathDevice(path=disk), ensure_filesystem=True)
    assert refused(bed, overlay("o", "layer0", scratch=scratch)).code == "conflict"
    with open(disk, "rb") as file:
        assert file.read(16) == b"data of somebody"


def test_a_read_only_disk_and_an_empty_one_are_no_scratch(
    bed: EngineBed, pack: Pack, disk: str, tmp_path: Path
) -> None:
    (tmp_path / "readonly").write_bytes(bytes(1 << 20))
    with loop_device(tmp_path / "readonly") as node:
        readonly = DeviceScratch(device=PathDevice(path=node))
        assert refused(bed, overlay("o", "layer0", scratch=readonly)).code == "invalid"
    layers = DeviceScratch(device=PathDevice(path=pack.node))
    assert refused(bed, overlay("o", "layer0", scratch=layers)).code == "conflict"
    empty = DeviceScratch(device=PathDevice(path=disk))
    error = refused(bed, overlay("o", "layer0", scratch=empty))
    assert "has no file system" in error.message
    assert "ensure_filesystem" in (error.hint or "")


def test_a_scratch_device_of_another_overlay_is_named(bed: EngineBed, disk: str) -> None:
    scratch = DeviceScratch(device=PathDevice(path=disk), ensure_filesystem=True)
    with bed.operation() as op:
        bed.engine.overlays.mount(overlay("o", "layer0", scratch=scratch), op)
    try:
        error = refused(bed, overlay("p", "layer0", scratch=scratch.replace(existing="adopt")))
        assert (error.code, error.message) == ("conflict", f"{disk} is the scratch of overlay 'o'")
    finally:
        with bed.operation() as op:
            bed.engine.overlays.unmount("o", op)


def test_a_full_scratch_is_named(bed: EngineBed, tmp_path: Path) -> None:
    """A scratch with no inode for its directories: the error says which file system is full."""
    image = tmp_path / "full.img"
    run("mke2fs", "-q", "-t", "ext4", "-N", "16", "-O", "^has_journal", image, "1M")
    with loop_device(image, readonly=False) as node:
        run("mount", node, "/mnt")
        with contextlib.suppress(OSError):
            for number in range(100):
                Path(f"/mnt/{number}").touch()
        run("umount", "/mnt")
        scratch = DeviceScratch(device=PathDevice(path=node), existing="adopt")
        error = refused(bed, overlay("o", "layer0", scratch=scratch))
    assert (error.code, error.step) == ("resource", "scratch")
    assert "ext4 at" in (error.hint or "")
    assert " 0 of 16 inodes" in (error.hint or "")


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (OverlayOptions(metacopy="on", redirect_dir="on"), "metacopy=on"),
        (OverlayOptions(redirect_dir="on"), "redirect_dir=on"),
        (OverlayOptions(xino="off"), ""),
        (OverlayOptions(xino="on"), "xino=on"),
        (OverlayOptions(volatile=True), "volatile"),
        (OverlayOptions(userxattr=True), "userxattr"),
    ],
)
def test_options_reach_the_kernel(bed: EngineBed, options: OverlayOptions, shown: str) -> None:
    spec = overlay("o", "layer0", scratch=TmpfsScratch(size_bytes=1 << 20), options=options)
    if options.userxattr and not tmpfs_has_user_attributes():
        refusal = refused(bed, spec)
        assert (refusal.code, refusal.object) == ("unsupported", "params.options.userxattr")
        return
    report = mount(bed, spec)
    if shown == "volatile" and "fsync=volatile" in report.options:
        shown = "fsync=volatile"  # as newer kernels say it
    assert not shown or shown in report.options


def tmpfs_has_user_attributes() -> bool:
    """Since Linux 6.6."""
    try:
        os.setxattr("/run", "user.test", b"")
    except OSError:
        return False
    os.removexattr("/run", "user.test")
    return True


@pytest.mark.parametrize("allowed", [False, True])
def test_set_uid_programs_and_devices_where_the_request_says_so(
    bed: EngineBed, allowed: bool
) -> None:
    options = OverlayOptions(suid=allowed, dev=allowed)
    for name, scratch in (("o", None), ("p", TmpfsScratch(size_bytes=1 << 20))):
        report = mount(bed, overlay(name, "layer0", scratch=scratch, options=options))
        assert ("nosuid" in report.options) != allowed
        assert ("nodev" in report.options) != allowed
    report = mount(
        bed,
        overlay("q", "layer0", scratch=TmpfsScratch(size_bytes=1 << 20), options=options),
    )
    program = Path(report.target, "id")
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert ("euid=0" in said) == allowed


@pytest.mark.parametrize(("mode", "uid"), [(0o1777, 0), (0o555, 0), (0o700, 1000)])
def test_the_root_of_a_writable_overlay_is_that_of_its_top_layer(
    bed: EngineBed, tmp_path: Path, mode: int, uid: int
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").touch()
    source.chmod(mode)
    os.chown(source, uid, uid)
    os.setxattr(source, "security.test", b"kept")
    os.utime(source, (1_000_000_000, 1_100_000_000))
    image = tmp_path / "image"
    run("mkfs.erofs", image, source)
    os.truncate(image, -(-image.stat().st_size // 4096) * 4096)
    umask = os.umask(0o077)
    try:
        with loop_device(image) as node, bed.operation() as op:
            bed.engine.layers.mount(
                LayerSpec(layer_id="top", device=PathDevice(path=node), filesystem="erofs"), op
            )
            spec = overlay("o", "top", "layer0", scratch=TmpfsScratch(size_bytes=1 << 20))
            report = mount(bed, spec)
            found = os.stat(report.target)
            assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, uid, uid)
            assert int(found.st_mtime) == 1_100_000_000
            assert os.getxattr(report.target, "security.test") == b"kept"
            unmount(bed)
            bed.engine.layers.unmount("top", op)
    finally:
        os.umask(umask)


def test_an_overlay_that_the_kernel_made_read_only_is_refused(bed: EngineBed) -> None:
    """The kernel does so without an error where it cannot clear its work directory."""
    directory = Path("/run/changes")
    (directory / "work/work/x/y/z").mkdir(parents=True)
    (directory / "upper").mkdir()
    scratch = DirectoryScratch(path=str(directory))
    try:
        assert refused(bed, overlay("o", "layer0", scratch=scratch)).code == "conflict"
        adopted = overlay("o", "layer0", scratch=scratch.replace(existing="adopt"))
        error = refused(bed, adopted)
        assert (error.code, error.errno) == ("mount", errno.EROFS)
        assert any("overlayfs" in line for line in error.kernel_log)
    finally:
        shutil.rmtree(directory)


def test_an_overlay_whose_scratch_became_read_only_says_so(bed: EngineBed, disk: str) -> None:
    scratch = DeviceScratch(device=PathDevice(path=disk), ensure_filesystem=True)
    report = mount(bed, overlay("o", "layer0", scratch=scratch))
    assert report.state == "mounted"
    assert report.scratch is not None
    run("mount", "-o", "remount,ro", report.scratch.path)
    assert bed.engine.overlays.get("o").state == "read_only"
    assert [listed.state for listed in bed.engine.overlays.list()] == ["read_only"]
    assert any("'o'" in problem for problem in bed.engine.problems())
    unmount(bed)
    assert bed.engine.problems() == ()


@pytest.mark.parametrize("kind", ["device", "directory"])
def test_a_volatile_scratch_can_be_used_again(bed: EngineBed, disk: str, kind: str) -> None:
    directory = Path("/run/changes")
    directory.mkdir()
    scratch: DeviceScratch | DirectoryScratch = DirectoryScratch(path=str(directory))
    if kind == "device":
        scratch = DeviceScratch(device=PathDevice(path=disk), ensure_filesystem=True)
    options = OverlayOptions(volatile=True)
    try:
        report = mount(bed, overlay("o", "layer0", scratch=scratch, options=options))
        Path(report.target, "new").write_text("new")
        unmount(bed)
        adopted = scratch.replace(existing="adopt")
        report = mount(bed, overlay("o", "layer0", scratch=adopted, options=options))
        assert Path(report.target, "new").read_text() == "new"
    finally:
        bed.ask(bed.engine.overlays.unmount, "o", force=True)
        shutil.rmtree(directory)


def test_a_volatile_scratch_of_a_crash_is_refused(bed: EngineBed) -> None:
    directory = Path("/run/changes")
    (directory / "work/work/incompat/volatile").mkdir(parents=True)
    scratch = DirectoryScratch(path=str(directory), existing="adopt")
    try:
        error = refused(bed, overlay("o", "layer0", scratch=scratch))
        assert error.code == "conflict"
        assert "volatile" in error.message
        assert "fresh" in (error.hint or "")
    finally:
        shutil.rmtree(directory)


def test_a_scratch_directory_may_be_a_mount_point(bed: EngineBed) -> None:
    directory = Path("/run/changes")
    directory.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", directory)
    try:
        scratch = DirectoryScratch(path=str(directory))
        report = mount(bed, overlay("o", "layer0", scratch=scratch))
        Path(report.target, "new").touch()
        unmount(bed)
    finally:
        run("umount", directory)
        directory.rmdir()


def test_default_roots_and_empty_targets(tmp_path: Path, pack: Pack) -> None:
    full = Path("/run/layers/full")
    full.mkdir(parents=True)
    (full / "unit.service").touch()
    try:
        with EngineBed(tmp_path / "strict", Rules()) as bed, bed.operation() as op:
            for target in ("/run/systemd/system", "/run/udev/rules.d", "/run/elsewhere"):
                with call_error("invalid"):
                    bed.engine.layers.mount(pack.spec(0, target=target), op)
                with call_error("invalid"):
                    bed.engine.overlays.mount(overlay("o", "layer0", target=target), op)
            with call_error("conflict", match="not empty"):
                bed.engine.layers.mount(pack.spec(0, target=str(full)), op)
            assert (full / "unit.service").exists()
    finally:
        shutil.rmtree("/run/layers")


@pytest.mark.timeout(120)
def test_five_hundred_layers(tmp_path: Path, pack: Pack) -> None:
    """As many as the kernel takes, past the 4095 bytes that mount(2) cuts at without a word."""
    names = [f"many-{number:03d}-" + "x" * 20 for number in range(MANY)]
    with EngineBed(tmp_path / "state") as bed:
        layers = tuple(
            pack.spec(number % 3, name, verity=None) for number, name in enumerate(names)
        )
        request = LayersMount(layers=layers, overlay=overlay("o", *reversed(names)))
        with bed.operation(100.0) as op:
            reply = bed.engine.batches.mount(request, op)
        assert reply.overlay is not None
        expected = tuple(f"/run/layers/{name}" for name in reversed(names))
        assert reply.overlay.lowerdirs == expected
        assert sum(map(len, expected)) > 4095
        assert who(reply.overlay.target) == pack.layers[(MANY - 1) % 3].marker
        bed.reopen()
        (adopted,) = bed.engine.overlays.list()
        assert adopted.lowerdirs == expected
        assert len(bed.engine.layers.list()) == MANY
        with bed.operation(100.0) as op:
            bed.engine.batches.unmount(LayersUnmount(layers=tuple(names), overlay="o"), op)
        assert not os.path.exists("/run/layers")
