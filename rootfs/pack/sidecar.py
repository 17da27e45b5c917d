"""The ``.dmverity`` file that containerd's EROFS snapshotter keeps beside a layer.

JSON: ``roothash`` in hexadecimal, ``hashoffset`` in bytes, where the superblock is in the layer.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from guestagent.storage.verity import DIGEST_BYTES, VerityParameters
from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.output import write_file
from vsock.errors import CallError

__all__ = ("Sidecar",)

_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """What to verify a layer against; everything else is in the layer's superblock."""

    root_digest: bytes
    hash_offset_bytes: int

    def __post_init__(self) -> None:
        if len(self.root_digest) not in DIGEST_BYTES.values():
            raise ValueError(f"roothash: {len(self.root_digest)} bytes are no digest")
        if self.hash_offset_bytes <= 0 or self.hash_offset_bytes % 512:
            raise ValueError(f"hashoffset: {self.hash_offset_bytes} is no place for a superblock")

    @classmethod
    def of(cls, parameters: VerityParameters) -> "Sidecar":
        """Return the sidecar of an image with this hash area in it, superblock included."""
        return cls(
            root_digest=parameters.root_digest, hash_offset_bytes=parameters.hash_offset_bytes
        )

    @staticmethod
    def path_of(image: str | os.PathLike[str]) -> Path:
        """Return where the sidecar of an image is by custom."""
        return Path(os.fspath(image) + ".dmverity")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all.

        Raises:
            CallError: as ``write_file``.
        """
        value = {"roothash": self.root_digest.hex(), "hashoffset": self.hash_offset_bytes}
        write_file(path, json.dumps(value).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Sidecar":
        """Read the file; fields that are not known are left alone.

        Raises:
            CallError: ``invalid``, and why; by errno.
        """
        with OsErrors("read", path), open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        try:
            if len(raw) > _MAX_BYTES:
                raise ValueError(f"over {_MAX_BYTES} bytes")
            value = json.loads(raw)
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
            digest, offset = value.get("roothash"), value.get("hashoffset")
            if not isinstance(digest, str):
                raise ValueError("roothash: no text")
            if not isinstance(offset, int) or isinstance(offset, bool):
                raise ValueError("hashoffset: no integer")
            return cls(root_digest=bytes.fromhex(digest), hash_offset_bytes=offset)
        except (ValueError, RecursionError) as problem:
            raise CallError(
                "invalid",
                f"cannot use {os.fspath(path)!r}: {problem}",
                step="read the sidecar",
                object=os.fspath(path),
            ) from None
