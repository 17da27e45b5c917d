"""Packs: where layers go, what a reader sees at every moment, and who is kept out."""

import contextlib
import fcntl
import json
import os
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from guestagent.storage.verity import VerityTerms
from rootfs.image.images import build_image
from rootfs.imagefile.ranges import FileRange, first_fit, free_ranges, overlapping, round_up
from rootfs.pack.manifest import Manifest
from rootfs.pack.pack import DAX_ALIGNMENT_BYTES, Pack, manifest_path_of
from rootfs.verity.formatter import format_image
from tests.beds.calls import call_error
from vsock.errors import CallError

MIB = 1 << 20


def superblock(size: int) -> bytes:
    """Return what begins an EROFS image of ``size`` bytes; at least 2 KiB, of blocks of 512."""
    head = bytearray(2048)
    head[1024:1028] = b"\xe2\xe1\xf5\xe0"
    head[1024 + 12] = 9
    head[1024 + 36 : 1024 + 40] = struct.pack("<I", size // 512)
    return bytes(head)


def layer_file(path: Path, size: int, seed: int = 0) -> Path:
    path.write_bytes(superblock(size) + random.Random(seed).randbytes(size - 2048))
    return path


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    return layer_file(tmp_path / "layer", 10_000)


# --- allocator

RANGES = st.lists(
    st.builds(FileRange, offset_bytes=st.integers(0, 200), size_bytes=st.integers(1, 50)),
    max_size=8,
)


@given(RANGES, st.integers(1, 60), st.sampled_from([1, 4, 16]))
def test_first_fit_is_the_lowest_place(used: list[FileRange], size: int, alignment: int) -> None:
    taken = {at for each in used for at in range(each.offset_bytes, each.end_bytes)}
    place = 0
    while not taken.isdisjoint(range(place, place + size)):
        place += alignment
    assert first_fit(used, size, alignment) == place


@given(RANGES, st.integers(0, 260))
def test_free_ranges_are_the_complement_of_used_ranges(used: list[FileRange], total: int) -> None:
    taken = {at for each in used for at in range(each.offset_bytes, each.end_bytes)}
    free = free_ranges(used, total)
    assert {at for each in free for at in range(each.offset_bytes, each.end_bytes)} == set(
        range(total)
    ) - taken
    assert free == sorted(free)
    assert not overlapping(free)


@given(RANGES)
def test_overlaps_are_found(used: list[FileRange]) -> None:
    counts = [at for each in used for at in range(each.offset_bytes, each.end_bytes)]
    assert bool(overlapping(used)) == (len(counts) != len(set(counts)))


# --- packs


def test_layers_lie_aligned_in_whole_steps(tmp_path: Path, layer: Path) -> None:
    with Pack.create(tmp_path / "p", alignment_bytes=DAX_ALIGNMENT_BYTES) as pack:
        first = pack.add(layer, "a")
        second = pack.add(layer, "b")
        assert (first.offset_bytes, second.offset_bytes) == (0, 2 * MIB)
        assert first.size_bytes == 12288
    assert (tmp_path / "p").stat().st_size == 4 * MIB
    data = (tmp_path / "p").read_bytes()
    assert data[2 * MIB : 2 * MIB + 12288] == layer.read_bytes().ljust(12288, b"\0")
    assert [each.layer_id for each in Manifest.load(tmp_path / "p.json").layers] == ["b", "a"]


def test_a_freed_range_is_used_again_and_was_cleared(tmp_path: Path) -> None:
    with Pack.create(tmp_path / "p") as pack:
        for number in range(4):
            pack.add(layer_file(tmp_path / "l", 20_000, number), f"l{number}")
        pack.remove("l1")
        assert (tmp_path / "p").read_bytes()[20480:40960] == bytes(20480)
        small = pack.add(layer_file(tmp_path / "l", 5000, 9), "small", position=3)
        assert small.offset_bytes == 20480
        large = pack.add(layer_file(tmp_path / "l", 30_000, 9), "large")
        assert large.offset_bytes == 4 * 20480
        ids = [each.layer_id for each in pack.layers]
        assert ids == ["large", "l3", "l2", "l0", "small"]
        assert pack.check().is_sound


def test_trimming_gives_back_the_end(tmp_path: Path, layer: Path) -> None:
    with Pack.create(tmp_path / "p") as pack:
        pack.add(layer, "a")
        pack.add(layer_file(tmp_path / "l", 3 * MIB), "b")
        assert (tmp_path / "p").stat().st_size == 4 * MIB
        pack.remove("b")
        assert (tmp_path / "p").stat().st_size == pack.manifest.size_bytes == 4 * MIB
        pack.remove("a", trim=True)
        assert (tmp_path / "p").stat().st_size == pack.manifest.size_bytes == 0
        assert pack.check().is_sound


def verity_layer(path: Path, size: int = 700_000) -> tuple[Path, object]:
    layer_file(path, round_up(size, 4096))
    return path, format_image(path, terms=VerityTerms(salt=b"salt"), workers=1).parameters


def test_check_finds_a_corrupt_block_at_any_place(tmp_path: Path) -> None:
    path, parameters = verity_layer(tmp_path / "layer")
    with Pack.create(tmp_path / "p") as pack:
        pack.add(layer_file(tmp_path / "other", 5000), "other")
        added = pack.add(path, "v", verity=parameters)  # type: ignore[arg-type]
        assert pack.check().is_sound
    size = added.size_bytes
    tree = added.verity.tree_offset_bytes  # type: ignore[union-attr]
    for at in (0, 300_000, tree - 8192, tree, tree + 4096, size - 4096 + 1):
        with flipped(tmp_path / "p", added.offset_bytes + at), Pack.open(tmp_path / "p") as pack:
            report = pack.check()
            assert [each.layer_id for each in report.findings] == ["v"], at
    with flipped(tmp_path / "p", 4999), Pack.open(tmp_path / "p") as pack:
        assert [each.layer_id for each in pack.check().findings] == ["other"]
    with Pack.open(tmp_path / "p") as pack:
        assert pack.check().is_sound


def test_check_finds_a_changed_superblock(tmp_path: Path) -> None:
    path, parameters = verity_layer(tmp_path / "layer")
    with Pack.create(tmp_path / "p") as pack:
        added = pack.add(path, "v", verity=parameters)  # type: ignore[arg-type]
    place = added.offset_bytes + added.verity.hash_offset_bytes  # type: ignore[union-attr]
    for at, what in ((0, "signature"), (8, "version"), (72, "data_blocks"), (88, "salt")):
        with flipped(tmp_path / "p", place + at), Pack.open(tmp_path / "p") as pack:
            (finding,) = pack.check().findings
            assert finding.layer_id == "v"
            assert what in finding.problem, finding


@pytest.mark.parametrize(
    ("content", "filesystem", "what"),
    [
        (bytes(8192), "erofs", "no erofs superblock"),
        (superblock(8192) + bytes(6144), "squashfs", "no squashfs superblock"),
        (superblock(16384) + bytes(6144), "erofs", "claims 16384 bytes, the device has 8192"),
    ],
)
def test_a_check_looks_for_the_file_system(
    tmp_path: Path, content: bytes, filesystem: str, what: str
) -> None:
    (tmp_path / "layer").write_bytes(content)
    with Pack.create(tmp_path / "p") as pack:
        pack.add(tmp_path / "layer", "a", filesystem=filesystem)
        (finding,) = pack.check().findings
    assert what in finding.problem


@contextlib.contextmanager
def flipped(path: Path, at: int):  # type: ignore[no-untyped-def]
    with path.open("r+b") as file:
        before = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([before[0] ^ 1]), at)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), before, at)


def test_hole_of_one_layer_is_not_taken_for_one_of_the_next(tmp_path: Path) -> None:
    with (tmp_path / "hole").open("wb") as file:
        file.write(superblock(4 * MIB))
        file.truncate(4 * MIB)
    path, parameters = verity_layer(tmp_path / "layer", 2 * MIB)
    with Pack.create(tmp_path / "p") as pack:
        pack.add(tmp_path / "hole", "hole")
        pack.add(path, "v", verity=parameters)  # type: ignore[arg-type]
        assert pack.check().is_sound


def test_holes_read_as_zeros_where_something_was_before(tmp_path: Path) -> None:
    with Pack.create(tmp_path / "p"):
        pass
    (tmp_path / "p").write_bytes(b"left by an addition that did not end" * 100_000)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(MIB)
        file.write(superblock(MIB))
    with Pack.open(tmp_path / "p", writable=True) as pack:
        pack.add(tmp_path / "sparse", "a")
        assert pack.check().is_sound
    assert (tmp_path / "p").read_bytes()[:MIB] == superblock(MIB).ljust(MIB, b"\0")


def test_layer_with_the_tree_of_another_is_refused(tmp_path: Path) -> None:
    path, parameters = verity_layer(tmp_path / "layer")
    wrong = parameters.replace(root_digest=bytes(32))  # type: ignore[attr-defined]
    with Pack.create(tmp_path / "p") as pack:
        with call_error("integrity"):
            pack.add(path, "v", verity=wrong)
        assert pack.layers == ()
    assert (tmp_path / "p").stat().st_size == 0


def test_an_image_that_was_cut_is_found(tmp_path: Path, layer: Path) -> None:
    with Pack.create(tmp_path / "p") as pack:
        pack.add(layer, "a")
    os.truncate(tmp_path / "p", 4096)
    with Pack.open(tmp_path / "p") as pack:
        problems = [(each.layer_id, each.problem) for each in pack.check().findings]
    assert [layer_id for layer_id, _ in problems] == [None, "a"]
    assert "2097152" in problems[0][1]


# --- who is kept out


def test_a_pack_in_use_is_busy(tmp_path: Path, layer: Path) -> None:
    with Pack.create(tmp_path / "p") as pack:
        pack.add(layer, "a")
        with call_error("busy"):
            Pack.open(tmp_path / "p")
    with Pack.open(tmp_path / "p"), Pack.open(tmp_path / "p"), call_error("busy"):
        Pack.open(tmp_path / "p", writable=True)
    with Pack.open(tmp_path / "p", writable=True) as pack:
        pack.remove("a")


def test_a_disk_that_qemu_holds_is_busy(tmp_path: Path) -> None:
    Pack.create(tmp_path / "p").close()
    with (tmp_path / "p").open("rb") as held:
        lock = struct.pack("hh4xqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(held, fcntl.F_OFD_SETLK, lock)
        with call_error("busy", match="virtual machine"):
            Pack.open(tmp_path / "p", writable=True)
        Pack.open(tmp_path / "p").close()


def test_reading_only_is_reading_only(tmp_path: Path, layer: Path) -> None:
    Pack.create(tmp_path / "p").close()
    with Pack.open(tmp_path / "p") as pack:
        with pytest.raises(CallError, match="reading only"):
            pack.add(layer, "a")
        with pytest.raises(CallError, match="reading only"):
            pack.remove("a")
    with pytest.raises(CallError, match="closed"):
        pack.remove("a")


def test_ids_are_unique_and_removal_is_exact(tmp_path: Path, layer: Path) -> None:
    with Pack.create(tmp_path / "p") as pack:
        pack.add(layer, "a")
        with call_error("conflict"):
            pack.add(layer, "a")
        with call_error("not_found"):
            pack.remove("b")
        with call_error("invalid", match="layer id"):
            pack.add(layer, "../a")


def test_pack_create_does_not_overwrite_existing_files(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"precious")
    with call_error("conflict"):
        Pack.create(tmp_path / "p")
    (tmp_path / "q.json").write_bytes(b"precious")
    with call_error("conflict"):
        Pack.create(tmp_path / "q")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p", "q.json"]


def test_a_manifest_belongs_to_its_image(tmp_path: Path) -> None:
    Pack.create(tmp_path / "p").close()
    Pack.create(tmp_path / "q").close()
    with pytest.raises(CallError, match="manifest of 'p'"):
        Pack.open(tmp_path / "q", manifest_path_of(tmp_path / "p"))
    (tmp_path / "d").mkdir()
    with pytest.raises(CallError, match="directory"):
        Pack.create(tmp_path / "r", tmp_path / "d" / "r.json")


def test_a_full_disk_leaves_the_pack_as_it_was(
    tmp_path: Path, layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Pack.create(tmp_path / "p") as pack:
        pack.add(layer, "a")
        before = (tmp_path / "p").read_bytes(), (tmp_path / "p.json").read_bytes()
        large = layer_file(tmp_path / "large", 5 * MIB)
        with monkeypatch.context() as patch:
            patch.setattr(os, "copy_file_range", full)
            with pytest.raises(CallError) as caught:
                pack.add(large, "b")
        assert caught.value.code == "resource"
        assert ((tmp_path / "p").read_bytes(), (tmp_path / "p.json").read_bytes()) == before
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", full)
            with pytest.raises(CallError):
                pack.add(layer, "c")
        assert (tmp_path / "p.json").read_bytes() == before[1]
        assert [each.layer_id for each in pack.layers] == ["a"]
        pack.add(large, "b")
        assert pack.check().is_sound
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_a_process_that_dies_before_the_manifest_leaves_a_sound_pack(
    tmp_path: Path, layer: Path
) -> None:
    with Pack.create(tmp_path / "p") as pack:
        pack.add(layer, "a")
        old = (tmp_path / "p.json").read_bytes()
        pack.add(layer_file(tmp_path / "l", 3 * MIB), "lost")
    (tmp_path / "p.json").write_bytes(old)
    with Pack.open(tmp_path / "p", writable=True) as pack:
        report = pack.check()
        assert report.is_sound
        assert report.unclaimed_bytes == 2 * MIB
        added = pack.add(layer_file(tmp_path / "l", 3 * MIB + 1, 5), "new")
        assert added.offset_bytes == 12288
        assert pack.check().unclaimed_bytes == 0


def test_a_copy_by_hand_is_the_same(
    tmp_path: Path, layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def unsupported(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", unsupported)
    with Pack.create(tmp_path / "p") as pack:
        pack.add(layer, "a")
        assert pack.check().is_sound


class PackMachine(RuleBasedStateMachine):
    """Any sequence of additions, merges and removals keeps a pack sound, and its layers as they
    were."""

    ids = Bundle("ids")
    images = Bundle("images")

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.holder = tempfile.TemporaryDirectory(prefix="pack-")
        self.top = Path(self.holder.name)
        self.pack = Pack.create(self.top / "p")
        self.model: list[tuple[str, bytes]] = []
        self.count = 0

    @rule(target=ids, size=st.integers(2048, 40_000), position=st.integers(0, 3))
    def add(self, size: int, position: int) -> str:
        self.count += 1
        path = layer_file(self.top / "layer", size, self.count)
        layer_id = f"l{self.count}"
        self.pack.add(path, layer_id, position=position)
        self.model.insert(position, (layer_id, path.read_bytes()))
        return layer_id

    @rule(target=ids, files=st.integers(1, 3), position=st.integers(0, 3))
    def add_verified(self, files: int, position: int) -> str:
        self.count += 1
        tree, path, layer_id = self.top / f"tree{self.count}", self.top / "layer", f"l{self.count}"
        tree.mkdir()
        for number in range(files):
            (tree / f"file{number}").write_bytes(bytes([self.count]) * 200_000)
        path.unlink(missing_ok=True)
        built = build_image(tree, path, verity=True)
        assert built.verity is not None
        self.pack.add(path, layer_id, verity=built.verity, position=position)
        data = path.read_bytes()[: built.verity.data_size_bytes]
        self.model.insert(position, (layer_id, data))
        return layer_id

    @rule(target=images, seed=st.integers(0, 1000))
    def merge(self, seed: int) -> str:
        self.count += 1
        ids = [layer.layer_id for layer in self.pack.layers if layer.verity is not None]
        chosen = random.Random(seed).sample(ids, k=min(2, len(ids)))
        image_id = f"i{self.count}"
        if chosen:
            self.pack.merge(image_id, chosen)
        else:
            with pytest.raises(CallError, match="no layers"):
                self.pack.merge(image_id, chosen)
        return image_id

    @rule(image_id=consumes(images), trim=st.booleans())
    def remove_image(self, image_id: str, trim: bool) -> None:
        if self.pack.manifest.find_image(image_id) is not None:
            self.pack.remove(image_id, trim=trim)

    @rule(layer_id=consumes(ids), trim=st.booleans())
    def remove(self, layer_id: str, trim: bool) -> None:
        if any(layer_id in image.layers for image in self.pack.manifest.images):
            with pytest.raises(CallError, match="needs it"):
                self.pack.remove(layer_id, trim=trim)
            return
        self.pack.remove(layer_id, trim=trim)
        self.model = [each for each in self.model if each[0] != layer_id]

    @rule()
    def reopen(self) -> None:
        self.pack.close()
        self.pack = Pack.open(self.top / "p", writable=True)

    @invariant()
    def sound(self) -> None:
        report = self.pack.check()
        assert report.is_sound
        assert report.used_bytes + report.free_bytes == self.pack.manifest.size_bytes
        assert [each.layer_id for each in self.pack.layers] == [name for name, _ in self.model]
        data = (self.top / "p").read_bytes()
        for (_, content), each in zip(self.model, self.pack.layers, strict=True):
            assert data[each.offset_bytes :][: len(content)] == content
        assert json.loads((self.top / "p.json").read_text()) == self.pack.manifest.to_json()

    def teardown(self) -> None:
        self.pack.close()
        self.holder.cleanup()


PackMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
TestPackMachine = PackMachine.TestCase


def test_a_layer_that_grows_meanwhile_does_not_run_into_the_next(
    tmp_path: Path, layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rootfs.pack import pack as module

    measured = module.digest_range

    def and_grow(*arguments: object, **options: object) -> str:
        digest = measured(*arguments, **options)  # type: ignore[arg-type]
        with (tmp_path / "growing").open("ab") as file:
            file.write(b"more" * 5000)
        return digest

    with Pack.create(tmp_path / "p.img") as pack:
        pack.add(layer, "first")
        pack.add(layer_file(tmp_path / "behind", 10_000, 1), "behind")
        pack.remove("first")
        layer_file(tmp_path / "growing", 10_000, 2)
        monkeypatch.setattr(module, "digest_range", and_grow)
        with call_error("conflict", match="size changed"):
            pack.add(tmp_path / "growing", "growing")
        assert [each.layer_id for each in pack.layers] == ["behind"]
        assert pack.check().is_sound
