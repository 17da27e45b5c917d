"""The verifier: agrees with veritysetup in both directions, and names what is corrupt."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestagent.storage.verity import VerityTerms
from rootfs.verity import hashtree, multibuffer
from rootfs.verity.formatter import FormatResult, format_image
from rootfs.verity.runs import Run
from rootfs.verity.verifier import VerifyResult, read_layer, verify_image
from tests.beds.calls import call_error
from vsock.deadline import Deadline
from vsock.errors import CallError

needs_veritysetup = pytest.mark.skipif(
    shutil.which("veritysetup") is None, reason="veritysetup is not installed"
)

RANDOM = random.Random(11)
BLOCK = 512
BLOCKS = 3000
NOISE = RANDOM.randbytes(BLOCKS * BLOCK)
#: 16 digests in a hash block: 188, 12 and 1 blocks in three levels.
SMALL = VerityTerms(data_block_size=BLOCK, hash_block_size=512)


class Image:
    """A formatted image of 3000 small blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(NOISE)
        self.result: FormatResult = format_image(path, terms=SMALL.replace(salt=b"salt"))
        self.parameters = self.result.parameters
        self.terms = VerityTerms(root_digest=self.result.root_digest)

    def flip(self, offset_bytes: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset_bytes)
            byte = file.read(1)[0]
            file.seek(offset_bytes)
            file.write(bytes([byte ^ 0x40]))

    def flip_data(self, block: int) -> None:
        self.flip(block * BLOCK + 17)

    def flip_hash(self, level: int, block: int) -> None:
        self.flip(self.parameters.level_offsets_bytes[level] + block * 512 + 100)

    def verify(self, **choices: object) -> VerifyResult:
        return verify_image(self.path, **{"terms": self.terms, **choices})  # type: ignore[arg-type]


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path / "image")


def test_an_intact_image(image: Image) -> None:
    result = image.verify()
    assert result.intact
    assert (result.first_block, result.end_block) == (0, BLOCKS)
    assert result.parameters == image.parameters
    assert image.parameters.level_blocks == (188, 12, 1)


@needs_veritysetup
@pytest.mark.parametrize("hash_type", [0, 1])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512", "sha1"])
def test_each_accepts_what_the_other_made(tmp_path: Path, hash_type: int, algorithm: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(NOISE)
    options = f"--hash={algorithm} --format={hash_type} --data-block-size={BLOCK}"
    place = f"--data-blocks={BLOCKS} --hash-offset={len(NOISE)}"
    format_command = ["veritysetup", "format", str(path), str(path), *options.split()]
    format_command += [*place.split(), f"--root-hash-file={tmp_path / 'root'}"]
    subprocess.run(format_command, check=True, capture_output=True)
    root_digest = bytes.fromhex((tmp_path / "root").read_text())
    terms = VerityTerms(root_digest=root_digest)
    assert verify_image(path, terms=terms).intact
    with path.open("r+b") as file:
        file.seek(2222 * BLOCK)
        file.write(b"\0")
    assert verify_image(path, terms=terms).corrupt_data == (Run(first=2222, count=1),)

    choices = VerityTerms(algorithm=algorithm, hash_type=hash_type, data_block_size=BLOCK)
    result = format_image(path, terms=choices, force=True)
    command = ["veritysetup", "verify", str(path), str(path), result.root_digest.hex()]
    command.append(f"--hash-offset={len(NOISE)}")
    subprocess.run(command, check=True, capture_output=True)
    with path.open("r+b") as file:
        file.write(b"damage")
    assert subprocess.run(command, check=False, capture_output=True).returncode
    assert not verify_image(path, terms=VerityTerms(root_digest=result.root_digest)).intact


@pytest.mark.parametrize("block", [0, 1, 15, 16, 2047, BLOCKS - 1])
def test_a_corrupt_data_block_is_named(image: Image, block: int) -> None:
    image.flip_data(block)
    result = image.verify()
    assert not result.intact
    assert result.corrupt_data == (Run(first=block, count=1),)
    assert result.corrupt_data_blocks == 1
    assert result.corrupt_hash == ()
    assert result.unproven_data == ()


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sets(st.integers(0, BLOCKS - 1), max_size=12), st.sampled_from([1, 2]))
def test_all_corrupt_data_blocks_are_named(tmp_path: Path, blocks: set[int], workers: int) -> None:
    image = Image(tmp_path / "image")
    for block in blocks:
        image.flip_data(block)
    result = image.verify(workers=workers)
    named = [n for run in result.corrupt_data for n in range(run.first, run.end)]
    assert named == sorted(blocks)
    assert result.corrupt_data_blocks == len(blocks)
    os.unlink(image.path)


@pytest.mark.parametrize(
    ("level", "block", "first", "count"),
    [(0, 0, 0, 16), (0, 187, 187 * 16, 8), (0, 100, 1600, 16), (1, 3, 768, 256)],
)
def test_a_corrupt_hash_block_is_named_and_what_it_hides(
    image: Image, level: int, block: int, first: int, count: int
) -> None:
    image.flip_hash(level, block)
    image.flip_data(first)  # cannot be told apart: nothing vouches for its digest
    image.flip_data(2000)
    result = image.verify()
    assert result.corrupt_hash == ((level, block),)
    assert result.unproven_data == (Run(first=first, count=count),)
    assert result.corrupt_data == (Run(first=2000, count=1),)


def test_two_corrupt_hash_blocks_in_one_branch(image: Image) -> None:
    image.flip_hash(1, 3)
    image.flip_hash(0, 50)  # below it
    image.flip_hash(0, 0)
    result = image.verify()
    assert result.corrupt_hash == ((1, 3), (0, 0))
    assert result.unproven_data == (Run(first=0, count=16), Run(first=768, count=256))


def test_a_wrong_root_proves_nothing(image: Image) -> None:
    result = image.verify(terms=VerityTerms(root_digest=bytes(32)))
    assert not result.intact
    assert result.corrupt_hash == ((2, 0),)
    assert result.unproven_data == (Run(first=0, count=BLOCKS),)
    # without a root, data and tree agree
    assert verify_image(image.path).intact


def test_a_range_is_checked_up_to_the_root(image: Image) -> None:
    image.flip_data(99)
    image.flip_data(200)
    image.flip_hash(0, 30)
    assert image.verify(first_block=100, end_block=200).intact
    assert image.verify(first_block=99, end_block=100).corrupt_data == (Run(first=99, count=1),)
    below = image.verify(first_block=485, end_block=490)
    assert below.corrupt_hash == ((0, 30),)
    assert below.unproven_data == (Run(first=485, count=5),)


@pytest.mark.parametrize("bounds", [(0, 0), (5, 4), (-1, 4), (0, BLOCKS + 1)])
def test_an_impossible_range_is_refused(image: Image, bounds: tuple[int, int]) -> None:
    with call_error("invalid", match="it has 3000"):
        image.verify(first_block=bounds[0], end_block=bounds[1])


def test_a_corrupt_superblock_is_named(image: Image) -> None:
    image.flip(len(NOISE) + 200)  # behind the salt
    with call_error("integrity", match="padding", object="padding"):
        image.verify()


def test_terms_and_superblock_must_agree(image: Image) -> None:
    with pytest.raises(CallError, match="salt: the request says 00, the superblock 73616c74"):
        image.verify(terms=VerityTerms(salt=b"\0"))


def test_a_truncated_image_is_refused(image: Image) -> None:
    size_bytes = image.path.stat().st_size
    os.truncate(image.path, size_bytes - 1)
    offset_bytes = image.parameters.hash_offset_bytes
    with call_error("integrity", match="is truncated: the hash tree would end at"):
        image.verify(terms=VerityTerms(hash_offset_bytes=offset_bytes))
    with call_error("not_found", match="no verity superblock"):
        image.verify()


def test_the_data_may_be_truncated_apart_from_the_hashes(tmp_path: Path) -> None:
    path, hashes = tmp_path / "image", tmp_path / "hashes"
    path.write_bytes(NOISE)
    result = format_image(path, terms=SMALL, hash_file=hashes)
    terms = VerityTerms(root_digest=result.root_digest)
    assert verify_image(path, terms=terms, hash_file=hashes).intact
    os.truncate(path, len(NOISE) - BLOCK)
    with pytest.raises(CallError, match="is truncated: the data would end"):
        verify_image(path, terms=terms, hash_file=hashes)


@pytest.mark.parametrize("apart", [True, False])
def test_without_a_superblock_the_terms_say_all(tmp_path: Path, apart: bool) -> None:
    path, hashes = tmp_path / "image", tmp_path / "hashes" if apart else None
    path.write_bytes(NOISE)
    bare = VerityTerms(data_block_size=BLOCK, superblock=False)
    result = format_image(path, terms=bare.replace(salt=b"s"), hash_file=hashes)
    terms = VerityTerms(
        root_digest=result.root_digest,
        salt=b"s",
        data_blocks=BLOCKS,
        data_block_size=BLOCK,
        hash_offset_bytes=result.parameters.hash_offset_bytes,
        superblock=False,
    )
    assert verify_image(path, terms=terms, hash_file=hashes).intact


def test_one_block(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(NOISE[:4096])
    terms = VerityTerms(root_digest=format_image(path).root_digest)
    assert verify_image(path, terms=terms).intact
    with path.open("r+b") as file:
        file.write(b"damage")
    assert verify_image(path, terms=terms).corrupt_data == (Run(first=0, count=1),)


def test_a_hole_that_should_be_data_and_data_that_should_be_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(16 << 20)
        file.write(NOISE)
    terms = VerityTerms(root_digest=format_image(path).root_digest)
    assert verify_image(path, terms=terms).intact
    with path.open("r+b") as file:
        file.seek(3000 * 4096)
        file.write(b"x")
    assert verify_image(path, terms=terms).corrupt_data == (Run(first=3000, count=1),)
    # the hash block over an all-zero stretch is read, not assumed
    parameters = read_layer(path).parameters
    with path.open("r+b") as file:
        file.seek(parameters.level_offsets_bytes[0] + 20 * 4096)
        file.write(b"x")
    assert (0, 20) in verify_image(path, terms=terms).corrupt_hash


def test_all_is_corrupt(image: Image) -> None:
    with image.path.open("r+b") as file:
        file.write(bytes(len(NOISE)))
    result = image.verify()
    assert result.corrupt_data == (Run(first=0, count=BLOCKS),)
    assert result.corrupt_data_blocks == BLOCKS


def test_workers_find_the_same(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashtree, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(hashtree, "_SPAN_BYTES", 100 * BLOCK)
    monkeypatch.setattr(multibuffer, "_ACCELERATION_BLOCKS", 1)
    for block in (0, 5, 6, 7, 1023, 1024, 2999):
        image.flip_data(block)
    image.flip_hash(0, 99)
    alone = image.verify(workers=1, accelerate=False)
    assert image.verify(workers=3, accelerate=False) == alone
    assert image.verify(workers=2) == alone
    assert alone.corrupt_data_blocks == 7


def test_a_cancel_ends_it(image: Image) -> None:
    deadline = Deadline()
    deadline.cancel()
    with pytest.raises(CallError) as caught:
        image.verify(deadline=deadline)
    deadline.close()
    assert caught.value.code == "cancelled"


def test_the_layer_as_it_is_on_disk(image: Image) -> None:
    layer = read_layer(image.path)
    assert layer.parameters == image.parameters
    assert layer.computed_root == image.result.root_digest
    assert image.result.uuid is not None
    assert layer.uuid == image.result.uuid
