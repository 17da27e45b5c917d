"""Layers whose bytes lie in many ranges of a device, in any order: one linear table for each."""

import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import ByteRange, DeviceScratch, LayerSpec, PathDevice, Verity
from guestagent.api.devices import MAX_RANGES
from guestagent.api.layers import SHOWN_PARTS
from guestagent.storage.filesystems import has_flattened_erofs
from guestagent.storage.verity import VerityTerms
from rootfs.verity.formatter import format_image
from tests.beds.agentbed import EngineBed, Pack, World, layer_on, overlay, settled_world, who
from tests.beds.calls import run
from tests.beds.dmbed import loop_device
from tests.beds.loopbed import sparse_file
from tests.kernel.test_engine_transactions import FAILURES, fail_at_every_step, unmount_layer
from vsock.errors import CallError

PACK_LAYERS = 2
PAGE = 4096


def scatter(content: bytes, image: Path) -> tuple[ByteRange, ...]:
    """Write the sectors of ``content`` into ``image`` in another order, with foreign bytes between
    them; return where each is, in the order of the content."""
    parts = [content[at : at + 512] for at in range(0, len(content), 512)]
    places = list(range(len(parts)))
    random.Random(len(parts)).shuffle(places)
    with image.open("wb") as file:
        for place, part in zip(places, parts, strict=True):
            file.seek(place * 1024)
            file.write(part + b"\xff" * 512)
    return tuple(
        ByteRange(offset_bytes=place * 1024, size_bytes=len(part))
        for place, part in zip(places, parts, strict=True)
    )


@pytest.fixture
def scattered(pack: Pack, tmp_path: Path) -> Iterator[LayerSpec]:
    """The first layer of the pack, sector by sector in another order on a device of its own."""
    place = pack.layers[0].mapping
    content = pack.image.read_bytes()[place.offset_bytes : place.end_bytes]
    ranges = scatter(content, tmp_path / "scattered.img")
    with loop_device(tmp_path / "scattered.img") as node:
        yield pack.spec(0, device=PathDevice(path=node), mapping=ranges)


def mount(bed: EngineBed, spec: LayerSpec):  # type: ignore[no-untyped-def]
    return bed.ask(bed.engine.layers.mount, spec)


def unmount(bed: EngineBed, layer_id: str) -> None:
    bed.ask(bed.engine.layers.unmount, layer_id)


def refused(bed: EngineBed, spec: LayerSpec) -> CallError:
    return bed.refusal(lambda op: bed.engine.layers.mount(spec, op))


def linear_lines(spec: LayerSpec, node: str) -> list[str]:
    rdev = os.stat(node).st_rdev
    lines, start = [], 0
    for part in spec.ranges:
        length, offset = part.size_bytes // 512, part.offset_bytes // 512
        lines.append(f"{start} {length} linear {os.major(rdev)}:{os.minor(rdev)} {offset}")
        start += length
    return lines


def dmsetup_table(name: str) -> list[str]:
    asked = subprocess.run(["dmsetup", "table", name], check=True, capture_output=True, text=True)
    return asked.stdout.splitlines()


@pytest.mark.parametrize("is_verified", [True, False])
def test_ranges_in_any_order_become_the_same_dmsetup_table(
    bed: EngineBed, pack: Pack, scattered: LayerSpec, is_verified: bool
) -> None:
    spec = scattered if is_verified else scattered.replace(verity=None)
    report = mount(bed, spec)
    linear = report.dm[-1]
    assert linear.name.startswith("dm-linear-")
    assert f"-{len(spec.ranges)}x-" in linear.name
    expected = linear_lines(spec, report.device_node)
    assert dmsetup_table(linear.name) == expected
    assert len(expected) > SHOWN_PARTS
    assert linear.table == "; ".join(expected[:SHOWN_PARTS])
    assert (linear.target_count, report.range_count) == (len(expected), len(expected))
    assert report.mapping == spec.ranges[:SHOWN_PARTS]
    assert report.size_bytes == sum(part.size_bytes for part in spec.ranges)
    assert list(bed.engine.dm.table(linear.name)) == expected
    assert who(report.target) == pack.layers[0].marker
    if is_verified:
        assert report.verity.status == "V"
        with bed.operation() as op:
            checked = bed.engine.layers.verify(spec.layer_id, op, lambda done, total: None)
        assert checked.corrupt_blocks == ()
    unmount(bed, spec.layer_id)
    assert World.now().dm == ()


def test_the_same_ranges_are_the_same_layer(bed: EngineBed, scattered: LayerSpec) -> None:
    first = mount(bed, scattered)
    again = mount(bed, scattered)
    assert (first.already, again.already) == (False, True)
    swapped = (scattered.ranges[1], scattered.ranges[0], *scattered.ranges[2:])
    error = refused(bed, scattered.replace(mapping=swapped))
    assert (error.code, "mapping" in error.message) == ("conflict", True)
    assert refused(bed, scattered.replace(mapping=None)).code == "conflict"


def test_a_list_of_one_range_is_the_layer_of_that_range(bed: EngineBed, pack: Pack) -> None:
    first = mount(bed, pack.spec(0, mapping=(pack.layers[0].mapping,)))
    assert f"-0-{pack.layers[0].mapping.size_bytes}" in first.dm[-1].name
    assert mount(bed, pack.spec(0)).already


def test_another_order_does_not_verify(bed: EngineBed, scattered: LayerSpec) -> None:
    first, second, superblock, *rest = scattered.ranges
    error = refused(bed, scattered.replace(mapping=(superblock, second, first, *rest)))
    assert error.code == "integrity"


def test_restarted_agent_adopts_a_layer_of_ranges(bed: EngineBed, scattered: LayerSpec) -> None:
    first = mount(bed, scattered)
    bed.reopen()
    assert bed.engine.problems() == ()
    again = mount(bed, scattered)
    assert again.already
    assert (again.mount_id, again.dm) == (first.mount_id, first.dm)
    unmount(bed, scattered.layer_id)


def test_a_table_that_another_program_changed_is_told(bed: EngineBed, scattered: LayerSpec) -> None:
    report = mount(bed, scattered)
    name = report.dm[-1].name
    lines = dmsetup_table(name)
    # the last of many targets, behind those that a report shows
    start, length, kind, device, offset = lines[-1].split()
    lines[-1] = f"{start} {length} {kind} {device} {int(offset) + 1}"
    table = "\n".join(lines)
    run("dmsetup", "load", "--readonly", name, input=table)
    run("dmsetup", "resume", name)
    seen = bed.engine.layers.get(scattered.layer_id)
    assert (seen.state, seen.dm[-1].name) == ("changed", name)
    assert any(name in problem for problem in bed.engine.problems())


def test_layers_that_share_a_range_say_so(bed: EngineBed, scattered: LayerSpec) -> None:
    mount(bed, scattered)
    shared = ByteRange(offset_bytes=scattered.ranges[-1].offset_bytes, size_bytes=512)
    between = ByteRange(offset_bytes=scattered.ranges[-1].end_bytes, size_bytes=512)
    for part, overlaps in ((shared, (scattered.layer_id,)), (between, ())):
        other = scattered.replace(layer_id="other", verity=None, mapping=(between, part))
        live = bed.engine.state.inventory.layer(scattered.layer_id)
        assert live is not None
        assert bed.engine.state.inventory.overlapping(live.replace(spec=other)) == overlaps


def test_holes_may_all_be_one_padding_range(bed: EngineBed, pack: Pack, tmp_path: Path) -> None:
    """Zeros behind the layer's own bytes come from one page, again and again."""
    place = pack.layers[0].mapping
    erofs = pack.image.read_bytes()[: place.end_bytes]
    (blocks,) = struct.unpack_from("<I", erofs, 1024 + 36)
    whole = tmp_path / "whole.img"
    whole.write_bytes(erofs[: blocks * PAGE] + bytes(512 * 1024))
    made = format_image(whole, terms=VerityTerms(salt=b"common"), workers=1)
    content, tree_at = whole.read_bytes(), blocks * PAGE + 512 * 1024
    pages = [content[at : at + PAGE] for at in range(0, blocks * PAGE, PAGE)]
    image = tmp_path / "packed.img"
    tree = content[tree_at:].ljust(-(-len(content[tree_at:]) // PAGE) * PAGE, b"\0")
    image.write_bytes(bytes(PAGE) + b"".join(pages) + tree)
    padding = ByteRange(offset_bytes=0, size_bytes=PAGE)
    ranges = (
        ByteRange(offset_bytes=PAGE, size_bytes=blocks * PAGE),
        *[padding] * 128,
        ByteRange(offset_bytes=PAGE + blocks * PAGE, size_bytes=len(tree)),
    )
    verity = Verity(root_digest=made.root_digest, hash_offset_bytes=tree_at)
    with loop_device(image) as node:
        spec = pack.spec(0, device=PathDevice(path=node), mapping=ranges, verity=verity)
        report = mount(bed, spec)
        assert who(report.target) == pack.layers[0].marker
        with bed.operation() as op:
            checked = bed.engine.layers.verify("layer0", op, lambda done, total: None)
        assert (checked.read_bytes, checked.corrupt_blocks) == (tree_at, ())
        unmount(bed, "layer0")


def test_as_many_ranges_as_there_may_be(bed: EngineBed, pack: Pack, tmp_path: Path) -> None:
    place = pack.layers[0].mapping
    content = pack.image.read_bytes()[: place.end_bytes].ljust(MAX_RANGES * 512, b"\0")
    ranges = scatter(content, tmp_path / "many.img")
    assert len(ranges) == MAX_RANGES
    with loop_device(tmp_path / "many.img") as node:
        spec = pack.spec(0, device=PathDevice(path=node), mapping=ranges)
        report = mount(bed, spec)
        assert dmsetup_table(report.dm[-1].name) == linear_lines(spec, node)
        assert who(report.target) == pack.layers[0].marker
        assert len(report.to_wire()["mapping"]) == SHOWN_PARTS  # type: ignore[arg-type]
        assert report.dm[-1].table.count("linear") == SHOWN_PARTS
        bed.reopen()
        assert mount(bed, spec).already
        unmount(bed, "layer0")


# --- what is refused


def test_ranges_past_the_device_and_tables_that_do_not_fit(
    bed: EngineBed, scattered: LayerSpec
) -> None:
    size_bytes = Path(bed.directory.parent / "scattered.img").stat().st_size // 512 * 512
    past = ByteRange(offset_bytes=size_bytes - 512, size_bytes=1024)
    error = refused(bed, scattered.replace(mapping=(*scattered.ranges, past)))
    number = len(scattered.ranges)
    assert (error.code, error.object) == ("invalid", f"params.mapping[{number}]")
    # without its end, where the hash tree is, the layer is too short
    error = refused(bed, scattered.replace(mapping=scattered.ranges[:-1]))
    assert (error.code, error.step) == ("integrity", "superblock")
    error = refused(bed, scattered.replace(mapping=scattered.ranges[:4], verity=None))
    assert (error.code, error.step) == ("mount", "filesystem")


def test_ranges_of_a_writable_scratch_are_refused(
    bed: EngineBed, pack: Pack, tmp_path: Path
) -> None:
    image = sparse_file(tmp_path / "disk.img", 8 << 20)
    with loop_device(image, readonly=False) as node:
        mount(bed, pack.spec(0))
        scratch = DeviceScratch(device=PathDevice(path=node), ensure_filesystem=True)
        bed.ask(bed.engine.overlays.mount, overlay("o", "layer0", scratch=scratch))
        ranges = tuple(ByteRange(offset_bytes=at, size_bytes=PAGE) for at in (PAGE, 0))
        spec = pack.spec(1, device=PathDevice(path=node), mapping=ranges)
        error = refused(bed, spec)
        assert (error.code, "scratch of overlay 'o'" in error.message) == ("conflict", True)
        bed.ask(bed.engine.overlays.unmount, "o")


def test_a_device_table_is_mounted_or_refused_by_the_kernel_it_needs(
    bed: EngineBed, tmp_path: Path
) -> None:
    """An image and its blob, put together by ranges: flattened since Linux 6.4."""
    source, image, blob = tmp_path / "source", tmp_path / "image", tmp_path / "blob"
    source.mkdir()
    content = b"in the blob".ljust(3 * PAGE, b".")
    (source / "file").write_bytes(content)
    blob.touch()  # mkfs.erofs 1.8 does not make it
    command = ["mkfs.erofs", "-T0", f"--blobdev={blob}", f"--chunksize={PAGE}"]
    run(*command, image, source)
    meta = bytearray(image.read_bytes().ljust(-(-image.stat().st_size // PAGE) * PAGE, b"\0"))
    data = blob.read_bytes().ljust(-(-blob.stat().st_size // PAGE) * PAGE, b"\0")
    extra, slot = struct.unpack_from("<HH", meta, 1024 + 86)
    assert extra == 1
    struct.pack_into("<II", meta, slot * 128 + 64, len(data) // PAGE, len(meta) // PAGE)
    struct.pack_into("<I", meta, 1024 + 8, 0)  # no checksum
    both = tmp_path / "both.img"
    both.write_bytes(data + meta)
    ranges = (
        ByteRange(offset_bytes=len(data), size_bytes=len(meta)),
        ByteRange(offset_bytes=0, size_bytes=len(data)),
    )
    with loop_device(both) as node:
        spec = layer_on(node, "flat", mapping=ranges)
        if not has_flattened_erofs():
            assert "erofs-flattened" not in bed.engine.features()
            error = refused(bed, spec)
            assert (error.code, error.object) == ("unsupported", "erofs-flattened")
            return
        assert "erofs-flattened" in bed.engine.features()
        report = mount(bed, spec)
        assert Path(report.target, "file").read_bytes() == content
        unmount(bed, "flat")
        short = (ranges[0], ranges[1].replace(size_bytes=len(data) - 512))
        error = refused(bed, spec.replace(mapping=short))
        assert (error.code, "device 0 of" in error.message) == ("mount", True)


# --- faults and crashes, which the beds of the other kinds go through as well


def in_parts(pack: Pack, number: int) -> LayerSpec:
    """The same bytes as ``pack.spec``, in ranges of a page."""
    place = pack.layers[number].mapping
    ranges = tuple(
        ByteRange(offset_bytes=at, size_bytes=PAGE)
        for at in range(place.offset_bytes, place.end_bytes, PAGE)
    )
    return pack.spec(number, mapping=ranges)


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_at_every_step_leaves_nothing(bed: EngineBed, pack: Pack, kind: str) -> None:
    spec = in_parts(pack, 0)
    assert fail_at_every_step(bed, lambda bed, op: bed.engine.layers.mount(spec, op), kind) >= 12
    fail_at_every_step(bed, unmount_layer, kind)


def test_an_agent_killed_at_every_step(tmp_path: Path, pack: Pack) -> None:
    spec, directory = in_parts(pack, 0), tmp_path / "state"
    for step in range(1, 40):
        with EngineBed(directory) as bed:
            before = World.now()
            bed.engine.close()
            child = os.fork()
            if child == 0:
                try:
                    dying = EngineBed(directory)
                    dying.faults.arm(f"#{step}:KILL")
                    mount(dying, spec)
                finally:
                    os._exit(0)
            died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
            bed.reopen()
            assert bed.engine.problems() == ()
            if not bed.engine.layers.list():
                assert settled_world(before) == before, f"step {step}"
            assert mount(bed, spec).state == "mounted"
        if not died:
            return
    raise AssertionError("the request never ends")
