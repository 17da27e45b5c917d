"""The superblock and the root check, against veritysetup and against damage."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guestagent.storage import verity
from guestagent.storage.verity import (
    BLOCK_SIZES,
    DIGEST_BYTES,
    FieldError,
    VerityParameters,
    VerityTerms,
    block_digest,
    check_kernel_limits,
    check_root,
    check_tree_spines,
    hash_area_offset,
    parse_superblock,
    superblock_uuid,
)
from tests.beds.calls import call_error, run
from vsock.errors import CallError

needs_veritysetup = pytest.mark.skipif(
    shutil.which("veritysetup") is None, reason="veritysetup is not installed"
)

UUID = bytes(range(16))


def parameters(**changes: object) -> VerityParameters:
    fields: dict[str, object] = {
        "root_digest": bytes(32),
        "salt": b"",
        "algorithm": "sha256",
        "hash_type": 1,
        "data_blocks": 300,
        "data_block_size": 4096,
        "hash_block_size": 4096,
        "hash_offset_bytes": 300 * 4096,
        "superblock": True,
    }
    make: Callable[..., VerityParameters] = VerityParameters
    return make(**{**fields, **changes})


GOOD = parameters(salt=b"salt", hash_block_size=1024)
RAW = GOOD.pack_superblock(UUID)

any_parameters = st.builds(
    lambda algorithm, **rest: parameters(
        algorithm=algorithm, root_digest=bytes(DIGEST_BYTES[algorithm]), **rest
    ),
    algorithm=st.sampled_from(sorted(DIGEST_BYTES)),
    hash_type=st.integers(0, 1),
    data_block_size=st.sampled_from(BLOCK_SIZES),
    hash_block_size=st.sampled_from(BLOCK_SIZES),
    data_blocks=st.integers(1, 1 << 48),
    hash_offset_bytes=st.integers(0, 1 << 40).map(lambda sector: sector * 512),
    salt=st.binary(max_size=256),
)


def outcome(raw: bytes) -> tuple[VerityTerms | None, str, str | None]:
    try:
        return parse_superblock(raw), "", None
    except CallError as problem:
        return None, problem.code, problem.object


def from_superblock(raw: bytes, **said: object) -> VerityParameters:
    terms: Callable[..., VerityTerms] = VerityTerms
    return VerityParameters.from_request(
        terms(**{"root_digest": bytes(32), **said}), hash_offset_bytes=300 * 4096, superblock=raw
    )


@given(any_parameters)
def test_superblock_is_parsed_as_it_was_packed(made: VerityParameters) -> None:
    raw = made.pack_superblock(UUID)
    assert len(raw) == 512
    assert superblock_uuid(raw) == UUID
    terms = VerityTerms(root_digest=made.root_digest)
    found = VerityParameters.from_request(
        terms, hash_offset_bytes=made.hash_offset_bytes, superblock=raw
    )
    assert found == made


@given(st.binary(max_size=600))
def test_parsing_ends_in_a_superblock_or_a_named_field(raw: bytes) -> None:
    parsed, code, field = outcome(raw)
    assert parsed is not None or (code, bool(field)) == ("integrity", True)


@given(any_parameters, st.integers(0, 511), st.integers(1, 255))
def test_one_changed_byte_is_another_superblock_or_an_error(
    made: VerityParameters, position: int, flip: int
) -> None:
    raw = bytearray(made.pack_superblock(UUID))
    raw[position] ^= flip
    parsed, code, _ = outcome(bytes(raw))
    if parsed is None:
        assert code in ("integrity", "unsupported")
    else:
        assert parsed != parse_superblock(made.pack_superblock(UUID)) or 16 <= position < 32


@pytest.mark.parametrize(
    ("offset", "layout", "value", "field"),
    [
        (0, "<8s", b"verity\0\1", "signature"),
        (8, "<I", 2, "version"),
        (12, "<I", 2, "hash_type"),
        (32, "<32s", b"", "algorithm"),
        (32, "<32s", b"sha 256", "algorithm"),
        (32, "<32s", b"SHA256", "algorithm"),
        (32, "<32s", b"sha256\0x", "algorithm"),
        (32, "<32s", b"a" * 32, "algorithm"),
        (64, "<I", 0, "data_block_size"),
        (64, "<I", 256, "data_block_size"),
        (64, "<I", 3 * 512, "data_block_size"),
        (64, "<I", 1024 * 1024, "data_block_size"),
        (68, "<I", 0xFFFFFFFF, "hash_block_size"),
        (72, "<Q", 0, "data_blocks"),
        (72, "<Q", 1 << 51, "data_blocks"),
        (80, "<H", 257, "salt_size"),
        (80, "<H", 3, "padding"),
        (82, "<6s", b"\0\0\0\0\0\1", "padding"),
        (511, "<B", 1, "padding"),
    ],
)
def test_each_field_is_checked_and_named(
    offset: int, layout: str, value: object, field: str
) -> None:
    raw = bytearray(RAW)
    struct.pack_into(layout, raw, offset, value)
    with call_error("integrity", object=field) as caught:
        parse_superblock(bytes(raw))
    assert field in caught.value.message


def test_a_short_superblock_is_refused() -> None:
    with pytest.raises(CallError, match="only 511 of 512"):
        parse_superblock(RAW[:511])


@pytest.mark.parametrize(
    ("offset", "layout", "value", "field"),
    [
        (32, "<32s", b"blake2b-512", "algorithm"),
        (64, "<I", 8192, "data_block_size"),
        (68, "<I", 64 * 1024, "hash_block_size"),
    ],
)
def test_superblock_with_parameters_no_layer_may_have_is_unsupported(
    offset: int, layout: str, value: object, field: str
) -> None:
    raw = bytearray(RAW)
    struct.pack_into(layout, raw, offset, value)
    with call_error("unsupported", object=field):
        from_superblock(bytes(raw))


@needs_veritysetup
def test_veritysetup_reads_what_is_packed(tmp_path: Path) -> None:
    path = tmp_path / "superblock"
    path.write_bytes(RAW.ljust(4096, b"\0"))
    output = run("veritysetup", "dump", path)
    facts = {key.strip(): value.strip() for key, _, value in map(_cut, output.splitlines())}
    assert facts["UUID"] == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert facts["Data blocks"] == "300"
    assert facts["Data block size"] == "4096"
    assert facts["Hash block size"] == "1024"
    assert facts["Hash algorithm"] == "sha256"
    assert facts["Salt"] == b"salt".hex()


def _cut(line: str) -> tuple[str, str, str]:
    return line.partition(":")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"algorithm": "md5"}, "algorithm"),
        ({"algorithm": "sha256 x"}, "algorithm"),
        ({"root_digest": bytes(20)}, "root_digest"),
        ({"algorithm": "sha512"}, "root_digest"),
        ({"salt": bytes(257)}, "salt"),
        ({"hash_type": 2}, "hash_type"),
        ({"data_blocks": 0}, "data_blocks"),
        ({"data_blocks": -1}, "data_blocks"),
        ({"data_blocks": 1 << 62}, "data_blocks"),
        ({"data_block_size": 4095}, "data_block_size"),
        ({"hash_block_size": 0}, "hash_block_size"),
        ({"hash_offset_bytes": -512}, "hash_offset_bytes"),
        ({"hash_offset_bytes": 511}, "hash_offset_bytes"),
        ({"hash_offset_bytes": 512, "superblock": False}, "hash_offset_bytes"),
        ({"hash_offset_bytes": (1 << 63) - 512}, "hash_offset_bytes"),
    ],
)
def test_impossible_parameters_are_refused_by_name(changes: dict[str, object], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        parameters(**changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("data_blocks", "level_blocks"),
    [
        (1, ()),
        (2, (1,)),
        (128, (1,)),
        (129, (2, 1)),
        (16384, (128, 1)),
        (16385, (129, 2, 1)),
    ],
)
def test_levels(data_blocks: int, level_blocks: tuple[int, ...]) -> None:
    value = parameters(data_blocks=data_blocks, hash_offset_bytes=1 << 30)
    assert value.level_blocks == level_blocks
    assert value.hash_start_block == (1 << 18) + 1
    assert value.end_bytes == value.tree_offset_bytes + sum(level_blocks) * 4096
    if level_blocks:
        assert value.level_offsets_bytes[-1] == value.tree_offset_bytes


@given(
    st.sampled_from(sorted(DIGEST_BYTES)),
    st.integers(0, 1),
    st.integers(1, (1 << 50) - 1),
    st.integers(0, 3),
    st.integers(0, 3),
)
@example("sha256", 1, (1 << 50) - 1, 3, 3)
def test_geometry_is_bounded_and_whole(
    algorithm: str, hash_type: int, data_blocks: int, data_shift: int, hash_shift: int
) -> None:
    value = parameters(
        algorithm=algorithm,
        root_digest=bytes(DIGEST_BYTES[algorithm]),
        hash_type=hash_type,
        data_blocks=data_blocks,
        data_block_size=512 << data_shift,
        hash_block_size=512 << hash_shift,
        hash_offset_bytes=0,
    )
    per_block = 1 << value.hashes_per_block_bits
    assert value.levels < 63  # DM_VERITY_MAX_LEVELS
    assert per_block * value.slot_size_bytes <= value.hash_block_size
    assert value.slot_size_bytes >= value.digest_bytes
    below = value.data_blocks
    for count in value.level_blocks:
        assert (count - 1) * per_block < below <= count * per_block
        below = count
    assert below == 1


def test_a_superblock_alone_is_enough() -> None:
    value = from_superblock(RAW)
    assert (value.data_blocks, value.salt, value.superblock) == (300, b"salt", True)
    assert value.tree_offset_bytes == 300 * 4096 + 1024


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("salt", b""),
        ("algorithm", "sha1"),
        ("hash_type", 0),
        ("data_blocks", 301),
        ("data_block_size", 512),
        ("hash_block_size", 4096),
    ],
)
def test_a_request_that_contradicts_the_superblock_is_refused(field: str, value: object) -> None:
    said = GOOD.as_dict()
    assert from_superblock(RAW, **said).salt == b"salt"
    said["root_digest"] = None
    with call_error("integrity", object=field):
        from_superblock(RAW, **{**said, field: value})


def test_a_digest_of_another_length_than_the_superblocks_algorithm_is_refused() -> None:
    with call_error("invalid", object="root_digest"):
        from_superblock(RAW, root_digest=bytes(64))


def bare(offset: int, **said: object) -> VerityParameters:
    terms: Callable[..., VerityTerms] = VerityTerms
    return VerityParameters.from_request(terms(superblock=False, **said), hash_offset_bytes=offset)


def test_without_a_superblock_the_defaults_are_those_of_veritysetup() -> None:
    value = bare(7 * 4096, salt=b"", data_blocks=7)
    assert (value.algorithm, value.hash_type, value.hash_block_size) == ("sha256", 1, 4096)
    assert value.hash_offset_bytes == value.tree_offset_bytes == 7 * 4096
    assert value.root_digest == bytes(32)  # it was not said


@pytest.mark.parametrize(
    ("said", "offset", "field"),
    [
        ({"salt": b""}, 0, "data_blocks"),
        ({"data_blocks": 1}, 0, "salt"),
        ({"salt": b"", "data_blocks": 1}, 512, "hash_offset_bytes"),
        ({"salt": b"", "data_blocks": 1, "algorithm": "sha1", "root_digest": bytes(32)}, 0, ""),
    ],
)
def test_missing_and_impossible_values_are_invalid(
    said: dict[str, object], offset: int, field: str
) -> None:
    if not field:  # the terms themselves are not to be had
        with pytest.raises(FieldError, match="root_digest"):
            bare(offset, **said)
        return
    with call_error("invalid", object=field):
        bare(offset, **said)


def test_where_the_hash_area_starts() -> None:
    def place(separate: bool = False, data: int | None = None, **said: object) -> int | None:
        terms: Callable[..., VerityTerms] = VerityTerms
        return hash_area_offset(terms(**said), separate=separate, data_size_bytes=data)

    assert place(hash_offset_bytes=4096, data_blocks=9, separate=True) == 4096
    assert place(data_blocks=9, separate=True) == 0
    assert place(data_blocks=9, data_block_size=512) == 9 * 512
    assert place(data_blocks=9) == 9 * 4096
    assert place(data=5000) == 8192
    assert place(data=5000, data_block_size=512) == 5120
    assert place(data_blocks=9, data_block_size=512, superblock=False) == 8192
    assert place() is None


def test_kernel_limits() -> None:
    check_kernel_limits(parameters(), logical_block_size=512)
    check_kernel_limits(parameters(), logical_block_size=4096)
    with call_error(
        "unsupported", match="hash_block_size: 512 bytes cannot be mapped", object="hash_block_size"
    ):
        check_kernel_limits(parameters(hash_block_size=512), logical_block_size=4096)


class Device:
    """300 data blocks of 512 bytes, superblock room, three hash blocks of 4096 bytes."""

    def __init__(self, hash_type: int = 1, blocks: int = 300) -> None:
        self.content = bytearray(b"".join(struct.pack("<Q504x", n) for n in range(blocks)))
        self.parameters = parameters(
            salt=b"pepper",
            hash_type=hash_type,
            data_blocks=blocks,
            data_block_size=512,
            hash_offset_bytes=(blocks * 512 + 4095) // 4096 * 4096,
        )
        self._append_tree()

    def _append_tree(self) -> None:
        digests = [
            block_digest(self.parameters, bytes(self.content[at : at + 512]))
            for at in range(0, len(self.content), 512)
        ]
        leaves = [
            b"".join(digests[at : at + 128]).ljust(4096, b"\0")
            for at in range(0, len(digests), 128)
        ]
        root = digests[0]
        self.content += bytes(self.parameters.tree_offset_bytes - len(self.content))
        if self.parameters.levels:
            top = b"".join(block_digest(self.parameters, leaf) for leaf in leaves)
            self.content += top.ljust(4096, b"\0") + b"".join(leaves)
            root = block_digest(self.parameters, top.ljust(4096, b"\0"))
        self.parameters = self.parameters.replace(root_digest=root)

    def read_at(self, offset_bytes: int, size: int) -> bytes:
        return bytes(self.content[offset_bytes : offset_bytes + size])


@pytest.mark.parametrize("hash_type", [0, 1])
def test_a_whole_tree_passes(hash_type: int) -> None:
    device = Device(hash_type)
    check_root(device.parameters, device.read_at)
    for block in (0, 127, 128, 299):
        check_tree_spines(device.parameters, device.read_at, data_blocks=(block,))


def test_one_data_block_is_its_own_root() -> None:
    device = Device(blocks=1)
    assert device.parameters.levels == 0
    check_root(device.parameters, device.read_at)
    check_tree_spines(device.parameters, device.read_at)
    device.content[7] ^= 1
    with pytest.raises(CallError, match="data block 0, which is the root"):
        check_root(device.parameters, device.read_at)


def test_a_wrong_root_is_refused_and_both_are_named() -> None:
    device = Device()
    wrong = device.parameters.replace(root_digest=b"\1" * 32)
    with call_error("integrity") as caught:
        check_root(wrong, device.read_at)
    assert "01" * 32 in caught.value.message
    assert device.parameters.root_digest.hex() in caught.value.message


@pytest.mark.parametrize("keep", [0, 100, 4095])
def test_a_truncated_top_is_refused(keep: int) -> None:
    device = Device()
    del device.content[device.parameters.tree_offset_bytes + keep :]
    with call_error("integrity", match="the top hash block"):
        check_root(device.parameters, device.read_at)


def test_a_tree_without_its_end_is_refused() -> None:
    device = Device()
    del device.content[-1]
    with pytest.raises(CallError, match="the last hash block: the device ends 1 bytes too early"):
        check_root(device.parameters, device.read_at)


def test_a_hash_area_within_the_data_is_refused() -> None:
    device = Device()
    within = device.parameters.replace(hash_offset_bytes=4096)
    with call_error("invalid", match="overlaps the data"):
        check_root(within, device.read_at)
    # on a device of its own it may start anywhere
    apart = device.parameters.replace(hash_offset_bytes=0)
    shift = device.parameters.tree_offset_bytes - apart.tree_offset_bytes
    check_root(
        apart,
        device.read_at,
        read_hash_at=lambda offset, size: device.read_at(offset + shift, size),
    )


@pytest.mark.parametrize(
    ("position", "named"),
    [
        (0, "data block 0"),
        (lambda device: device.parameters.level_offsets_bytes[0], "hash block 0 of level 0"),
        (lambda device: device.parameters.tree_offset_bytes, "the top hash block"),
    ],
)
def test_the_spine_finds_damage_on_its_path(
    position: int | Callable[[Device], int], named: str
) -> None:
    device = Device()
    device.content[position if isinstance(position, int) else position(device)] ^= 1
    with call_error("integrity", object=named):
        check_tree_spines(device.parameters, device.read_at)


def test_the_spine_of_another_block_does_not_read_this_one() -> None:
    device = Device()
    device.content[0] ^= 1
    check_tree_spines(device.parameters, device.read_at, data_blocks=(299,))
    with pytest.raises(ValueError, match="data block 300 of 300"):
        check_tree_spines(device.parameters, device.read_at, data_blocks=(300,))


def test_hash_block_shared_by_two_paths_is_read_once() -> None:
    device = Device()
    reads: list[int] = []

    def read_at(offset: int, size: int) -> bytes:
        reads.append(offset)
        return device.read_at(offset, size)

    check_tree_spines(device.parameters, read_at, data_blocks=(0, 1, 299))
    parameters = device.parameters
    last_hash_block = parameters.end_bytes - parameters.hash_block_size
    reads.remove(last_hash_block)  # once to see that it is there, once on the way
    assert len(reads) == len(set(reads))
    last = 299 * parameters.data_block_size
    assert {0, last, last_hash_block, *parameters.level_offsets_bytes} <= set(reads)
    device.content[last] ^= 1
    with pytest.raises(CallError, match="data block 299 has the digest"):
        check_tree_spines(device.parameters, device.read_at, data_blocks=(0, 1, 299))


@pytest.mark.parametrize("hash_type", [0, 1])
@pytest.mark.parametrize("blocks", [299, 257, 256, 129])
def test_fewer_data_blocks_than_the_tree_has_are_noticed(hash_type: int, blocks: int) -> None:
    device = Device(hash_type)
    fewer = device.parameters.replace(data_blocks=blocks)
    assert fewer.levels == device.parameters.levels
    end = device.parameters.level_offsets_bytes[0] - fewer.level_offsets_bytes[0]

    def shifted(offset: int, size: int) -> bytes:  # a smaller tree would start elsewhere
        return device.read_at(offset + (end if offset > fewer.tree_offset_bytes else 0), size)

    with call_error(
        "integrity", match=f"the hash tree is not over {blocks} blocks", object="data_blocks"
    ):
        check_tree_spines(fewer, device.read_at, read_hash_at=shifted, data_blocks=(blocks - 1,))


def test_every_export_exists() -> None:
    assert all(hasattr(verity, name) for name in verity.__all__)
