"""Magic numbers and superblock sizes, against images that the file systems' own tools made."""

import contextlib
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.storage import filesystems
from guestagent.storage.filesystems import check_size, claimed_size_bytes, detect, mount_options
from vsock.errors import CallError

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


@pytest.mark.parametrize("filesystem", filesystems.ALLOWED)
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
    with pytest.raises(CallError, match="claims") as caught:
        check_size(filesystem, reader(head), claimed - 1)
    assert caught.value.code == "mount"
    for other in set(filesystems.ALLOWED) - {filesystem}:
        with pytest.raises(CallError, match=f"no {other} superblock"):
            claimed_size_bytes(other, reader(head))


def test_no_magic_is_none_and_two_are_refused() -> None:
    assert detect(reader(bytes(4096))) is None
    both = bytearray(4096)
    both[:4] = b"hsqs"
    both[1024:1028] = b"\xe2\xe1\xf5\xe0"
    with pytest.raises(CallError, match="squashfs") as caught:
        detect(reader(bytes(both)))
    assert caught.value.code == "mount"
    assert "erofs" in caught.value.message


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


@given(st.binary(min_size=2048, max_size=2048), st.sampled_from(filesystems.ALLOWED))
def test_any_superblock_gives_a_size_or_a_refusal(head: bytes, filesystem: str) -> None:
    offset, magic = filesystems._MAGIC[filesystem]
    head = head[:offset] + magic + head[offset + len(magic) :]
    with contextlib.suppress(CallError):
        assert 0 < check_size(filesystem, reader(head), 1 << 40) <= 1 << 40


def test_options() -> None:
    assert mount_options("erofs") == ()
    assert mount_options("squashfs") == ()
    assert mount_options("ext4") == (("noload", None),)
    assert mount_options("ext4", readonly=False) == ()
    assert set(mount_options("xfs")) == {("norecovery", None), ("nouuid", None)}
    assert mount_options("xfs", readonly=False) == (("nouuid", None),)
    assert mount_options("erofs", dax=True) == (("dax", "always"),)
    for filesystem, dax in (("squashfs", True), ("btrfs", False), ("", False), ("tmpfs", False)):
        with pytest.raises(CallError) as caught:
            mount_options(filesystem, dax=dax)
        assert caught.value.code == "unsupported"
    with pytest.raises(CallError, match="is not one of"):
        claimed_size_bytes("vfat", reader(bytes(2048)))


def test_registered(tmp_path: Path) -> None:
    path = tmp_path / "filesystems"
    path.write_text("nodev\tsysfs\nnodev\ttmpfs\n\text4\n\n")
    assert filesystems.registered(str(path)) == {"sysfs", "tmpfs", "ext4"}
    assert "tmpfs" in filesystems.registered()
