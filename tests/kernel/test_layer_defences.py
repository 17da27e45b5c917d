"""What a layer, a foreign device or a failing disk must not do to the guest, and what is said."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import (
    ByteRange,
    DeviceScratch,
    LayerReport,
    LayersMount,
    LayerSpec,
    OverlayOptions,
    OverlaySpec,
    PathDevice,
    Verity,
)
from guestagent.api.devices import TREE_FIELDS
from guestagent.api.layers import READONLY_POLICIES, WHITEOUT_KINDS
from guestagent.api.overlays import LayersMountReply
from guestagent.engine.state import Rules
from guestagent.storage.devicemapper import devices
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.devicemapper.targets import Target, linear_target, parse_line
from guestagent.storage.verity import VerityParameters, block_digest
from tests.beds import dmbed
from tests.beds.agentbed import EngineBed, Pack, layer_on, overlay
from tests.beds.calls import call_error
from tests.beds.dmbed import loop_device
from tests.beds.loopbed import sparse_file
from vsock.deadline import Deadline
from vsock.errors import CallError

PACK_LAYERS = 2


@pytest.fixture
def control() -> Iterator[Control]:
    with Control() as control:
        yield control


def mount(bed: EngineBed, spec: LayerSpec) -> LayerReport:
    return bed.ask(bed.engine.layers.mount, spec)


def mount_many(bed: EngineBed, request: LayersMount) -> LayersMountReply:
    return bed.ask(bed.engine.batches.mount, request)


def mount_overlay(bed: EngineBed, spec: OverlaySpec) -> None:
    bed.ask(bed.engine.overlays.mount, spec)


def unmount(bed: EngineBed, layer_id: str) -> None:
    bed.ask(bed.engine.layers.unmount, layer_id)


def refused(bed: EngineBed, spec: LayerSpec) -> CallError:
    return bed.refusal(lambda op: bed.engine.layers.mount(spec, op))


@contextlib.contextmanager
def made(control: Control, name: str, *targets: Target, uuid: str = "foreign") -> Iterator[str]:
    """A dm device that is not the agent's; yields its node."""
    info = devices.create_device(control, name=name, uuid=uuid, targets=targets)
    try:
        yield info.node
    finally:
        with contextlib.closing(Deadline(5)) as deadline:
            devices.remove_device(control, name, deadline)


def erofs(directory: Path) -> dmbed.VerityImage:
    return dmbed.VerityImage(dmbed.erofs_image(directory, "image", {"a": os.urandom(1 << 20)}))


# --- file systems


def damaged_ext4(path: Path) -> None:
    """An ext4 image whose superblock says errors=panic, and whose directory /d is garbage."""
    tree = path.parent / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d/x").write_bytes(b"x")
    options = ("-q", "-t", "ext4", "-F", "-b", "4096", "-O", "^metadata_csum")
    dmbed.run("mke2fs", *options, "-d", tree, path, "16M")
    dmbed.run("tune2fs", "-e", "panic", path)
    block = int(dmbed.run("debugfs", "-R", "blocks /d", path).split()[0])
    with path.open("r+b") as image:
        image.seek(block * 4096)
        image.write(b"\xff" * 64)


def test_an_ext4_layer_that_says_errors_panic_does_not_end_the_guest(
    bed: EngineBed, tmp_path: Path
) -> None:
    damaged_ext4(tmp_path / "image")
    image = dmbed.VerityImage(tmp_path / "image")
    with loop_device(image.path) as node:
        spec = layer_on(node, "l", filesystem="ext4", verity=Verity(root_digest=image.root_digest))
        report = mount(bed, spec)
        assert "errors=remount-ro" in report.options, "the next step would end this kernel"
        assert "x" not in os.listdir(f"{report.target}/d")
        assert "EXT4-fs error" in dmbed.run("dmesg")
        unmount(bed, "l")


def test_an_ext4_scratch_that_says_errors_panic_does_not_end_the_guest(
    bed: EngineBed, pack: Pack, tmp_path: Path
) -> None:
    damaged_ext4(tmp_path / "image")
    with loop_device(tmp_path / "image", readonly=False) as node:
        mount(bed, pack.spec(0))
        scratch = DeviceScratch(device=PathDevice(path=node), existing="adopt")
        bed.ask(bed.engine.overlays.mount, overlay("o", "layer0", scratch=scratch))
        text = Path("/proc/self/mountinfo").read_text()
        assert [line for line in text.splitlines() if node in line and "errors=remount-ro" in line]
        bed.ask(bed.engine.overlays.unmount, "o")


def test_auto_takes_no_type_that_is_not_for_layers(bed: EngineBed, tmp_path: Path) -> None:
    image = sparse_file(tmp_path / "image", 320 << 20)
    dmbed.run("mkfs.xfs", "-q", image)
    with loop_device(image) as node:
        spec = LayerSpec(layer_id="l", device=PathDevice(path=node), filesystem="auto")
        error = refused(bed, spec)
    assert (error.code, error.step) == ("mount", "filesystem")
    assert "xfs" in error.message


def test_a_file_system_that_the_kernel_lacks_is_named(bed: EngineBed, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    image = tmp_path / "image"
    dmbed.run("mksquashfs", tmp_path / "tree", image, "-quiet", "-no-progress")
    os.truncate(image, 8192)
    loader = Path("/proc/sys/kernel/modprobe")
    before = loader.read_text()
    if "squashfs" in Path("/proc/modules").read_text():
        dmbed.run("modprobe", "-r", "squashfs")
    if "squashfs" in Path("/proc/filesystems").read_text():
        pytest.skip("squashfs is built into this kernel")
    loader.write_text("/bin/false")
    try:
        with loop_device(image) as node:
            spec = LayerSpec(layer_id="l", device=PathDevice(path=node), filesystem="squashfs")
            error = refused(bed, spec)
    finally:
        loader.write_text(before)
    assert (error.code, error.step) == ("unsupported", "mount")
    assert error.hint == "load the module squashfs, of Linux 2.6.29 or later"


def spoiled(image: Path, feature_at: int) -> Path:
    """Set a feature in the superblock that no kernel has."""
    with image.open("r+b") as file:
        file.seek(feature_at + 3)
        file.write(b"\x40")
    return image


def test_image_that_the_kernel_refuses_is_named_in_the_error(
    bed: EngineBed, pack: Pack, tmp_path: Path
) -> None:
    """No bare EINVAL, of a layer or of a scratch."""
    image = spoiled(dmbed.erofs_image(tmp_path, "image", {"a": b"x"}), 1024 + 80)
    with loop_device(image) as node:
        spec = LayerSpec(layer_id="l", device=PathDevice(path=node), filesystem="erofs")
        error = refused(bed, spec)
    assert (error.code, error.step, error.object) == ("mount", "mount", node)
    assert error.errno in (errno.EINVAL, errno.EBADMSG)
    assert "features that this kernel lacks" in str(error.hint)
    assert f"does not accept the erofs file system on {node}" in error.message
    disk = tmp_path / "disk"
    dmbed.run("mke2fs", "-q", "-t", "ext4", "-F", disk, "16M")
    spoiled(disk, 1024 + 96)
    mount(bed, pack.spec(0))
    with loop_device(disk, readonly=False) as node:
        scratch = DeviceScratch(device=PathDevice(path=node), existing="adopt")
        with pytest.raises(CallError) as caught:
            mount_overlay(bed, overlay("o", "layer0", scratch=scratch))
    error = caught.value
    assert (error.code, error.step, error.object) == ("mount", "scratch", node)
    assert f"does not accept the ext4 file system on {node}" in error.message
    assert any("EXT4-fs" in line for line in error.kernel_log)


def test_reason_of_a_failed_mkfs_is_in_the_error(
    bed: EngineBed, pack: Pack, tmp_path: Path
) -> None:
    disk = sparse_file(tmp_path / "disk", 32 << 10)
    with loop_device(disk, readonly=False) as node:
        mount(bed, pack.spec(0))
        scratch = DeviceScratch(device=PathDevice(path=node), ensure_filesystem=True)
        with bed.operation() as op, pytest.raises(CallError) as caught:
            bed.engine.overlays.mount(overlay("o", "layer0", scratch=scratch), op)
    assert caught.value.code == "device"
    assert "Not enough space to build" in caught.value.message


# --- devices


def test_an_error_of_the_disk_is_no_error_of_integrity(
    bed: EngineBed, control: Control, tmp_path: Path
) -> None:
    """What the agent reads by itself comes from the cache, and the kernel's own reads fail."""
    image = erofs(tmp_path)
    size = image.path.stat().st_size
    with (
        loop_device(image.path) as loop,
        made(control, "disk", linear_target(length_bytes=size, device=loop)) as node,
        open(node, "rb") as held,
    ):
        held.read()
        failing = Target(start_sectors=0, length_sectors=size // 512, target_type="error")
        control.load_table("disk", [failing], readonly=True)
        control.resume("disk")
        spec = layer_on(node, "l", verity=Verity(root_digest=image.root_digest))
        with call_error("device"):
            mount(bed, spec)


def test_a_dm_name_that_is_taken_is_named(bed: EngineBed, control: Control, pack: Pack) -> None:
    name = mount(bed, pack.spec(0)).dm[-1].name
    unmount(bed, "layer0")
    zero = Target(start_sectors=0, length_sectors=8, target_type="zero")
    with made(control, name, zero):
        error = refused(bed, pack.spec(0))
    assert error.code == "busy"
    assert name in (error.hint or "")
    assert "'foreign'" in (error.hint or "")


@pytest.mark.parametrize("stale", ["linear", "writable", "options", "salt"])
def test_a_device_that_was_left_behind_is_used_again_only_as_planned(
    bed: EngineBed, control: Control, pack: Pack, stale: str
) -> None:
    """An unmount that was half done leaves devices with the names and uuids of the layer."""
    verity, linear = mount(bed, pack.spec(0)).dm
    unmount(bed, "layer0")
    below = parse_line(linear.table)
    if stale == "linear":
        below = linear_target(length_bytes=below.length_sectors * 512, device=pack.node)
        below = below.replace(params=below.params[:-1] + "8")
    with contextlib.ExitStack() as stack:
        info = devices.create_device(
            control,
            name=linear.name,
            uuid=linear.uuid,
            targets=[below],
            readonly=stale != "writable",
        )
        if stale in ("options", "salt"):
            first, _, _, rest = parse_line(verity.table).params.split(" ", 3)
            rest = f"{rest} 1 ignore_corruption" if stale == "options" else rest[:-2] + "ff"
            above = parse_line(verity.table).replace(params=f"{first} {info.dev} {info.dev} {rest}")
            devices.create_device(control, name=verity.name, uuid=verity.uuid, targets=[above])
        again = mount(bed, pack.spec(0))
        stack.callback(unmount, bed, "layer0")
        assert [device.name for device in again.dm] == [verity.name, linear.name]
        assert all(device.readonly for device in again.dm)
        assert again.dm[1].table == linear.table
        # after the numbers of the devices: the kernel gives each the lowest that is free
        assert again.dm[0].table.split()[6:] == verity.table.split()[6:]
        assert again.verity is not None
        assert again.verity.options == ()


def test_the_device_of_a_hash_tree_is_in_use(bed: EngineBed, pack: Pack, tmp_path: Path) -> None:
    image = erofs(tmp_path)
    hashes = tmp_path / "hashes"
    hashes.write_bytes(image.path.read_bytes()[image.data_bytes :].ljust(1 << 20, b"\0"))
    with (
        loop_device(image.path) as node,
        loop_device(hashes, readonly=False) as hash_node,
    ):
        verity = Verity(root_digest=image.root_digest, hash_device=PathDevice(path=hash_node))
        spec = layer_on(node, "l", verity=verity)
        scratch = DeviceScratch(device=PathDevice(path=hash_node), ensure_filesystem=True)
        mount(bed, pack.spec(0))
        mount(bed, spec)
        with bed.operation() as op, call_error("conflict", step="claim", match="layer 'l'"):
            bed.engine.overlays.mount(overlay("o", "layer0", scratch=scratch), op)
        unmount(bed, "l")
        with open(hash_node, "wb") as file:
            file.write(bytes(1 << 20))
        bed.ask(bed.engine.overlays.mount, overlay("o", "layer0", scratch=scratch))
        error = refused(bed, spec)
        assert (error.code, error.step) == ("conflict", "claim")
        bed.ask(bed.engine.overlays.unmount, "o")


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_foreign_table_is_a_problem_of_its_layer_alone(
    bed: EngineBed, control: Control, pack: Pack, tmp_path: Path, is_mapped: bool
) -> None:
    """Where the layer is mapped its linear device goes when nothing stands on it any more."""
    image = erofs(tmp_path)
    with loop_device(image.path) as node:
        area = ByteRange(offset_bytes=0, size_bytes=image.size_bytes)
        spec = layer_on(
            node,
            "l",
            mapping=area if is_mapped else None,
            verity=Verity(root_digest=image.root_digest),
        )
        mount(bed, pack.spec(0))
        name = mount(bed, spec).dm[0].name
        size = control.table(name)[0].length_sectors
        for target in (
            Target(start_sectors=0, length_sectors=size, target_type="error"),
            linear_target(length_bytes=size * 512, device=node),
        ):
            control.load_table(name, [target], readonly=True)
            control.resume(name)
            listed = {report.layer_id: report for report in bed.engine.layers.list()}
            assert listed["layer0"].state == "mounted"
            assert (listed["l"].state, listed["l"].verity) == ("changed", None)
            assert listed["l"].dm[0].table == control.table(name)[0].line()
            assert bed.engine.layers.get("l").state == "changed"
            assert any("'l'" in text and name in text for text in bed.engine.problems())
        unmount(bed, "l")
        assert bed.engine.problems() == ()


def test_a_signature_that_the_kernel_cannot_check_is_unsupported(
    bed: EngineBed, pack: Pack
) -> None:
    if os.path.exists("/sys/module/dm_verity/parameters/require_signatures"):
        pytest.skip("this kernel checks signatures")
    verity = pack.spec(0).verity
    assert verity is not None
    error = refused(bed, pack.spec(0, verity=verity.replace(signature=b"\x30\x82" + bytes(100))))
    assert error.code == "unsupported"
    assert "CONFIG_DM_VERITY_VERIFY_ROOTHASH_SIG" in (error.hint or "")


# --- read-only devices


def is_writable(node: str) -> bool:
    return Path(f"/sys/class/block/{os.path.basename(node)}/ro").read_text().strip() == "0"


def test_devices_of_a_mounted_layer_are_read_only(bed: EngineBed, tmp_path: Path) -> None:
    image = erofs(tmp_path)
    hashes = tmp_path / "hashes"
    hashes.write_bytes(image.path.read_bytes()[image.data_bytes :].ljust(1 << 20, b"\0"))
    with (
        loop_device(image.path, readonly=False) as node,
        loop_device(hashes, readonly=False) as hash_node,
    ):
        verity = Verity(root_digest=image.root_digest, hash_device=PathDevice(path=hash_node))
        plain = LayerSpec(layer_id="plain", device=PathDevice(path=node), filesystem="erofs")
        verified = plain.replace(layer_id="verified", verity=verity)
        assert mount(bed, verified).readonly
        assert (is_writable(node), is_writable(hash_node)) == (False, False)
        with pytest.raises(PermissionError), open(node, "r+b", buffering=0) as file:
            file.write(bytes(4096))
        unmount(bed, "verified")
        assert (is_writable(node), is_writable(hash_node)) == (True, True)
        assert mount(bed, plain).readonly
        assert not is_writable(node)
        unmount(bed, "plain")
        assert is_writable(node)


def test_a_device_of_several_layers_stays_read_only_until_the_last_goes(
    bed: EngineBed, pack: Pack, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(pack.image.read_bytes())
    with loop_device(copy, readonly=False) as node:
        device = PathDevice(path=node)
        for number in (0, 1):
            assert mount(bed, pack.spec(number, device=device)).readonly
        unmount(bed, "layer0")
        assert not is_writable(node)
        unmount(bed, "layer1")
        assert is_writable(node)


def test_a_restart_remembers_which_devices_were_made_read_only(pack: Pack, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(pack.image.read_bytes())
    with loop_device(copy, readonly=False) as node:
        with EngineBed(tmp_path / "state") as bed:
            mount(bed, pack.spec(0, device=PathDevice(path=node)))
            bed.reopen()
            assert not is_writable(node)
            unmount(bed, "layer0")
        assert is_writable(node)


def test_failed_mount_leaves_device_access_unchanged(bed: EngineBed, tmp_path: Path) -> None:
    image = tmp_path / "garbage"
    image.write_bytes(os.urandom(65536))
    for readonly in (False, True):
        with loop_device(image, readonly=readonly) as node:
            spec = LayerSpec(layer_id="l", device=PathDevice(path=node), filesystem="erofs")
            assert refused(bed, spec).step == "filesystem"
            assert is_writable(node) is not readonly


def test_a_disk_that_is_mounted_for_writing_is_no_layer(bed: EngineBed, tmp_path: Path) -> None:
    disk, target = tmp_path / "disk", tmp_path / "mnt"
    target.mkdir()
    dmbed.run("mke2fs", "-q", "-t", "ext4", "-F", disk, "16M")
    with loop_device(disk, readonly=False) as node:
        dmbed.run("mount", "-t", "ext4", node, target)
        spec = LayerSpec(layer_id="l", device=PathDevice(path=node), filesystem="ext4")
        error = refused(bed, spec)
        assert (error.code, error.step) == ("conflict", "protect")
        assert str(target) in error.message
        assert is_writable(node)
        (target / "file").write_text("still written to")
        dmbed.run("umount", target)


@pytest.mark.parametrize("policy", READONLY_POLICIES)
@pytest.mark.parametrize("readonly", [True, False], ids=["read-only", "writable"])
def test_a_policy_decides_on_a_device_that_is_writable(
    bed: EngineBed, tmp_path: Path, policy: str, readonly: bool
) -> None:
    image = erofs(tmp_path)
    with loop_device(image.path, readonly=readonly) as node:
        device = PathDevice(path=node)
        spec = LayerSpec(layer_id="l", device=device, filesystem="erofs", readonly_policy=policy)
        if policy == "error" and not readonly:
            error = refused(bed, spec)
            assert (error.code, error.step, error.object) == ("denied", "protect", node)
            assert "is writable, and layer 'l'" in error.message
        else:
            report = mount(bed, spec)
            is_left_out = policy == "ignore" and not readonly
            assert report.state == ("ignored" if is_left_out else "mounted")
            assert report.readonly is (readonly or policy == "read")
            assert is_writable(node) is not report.readonly
            assert bool(report.mount_id) is not is_left_out
            assert "rw" not in report.options
            bed.reopen()
            assert [live.layer_id for live in bed.engine.layers.list()] == (
                [] if is_left_out else ["l"]
            )
            assert is_writable(node) is not report.readonly
            unmount(bed, "l")
        assert is_writable(node) is not readonly
        # nothing is left reserved, and the device is as it was
        mount(bed, spec.replace(readonly_policy="read"))
        unmount(bed, "l")


@pytest.mark.parametrize("policy", ["error", "ignore"])
def test_device_that_the_agent_set_read_only_counts_as_writable(
    bed: EngineBed, pack: Pack, tmp_path: Path, policy: str
) -> None:
    """The answer must not depend on which other layers are there, or come first in a batch."""
    copy = tmp_path / "copy"
    copy.write_bytes(pack.image.read_bytes())
    with loop_device(copy, readonly=False) as node:
        device = PathDevice(path=node)
        first = pack.spec(0, device=device)
        second = pack.spec(1, device=device, readonly_policy=policy)
        mount(bed, first)
        if policy == "error":
            assert refused(bed, second).code == "denied"
        else:
            assert mount(bed, second).state == "ignored"
            unmount(bed, "layer0")
            request = LayersMount(layers=(first, second))
            states = [layer.state for layer in mount_many(bed, request).layers]
            assert states == ["mounted", "ignored"]
            only = LayersMount(layers=(second,))
            assert [layer.state for layer in mount_many(bed, only).layers] == ["ignored"]
            spec = OverlaySpec(overlay_id="o", layers=("layer0", "layer1"))
            with call_error("not_found", match="needs layer 'layer1'"):
                mount_many(bed, request.replace(overlay=spec))
        assert not is_writable(node)
        unmount(bed, "layer0")
        assert is_writable(node)


def test_a_disk_that_is_mounted_for_writing_is_no_layer_by_any_policy(
    bed: EngineBed, tmp_path: Path
) -> None:
    disk, target = tmp_path / "disk", tmp_path / "mnt"
    target.mkdir()
    dmbed.run("mke2fs", "-q", "-t", "ext4", "-F", disk, "16M")
    with loop_device(disk, readonly=False) as node:
        dmbed.run("mount", "-t", "ext4", node, target)
        for policy in ("read", "write"):
            spec = layer_on(node, "l", filesystem="ext4", readonly_policy=policy)
            assert refused(bed, spec).code == "conflict"
        dmbed.run("umount", target)


# --- overlays that would not see what a layer removes


@pytest.mark.parametrize("kind", [None, *WHITEOUT_KINDS])
@pytest.mark.parametrize("userxattr", [False, True])
def test_an_overlay_must_see_the_whiteouts_of_its_layers(
    bed: EngineBed, pack: Pack, kind: str | None, userxattr: bool
) -> None:
    unfit = ("both", "trusted" if userxattr else "user")
    mount(bed, pack.spec(0, whiteouts=kind))
    mount(bed, pack.spec(1))
    spec = OverlaySpec(
        overlay_id="o",
        layers=("layer0", "layer1"),
        options=OverlayOptions(userxattr=userxattr),
    )
    if kind in unfit:
        with call_error(
            "invalid", match=f"layer 'layer0', which are of the kind {kind}", object="layer0"
        ):
            mount_overlay(bed, spec)
        with pytest.raises(ValueError, match="does not see all whiteouts"):
            LayersMount(layers=(pack.spec(0, whiteouts=kind), pack.spec(1)), overlay=spec)
    else:
        LayersMount(layers=(pack.spec(0, whiteouts=kind), pack.spec(1)), overlay=spec)
        mount_overlay(bed, spec)


# --- what the root digest does not say


SALT = b"salt"


def hashed(content: bytes, data_blocks: int, hash_blocks: bytes) -> tuple[bytes, VerityParameters]:
    """An image of ``content``, superblock and these hash blocks, the top one first."""
    parameters = VerityParameters(
        root_digest=bytes(32),
        salt=SALT,
        algorithm="sha256",
        hash_type=1,
        data_blocks=data_blocks,
        data_block_size=4096,
        hash_block_size=4096,
        hash_offset_bytes=data_blocks * 4096,
        superblock=True,
    )
    root_digest = block_digest(parameters, hash_blocks[:4096])
    image = content.ljust(data_blocks * 4096, b"\0")
    image += parameters.pack_superblock(bytes(16)).ljust(4096, b"\0") + hash_blocks
    return image, parameters.replace(root_digest=root_digest)


def digests(content: bytes) -> bytes:
    parameters = hashed(b"", 1, bytes(4096))[1]
    blocks = [content[at : at + 4096] for at in range(0, len(content), 4096)]
    return b"".join(block_digest(parameters, block) for block in blocks)


def two_images_of_one_digest(directory: Path) -> tuple[Path, Path, VerityParameters]:
    """An image of 4 data blocks, and one of 385 whose hash blocks are the data of the first.

    The digests of the second lie where the first's file system has nothing: in the 1024 bytes that
    EROFS leaves free at its start, and in a block behind it.
    """
    audited = dmbed.erofs_image(directory, "audited", {"who": b"what was audited"}).read_bytes()
    served = dmbed.erofs_image(directory, "served", {"who": b"what the host serves"}).read_bytes()
    assert len(audited) <= 3 * 4096
    assert len(served) <= 32 * 4096
    data = digests(served.ljust(32 * 4096, b"\0")) + audited[1024:].ljust(3 * 4096 - 1024, b"\0")
    data += digests(bytes(4096)).ljust(4096, b"\0")  # of the last block of the second
    top = digests(data).ljust(4096, b"\0")
    first, parameters = hashed(data, 4, top)
    second, others = hashed(served, 385, top + data)
    assert parameters.root_digest == others.root_digest
    for name, image in (("first", first), ("second", second)):
        (directory / name).write_bytes(image)
    return directory / "first", directory / "second", parameters


def test_a_root_digest_alone_does_not_say_which_file_system_is_seen(
    bed: EngineBed, tmp_path: Path
) -> None:
    """Why ``require_verity=full`` is there: the same request, and two file systems."""
    first, second, parameters = two_images_of_one_digest(tmp_path)
    seen = []
    for image in (first, second):
        with loop_device(image) as node:
            offset = parameters.hash_offset_bytes if image == first else 385 * 4096
            verity = Verity(root_digest=parameters.root_digest, hash_offset_bytes=offset)
            spec = layer_on(node, "l", verity=verity)
            report = mount(bed, spec)
            assert report.verity is not None
            assert (report.verity.status, report.verity.source) == ("V", "superblock")
            seen.append(Path(report.target, "who").read_bytes())
            unmount(bed, "l")
    assert seen == [b"what was audited", b"what the host serves"]


@pytest.mark.parametrize("left_out", [*TREE_FIELDS, "hash_offset_bytes"])
def test_full_verity_takes_nothing_from_a_superblock(tmp_path: Path, left_out: str) -> None:
    first, second, parameters = two_images_of_one_digest(tmp_path)
    whole = Verity(**parameters.as_dict())  # type: ignore[arg-type]
    with (
        EngineBed(tmp_path / "state", Rules(require_verity="full")) as bed,
        loop_device(first) as first_node,
        loop_device(second) as second_node,
    ):
        spec = layer_on(first_node, "l", verity=whole)
        swapped = spec.replace(device=PathDevice(path=second_node))
        for each in (spec, swapped):
            error = refused(bed, each.replace(verity=whole.replace(**{left_out: None})))
            assert (error.code, error.object) == ("denied", "params.verity")
            assert left_out in error.message
        assert refused(bed, spec.replace(verity=None)).code == "denied"
        assert refused(bed, swapped).code == "integrity"
        report = mount(bed, spec)
        assert Path(report.target, "who").read_bytes() == b"what was audited"
