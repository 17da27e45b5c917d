"""Magic numbers and superblock sizes, against images that the file systems' own tools made."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.api.layers import LAYER_FILESYSTEMS
from guestagent.api.overlays import SCRATCH_FILESYSTEMS
from guestagent.storage import filesystems, makefs
from guestagent.storage.filesystems import (
    TABLE,
    check_size,
    check_superblock,
    claimed_size_bytes,
    detect,
    layer_type,
    mount_options,
)
from rootfs.image.images import FILESYSTEMS as BUILT
from tests.beds.calls import call_error
from vsock.deadline import Deadline
from vsock.errors import CallError

SCHEMA = Path(__file__).resolve().parents[2] / "rootfs/schema/manifest-v2.json"
ReadAt = Callable[[int, int], bytes]


def reader(data: bytes) -> ReadAt:
    return lambda offset, length: data[offset : offset + length].ljust(length, b"\0")


def build(directory: Path, filesystem: str) -> bytes:
    tree = directory / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"content" * 1000)
    image = directory / "image"
    with open(image, "wb") as file:
        file.truncate(0 if filesystem in ("erofs", "squashfs") else 512 << 20)
    commands = {
        "erofs": ["mkfs.erofs", str(image), str(tree)],
        "squashfs": ["mksquashfs", str(tree), str(image), "-noappend", "-quiet", "-no-progress"],
        "ext4": ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image)],
        "xfs": ["mkfs.xfs", "-q", "-f", str(image)],
    }
    if shutil.which(commands[filesystem][0], path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip(f"{commands[filesystem][0]} is not installed")
    subprocess.run(commands[filesystem], check=True, capture_output=True)
    with open(image, "rb") as file:
        head = file.read(1 << 20)
    size = image.stat().st_size
    image.unlink()
    assert filesystem not in ("ext4", "xfs") or size == 512 << 20
    return head if filesystem in ("ext4", "xfs") else head[:size]


@pytest.mark.parametrize("filesystem", sorted(TABLE))
def test_images_of_the_tools(filesystem: str, tmp_path: Path) -> None:
    head = build(tmp_path, filesystem)
    assert detect(reader(head)) == filesystem
    claimed = claimed_size_bytes(filesystem, reader(head))
    if filesystem in ("ext4", "xfs"):
        assert claimed == 512 << 20
    else:
        assert 0 < claimed <= len(head)
        assert len(head) - claimed < 4096  # the tools pad the file to whole blocks
    assert check_size(filesystem, reader(head), 512 << 20) == claimed
    with call_error("mount", match="claims"):
        check_size(filesystem, reader(head), claimed - 1)
    for other in set(TABLE) - {filesystem}:
        with pytest.raises(CallError, match=f"no {other} superblock"):
            claimed_size_bytes(other, reader(head))


def test_no_magic_is_none_and_two_are_refused() -> None:
    assert detect(reader(bytes(4096))) is None
    both = bytearray(4096)
    both[:4] = b"hsqs"
    both[1024:1028] = b"\xe2\xe1\xf5\xe0"
    with call_error("mount", match="squashfs") as caught:
        detect(reader(bytes(both)))
    assert "erofs" in caught.value.message


def test_auto_takes_only_file_systems_of_layers() -> None:
    for name, row in TABLE.items():
        head = bytes(row.magic_at) + row.magic
        assert detect(reader(head)) == name
        if name in LAYER_FILESYSTEMS:
            assert layer_type("auto", reader(head)) == name
        else:
            with call_error("mount", match=f"those of {name}, not of erofs"):
                layer_type("auto", reader(head))
    with pytest.raises(CallError, match="no known type"):
        layer_type("auto", reader(b""))
    assert layer_type("ext4", reader(b"")) == "ext4"


def test_other_lists_agree_with_the_table() -> None:
    layers = {name for name, row in TABLE.items() if row.layer_options is not None}
    scratches = {name for name, row in TABLE.items() if row.scratch_options is not None}
    assert set(LAYER_FILESYSTEMS) == layers
    assert set(SCRATCH_FILESYSTEMS) == scratches
    assert all(TABLE[name].mkfs for name in scratches)
    schema = json.loads(SCHEMA.read_text())
    assert set(schema["$defs"]["layer"]["properties"]["filesystem"]["enum"]) == layers
    assert layers <= set(BUILT)  # each can be built on the host


def erofs(bits: int, blocks: int, *, incompat: int = 0, high: int = 0) -> bytes:
    head = bytearray(2048)
    struct.pack_into("<I", head, 1024, 0xE0F5E1E2)
    head[1024 + 12] = bits
    struct.pack_into("<H", head, 1024 + 14, high)
    struct.pack_into("<I", head, 1024 + 36, blocks)
    struct.pack_into("<I", head, 1024 + 80, incompat)
    return bytes(head)


def test_erofs_sizes_of_48_bits() -> None:
    assert claimed_size_bytes("erofs", reader(erofs(12, 3))) == 3 * 4096
    assert claimed_size_bytes("erofs", reader(erofs(9, 3, high=7))) == 3 * 512
    wide = erofs(12, 3, incompat=0x80, high=2)
    assert claimed_size_bytes("erofs", reader(wide)) == ((2 << 32) + 3) * 4096
    with pytest.raises(CallError, match=r"2\^40"):
        claimed_size_bytes("erofs", reader(erofs(40, 3)))
    with pytest.raises(CallError, match="claims 0 bytes"):
        check_size("erofs", reader(erofs(12, 0)), 4096)


def erofs_devices(*devices: tuple[int, int], slot: int = 16) -> bytes:
    """An image of two blocks with a table of (blocks, address) at ``slot``, and those devices."""
    image = bytearray(erofs(12, 2, incompat=8)) + bytes(5 * 4096 + 2048)
    struct.pack_into("<HH", image, 1024 + 86, len(devices), slot)
    for number, (blocks, address) in enumerate(devices):
        struct.pack_into("<II", image, (slot + number) * 128 + 64, blocks, address)
    return bytes(image)


def on_linux(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(release=release))


@pytest.mark.parametrize(
    ("release", "has"),
    [
        ("6.1.0-50-cloud-amd64", False),
        ("5.15.200", False),
        ("6.3.13", False),
        ("6.4.0-rc1", True),
        ("6.12", True),
        ("7.2.0", True),
        ("7", True),
    ],
)
def test_device_tables_need_linux_6_4(
    monkeypatch: pytest.MonkeyPatch, release: str, has: bool
) -> None:
    image = erofs_devices((3, 2), (1, 5))
    on_linux(monkeypatch, release)
    assert filesystems.has_flattened_erofs() is has
    if has:
        check_superblock("erofs", reader(image), len(image))
        return
    with call_error(
        "unsupported", match=r"2 devices, which needs Linux 6\.4", object="erofs-flattened"
    ) as caught:
        check_superblock("erofs", reader(image), len(image))
    assert release in caught.value.message
    check_superblock("erofs", reader(erofs(12, 1)), 4096)  # without a table any kernel will do


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (erofs_devices((3, 4)), "device 0 of 12288 bytes at byte 16384"),
        (erofs_devices((3, 2), ((1 << 32) - 1, (1 << 32) - 1))[:20480], "device 1 of"),
        (erofs_devices((3, 0)), "device 0 of 12288 bytes at byte 0"),
        (erofs_devices((3, 2), slot=100)[:12800], "1 devices at byte 12800"),
    ],
)
def test_device_tables_that_point_outside_are_refused(
    monkeypatch: pytest.MonkeyPatch, image: bytes, problem: str
) -> None:
    on_linux(monkeypatch, "6.12.0")
    with call_error("mount", match=problem):
        check_superblock("erofs", reader(image), len(image))


def test_the_last_of_many_slots_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    on_linux(monkeypatch, "6.12.0")
    image = bytearray(erofs(12, 2, incompat=8)) + bytes(65536 * 128)
    struct.pack_into("<HH", image, 1024 + 86, 65535, 16)
    for number in range(65535):
        struct.pack_into("<II", image, (16 + number) * 128 + 64, 0, 1)
    check_superblock("erofs", reader(bytes(image)), len(image))
    struct.pack_into("<II", image, (16 + 65534) * 128 + 64, 1 << 31, 1)
    with pytest.raises(CallError, match="device 65534"):
        check_superblock("erofs", reader(bytes(image)), len(image))


@given(st.binary(min_size=2048, max_size=2048), st.sampled_from(sorted(TABLE)))
def test_any_superblock_gives_a_size_or_a_refusal(head: bytes, filesystem: str) -> None:
    row = TABLE[filesystem]
    head = head[: row.magic_at] + row.magic + head[row.magic_at + len(row.magic) :]
    with contextlib.suppress(CallError):
        assert 0 < check_size(filesystem, reader(head), 1 << 40) <= 1 << 40


def test_options() -> None:
    assert mount_options("erofs") == ()
    assert mount_options("squashfs") == ()
    assert mount_options("ext4") == (("noload", None), ("errors", "remount-ro"))
    assert mount_options("ext4", readonly=False) == (("errors", "remount-ro"),)
    assert mount_options("xfs", readonly=False) == (("nouuid", None),)
    assert mount_options("erofs", dax=True) == (("dax", "always"),)
    for filesystem, dax in (
        ("squashfs", True),
        ("xfs", False),
        ("btrfs", False),
        ("", False),
        ("tmpfs", False),
    ):
        with call_error("unsupported"):
            mount_options(filesystem, dax=dax)
    with pytest.raises(CallError, match="is not one of"):
        claimed_size_bytes("vfat", reader(bytes(2048)))


def test_registered(tmp_path: Path) -> None:
    path = tmp_path / "filesystems"
    path.write_text("nodev\tsysfs\nnodev\ttmpfs\n\text4\n\n")
    assert filesystems.registered(str(path)) == {"sysfs", "tmpfs", "ext4"}
    assert "tmpfs" in filesystems.registered()


def test_no_program_of_another_root_formats_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(makefs, "_is_forbidden", False)
    makefs.forbid_programs()
    with (
        contextlib.closing(Deadline(10)) as deadline,
        call_error("unsupported", match="not measured"),
    ):
        makefs.make_filesystem("ext4", "/dev/null", deadline)
