"""The layouts of other systems: fixed VHDs as hcsshim has them, and containerd's sidecar."""

import json
import subprocess
import uuid
from pathlib import Path

import pytest

from rootfs.image.images import build_image
from rootfs.imagefile.vhd import FOOTER_BYTES, VhdFooter, find_footer
from rootfs.pack.sidecar import Sidecar
from rootfs.verity.verifier import read_layer
from tests.beds.calls import call_error, run
from tests.beds.imagebed import Member, make_tar
from vsock.errors import CallError

FOOTER = VhdFooter(size_bytes=64 << 20, uuid=uuid.UUID(int=7))


def test_a_footer_is_read_back() -> None:
    raw = FOOTER.pack()
    assert len(raw) == FOOTER_BYTES
    assert VhdFooter.parse(raw) == FOOTER


def test_the_fields_are_where_the_specification_has_them() -> None:
    raw = FOOTER.pack()
    assert raw[:8] == b"conectix"
    assert raw[12:16] == b"\0\1\0\0"
    assert raw[16:24] == b"\xff" * 8
    assert int.from_bytes(raw[40:48], "big") == int.from_bytes(raw[48:56], "big") == 64 << 20
    # the example of the specification's appendix: 64 MiB are 963 x 8 x 17
    assert (int.from_bytes(raw[56:58], "big"), raw[58], raw[59]) == (963, 8, 17)
    assert int.from_bytes(raw[60:64], "big") == 2
    total = sum(raw) - sum(raw[64:68])
    assert int.from_bytes(raw[64:68], "big") == ~total & 0xFFFFFFFF


def test_every_flipped_byte_of_a_footer_is_noticed() -> None:
    raw = FOOTER.pack()
    for at in range(FOOTER_BYTES):
        damaged = bytearray(raw)
        damaged[at] ^= 1
        with pytest.raises(CallError):
            VhdFooter.parse(bytes(damaged))


@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        (1 << 20, (30, 4, 17)),
        (2 << 30, (4161, 16, 63)),
        (127 << 30, (65278, 16, 255)),
        (4 << 40, (65535, 16, 255)),
    ],
)
def test_geometry(size: int, geometry: tuple[int, int, int]) -> None:
    raw = VhdFooter(size_bytes=size, uuid=uuid.UUID(int=0)).pack()
    assert (int.from_bytes(raw[56:58], "big"), raw[58], raw[59]) == geometry


def test_a_layer_of_hcsshim(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(make_tar([Member("file", b"content")]))
    result = build_image(
        tmp_path / "t", tmp_path / "layer.vhd", filesystem="ext4", verity=True, vhd_footer=True
    )
    assert result.verity is not None
    layer = read_layer(tmp_path / "layer.vhd")
    assert layer.parameters == result.verity
    assert layer.footer is not None
    assert layer.footer.size_bytes == result.size_bytes - 512 == result.verity.end_bytes
    # the oracle: the tree is where veritysetup looks for it
    command = ["veritysetup", "verify", tmp_path / "layer.vhd", tmp_path / "layer.vhd"]
    root = result.verity.root_digest.hex()
    offset = f"--hash-offset={result.verity.hash_offset_bytes}"
    run(*command, root, offset)
    wrong = subprocess.run([*command, "00" * 32, offset], capture_output=True)
    assert wrong.returncode != 0


@pytest.mark.parametrize("keep", [0, 100, 512, 4096])
def test_a_file_without_a_footer(tmp_path: Path, keep: int) -> None:
    with (tmp_path / "x").open("w+b") as file:
        file.truncate(keep)
        assert find_footer(file.fileno()) is None


def test_a_footer_of_another_disk(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(4096) + FOOTER.pack())
    with (tmp_path / "x").open("rb") as file, call_error("integrity"):
        find_footer(file.fileno())


def test_a_sidecar_survives_the_file(tmp_path: Path) -> None:
    sidecar = Sidecar(root_digest=b"\xab" * 32, hash_offset_bytes=8192)
    path = Sidecar.path_of(tmp_path / "layer.erofs")
    assert path.name == "layer.erofs.dmverity"
    sidecar.save(path)
    assert json.loads(path.read_text()) == {"roothash": "ab" * 32, "hashoffset": 8192}
    assert Sidecar.load(path) == sidecar


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"roothash": "ab", "hashoffset": 4096}',
        '{"roothash": "' + "zz" * 32 + '", "hashoffset": 4096}',
        '{"roothash": "' + "ab" * 32 + '"}',
        '{"roothash": "' + "ab" * 32 + '", "hashoffset": true}',
        '{"roothash": "' + "ab" * 32 + '", "hashoffset": 0}',
        '{"roothash": "' + "ab" * 32 + '", "hashoffset": 100}',
        "{" + " " * 70_000 + "}",
    ],
)
def test_sidecar_load_refuses_invalid_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "s").write_text(text)
    with call_error("invalid"):
        Sidecar.load(tmp_path / "s")
