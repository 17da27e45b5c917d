"""Images whose hash tree veritysetup made."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tests.beds import dmbed


@dataclass(frozen=True, slots=True, kw_only=True)
class VerityImage:
    """An image with the hash tree that veritysetup put behind its data, superblock included."""

    path: Path
    root_digest: bytes
    salt: bytes
    hash_offset_bytes: int
    data_blocks: int
    size_bytes: int


def make_verity_image(image: Path, *options: str) -> VerityImage:
    """Format ``image`` in place with veritysetup."""
    data_bytes = -(-image.stat().st_size // 4096) * 4096
    os.truncate(image, data_bytes)
    output = dmbed.run(
        "veritysetup", "format", f"--hash-offset={data_bytes}",
        f"--data-blocks={data_bytes // 4096}", *options, str(image), str(image),
    )  # fmt: skip
    salt = _field(output, "Salt")
    return VerityImage(
        path=image,
        root_digest=bytes.fromhex(_field(output, "Root hash")),
        salt=b"" if salt == "-" else bytes.fromhex(salt),
        hash_offset_bytes=data_bytes,
        data_blocks=int(_field(output, "Data blocks")),
        size_bytes=image.stat().st_size,
    )


def _field(output: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*(\S+)$", output, re.MULTILINE)
    assert match is not None, output
    return match.group(1)
