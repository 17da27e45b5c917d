"""Reading data by their hash tree: the right bytes, or an error that names the block."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.storage.verity import VerityParameters, VerityTerms
from rootfs.verity.formatter import format_image
from rootfs.verity.verifiedread import VerifiedReader
from tests.beds.calls import call_error
from vsock.errors import CallError

BLOCKS = 300
DATA = random.Random(5).randbytes(BLOCKS * 4096)
BASE = 8192

Layer = tuple[int, VerityParameters]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layer]:
    """Data and their tree at ``BASE`` of a file."""
    path = tmp_path_factory.mktemp("read") / "layer"
    path.write_bytes(DATA)
    parameters = format_image(path, terms=VerityTerms(salt=b"salt"), workers=1).parameters
    path.write_bytes(bytes(BASE) + path.read_bytes())
    fd = os.open(path, os.O_RDWR)
    yield fd, parameters
    os.close(fd)


def reader(layer: Layer) -> VerifiedReader:
    fd, parameters = layer
    return VerifiedReader(fd, parameters, base_offset_bytes=BASE, name="layer")


@given(at=st.integers(0, len(DATA)), size=st.integers(0, 3 * 4096 + 5))
def test_any_range_is_what_was_hashed(layer: Layer, at: int, size: int) -> None:
    size = min(size, len(DATA) - at)
    assert reader(layer).read(at, size) == DATA[at : at + size]


@pytest.mark.parametrize("block", [0, 1, 127, 128, BLOCKS - 1])
def test_a_block_that_changed_is_named(layer: Layer, block: int) -> None:
    fd, _ = layer
    place = BASE + block * 4096 + 9
    before = os.pread(fd, 1, place)
    os.pwrite(fd, bytes([before[0] ^ 1]), place)
    try:
        found = reader(layer)
        with call_error("integrity", match=f"data block {block} does not match", object="layer"):
            found.read(block * 4096, 1)
        other = (block + 1) % BLOCKS
        assert found.read(other * 4096, 4096) == DATA[other * 4096 : (other + 1) * 4096]
    finally:
        os.pwrite(fd, before, place)


def test_read_past_the_last_data_block_is_refused(layer: Layer) -> None:
    with pytest.raises(CallError, match=f"data block {BLOCKS} is not one of its {BLOCKS}"):
        reader(layer).read(len(DATA) - 1, 2)


def test_one_block_is_compared_with_the_root_digest(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.write_bytes(DATA[:4096])
    parameters = format_image(path, terms=VerityTerms(salt=b"salt")).parameters
    with path.open("r+b") as file:
        one = VerifiedReader(file.fileno(), parameters, base_offset_bytes=0, name="one")
        assert one.read(10, 5) == DATA[10:15]
        os.pwrite(file.fileno(), b"\0\1", 100)
        one = VerifiedReader(file.fileno(), parameters, base_offset_bytes=0, name="one")
        with pytest.raises(CallError, match="data block 0"):
            one.read(10, 5)
