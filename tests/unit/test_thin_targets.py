"""Lines of dm-thin: what is built, what is refused, and that what is parsed is what was built."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.storage.devicemapper.targets import Target, parse_line
from guestagent.storage.devicemapper.thin import (
    DEVICE_ID_MAX,
    PoolStatus,
    PoolTable,
    ThinStatus,
    ThinTable,
    create_snap,
    create_thin,
    delete_thin,
    parse_pool,
    parse_pool_status,
    parse_thin,
    parse_thin_status,
    set_transaction_id,
)

POOL = PoolTable(
    metadata_device="7:0",
    data_device="254:0",
    length_sectors=204800,
    block_sectors=128,
    low_water_blocks=160,
    options=("error_if_no_space",),
)


def test_pool_line() -> None:
    line = "0 204800 thin-pool 7:0 254:0 128 160 1 error_if_no_space"
    assert POOL.target().line() == line
    assert POOL.error_if_full
    # the kernel ends the line with a space
    assert parse_pool(parse_line(line + " ")) == POOL
    plain = POOL.replace(options=())
    assert not plain.error_if_full
    assert parse_pool(parse_line("0 204800 thin-pool 7:0 254:0 128 160 0 ")) == plain
    assert parse_pool(plain.target()) == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_sectors", 64),
        ("block_sectors", 130),
        ("block_sectors", 2097280),
        ("low_water_blocks", -1),
        ("metadata_device", "7:0 7:1"),
        ("data_device", "loop0"),
    ],
)
def test_pool_that_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        POOL.replace(**{field: value})


@given(
    st.builds(
        ThinTable,
        pool_device=st.just("254:1"),
        device_id=st.integers(0, DEVICE_ID_MAX),
        length_sectors=st.integers(1, 1 << 50),
        origin_device=st.none() | st.just("7:3"),
    )
)
def test_thin_line(table: ThinTable) -> None:
    assert parse_thin(table.target()) == table


@pytest.mark.parametrize("line", ["0 8 thin 254:1", "0 8 linear 7:0 0", "8 8 thin 254:1 1"])
def test_line_that_is_no_thin_device(line: str) -> None:
    with pytest.raises(ValueError, match="thin"):
        parse_thin(parse_line(line))


def test_pool_line_with_a_wrong_count() -> None:
    with pytest.raises(ValueError, match="option count"):
        parse_pool(parse_line("0 8 thin-pool 7:0 7:1 128 0 2 error_if_no_space"))
    with pytest.raises(ValueError, match="thin-pool"):
        parse_pool(Target(start_sectors=0, length_sectors=8, target_type="thin", params="1:1 2"))


@pytest.mark.parametrize("device_id", [-1, DEVICE_ID_MAX + 1])
def test_device_id_has_24_bits(device_id: int) -> None:
    for build in (
        lambda: create_thin(device_id),
        lambda: delete_thin(device_id),
        lambda: create_snap(device_id, 1),
        lambda: create_snap(1, device_id),
        lambda: ThinTable(pool_device="1:1", device_id=device_id, length_sectors=8),
    ):
        with pytest.raises(ValueError, match="must be in"):
            build()


def test_messages() -> None:
    assert create_thin(DEVICE_ID_MAX) == "create_thin 16777215"
    assert create_snap(2, 1) == "create_snap 2 1"
    assert delete_thin(0) == "delete 0"
    assert set_transaction_id(4, 5) == "set_transaction_id 4 5"


def test_pool_status() -> None:
    text = "3 141/4096 77/1600 - rw discard_passdown error_if_no_space - 1024 "
    assert parse_pool_status(text) == PoolStatus(
        mode="rw",
        transaction_id=3,
        used_metadata_blocks=141,
        total_metadata_blocks=4096,
        used_data_blocks=77,
        total_data_blocks=1600,
        discard_passdown=True,
        error_if_full=True,
        metadata_low_water_blocks=1024,
    )
    text = "0 1/2 3/3 9 out_of_data_space no_discard_passdown queue_if_no_space needs_check"
    status = parse_pool_status(text)
    assert (status.mode, status.held_root_block) == ("out_of_data_space", 9)
    assert status.needs_check
    assert not status.discard_passdown
    assert not status.error_if_full
    assert status.metadata_low_water_blocks is None
    assert parse_pool_status("Fail") == PoolStatus(mode="failed")
    assert parse_pool_status("Error").mode == "failed"


@pytest.mark.parametrize(
    "text", ["", "1", "1 2/3 4/5 - xx a b -", "1 23 4/5 - rw a b -", "x 2/3 4/5 - rw a b -"]
)
def test_pool_status_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"status|must be"):
        parse_pool_status(text)


def test_thin_status() -> None:
    assert parse_thin_status("0 -") == ThinStatus()
    assert parse_thin_status("2048 4095") == ThinStatus(
        mapped_sectors=2048, highest_mapped_sector=4095
    )
    assert parse_thin_status("Fail").failed
    for text in ("", "1", "1 2 3", "a -"):
        with pytest.raises(ValueError, match=r"status|must be"):
            parse_thin_status(text)
