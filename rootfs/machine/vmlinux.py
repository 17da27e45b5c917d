"""The kernel as an ELF file, for monitors that boot no compressed image (Firecracker).

Source: Documentation/arch/x86/boot.rst: the payload of a bzImage is the ELF file, compressed, with
its unpacked size in four more bytes.
"""

import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.output import new_file
from vsock.errors import CallError

__all__ = ("unpack_kernel", "write_vmlinux")

_MAGIC_OFFSET, _MAGIC = 0x202, b"HdrS"
_SETUP_SECTORS_OFFSET, _PAYLOAD_OFFSET = 0x1F1, 0x248
_SIZE_BYTES = 4
_ELF = b"\x7fELF"


def unpack_kernel(image: bytes) -> bytes:
    """Return the ELF file in a bzImage; what is one already is returned as it is.

    Raises:
        CallError: ``invalid``, it is no kernel for x86; ``unsupported``, its compression.
    """
    if image.startswith(_ELF):
        return image
    if len(image) < 0x400 or image[_MAGIC_OFFSET : _MAGIC_OFFSET + 4] != _MAGIC:
        raise _failed("invalid", "no HdrS in its header")
    setup_bytes = ((image[_SETUP_SECTORS_OFFSET] or 4) + 1) * 512
    offset, size_bytes = struct.unpack_from("<II", image, _PAYLOAD_OFFSET)
    payload = image[setup_bytes + offset : setup_bytes + offset + size_bytes]
    for magic, unpack in _UNPACKERS.items():
        if payload.startswith(magic):
            try:
                elf = unpack(payload[:-_SIZE_BYTES])
            except (OSError, EOFError, lzma.LZMAError, subprocess.CalledProcessError) as problem:
                raise _failed("invalid", f"its payload cannot be unpacked: {problem}") from problem
            (unpacked_bytes,) = struct.unpack("<I", payload[-_SIZE_BYTES:])
            if len(elf) != unpacked_bytes:
                raise _failed("invalid", f"{unpacked_bytes} bytes announced, {len(elf)} unpacked")
            if not elf.startswith(_ELF):
                raise _failed("invalid", "its payload is no ELF file")
            return elf
    raise _failed("unsupported", f"its payload begins {payload[:6].hex()}")


def write_vmlinux(image: Path, output: Path) -> Path:
    """Unpack the kernel ``image`` to ``output``.

    Raises:
        CallError: as ``unpack_kernel``; or by errno.
    """
    with OsErrors("unpack the kernel", image):
        elf = unpack_kernel(image.read_bytes())
        with new_file(output) as (_, temporary):
            temporary.write_bytes(elf)
    return output


def _run(*argv: str) -> Callable[[bytes], bytes]:
    def unpack(payload: bytes) -> bytes:
        if shutil.which(argv[0]) is None:
            raise _failed("unsupported", f"{argv[0]} is not installed, and it is packed with it")
        return subprocess.run(argv, input=payload, capture_output=True, check=True).stdout

    return unpack


_UNPACKERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"\xfd7zXZ": lambda payload: lzma.LZMADecompressor().decompress(payload),
    b"\x28\xb5\x2f\xfd": _run("zstd", "-dcq"),
    b"\x02\x21\x4c\x18": _run("lz4", "-dc"),  # the legacy frame
}


def _failed(code: str, why: str) -> CallError:
    return CallError(
        code, f"cannot unpack the kernel: {why}", step="unpack the kernel", object="kernel"
    )
