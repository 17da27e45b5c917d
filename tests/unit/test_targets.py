"""Table lines: what is built, what is refused, and that what is parsed is what was built."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.storage.devicemapper.targets import (
    CryptTable,
    Target,
    TargetStatus,
    VerityStatus,
    VerityTable,
    linear_target,
    parse_line,
    parse_verity,
    parse_verity_status,
    sectors,
)
from guestagent.storage.verity import VerityParameters

ROOT = bytes(range(32))
SALT = bytes(range(200, 232))


PARAMETERS = VerityParameters(
    root_digest=ROOT,
    salt=SALT,
    algorithm="sha256",
    hash_type=1,
    data_blocks=256,
    data_block_size=4096,
    hash_block_size=4096,
    hash_offset_bytes=256 * 4096,
    superblock=True,
)
TABLE = VerityTable(parameters=PARAMETERS, data_device="253:0", hash_device="253:0")


def test_sectors() -> None:
    assert [sectors(n) for n in (0, 512, 1 << 40)] == [0, 1, 1 << 31]
    for wrong in (-512, -1, 1, 511, 513):
        with pytest.raises(ValueError, match="whole number"):
            sectors(wrong)


def test_linear_line() -> None:
    target = linear_target(length_bytes=1 << 20, device="/dev/pmem0", offset_bytes=4096)
    assert target.line() == "0 2048 linear /dev/pmem0 8"
    target = linear_target(length_bytes=512, device="259:3", start_bytes=1024)
    assert target.line() == "2 1 linear 259:3 0"


@pytest.mark.parametrize(
    "fields",
    [
        {"length_bytes": 0},
        {"length_bytes": 511},
        {"length_bytes": -512},
        {"offset_bytes": 100},
        {"offset_bytes": -512},
        {"length_bytes": 512 << 64},
        {"offset_bytes": ((1 << 64) - 1) * 512},
        {"device": ""},
        {"device": "pmem0"},
        {"device": "/dev/pmem 0"},
        {"device": "/dev/x\n0 1 error"},
        {"device": "/dev/\u00e4"},
        {"device": "/dev/back\\slash"},
        {"device": "1:2:3"},
        {"device": ":1"},
        {"device": "1:"},
        {"device": "-1:0"},
        {"device": "4096:0"},
        {"device": "1:1048576"},
        {"device": "\u0661:0"},
    ],
)
def test_linear_refuses(fields: dict[str, object]) -> None:
    good: dict[str, object] = {"length_bytes": 4096, "device": "7:0", "offset_bytes": 0}
    with pytest.raises(ValueError, match=r"."):
        linear_target(**{**good, **fields})  # type: ignore[arg-type]


def test_verity_line() -> None:
    """The ten arguments in the order of verity.rst, as hcsshim writes them, and the options."""
    assert TABLE.target().line() == (
        f"0 2048 verity 1 253:0 253:0 4096 4096 256 257 sha256 {ROOT.hex()} {SALT.hex()}"
    )
    table = VerityTable(
        parameters=PARAMETERS.replace(salt=b""),
        data_device="253:0",
        hash_device="/dev/mapper/hash",
        options=("ignore_zero_blocks", "root_hash_sig_key_desc", "guestagent:x"),
    )
    assert table.target().line() == (
        f"0 2048 verity 1 253:0 /dev/mapper/hash 4096 4096 256 257 sha256 {ROOT.hex()} - "
        "3 ignore_zero_blocks root_hash_sig_key_desc guestagent:x"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"options": ("a b",)},
        {"options": ("",)},
        {"options": ("a\n",)},
        {"options": ("a\0",)},
        {"data_device": "a"},
        {"hash_device": "/dev/a b"},
    ],
)
def test_verity_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        TABLE.replace(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"start_sectors": -1},
        {"length_sectors": 0},
        {"start_sectors": 1 << 63, "length_sectors": 1 << 63},
        {"target_type": ""},
        {"target_type": "a" * 16},
        {"target_type": "a b"},
        {"target_type": "Linear"},
        {"params": "a\nb"},
        {"params": "a\0b"},
        {"params": "a\tb"},
        {"params": "\x7f"},
        {"params": "\u00e4"},
    ],
)
def test_target_refuses(fields: dict[str, object]) -> None:
    good: dict[str, object] = {"start_sectors": 0, "length_sectors": 1, "target_type": "error"}
    with pytest.raises(ValueError, match=r"."):
        Target(**{**good, **fields})  # type: ignore[arg-type]


def test_target_without_params() -> None:
    target = Target(start_sectors=0, length_sectors=1, target_type="error")
    assert target.line() == "0 1 error"
    assert parse_line("0 1 error") == target
    assert parse_line("0 1 error ") == target
    status = TargetStatus(start_sectors=0, length_sectors=1, target_type="error", status="")
    assert status.line() == "0 1 error"


numbers = st.integers(0, 1 << 48)
devices = st.one_of(
    st.builds("{}:{}".format, st.integers(0, 4095), st.integers(0, (1 << 20) - 1)),
    st.from_regex(r"/dev/[a-z0-9/_.:+-]{1,20}", fullmatch=True),
)
words = st.from_regex(r"[!-\[\]-~]{1,20}", fullmatch=True)
sizes = st.sampled_from([512, 1024, 4096])


@given(
    parameters=st.builds(
        VerityParameters,
        hash_type=st.integers(0, 1),
        data_blocks=st.integers(1, 1 << 40),
        data_block_size=sizes,
        hash_block_size=st.just(4096),
        hash_offset_bytes=st.integers(0, 1 << 40).map(lambda block: block * 4096),
        algorithm=st.just("sha256"),
        root_digest=st.binary(min_size=32, max_size=32),
        salt=st.binary(max_size=256),
        superblock=st.just(False),
    ),
    data_device=devices,
    hash_device=devices,
    options=st.lists(words, max_size=5).map(tuple),
)
def test_verity_round_trip(
    parameters: VerityParameters, data_device: str, hash_device: str, options: tuple[str, ...]
) -> None:
    table = VerityTable(
        parameters=parameters, data_device=data_device, hash_device=hash_device, options=options
    )
    assert parse_verity(parse_line(table.target().line())) == table


@given(st.text(max_size=200))
def test_any_line_parses_or_is_refused(line: str) -> None:
    try:
        target = parse_line(line)
    except ValueError:
        return
    assert parse_line(target.line()) == target


@given(st.lists(st.one_of(words, st.integers().map(str)), max_size=16).map(" ".join))
def test_any_params_parse_or_are_refused(params: str) -> None:
    target = Target(start_sectors=0, length_sectors=8, target_type="verity", params=params)
    with contextlib.suppress(ValueError):
        parse_verity(target)


@pytest.mark.parametrize(
    "params",
    [
        "1 7:0 7:0 4096 4096 1 1 sha256 " + ROOT.hex(),  # no salt
        "1 7:0 7:0 4096 4096 1 1 sha256 " + ROOT.hex() + " - 2 one",
        "1 7:0 7:0 4096 4096 1 1 sha256 " + ROOT.hex() + " - x one",
        "1 7:0 7:0 4096 4096 1 1 sha256 " + ROOT.hex()[1:] + " -",
        "1 7:0 7:0 4096 4096 1 1 sha256 " + "zz" * 32 + " -",
        "1 7:0 7:0 4096 4096 +1 1 sha256 " + ROOT.hex() + " -",
        "2 7:0 7:0 4096 4096 1 1 sha256 " + ROOT.hex() + " -",
        "1 7:0 7:0 4095 4096 1 1 sha256 " + ROOT.hex() + " -",
        "1 7:0 7:0 4096 1048576 1 1 sha256 " + ROOT.hex() + " -",
        "1 7:0 7:0 4096 4096 0 1 sha256 " + ROOT.hex() + " -",
        f"1 7:0 7:0 4096 4096 {1 << 63} 1 sha256 {ROOT.hex()} -",
        "1 7:0 7:0 4096 4096 1 1 blake2b " + ROOT.hex() + " -",
        "1 7:0 7:0 4096 4096 1 1 sha512 " + ROOT.hex() + " -",
        "1 7:0 7:0 4096 4096 1 1 sha256 " + ROOT.hex() + " " + "00" * 257,
        "1 7:0 7:0 4096 4096 2 1 sha256 " + ROOT.hex() + " -",  # of which only 1 is mapped
        "1 a 7:0 4096 4096 1 1 sha256 " + ROOT.hex() + " -",
    ],
)
def test_parse_verity_refuses(params: str) -> None:
    target = Target(start_sectors=0, length_sectors=8, target_type="verity", params=params)
    with pytest.raises(ValueError, match=r"."):
        parse_verity(target)


def test_parse_verity_takes_no_other_target() -> None:
    with pytest.raises(ValueError, match="expected a verity target"):
        parse_verity(linear_target(length_bytes=512, device="7:0"))


def test_verity_status() -> None:
    assert parse_verity_status("V") == VerityStatus(state="V")
    assert not parse_verity_status("V -").corrupted
    assert parse_verity_status("V 12").fec_corrected == 12
    assert parse_verity_status("C - something new").corrupted
    for wrong in ("", "X", "v"):
        with pytest.raises(ValueError, match="V or C"):
            parse_verity_status(wrong)


def test_crypt_line_names_its_key_and_does_not_contain_it() -> None:
    table = CryptTable(
        device="254:16",
        length_bytes=1 << 20,
        cipher="aes-xts-plain64",
        key_bytes=64,
        key_description="guestagent:x",
    )
    line = "0 2048 crypt aes-xts-plain64 :64:logon:guestagent:x 0 254:16 0"
    assert table.target().line() == line
    discards = table.replace(options=("allow_discards",))
    assert discards.target().line() == f"{line} 1 allow_discards"
    assert parse_line(line).line() == line


@pytest.mark.parametrize(
    "fields",
    [
        {"device": "sda"},
        {"device": "8:0 0 0"},
        {"length_bytes": 513},
        {"cipher": "aes xts"},
        {"cipher": ""},
        {"key_bytes": 0},
        {"key_description": "two words"},
        {"options": ("same cpu",)},
    ],
    ids=str,
)
def test_a_crypt_target_refuses(fields: dict[str, object]) -> None:
    table = CryptTable(
        device="254:16", length_bytes=512, cipher="aes", key_bytes=64, key_description="a:b"
    )
    with pytest.raises(ValueError, match=r"must be|whole number"):
        table.replace(**fields)


@pytest.mark.parametrize("options", ["", " 1 allow_discards"])
def test_a_line_hides_the_key_of_a_crypt_target(options: str) -> None:
    """As dmsetup does: zeros, as many as the key has digits."""
    line = f"0 8 crypt aes-xts-plain64 {'c0ffee' * 4} 0 8:0 0{options}"
    assert parse_line(line).line() == line.replace("c0ffee" * 4, "0" * 24)
    named = line.replace("c0ffee" * 4, ":32:user:name")
    assert parse_line(named).line() == named
