"""Layers as hcsshim and containerd lay them out, written and read by the command line.

What we write is checked by veritysetup and the tools of the file systems; what we read was made by
them.
"""

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from rootfs.imagefile.vhd import FOOTER_BYTES
from tests.beds.ctlbed import guestctl
from tests.beds.imagebed import Member, make_tar

FIXED_DISK = 2


@pytest.fixture
def place(tmp_path: Path) -> Path:
    members = [Member("etc/motd", b"hello\n"), Member("noise", os.urandom(700_000))]
    (tmp_path / "layer.tar").write_bytes(make_tar(members))
    return tmp_path


def ours(place: Path, *words: str, status: int = 0) -> dict[str, object]:
    done = guestctl(place, *words)
    assert done.returncode == status, done.stdout + done.stderr
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


def theirs(place: Path, *words: str) -> str:
    done = subprocess.run([*words], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def veritysetup_accepts(place: Path, image: str, root: object, offset: object) -> bool:
    command = ["veritysetup", "verify", image, image, str(root), f"--hash-offset={offset}"]
    return subprocess.run(command, cwd=place, capture_output=True, check=False).returncode == 0


def ext4_bytes(place: Path, image: str) -> int:
    """Return how far the file system says that it goes."""
    facts = dict(
        line.split(":", 1) for line in theirs(place, "dumpe2fs", "-h", image).splitlines()[1:]
        if ":" in line
    )  # fmt: skip
    return int(facts["Block count"]) * int(facts["Block size"])


def test_a_layer_of_hcsshim_is_written(place: Path) -> None:
    """ext4, then at its end the superblock, then the tree, then the footer of a fixed disk."""
    words = ("--filesystem", "ext4", "--verity", "--vhd")
    built = ours(place, "layer", "build", "layer.tar", "layer.vhd", *words)
    offset = ext4_bytes(place, "layer.vhd")
    assert built["hash_offset_bytes"] == offset
    raw = (place / "layer.vhd").read_bytes()
    assert raw[offset : offset + 8] == b"verity\0\0"
    footer = raw[-FOOTER_BYTES:]
    assert footer[:8] == b"conectix"
    assert struct.unpack_from(">Q", footer, 48) == (len(raw) - FOOTER_BYTES,)
    assert struct.unpack_from(">I", footer, 60) == (FIXED_DISK,)
    assert veritysetup_accepts(place, "layer.vhd", built["root_digest"], offset)
    assert not veritysetup_accepts(place, "layer.vhd", "00" * 32, offset)
    theirs(place, "e2fsck", "-fn", "layer.vhd")
    (place / "disk").write_bytes(raw[:-FOOTER_BYTES])
    assert theirs(place, "debugfs", "-R", "cat /etc/motd", "disk") == "hello\n"


def make_vhd(place: Path) -> str:
    """Make one as hcsshim does, by the tools of the file system and of verity; return its root."""
    (place / "tree").mkdir()
    (place / "tree/motd").write_text("made elsewhere\n")
    theirs(place, "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", "tree", "other.vhd", "4M")
    size = ext4_bytes(place, "other.vhd")
    command = ("veritysetup", "format", f"--hash-offset={size}", f"--data-blocks={size // 4096}")
    root = theirs(place, *command, "other.vhd", "other.vhd").split("Root hash:")[1].split()[0]
    disk_bytes = (place / "other.vhd").stat().st_size
    footer = bytearray(FOOTER_BYTES)
    struct.pack_into(">8sIIQI4sI4sQQ", footer, 0, b"conectix", 2, 0x10000, (1 << 64) - 1, 7,
                     b"test", 0, b"none", disk_bytes, disk_bytes)  # fmt: skip
    struct.pack_into(">I", footer, 60, FIXED_DISK)
    footer[68:84] = bytes(range(16))
    struct.pack_into(">I", footer, 64, ~sum(footer) & 0xFFFFFFFF)
    with (place / "other.vhd").open("ab") as file:
        file.write(footer)
    return root


def test_a_layer_of_hcsshim_is_read(place: Path) -> None:
    root = make_vhd(place)
    facts = ours(place, "layer", "dump", "other.vhd")
    assert facts["root_digest"] == root
    assert facts["hash_offset_bytes"] == 4 << 20
    assert facts["vhd_uuid"] == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert ours(place, "layer", "verify", "--root-digest", root, "other.vhd")["intact"] is True
    ours(place, "pack", "create", "p.img")
    added = ours(place, "pack", "add", "p.img", "other.vhd", "--root-digest", root)
    assert added["filesystem"] == "ext4"
    assert ours(place, "pack", "check", "p.img")["sound"] is True


@pytest.mark.parametrize("at", [8, 40, -FOOTER_BYTES + 60, -1])
def test_a_damaged_vhd_is_refused(place: Path, at: int) -> None:
    """A flipped byte of data, or of the footer; either is seen, whatever else is intact."""
    root = make_vhd(place)
    with (place / "other.vhd").open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    found = ours(place, "layer", "verify", "--root-digest", root, "other.vhd", status=1)
    if at >= 0:
        assert found["corrupt_data"] == [{"first": 0, "count": 1}]
    else:
        assert found["error"]["code"] == "integrity"  # type: ignore[index]


def test_a_sidecar_of_containerd_is_written(place: Path) -> None:
    built = ours(place, "layer", "build", "layer.tar", "layer.erofs", "--verity", "--sidecar")
    first = json.loads((place / "layer.erofs.dmverity").read_text())
    assert first == {"roothash": built["root_digest"], "hashoffset": built["hash_offset_bytes"]}
    ours(place, "layer", "build", "layer.tar", "plain.erofs")
    facts = ours(place, "layer", "format", "plain.erofs", "--sidecar")
    second = json.loads((place / "plain.erofs.dmverity").read_text())
    assert second == {"roothash": facts["root_digest"], "hashoffset": facts["hash_offset_bytes"]}
    for name, sidecar in (("layer.erofs", first), ("plain.erofs", second)):
        assert veritysetup_accepts(place, name, sidecar["roothash"], sidecar["hashoffset"])


def make_containerd_layer(place: Path) -> str:
    """Make one as containerd does: mkfs.erofs, veritysetup, and the file beside it."""
    (place / "tree").mkdir()
    (place / "tree/motd").write_text("made elsewhere\n")
    theirs(place, "mkfs.erofs", "--quiet", "layer.erofs", "tree")
    data_bytes = -(-(place / "layer.erofs").stat().st_size // 4096) * 4096
    os.truncate(place / "layer.erofs", data_bytes)
    command = ("veritysetup", "format", f"--hash-offset={data_bytes}", "--data-block-size=512")
    command += ("--hash-block-size=4096", f"--data-blocks={data_bytes // 512}")
    output = theirs(place, *command, "layer.erofs", "layer.erofs")
    root = output.split("Root hash:")[1].split()[0]
    sidecar = {"roothash": root, "hashoffset": data_bytes, "of a later containerd": True}
    (place / "layer.erofs.dmverity").write_text(json.dumps(sidecar))
    return root


def test_a_sidecar_of_containerd_is_read(place: Path) -> None:
    root = make_containerd_layer(place)
    found = ours(place, "layer", "verify", "--sidecar", "layer.erofs")
    assert (found["intact"], found["root_digest"]) == (True, root)
    ours(place, "pack", "create", "p.img")
    added = ours(place, "pack", "add", "p.img", "layer.erofs", "--sidecar")
    assert added["verity"]["root_digest"] == root  # type: ignore[index]
    assert ours(place, "pack", "check", "p.img")["sound"] is True


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"roothash": "%s", "hashoffset": 4096}' % ("00" * 32), "integrity"),
        ('{"roothash": "xyz", "hashoffset": 4096}', "invalid"),
        ('{"roothash": "%s", "hashoffset": "4096"}' % ("00" * 32), "invalid"),
        ("[", "invalid"),
        (None, "not_found"),
    ],
)
def test_a_sidecar_that_does_not_fit(place: Path, text: str | None, code: str) -> None:
    make_containerd_layer(place)
    sidecar = place / "layer.erofs.dmverity"
    sidecar.unlink() if text is None else sidecar.write_text(text)
    ours(place, "pack", "create", "p.img")
    before = (place / "p.img.json").read_bytes()
    error = ours(place, "pack", "add", "p.img", "layer.erofs", "--sidecar", status=1)["error"]
    assert error["code"] == code  # type: ignore[index]
    assert (place / "p.img.json").read_bytes() == before
    found = ours(place, "layer", "verify", "layer.erofs", "--sidecar", status=1)
    if code != "integrity":
        assert found["error"]["code"] == code  # type: ignore[index]
    else:
        assert found["intact"] is False


@pytest.mark.parametrize(
    "words",
    [
        ("layer", "verify", "--sidecar", "--root-digest", "00", "layer.erofs"),
        ("layer", "verify", "--sidecar", "--hash-offset", "4096", "layer.erofs"),
        ("layer", "format", "--sidecar", "--no-superblock", "layer.erofs"),
        ("layer", "format", "--sidecar", "--hash-file", "x", "layer.erofs"),
        ("pack", "add", "p.img", "layer.erofs", "--sidecar", "--root-digest", "00"),
    ],
    ids=" ".join,
)
def test_options_that_contradict_a_sidecar_are_wrong_usage(
    place: Path, words: tuple[str, ...]
) -> None:
    assert guestctl(place, *words).returncode == 2
