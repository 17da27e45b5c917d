"""Layers as the contract promises: the same answer twice, busy with names, proofs, refusals."""

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestagent.api import ByteRange, DeviceScratch, LayersMount, LayerSpec, PathDevice, Verity
from guestagent.engine.state import Rules
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.verity import VerityTerms
from rootfs.verity.formatter import format_image
from tests.beds.agentbed import EngineBed, Pack, World, layer_on, overlay, settled_world
from tests.beds.calls import at_once, call_error
from tests.beds.dmbed import loop_device
from tests.beds.loopbed import sparse_file
from vsock.errors import CallError

PACK_LAYERS = 4
LOOP_SET_CAPACITY = 0x4C07  # linux/loop.h


def mount(bed: EngineBed, spec: LayerSpec):  # type: ignore[no-untyped-def]
    return bed.ask(bed.engine.layers.mount, spec)


def unmount(bed: EngineBed, layer_id: str, **options: bool):  # type: ignore[no-untyped-def]
    return bed.ask(bed.engine.layers.unmount, layer_id, **options)


def refused(bed: EngineBed, spec: LayerSpec) -> CallError:
    error = bed.refusal(lambda op: bed.engine.layers.mount(spec, op))
    assert error.step
    return error


# --- the same again


def test_same_id_same_layer_is_already_there(bed: EngineBed, pack: Pack) -> None:
    first = mount(bed, pack.spec(0))
    again = mount(bed, pack.spec(0))
    assert (first.already, again.already) == (False, True)
    assert again.replace(already=False, timings_ms={}) == first.replace(timings_ms={})


def test_same_request_many_times_at_once_mounts_once(bed: EngineBed, pack: Pack) -> None:
    replies = at_once(lambda _: mount(bed, pack.spec(0)), range(8))
    assert sorted(reply.already for reply in replies) == [False] + [True] * 7
    assert len({reply.mount_id for reply in replies}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"target": "/run/elsewhere"},
        {"verity": None},
        {"filesystem": "auto"},
        {"options": ("noexec",)},
    ],
)
def test_same_id_other_layer_is_a_conflict(
    bed: EngineBed, pack: Pack, change: dict[str, object]
) -> None:
    mount(bed, pack.spec(0))
    error = refused(bed, pack.spec(0, **change))
    assert error.code == "conflict"
    assert next(iter(change)) in error.message


def test_two_layers_of_one_range_overlap_and_say_so(bed: EngineBed, pack: Pack) -> None:
    first = mount(bed, pack.spec(0, layer_id="a"))
    second = mount(bed, pack.spec(0, layer_id="b"))
    assert (first.overlaps, second.overlaps) == ((), ("a",))
    assert bed.engine.layers.get("a").overlaps == ("b",)
    assert not {device.name for device in first.dm} & {device.name for device in second.dm}
    wide = pack.layers[0].mapping.size_bytes + pack.layers[1].mapping.size_bytes
    whole = ByteRange(offset_bytes=0, size_bytes=wide)
    third = mount(bed, pack.spec(0, layer_id="c", mapping=whole))
    assert set(third.overlaps) == {"a", "b"}


def test_shared_directories_are_removed_with_the_last_layer(bed: EngineBed, pack: Pack) -> None:
    mount(bed, pack.spec(0, target="/run/deep/down/a"))
    mount(bed, pack.spec(1, target="/run/deep/down/b"))
    unmount(bed, "layer0")
    assert os.listdir("/run/deep/down") == ["b"]
    unmount(bed, "layer1")
    assert not os.path.exists("/run/deep")
    os.makedirs("/run/kept/here")
    mount(bed, pack.spec(0, target="/run/kept/here"))
    unmount(bed, "layer0")
    assert os.path.isdir("/run/kept/here")
    os.removedirs("/run/kept/here")


# --- busy


def _hold_file(path: str) -> "contextlib.AbstractContextManager[object]":
    return open(f"{path}/who", "rb")


@contextlib.contextmanager
def _hold_process(path: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", "print(1, flush=True); input()"],
        cwd=path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.communicate()


@contextlib.contextmanager
def _hold_mount(path: str) -> Iterator[None]:
    other = Path("/run/bound")
    other.mkdir()
    subprocess.run(["mount", "--bind", path, other], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", other], check=True)
        other.rmdir()


@contextlib.contextmanager
def _hold_device(path: str) -> Iterator[None]:
    dev = os.stat(path).st_dev
    with open(f"/dev/dm-{os.minor(dev)}", "rb"):
        yield


@contextlib.contextmanager
def _hold_dm(path: str) -> Iterator[None]:
    """Stand beside verity on the linear device: that of a mount itself cannot be shared."""
    top = f"dm-{os.minor(os.stat(path).st_dev)}"
    (below,) = os.listdir(f"/sys/block/{top}/slaves")
    table = f"0 8 linear {Path(f'/sys/block/{below}/dev').read_text().strip()} 0"
    subprocess.run(["dmsetup", "create", "other", "--readonly", "--table", table], check=True)
    try:
        yield
    finally:
        subprocess.run(["dmsetup", "remove", "other"], check=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("hold", "named"),
    [
        (_hold_file, "process python"),
        (_hold_process, "process python"),
        (_hold_mount, "mount /run/bound"),
        (_hold_device, "process python"),
        (_hold_dm, "dm other"),
    ],
)
def test_busy_names_the_holder_and_changes_nothing(
    bed: EngineBed, pack: Pack, hold: Callable[[str], object], named: str, force: bool
) -> None:
    report = mount(bed, pack.spec(0))
    with hold(report.target):  # type: ignore[attr-defined]
        begin = time.monotonic()
        with pytest.raises(CallError) as caught:
            unmount(bed, "layer0", force=force)
        assert time.monotonic() - begin < 3.0
        assert caught.value.code == "busy"
        assert named in (caught.value.hint or "")
        after = bed.engine.layers.get("layer0")
        assert after.mount_id == report.mount_id
    assert unmount(bed, "layer0").unmounted == (report.target,)


def test_layer_unmounted_by_another_process_is_reported_and_cleaned_up(
    bed: EngineBed, pack: Pack
) -> None:
    report = mount(bed, pack.spec(0))
    subprocess.run(["umount", report.target], check=True)
    with call_error("not_found", match="no longer mounted"):
        bed.engine.layers.get("layer0")
    assert [listed.state for listed in bed.engine.layers.list()] == ["unmounted"]
    reply = unmount(bed, "layer0", force=True)
    assert (reply.unmounted, reply.already) == ((), False)
    assert World.now().dm == ()


def test_forced_unmount_leaves_foreign_mount_over_layer(bed: EngineBed, pack: Pack) -> None:
    report = mount(bed, pack.spec(0))
    subprocess.run(["mount", "-t", "tmpfs", "cover", report.target], check=True)
    try:
        with call_error("conflict"):
            unmount(bed, "layer0", force=True)
    finally:
        subprocess.run(["umount", report.target], check=True)
    assert unmount(bed, "layer0").unmounted == (report.target,)


def test_devices_go_with_the_mount_whatever_the_agent_does(bed: EngineBed, pack: Pack) -> None:
    """Deferred removal: the kernel alone takes all of it away."""
    before = World.now()
    report = mount(bed, pack.spec(0))
    bed.engine.close()
    subprocess.run(["umount", report.target], check=True)
    os.rmdir(report.target)
    os.rmdir("/run/layers")
    assert settled_world(before) == before
    bed.engine = bed._open()
    assert bed.engine.layers.list() == ()
    assert bed.engine.problems() == ()


def test_directory_that_goes_while_a_request_begins_is_made_and_removed_by_it(
    bed: EngineBed, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = World.now()
    mount(bed, pack.spec(0))
    inventory = bed.engine.state.inventory
    reserve = inventory.reserve

    def reserve_later(*arguments: Any, **fields: Any) -> Any:
        monkeypatch.undo()
        unmount(bed, "layer0")
        return reserve(*arguments, **fields)

    monkeypatch.setattr(inventory, "reserve", reserve_later)
    mount(bed, pack.spec(1))
    unmount(bed, "layer1")
    assert settled_world(before) == before


def test_a_removal_that_is_kept_waiting_is_waited_for(bed: EngineBed, pack: Pack) -> None:
    """Opened just after the check, the device stays a while: the reply comes when it is gone."""
    report = mount(bed, pack.spec(0))
    node = f"/dev/dm-{report.dev.split(':')[1]}"
    fd = -1

    def open_at_unmount(step: str, _deadline: object) -> None:
        nonlocal fd
        if step == "unmount":
            fd = os.open(node, os.O_RDONLY)
            threading.Timer(0.3, os.close, (fd,)).start()

    bed.engine.state.faults.reach = open_at_unmount  # type: ignore[method-assign]
    begin = time.monotonic()
    unmount(bed, "layer0")
    assert 0.25 < time.monotonic() - begin < 3.0
    assert World.now().dm == ()


# --- what is refused, and where


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("salt", b"\x01"),
        ("algorithm", "sha1"),
        ("hash_type", 0),
        ("data_blocks", 1),
        ("data_block_size", 1024),
        ("hash_block_size", 1024),
    ],
)
def test_a_superblock_that_disagrees_in_one_field(
    bed: EngineBed, pack: Pack, field: str, value: object
) -> None:
    layer = pack.layers[0]
    digest = layer.root_digest[:20] if value == "sha1" else layer.root_digest
    offset_bytes = _hash_offset(pack)
    fields = {"root_digest": digest, "hash_offset_bytes": offset_bytes, field: value}
    error = refused(bed, pack.spec(0, verity=Verity(**fields)))
    assert (error.code, error.step) == ("integrity", "superblock")
    assert field in f"{error.message} {error.object}"


def _hash_offset(pack: Pack) -> int:
    data = pack.image.read_bytes()[: pack.layers[0].mapping.size_bytes]
    return data.index(b"verity\0\0")


@pytest.mark.parametrize("level", ["superblock", "top", "middle", "last"])
def test_a_truncated_hash_tree(bed: EngineBed, tmp_path: Path, level: str) -> None:
    """A tree of three levels, the device cut off in each of them."""
    image = tmp_path / "big.img"
    source = tmp_path / "source"
    source.mkdir()
    (source / "data").write_bytes(os.urandom(4096) * 32)
    with (source / "sparse").open("wb") as file:
        file.truncate(80 << 20)
        file.write(b"x")
    run = subprocess.run(
        ["mkfs.erofs", "-T0", str(image), str(source)], capture_output=True, check=False
    )
    assert run.returncode == 0
    os.truncate(image, -(-image.stat().st_size // 4096) * 4096)
    data_bytes = image.stat().st_size
    made = format_image(image, terms=VerityTerms(salt=b""))
    assert made.parameters.levels >= 2
    cuts = {
        "superblock": data_bytes,
        "top": data_bytes + 4096,
        "middle": data_bytes + 2 * 4096,
        "last": image.stat().st_size - 4096,
    }
    os.truncate(image, cuts[level])
    with loop_device(image) as node:
        spec = layer_on(
            node, "cut", verity=Verity(root_digest=made.root_digest, hash_offset_bytes=data_bytes)
        )
        error = refused(bed, spec)
        assert (error.code, error.step) == ("integrity", "superblock")


@pytest.mark.parametrize("kind", ["erofs", "squashfs", "ext4", "auto"])
@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize("content", ["zeros", "noise", "magic"])
def test_garbage_for_a_file_system(
    bed: EngineBed, tmp_path: Path, kind: str, content: str, verified: bool
) -> None:
    image = tmp_path / "garbage.img"
    data = {"zeros": bytes(65536), "noise": os.urandom(65536), "magic": bytes(65536)}[content]
    if content == "magic":
        place, magic = {
            "erofs": (1024, b"\xe2\xe1\xf5\xe0"),
            "squashfs": (0, b"hsqs"),
            "ext4": (1080, b"\x53\xef"),
            "auto": (0, b"hsqs"),
        }[kind]
        data = data[:place] + magic + os.urandom(4096) + data[place + len(magic) + 4096 :]
    image.write_bytes(data)
    verity = None
    if verified:
        made = format_image(image, terms=VerityTerms(salt=b""))
        verity = Verity(root_digest=made.root_digest, hash_offset_bytes=65536)
    with loop_device(image) as node:
        spec = layer_on(node, "garbage", filesystem=kind, verity=verity)
        error = refused(bed, spec)
        assert error.step in ("filesystem", "mount")
        assert error.code in ("mount", "unsupported")


@pytest.mark.parametrize("parts", ["plain", "linear", "both"])
def test_a_device_that_shrinks_after_it_was_checked(
    bed: EngineBed, pack: Pack, tmp_path: Path, parts: str
) -> None:
    image = tmp_path / "copy.img"
    image.write_bytes(pack.image.read_bytes())
    layer = pack.layers[-1]
    with loop_device(image) as node:

        def shrink(step: str, _deadline: object) -> None:
            if step == ("mount" if parts == "plain" else "linear"):
                os.truncate(image, 16384)
                with open(node, "rb") as loop:
                    fcntl.ioctl(loop, LOOP_SET_CAPACITY)

        bed.engine.state.faults.reach = shrink  # type: ignore[method-assign]
        spec = pack.spec(
            0 if parts == "plain" else 3,
            device=PathDevice(path=node),
            mapping=None if parts == "plain" else layer.mapping,
        )
        if parts != "both":
            spec = spec.replace(verity=None)
        error = refused(bed, spec)
        assert error.step == ("size" if parts == "plain" else "linear")
        assert error.code == "device"


def test_a_layer_on_a_scratch_and_a_scratch_on_a_layer(
    bed: EngineBed, pack: Pack, tmp_path: Path
) -> None:
    image = sparse_file(tmp_path / "disk.img", 8 << 20)
    with loop_device(image, readonly=False) as node:
        mount(bed, pack.spec(0))
        scratch = DeviceScratch(device=PathDevice(path=node), ensure_filesystem=True)
        bed.ask(bed.engine.overlays.mount, overlay("o", "layer0", scratch=scratch))
        on_scratch = LayerSpec(layer_id="x", device=PathDevice(path=node), filesystem="ext4")
        assert refused(bed, on_scratch).code == "conflict"
        with bed.operation() as op, call_error("conflict"):
            bed.engine.overlays.mount(overlay("p", "layer0", scratch=scratch), op)
        bed.ask(bed.engine.overlays.unmount, "o")


def test_the_rule_that_layers_are_verified(tmp_path: Path, pack: Pack) -> None:
    with EngineBed(tmp_path / "state", Rules(require_verity="yes")) as bed:
        assert refused(bed, pack.spec(0, verity=None)).code == "denied"
        assert mount(bed, pack.spec(0)).verity is not None


# --- batches


def test_batch_keeps_its_order_and_takes_mounted_layers(bed: EngineBed, pack: Pack) -> None:
    mount(bed, pack.spec(2))
    request = LayersMount(
        layers=tuple(pack.spec(number) for number in (3, 2, 1, 0)),
        overlay=overlay("o", "layer1", "layer2", "layer0"),
    )
    reply = bed.ask(bed.engine.batches.mount, request)
    assert [(report.layer_id, report.already) for report in reply.layers] == [
        ("layer3", False),
        ("layer2", True),
        ("layer1", False),
        ("layer0", False),
    ]
    assert reply.overlay is not None
    assert reply.overlay.lowerdirs == tuple(f"/run/layers/layer{n}" for n in (1, 2, 0))
    assert Path(reply.overlay.target, "who").read_bytes().startswith(pack.layers[1].marker)
    again = bed.ask(bed.engine.batches.mount, request)
    assert all(report.already for report in again.layers)
    assert again.overlay is not None
    assert again.overlay.already


def test_one_bad_layer_undoes_the_batch_and_is_named(bed: EngineBed, pack: Pack) -> None:
    mount(bed, pack.spec(3))
    before = World.now(), bed.books()
    bad = pack.spec(1, verity=Verity(root_digest=bytes(32)))
    request = LayersMount(
        layers=(pack.spec(0), bad, pack.spec(2), pack.spec(3)), overlay=overlay("o", "layer0")
    )
    with bed.operation() as op, call_error("integrity", step="superblock"):
        bed.engine.batches.mount(request, op)
    assert (settled_world(before[0]), bed.books()) == before
    kinds = [(event.kind, event.layer_id) for event in bed.engine.events.since(0)[0]]
    assert ("layer_failed", "layer1") in kinds


# --- presets


@pytest.mark.parametrize("preset", ["default", "strict", "fast"])
def test_presets_follow_the_features_of_the_kernel(bed: EngineBed, pack: Pack, preset: str) -> None:
    verity = Verity(root_digest=pack.layers[0].root_digest, preset=preset)
    report = mount(bed, pack.spec(0, verity=verity)).verity
    with Control() as control:
        version = control.list_versions()["verity"]
    assert report is not None
    asked = {
        "default": [],
        "strict": ["panic_on_corruption", "panic_on_error"],
        "fast": ["try_verify_in_tasklet", "ignore_zero_blocks"],
    }[preset]
    told = {*report.options, *(dropped.option for dropped in report.dropped)}
    assert told == set(asked)
    if version < (1, 10, 0) and preset == "strict":
        (dropped,) = report.dropped
        assert dropped.option == "panic_on_error"
        assert ".".join(map(str, version)) in dropped.reason


def test_a_signature_that_the_kernel_cannot_check(bed: EngineBed, pack: Pack) -> None:
    """Never ignored: without a trusted key, or without the code for it, there is no layer."""
    verity = Verity(root_digest=pack.layers[0].root_digest, signature=b"no signature")
    error = refused(bed, pack.spec(0, verity=verity))
    assert error.step in ("verity", "version")
    assert error.code in ("denied", "device", "integrity", "unsupported")


@pytest.mark.parametrize("what", ["all tables", "the verity status"])
def test_a_layer_that_is_going_is_gone(
    bed: EngineBed, pack: Pack, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The kernel removes a table before its device; nobody can make it stop in between, so that
    what it says then is made up."""
    bed.ask(bed.engine.layers.mount, pack.spec(0))
    real = Control.describe

    def describe(control: Control, name: str) -> object:
        info, table, status = real(control, name)
        if what == "all tables":
            return info, (), ()
        return info, table, tuple(one.replace(status="") for one in status)

    with monkeypatch.context() as patch:
        patch.setattr(Control, "describe", describe)
        assert [one.state for one in bed.engine.layers.list()] == ["damaged"]
        with call_error("not_found"):
            bed.engine.layers.get("layer0")
    assert [one.state for one in bed.engine.layers.list()] == ["mounted"]
