"""Signatures of kernel modules, cut off exactly."""

from pathlib import Path

import pytest

from rootfs.bootimage.kernel import cached_kernel, module_bytes, without_signature

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache"
MARKER = b"~Module signature appended~\n"


def signed(body: bytes, size_bytes: int) -> bytes:
    return body + bytes(size_bytes) + bytes(8) + size_bytes.to_bytes(4, "big") + MARKER


@pytest.mark.parametrize("size_bytes", [0, 1, 700])
def test_a_signature_is_cut_off(size_bytes: int) -> None:
    assert without_signature(signed(b"\x7fELF module", size_bytes)) == b"\x7fELF module"


@pytest.mark.parametrize("module", [b"", b"\x7fELF", MARKER[:-1], b"x" + MARKER + b"x"])
def test_module_without_signature_is_unchanged(module: bytes) -> None:
    assert without_signature(module) == module


@pytest.mark.parametrize("module", [MARKER, b"1234" + MARKER, signed(b"", 4)[1:]])
def test_a_signature_longer_than_the_file(module: bytes) -> None:
    with pytest.raises(ValueError, match="module"):
        without_signature(module)


def test_modules_of_the_kernel_at_hand_end_where_their_sections_do() -> None:
    if not list((CACHE_DIR / "kernel").glob("*/boot")):
        pytest.skip("no kernel in .cache/kernel")
    (path,) = cached_kernel(CACHE_DIR).modules.closure(["dm-mod"])
    data = without_signature(module_bytes(path))
    offset = int.from_bytes(data[0x28:0x30], "little")  # e_shoff, with e_shnum and e_shentsize
    count, size = (int.from_bytes(data[at : at + 2], "little") for at in (0x3C, 0x3A))
    assert len(data) == offset + count * size
