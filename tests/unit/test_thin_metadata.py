"""The metadata of dm-thin as bytes: what is read of it, and that nothing in it is believed."""

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.thin.metadata import (
    DeviceDetails,
    Superblock,
    checksum,
    devices_of,
    highest_block,
    parse_superblock,
)
from vsock.errors import CallError

SUPERBLOCK_XOR, NODE_XOR = 160774, 121107


def sealed(body: bytes, xor: int) -> bytes:
    block = body.ljust(4096, b"\0")
    return checksum(block, xor).to_bytes(4, "little") + block[4:]


def superblock(
    *, magic: int = 27022010, version: int = 2, flags: int = 0, block_sectors: int = 128
) -> bytes:
    head = struct.pack("<IIQ16sQIIQQ", 0, flags, 0, bytes(16), magic, version, 0, 9, 0)
    maps = struct.pack("<Q120x", 1000) + struct.pack("<Q120x", 1024)
    return sealed(head + maps + struct.pack("<QQI", 1, 2, block_sectors), SUPERBLOCK_XOR)


def node(number: int, entries: dict[int, bytes], *, leaf: bool = True, **wrong: int) -> bytes:
    size = wrong.get("size", len(next(iter(entries.values()), bytes(8))))
    most = wrong.get("most", 100)
    count = wrong.get("count", len(entries))
    head = struct.pack("<IIQIIII", 0, 2 if leaf else 1, number, count, most, size, 0)
    keys = b"".join(struct.pack("<Q", key) for key in entries).ljust(most * 8, b"\0")
    return sealed((head + keys + b"".join(entries.values()))[:4096], NODE_XOR)


def details(mapped: int, transaction_id: int) -> bytes:
    return struct.pack("<QQII", mapped, transaction_id, 0, 0)


def root(number: int) -> bytes:
    return struct.pack("<Q", number)


def reader(blocks: dict[int, bytes]) -> Callable[[int], bytes]:
    return lambda number: blocks.get(number, bytes(4096))


FOUND = parse_superblock(superblock())
assert FOUND is not None


def test_checksum_is_crc32c() -> None:
    """By the check value of the algorithm, of the register before its last inversion."""
    block = bytes(4) + b"123456789"
    assert checksum(block, 0) == 0xE3069283 ^ 0xFFFFFFFF


def test_superblock() -> None:
    assert (
        Superblock(
            transaction_id=9,
            needs_check=False,
            data_block_sectors=128,
            data_blocks=1000,
            metadata_blocks=1024,
            mapping_root=1,
            details_root=2,
        )
        == FOUND
    )
    flagged = parse_superblock(superblock(flags=1))
    assert flagged is not None
    assert flagged.needs_check
    assert parse_superblock(bytes(4096)) is None


@pytest.mark.parametrize(
    ("block", "code"),
    [
        (b"\1" * 4096, "conflict"),
        (superblock(magic=1), "conflict"),
        (superblock(version=3), "unsupported"),
        (superblock()[:-1] + b"\1", "integrity"),
        (superblock(block_sectors=0), "integrity"),
        (superblock(block_sectors=130), "integrity"),
        (superblock(block_sectors=1 << 31), "integrity"),
    ],
)
def test_superblock_that_is_refused(block: bytes, code: str) -> None:
    with pytest.raises(CallError) as caught:
        parse_superblock(block)
    assert caught.value.code == code


def test_devices_and_their_last_blocks() -> None:
    blocks = {
        2: node(2, {0: root(3), 5: root(4)}, leaf=False),
        3: node(3, {0: details(1, 0), 1: details(20, 3)}),
        4: node(4, {5: details(0, 4), 1 << 23: details(7, 5)}),
        1: node(1, {0: root(10), 1: root(11), 5: root(12)}),
        10: node(10, {0: bytes(8)}),
        11: node(11, {0: root(13), 40: root(14)}, leaf=False),
        13: node(13, {0: bytes(8), 39: bytes(8)}),
        14: node(14, {40: bytes(8), 77: bytes(8)}),
        12: node(12, {}),
    }
    read = reader(blocks)
    assert devices_of(read, FOUND) == {
        0: DeviceDetails(mapped_blocks=1, transaction_id=0),
        1: DeviceDetails(mapped_blocks=20, transaction_id=3),
        5: DeviceDetails(mapped_blocks=0, transaction_id=4),
        1 << 23: DeviceDetails(mapped_blocks=7, transaction_id=5),
    }
    assert [highest_block(read, FOUND, n) for n in (0, 1, 2, 5, 6)] == [0, 77, None, None, None]


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {2: node(3, {0: details(1, 1)})},
        {2: node(2, {0: details(1, 1)})[:-1] + b"\1"},
        {2: node(2, {0: bytes(8)})},
        {2: node(2, {0: details(1, 1)}, count=101)},
        {2: node(2, {0: details(1, 1)}, most=200, count=1)},
        {2: node(2, {0: details(1, 1)}, size=0)},
        {2: node(2, {1 << 24: details(1, 1)})},
        {2: node(2, {3: details(1, 1), 4: details(1, 1)})[:32].ljust(4096, b"\0")},
        {2: node(2, {0: root(2)}, leaf=False)},
    ],
)
def test_tree_that_is_damaged(blocks: dict[int, bytes]) -> None:
    with pytest.raises(CallError) as caught:
        devices_of(reader(blocks), FOUND)
    assert caught.value.code == "integrity"


@given(st.binary(max_size=300))
def test_any_bytes_end_as_an_answer(body: bytes) -> None:
    block = sealed(bytes(4) + body, NODE_XOR)
    for look in (
        lambda: parse_superblock(body.ljust(4096, b"\0")),
        lambda: devices_of(lambda _: block, FOUND),
        lambda: highest_block(lambda _: block, FOUND, 1),
    ):
        try:
            look()
        except CallError as error:
            assert error.code in ("integrity", "conflict", "unsupported")  # noqa: PT017
