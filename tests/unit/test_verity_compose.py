"""Composed hash trees: byte for byte those that veritysetup makes of the concatenation."""

import contextlib
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from guestagent.storage.verity import PART_STEP_BYTES, VerityParameters, VerityTerms
from rootfs.verity.compose import NewPart, Part, compose_tree, composed_parameters
from rootfs.verity.formatter import format_image
from tests.beds.calls import call_error
from tests.beds.loopbed import sparse_file
from vsock.errors import CallError

pytestmark = pytest.mark.skipif(
    shutil.which("veritysetup") is None, reason="veritysetup is not installed"
)

IDENTITY = UUID("12345678-1234-5678-9abc-123456789abc")
RANDOM = random.Random(11)
NOISE = RANDOM.randbytes(PART_STEP_BYTES)


class Parts:
    """Parts of random data: as parts, and the bytes of their concatenation."""

    def __init__(self, directory: Path, terms: VerityTerms, blocks: tuple[int, ...]) -> None:
        self._cleanup = contextlib.ExitStack()
        self.parts: list[Part] = []
        self.data = b""
        for number, count in enumerate(blocks):
            path = directory / f"part{number}"
            data = random.Random(number).randbytes(count * (terms.data_block_size or 4096))
            path.write_bytes(data)
            made = format_image(path, terms=terms, uuid=IDENTITY)
            fd = os.open(path, os.O_RDONLY)
            self._cleanup.callback(os.close, fd)
            self.parts.append(Part(name=path.name, fd=fd, parameters=made.parameters))
            self.data += data.ljust(-(-len(data) // PART_STEP_BYTES) * PART_STEP_BYTES, b"\0")

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def write(self, path: Path) -> VerityParameters:
        """Write data, superblock and composed tree; return the parameters with the root digest."""
        parameters = composed_parameters(self.parts)
        path.write_bytes(self.data)
        with path.open("r+b") as file:
            os.ftruncate(file.fileno(), parameters.end_bytes)
            at = parameters.hash_offset_bytes
            os.pwrite(file.fileno(), parameters.pack_superblock(IDENTITY.bytes), at)
            root = compose_tree(
                self.parts, parameters, file.fileno(), parameters.tree_offset_bytes, workers=1
            )
        return parameters.replace(root_digest=root)


def cases() -> Iterator[tuple[VerityTerms, tuple[int, ...]]]:
    default = VerityTerms(salt=NOISE[:32])
    yield default, (1,)
    yield default, (128,)
    yield default, (1, 1)
    yield default, (127, 128, 129)
    yield default, (1, 300, 2, 5000, 128)
    for _ in range(6):
        yield default, tuple(RANDOM.randint(1, 700) for _ in range(RANDOM.randint(1, 9)))
    for algorithm in ("sha1", "sha256", "sha512"):
        for hash_type in (0, 1):
            for data, hash_ in ((4096, 4096), (512, 4096), (4096, 512), (1024, 1024)):
                yield (
                    VerityTerms(
                        salt=NOISE[: RANDOM.choice((0, 1, 32, 256))],
                        algorithm=algorithm,
                        hash_type=hash_type,
                        data_block_size=data,
                        hash_block_size=hash_,
                    ),
                    tuple(RANDOM.randint(2, 400) for _ in range(3)),
                )


def describe(value: object) -> str:
    if isinstance(value, VerityTerms):
        sizes = f"{value.data_block_size or 4096}-{value.hash_block_size or 4096}"
        return f"{value.algorithm or 'sha256'}-type{value.hash_type}-{sizes}"
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("terms", "blocks"), list(cases()), ids=describe)
def test_the_tree_is_that_of_veritysetup_over_the_concatenation(
    tmp_path: Path, terms: VerityTerms, blocks: tuple[int, ...]
) -> None:
    composed, peer = tmp_path / "composed", tmp_path / "peer"
    with Parts(tmp_path, terms, blocks) as parts:
        made = parts.write(composed)
        peer.write_bytes(parts.data)
    command = [
        "veritysetup", "format", str(peer), str(peer),
        f"--format={made.hash_type}", f"--hash={made.algorithm}",
        f"--salt={made.salt.hex() or '-'}", f"--uuid={IDENTITY}",
        f"--data-block-size={made.data_block_size}", f"--hash-block-size={made.hash_block_size}",
        f"--data-blocks={made.data_blocks}", f"--hash-offset={made.hash_offset_bytes}",
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.split("Root hash:")[1].split()[0] == made.root_digest.hex()
    assert composed.read_bytes() == peer.read_bytes()
    offset = f"--hash-offset={made.hash_offset_bytes}"
    check = ["veritysetup", "verify", composed, composed, made.root_digest.hex(), offset]
    subprocess.run(check, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (VerityTerms(salt=b"another"), "salt"),
        (VerityTerms(salt=b"salt", algorithm="sha512"), "algorithm"),
        (VerityTerms(salt=b"salt", hash_type=0), "hash_type"),
        (VerityTerms(salt=b"salt", data_block_size=1024), "data_block_size"),
        (VerityTerms(salt=b"salt", hash_block_size=1024), "hash_block_size"),
    ],
)
def test_parts_that_differ_are_refused_by_name(
    tmp_path: Path, other: VerityTerms, field: str
) -> None:
    (tmp_path / "one").mkdir()
    with (
        Parts(tmp_path / "one", VerityTerms(salt=b"salt"), (3, 3)) as one,
        Parts(tmp_path, other, (3,)) as odd,
        call_error("invalid", object="odd") as caught,
    ):
        composed_parameters([*one.parts, Part(
            name="odd", fd=odd.parts[0].fd, parameters=odd.parts[0].parameters
        )])  # fmt: skip
    assert field in caught.value.message


def test_no_parts_are_refused() -> None:
    with pytest.raises(CallError, match="no part"):
        composed_parameters([])


@pytest.mark.parametrize("terms", [VerityTerms(salt=b"s"), VerityTerms(salt=b"s", hash_type=0)])
def test_a_part_without_a_tree_is_hashed(tmp_path: Path, terms: VerityTerms) -> None:
    new = tmp_path / "new"
    new.write_bytes(bytes(4096) + NOISE + NOISE[:5000].ljust(PART_STEP_BYTES, b"\0"))
    with Parts(tmp_path, terms, (300, 70)) as parts, new.open("rb") as file:
        fresh = NewPart(fd=file.fileno(), offset_bytes=4096, padded_bytes=2 * PART_STEP_BYTES)
        one, other = parts.parts
        parts.parts = [one, fresh, other]  # type: ignore[list-item]
        parts.data = (
            parts.data[: one.padded_bytes]
            + new.read_bytes()[4096:]
            + parts.data[one.padded_bytes :]
        )
        made = parts.write(tmp_path / "composed")
        (tmp_path / "whole").write_bytes(parts.data)
    whole = format_image(tmp_path / "whole", terms=terms, uuid=IDENTITY)
    assert whole.root_digest == made.root_digest
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "composed").read_bytes()


@pytest.mark.parametrize("blocks", [300, 128, 100, 128 * 130])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_part_whose_hash_blocks_changed_is_refused_by_name(
    tmp_path: Path, blocks: int, where: str
) -> None:
    with Parts(tmp_path, VerityTerms(salt=b"salt"), (5, blocks, 200)) as parts:
        own = parts.parts[1].parameters
        leaf = own.level_offsets_bytes[0]
        if where == "last":
            leaf += (own.level_blocks[0] - 1) * 4096
        with (tmp_path / "part1").open("r+b") as file:
            file.seek(leaf + 5)
            byte = file.read(1)[0]
            file.seek(leaf + 5)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(CallError) as caught:
            parts.write(tmp_path / "composed")
    assert (caught.value.code, caught.value.object) == ("integrity", "part1")


def test_a_part_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    with Parts(tmp_path, VerityTerms(salt=b"salt"), (5, 300)) as parts:
        os.truncate(tmp_path / "part1", 300 * 4096 + 4096)
        with pytest.raises((CallError, OSError)):
            parts.write(tmp_path / "composed")


def test_no_data_are_read_and_memory_stays_flat(tmp_path: Path) -> None:
    """Compose 10 GiB of 64 parts from hash areas alone."""
    image = sparse_file(tmp_path / "image", 160 << 20)
    terms = VerityTerms(salt=bytes(32))
    made = format_image(image, terms=terms, hash_file=tmp_path / "hashes")
    image.unlink()
    with (tmp_path / "hashes").open("rb") as hashes, (tmp_path / "tree").open("w+b") as tree:
        part = Part(name="part", fd=hashes.fileno(), parameters=made.parameters)
        parts = [part] * 64
        parameters = composed_parameters(parts)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        root = compose_tree(parts, parameters, tree.fileno(), 0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sparse_file(image, parameters.data_size_bytes)
    whole = format_image(image, terms=terms, hash_file=tmp_path / "whole")
    assert whole.root_digest == root
    assert grown < 32 * 1024
