"""Ranges of a device read as if they were put together already."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.api import ByteRange
from guestagent.engine.reader import Reader

SECTORS = 16
CONTENT = bytes(number for number in range(SECTORS) for _ in range(512))
places = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 4)).map(
    lambda place: ByteRange(
        offset_bytes=place[0] * 512, size_bytes=min(place[1], SECTORS - place[0]) * 512
    )
)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk"
    path.write_bytes(CONTENT)
    return path


@given(
    ranges=st.lists(places, max_size=6),
    offset_bytes=st.integers(-1, SECTORS * 512 + 1),
    size_bytes=st.integers(0, 5000),
)
def test_any_part_of_any_ranges(
    disk: Path, ranges: list[ByteRange], offset_bytes: int, size_bytes: int
) -> None:
    parts = [CONTENT[part.offset_bytes : part.end_bytes] for part in ranges]
    whole = b"".join(parts) if parts else CONTENT
    expected = whole[offset_bytes : offset_bytes + size_bytes] if offset_bytes >= 0 else b""
    with Reader(str(disk), size_bytes=len(whole), ranges=ranges) as reader:
        assert reader.read_at(offset_bytes, size_bytes) == expected
        assert reader.read_padded(offset_bytes, size_bytes) == expected.ljust(size_bytes, b"\0")


def test_a_device_that_ends_within_a_range_gives_what_there_is(disk: Path) -> None:
    ranges = [
        ByteRange(offset_bytes=(SECTORS - 1) * 512, size_bytes=1024),
        ByteRange(offset_bytes=0, size_bytes=512),
    ]
    with Reader(str(disk), size_bytes=1536, ranges=ranges) as reader:
        assert reader.read_at(0, 1536) == CONTENT[-512:]
