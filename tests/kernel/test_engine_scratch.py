"""Scratch devices: encrypted, shared by overlays, told of unused blocks; and directories made."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import (
    DeviceScratch,
    DirectoryScratch,
    LayersMount,
    OverlayOptions,
    OverlayReport,
    PathDevice,
    TmpfsScratch,
)
from guestagent.api.overlays import Scratch
from guestagent.storage.mountinfo import find_mount
from tests.beds import dmbed
from tests.beds.agentbed import EngineBed, Pack, overlay
from tests.beds.calls import at_once, call_error, run
from tests.beds.dmbed import dev_of, loop_device, open_free_disk
from tests.beds.loopbed import sparse_file
from vsock.errors import CallError

PACK_LAYERS = 3
SECRET = b"what nobody outside of the guest may read "


@pytest.fixture
def bed(tmp_path: Path, pack: Pack) -> Iterator[EngineBed]:
    """An engine with three layers."""
    with EngineBed(tmp_path / "state") as bed:
        with bed.operation() as op:
            layers = tuple(pack.spec(number) for number in range(3))
            bed.engine.batches.mount(LayersMount(layers=layers), op)
        yield bed


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return sparse_file(tmp_path / "disk.img", 16 << 20)


@pytest.fixture
def disk(image: Path) -> Iterator[str]:
    with loop_device(image, readonly=False) as node:
        yield node


def mount(bed: EngineBed, name: str, scratch: Scratch, layer: str = "layer0") -> OverlayReport:
    return bed.ask(bed.engine.overlays.mount, overlay(name, layer, scratch=scratch))


def unmount(bed: EngineBed, name: str = "o") -> None:
    bed.ask(bed.engine.overlays.unmount, name)


def refused(bed: EngineBed, name: str, scratch: Scratch) -> CallError:
    spec = overlay(name, "layer0", scratch=scratch)
    return bed.refusal(lambda op: bed.engine.overlays.mount(spec, op))


def dm_names() -> str:
    return dmbed.run("dmsetup", "ls")


# --- encrypted


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_an_encrypted_scratch_keeps_its_content_from_the_disk(
    bed: EngineBed, tmp_path: Path, filesystem: str
) -> None:
    image = sparse_file(tmp_path / "large.img", 320 << 20 if filesystem == "xfs" else 16 << 20)
    with loop_device(image, readonly=False) as node:
        scratch = DeviceScratch(
            device=PathDevice(path=node), filesystem=filesystem, encrypted=True, existing="fresh"
        )
        report = mount(bed, "o", scratch)
        assert report.scratch is not None
        assert report.scratch.formatted
        (device,) = report.scratch.dm
        name = f"dm-crypt-{os.path.basename(node)}"
        assert (device.name, device.target_type, device.deferred_remove) == (name, "crypt", True)
        assert device.uuid.endswith(f"crypt-{dev_of(node)}")
        said = dmbed.run("cryptsetup", "status", name)
        assert "aes-xts-plain64" in said
        assert "512 bits" in said
        Path(report.target, "new").write_bytes(SECRET * 1000)
        unmount(bed)
        assert name not in dm_names()
        os.close(open_free_disk(node))
    content = image.read_bytes()
    assert any(content)
    assert SECRET not in content
    assert b"upper" not in content


def test_key_of_an_encrypted_scratch_is_in_no_output(bed: EngineBed, disk: str) -> None:
    report = mount(bed, "o", DeviceScratch(device=PathDevice(path=disk), encrypted=True))
    assert report.scratch is not None
    (device,) = report.scratch.dm
    sectors = 16 * 2048
    place = f"aes-xts-plain64 :64:logon:guestagent:{device.name} 0 {dev_of(disk)} 0"
    assert dmbed.run("dmsetup", "table", "--showkeys", device.name).strip() == (
        f"0 {sectors} crypt {place}"
    )
    assert device.table == f"0 {sectors} crypt {place}"
    assert "guestagent" not in Path("/proc/keys").read_text()


def test_each_encrypted_scratch_has_a_key_of_its_own(
    bed: EngineBed, image: Path, disk: str
) -> None:
    """The same file system, written twice: what is on the disk differs throughout."""
    scratch = DeviceScratch(device=PathDevice(path=disk), encrypted=True, existing="fresh")
    seen = []
    for _ in range(2):
        report = mount(bed, "o", scratch)
        assert not Path(report.target, "new").exists()
        Path(report.target, "new").write_bytes(SECRET * 1000)
        unmount(bed)
        seen.append(image.read_bytes()[1024:2048])
    assert seen[0] != seen[1]


def test_encrypted_scratch_replaces_a_used_disk_only_when_asked_for_a_fresh_one(
    bed: EngineBed, disk: str
) -> None:
    scratch = DeviceScratch(device=PathDevice(path=disk), encrypted=True)
    with pytest.raises(ValueError, match="adopt"):
        scratch.replace(existing="adopt")
    mount(bed, "o", scratch)
    unmount(bed)
    assert refused(bed, "o", scratch).code == "conflict"
    mount(bed, "o", scratch.replace(existing="fresh"))


def test_an_encrypted_scratch_outlives_the_agent(bed: EngineBed, disk: str) -> None:
    scratch = DeviceScratch(device=PathDevice(path=disk), encrypted=True)
    report = mount(bed, "o", scratch)
    Path(report.target, "new").write_bytes(SECRET)
    bed.reopen()
    assert Path(report.target, "new").read_bytes() == SECRET
    (again,) = bed.engine.overlays.list()
    assert again.scratch is not None
    assert [device.target_type for device in again.scratch.dm] == ["crypt"]
    unmount(bed)
    assert "dm-crypt" not in dm_names()


def test_an_encrypted_scratch_that_is_held_keeps_its_key(bed: EngineBed, disk: str) -> None:
    """An unmount that fails as busy loses nothing."""
    report = mount(bed, "o", DeviceScratch(device=PathDevice(path=disk), encrypted=True))
    Path(report.target, "new").write_bytes(SECRET)
    assert report.scratch is not None
    with (
        open(Path(report.scratch.path, "upper", "new"), "rb"),
        bed.operation() as op,
        call_error("busy"),
    ):
        bed.engine.overlays.unmount("o", op)
    assert Path(report.target, "new").read_bytes() == SECRET
    (again,) = bed.engine.overlays.list()
    assert again.scratch is not None
    assert again.scratch.dm[0].deferred_remove


def test_a_key_in_the_table_of_another_program_is_not_shown(bed: EngineBed, disk: str) -> None:
    key = "0123456789abcdef" * 8
    table = f"0 2048 crypt aes-xts-plain64 {key} 0 {disk} 0"
    dmbed.run("dmsetup", "create", "foreign", "--table", table)
    try:
        (device,) = bed.engine.dm.list()[-1:]
        lines = [*bed.engine.dm.table("foreign"), device.table]
    finally:
        dmbed.run("dmsetup", "remove", "--retry", "foreign")
    shown = f"0 2048 crypt aes-xts-plain64 {'0' * 128} 0 {dev_of(disk)} 0"
    assert lines[0] == shown
    assert key not in "".join(lines)


# --- shared


def shared(disk: str, **changes: object) -> DeviceScratch:
    scratch = DeviceScratch(device=PathDevice(path=disk), ensure_filesystem=True, shared=True)
    return scratch.replace(**changes)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_shared_disk_is_mounted_once_and_goes_with_its_last_overlay(
    bed: EngineBed, disk: str, encrypted: bool
) -> None:
    scratch = shared(disk, encrypted=encrypted)
    reports = {name: mount(bed, name, scratch) for name in ("o", "p", "q")}
    mount_point = f"{bed.directory}/scratch/{dev_of(disk)}"
    for name, report in reports.items():
        assert report.scratch is not None
        assert report.scratch.path == f"{mount_point}/overlays/{name}"
        Path(report.target, "who").write_bytes(name.encode())
    listed = {report.overlay_id: report.scratch for report in bed.engine.overlays.list()}
    assert {name: found and found.shared_with for name, found in listed.items()} == {
        "o": ("p", "q"),
        "p": ("o", "q"),
        "q": ("o", "p"),
    }
    unmount(bed, "o")
    bed.reopen()
    unmount(bed, "q")
    assert find_mount(mount_point) is not None
    assert Path(reports["p"].target, "who").read_bytes() == b"p"
    unmount(bed, "p")
    assert find_mount(mount_point) is None
    assert not Path(mount_point).exists()
    assert "dm-crypt" not in dm_names()
    os.close(open_free_disk(disk))


def test_directory_on_a_shared_disk_is_adopted_by_name(bed: EngineBed, disk: str) -> None:
    report = mount(bed, "o", shared(disk))
    Path(report.target, "new").write_bytes(b"kept")
    mount(bed, "p", shared(disk))
    unmount(bed, "o")
    assert refused(bed, "o", shared(disk)).code == "conflict"
    report = mount(bed, "o", shared(disk, existing="adopt"))
    assert Path(report.target, "new").read_bytes() == b"kept"
    unmount(bed, "p")
    unmount(bed, "o")
    report = mount(bed, "o", shared(disk, existing="adopt"))
    assert Path(report.target, "new").read_bytes() == b"kept"


def test_a_directory_on_a_shared_disk_is_emptied_for_a_fresh_scratch(
    bed: EngineBed, disk: str, tmp_path: Path
) -> None:
    """However deep it is, whatever its names; and nothing that a link leads to."""
    report = mount(bed, "o", shared(disk))
    other = mount(bed, "p", shared(disk))
    Path(other.target, "kept").write_text("kept")
    kept = tmp_path / "kept"
    kept.write_text("kept")
    root = Path(report.target)
    (root / "link").symlink_to(tmp_path)
    (root / "removed-0" / "inner").mkdir(parents=True)
    (root / "removed-1").write_text("a file")
    at = os.open(root, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deep", dir_fd=at)
        below = os.open("deep", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    unmount(bed)
    assert refused(bed, "o", shared(disk)).code == "conflict"
    report = mount(bed, "o", shared(disk, existing="fresh"))
    assert not {"link", "removed-0", "removed-1", "deep"} & set(os.listdir(report.target))
    assert kept.read_text() == "kept"
    assert Path(other.target, "kept").read_text() == "kept"


@pytest.mark.parametrize("kind", ["shared", "encrypted"])
def test_a_volatile_scratch_device_can_be_used_again(bed: EngineBed, disk: str, kind: str) -> None:
    changes = {"encrypted": kind == "encrypted", "existing": "fresh"}
    options = OverlayOptions(volatile=True)
    mount(bed, "p", shared(disk, **changes))
    for content in ("first", "second"):
        spec = overlay("o", "layer0", scratch=shared(disk, **changes), options=options)
        report = bed.ask(bed.engine.overlays.mount, spec)
        assert not Path(report.target, "new").exists()
        Path(report.target, "new").write_text(content)
        unmount(bed)
    if kind == "shared":
        adopted = mount(bed, "o", shared(disk, existing="adopt"))
        assert Path(adopted.target, "new").read_text() == "second"


@pytest.mark.parametrize(
    "changes",
    [{"shared": False}, {"encrypted": True}, {"discard": True}, {"filesystem": "xfs"}],
    ids=str,
)
def test_a_shared_disk_is_used_in_one_way(
    bed: EngineBed, disk: str, changes: dict[str, object]
) -> None:
    mount(bed, "o", shared(disk))
    error = refused(bed, "p", shared(disk, **changes))
    assert (error.code, error.object) == ("conflict", disk)
    assert "'o'" in error.message or f"in use with another {next(iter(changes))}" in error.message
    unmount(bed, "o")


def test_overlays_come_and_go_on_a_shared_disk_at_once(bed: EngineBed, disk: str) -> None:
    """Each overlay finds the disk mounted, whichever made or takes it down meanwhile."""

    def come_and_go(name: str) -> None:
        for turn in range(4):
            report = mount(bed, name, shared(disk, existing="adopt"))
            path = Path(report.target, "turns")
            assert (path.read_text() if turn else "") == "." * turn
            path.write_text("." * (turn + 1))
            unmount(bed, name)

    at_once(come_and_go, "abc")
    assert find_mount(f"{bed.directory}/scratch/{dev_of(disk)}") is None
    assert bed.engine.problems() == ()


# --- discards


def test_a_scratch_tells_its_disk_of_unused_blocks(bed: EngineBed, image: Path, disk: str) -> None:
    report = mount(bed, "o", shared(disk, shared=False))
    assert report.scratch is not None
    assert "discard" not in report.scratch.options
    path = Path(report.target, "new")
    path.write_bytes(os.urandom(4 << 20))
    run("sync", "-f", report.scratch.path)
    path.unlink()
    run("sync", "-f", report.scratch.path)
    before = image.stat().st_blocks
    with bed.operation() as op:
        assert bed.engine.overlays.trim("o", op).trimmed_bytes >= 4 << 20
    assert image.stat().st_blocks <= before - (4 << 20) // 512


@pytest.mark.parametrize("discard", [False, True])
def test_encrypted_scratch_discards_blocks_only_when_asked(
    bed: EngineBed, disk: str, discard: bool
) -> None:
    report = mount(bed, "o", shared(disk, shared=False, encrypted=True, discard=discard))
    assert report.scratch is not None
    assert ("discard" in report.scratch.options) is discard
    assert report.scratch.dm[0].table.endswith(" 1 allow_discards") is discard
    with bed.operation() as op:
        if discard:
            assert bed.engine.overlays.trim("o", op).trimmed_bytes > 0
            return
        with pytest.raises(CallError) as caught:
            bed.engine.overlays.trim("o", op)
    assert caught.value.code == "unsupported"


def test_trim_without_a_scratch_device_is_refused(bed: EngineBed) -> None:
    mount(bed, "o", TmpfsScratch(size_bytes=1 << 20))
    for name, code in (("o", "unsupported"), ("absent", "not_found")):
        with bed.operation() as op, call_error(code):
            bed.engine.overlays.trim(name, op)


def test_a_disk_that_is_too_small_for_its_file_system_says_so(bed: EngineBed, disk: str) -> None:
    """mkfs.xfs gives the reason first, and then a page of its options."""
    error = refused(bed, "o", shared(disk, filesystem="xfs"))
    assert (error.code, error.step) == ("device", "format")
    assert "Filesystem must be larger than 300MB" in error.message


# --- directories


def test_a_scratch_directory_is_made_and_stays(bed: EngineBed) -> None:
    path = Path("/run/scratches/o")
    scratch = DirectoryScratch(path=str(path))
    assert refused(bed, "o", scratch).code == "mount"
    try:
        report = mount(bed, "o", scratch.replace(create=True))
        Path(report.target, "new").write_text("kept")
        unmount(bed)
        assert (path / "upper/new").read_text() == "kept"
        assert refused(bed, "o", scratch.replace(create=True)).code == "conflict"
        report = mount(bed, "o", scratch.replace(create=True, existing="adopt"))
        assert Path(report.target, "new").read_text() == "kept"
        unmount(bed)
    finally:
        shutil.rmtree(path.parent)


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize(
    ("mode", "owner", "inner_mode", "inner_owner"),
    [
        (0o777, 0, 0o755, 0),
        (0o775, 0, 0o755, 0),
        (0o755, 65534, 0o755, 0),
        (0o1777, 65534, 0o755, 0),
        (0o755, 0, 0o777, 0),
        (0o1777, 0, 0o755, 65534),
    ],
)
def test_a_scratch_directory_that_another_user_can_replace_is_refused(
    bed: EngineBed, mode: int, owner: int, inner_mode: int, inner_owner: int, create: bool
) -> None:
    """Such a user could put a link in its place between a check and the mount."""
    outer, path = Path("/run/shared"), Path("/run/shared/o")
    try:
        for made, its_mode, uid in ((outer, mode, owner), (path, inner_mode, inner_owner)):
            made.mkdir()
            os.chown(made, uid, uid)
            made.chmod(its_mode)
        scratch = DirectoryScratch(path=str(path), create=create)
        error = refused(bed, "o", scratch)
        assert (error.code, error.step) == ("denied", "scratch")
        place = outer if inner_mode == 0o755 and not inner_owner else path
        assert f"a user other than root could replace '{place}'" in error.message
        if place == outer and create:
            path.rmdir()
            assert refused(bed, "o", scratch).code == "denied"
            assert not path.exists()
    finally:
        shutil.rmtree(outer)


def test_a_scratch_directory_of_root_may_be_in_a_sticky_one(bed: EngineBed) -> None:
    outer = Path("/run/shared")
    outer.mkdir()
    outer.chmod(0o1777)
    try:
        report = mount(bed, "o", DirectoryScratch(path="/run/shared/o", create=True))
        Path(report.target, "new").write_text("kept")
        unmount(bed)
        assert Path("/run/shared/o/upper/new").read_text() == "kept"
    finally:
        shutil.rmtree(outer)


@pytest.mark.parametrize("owner", [0, 65534])
def test_in_a_sticky_scratch_directory_the_entries_are_of_root(bed: EngineBed, owner: int) -> None:
    path = Path("/run/shared")
    for made in (path, path / "upper", path / "work"):
        made.mkdir()
    path.chmod(0o1777)
    os.chown(path / "work", owner, owner)
    try:
        scratch = DirectoryScratch(path=str(path), existing="adopt")
        if owner:
            error = refused(bed, "o", scratch)
            assert (error.code, "'/run/shared/work'" in error.message) == ("denied", True)
        else:
            mount(bed, "o", scratch)
            unmount(bed)
    finally:
        shutil.rmtree(path)


def test_a_scratch_directory_is_not_made_through_a_link(bed: EngineBed, tmp_path: Path) -> None:
    Path("/run/way").symlink_to(tmp_path)
    try:
        scratch = DirectoryScratch(path="/run/way/o", create=True)
        assert refused(bed, "o", scratch).code == "denied"
        assert not (tmp_path / "o").exists()
    finally:
        Path("/run/way").unlink()
