"""The records of a pool in their two slots: whole, torn, of another version, too many."""

import binascii
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.api.devices import VirtioBlkDevice
from guestagent.thin.records import (
    RECORDS_BYTES,
    Pending,
    PoolRecords,
    VolumeRecord,
    decode_slot,
    encode_slot,
    is_slot,
    read_records,
    write_records,
)
from vsock.errors import CallError

A = VolumeRecord(
    volume_id="a",
    device_id=1,
    size_bytes=1 << 20,
    transaction_id=1,
    filesystem="ext4",
    external_origin=VirtioBlkDevice(serial="base"),
)
B = A.replace(volume_id="b", device_id=2, origin="a", external_origin=None, deleted=True)
RECORDS = PoolRecords(
    pool_id="p", transaction_id=7, next_device_id=3, data_bytes=(1 << 30, 4096), volumes=(A, B)
)


def test_records_are_read_as_they_were_written() -> None:
    pending = RECORDS.replace(pending=Pending(kind="delete", transaction_id=8, volume=B))
    for records in (RECORDS, pending):
        slot = encode_slot(records, 5)
        assert len(slot) % 4096 == 0
        assert is_slot(slot)
        assert decode_slot(slot) == (5, records)
    # the next change fits into what is written, so that it needs no block of a full pool
    assert len(encode_slot(RECORDS.with_volume(A.replace(deleted=True)), 6)) == len(slot)


def test_volumes_are_added_replaced_and_dropped() -> None:
    grown = RECORDS.with_volume(A.replace(size_bytes=1 << 21))
    assert [each.volume_id for each in grown.volumes] == ["b", "a"]
    assert grown.volume("a") == A.replace(size_bytes=1 << 21)
    assert RECORDS.without("a").volume("a") is None
    assert RECORDS.without("c") == RECORDS


@given(st.data())
def test_slot_that_is_torn_counts_for_nothing(data: st.DataObject) -> None:
    slot = bytearray(encode_slot(RECORDS, 5))
    used = len(bytes(slot).rstrip(b"\0"))
    at = data.draw(st.integers(0, used - 1))
    slot[at] ^= data.draw(st.integers(1, 255))
    assert decode_slot(bytes(slot)) is None
    assert decode_slot(bytes(slot[:at])) is None


def test_slot_of_another_version_is_refused() -> None:
    slot = bytearray(encode_slot(RECORDS, 5))
    slot[16] = 2
    length = int.from_bytes(slot[20:24], "little")
    slot[32:36] = bytes(4)
    slot[32:36] = binascii.crc32(bytes(slot[: 36 + length])).to_bytes(4, "little")
    with pytest.raises(CallError) as caught:
        decode_slot(bytes(slot))
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize(
    "changes",
    [
        {"volumes": (A, B.replace(device_id=1))},
        {"volumes": (A, B.replace(device_id=0))},
        {"volumes": (A, A.replace(device_id=2))},
        {"data_bytes": ()},
        {"transaction_id": -1},
        {"next_device_id": 0},
    ],
)
def test_records_that_contradict_themselves_are_damaged(changes: dict[str, object]) -> None:
    """As a disk from elsewhere may have them: device 0 holds the records."""
    with pytest.raises(ValueError, match=r"volume|data_bytes|transaction_id|device_id"):
        RECORDS.replace(**changes)
    wrong = PoolRecords.__new__(PoolRecords)
    wrong.__dict__.update({**RECORDS.as_dict(), **changes})
    with pytest.raises(CallError) as caught:
        decode_slot(encode_slot(wrong, 1))
    assert caught.value.code == "integrity"


@pytest.mark.parametrize(
    "changes",
    [
        {"volume_id": "../x"},
        {"device_id": 1 << 24},
        {"size_bytes": 0},
        {"size_bytes": 513},
        {"filesystem": "btrfs"},
    ],
)
def test_volume_that_is_none(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        A.replace(**changes)


@pytest.fixture
def node(tmp_path: Path) -> str:
    path = tmp_path / "records"
    path.touch()
    os.truncate(path, RECORDS_BYTES)
    return str(path)


def test_newest_whole_slot_counts(node: str) -> None:
    assert read_records(node) is None
    for sequence in range(1, 6):
        write_records(node, RECORDS.replace(transaction_id=sequence), sequence)
        assert read_records(node) == (sequence, RECORDS.replace(transaction_id=sequence))
    with open(node, "r+b") as file:  # 5 was written into the second slot
        file.seek(RECORDS_BYTES // 2 + 100)
        file.write(b"\xff\xff")
    assert read_records(node) == (4, RECORDS.replace(transaction_id=4))
    write_records(node, RECORDS, 5)
    assert read_records(node) == (5, RECORDS)


def test_records_that_are_too_long_are_refused(node: str) -> None:
    many = tuple(A.replace(volume_id=f"volume-{n}", device_id=n + 1) for n in range(40000))
    with pytest.raises(CallError) as caught:
        write_records(node, RECORDS.replace(volumes=many), 1)
    assert caught.value.code == "resource"
    assert read_records(node) is None
