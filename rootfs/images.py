"""One image from one source: the front door of the image tools.

The same source gives the same bytes: the UUID of the file system, and the salt and UUID for a hash
tree over it, derive from the source's digest. Nothing is seen under the final name before it is
whole.
"""

import contextlib
import hashlib
import os
import uuid as uuid_module
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rootfs.directory import DirectorySource
from rootfs.erofs import ErofsImage
from rootfs.failure import from_os_error
from rootfs.output import new_file
from rootfs.tree import Node, Progress, digest_tree
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("FILESYSTEMS", "ImageResult", "build_image", "derive_salt", "derive_uuid")

FILESYSTEMS = ("erofs", "squashfs", "ext4")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """A finished image. ``source_digest`` is ``sha256:HEX`` of the source: of the uncompressed tar,
    or of the tree that a directory holds (``rootfs.tree.digest_tree``)."""

    path: Path
    filesystem: str
    compression: str | None
    size_bytes: int
    inode_count: int
    source_digest: str
    uuid: uuid_module.UUID

    @property
    def verity_salt(self) -> bytes:
        """The salt to format a hash tree with, so that it is reproducible; 32 bytes."""
        return derive_salt(self.source_digest)

    @property
    def verity_uuid(self) -> uuid_module.UUID:
        """The UUID for the superblock of that hash tree."""
        return derive_uuid(self.source_digest, "verity")


def derive_uuid(source_digest: str, purpose: str) -> uuid_module.UUID:
    """Return a UUID (version 8, RFC 9562) that depends on nothing but the arguments."""
    raw = bytearray(hashlib.sha256(f"uuid\0{purpose}\0{source_digest}".encode()).digest()[:16])
    raw[6] = raw[6] & 0x0F | 0x80
    raw[8] = raw[8] & 0x3F | 0x80
    return uuid_module.UUID(bytes=bytes(raw))


def derive_salt(source_digest: str) -> bytes:
    """Return 32 bytes of salt that depend on nothing but the source."""
    return hashlib.sha256(f"salt\0{source_digest}".encode()).digest()


def build_image(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    filesystem: str = "erofs",
    compression: str | None = None,
    progress: Progress | None = None,
    cancel: Deadline | None = None,
) -> ImageResult:
    """Build a file system image from a directory.

    Raises:
        CallError: ``invalid``, a wrong argument or source; ``unsupported``, what the format cannot
            hold; ``resource``, the disk is full; ``denied``; ``conflict``, the source changed;
            ``cancelled``, ``timeout`` by ``cancel``.
    """
    if filesystem not in FILESYSTEMS:
        known = ", ".join(FILESYSTEMS)
        raise CallError("invalid", f"filesystem {filesystem!r} is none of {known}")
    if filesystem != "erofs" or compression is not None:
        raise CallError("unsupported", f"cannot make {filesystem} with {compression} compression")
    with _tree(source, cancel) as (root, source_digest):
        uuid = derive_uuid(source_digest, filesystem)
        image = ErofsImage(root)
        try:
            with new_file(output) as (fd, _):
                image.write(fd, uuid, progress=progress, cancel=cancel)
        except OSError as problem:
            raise from_os_error(problem, step="write", object=output) from problem
    return ImageResult(
        path=Path(output),
        filesystem=filesystem,
        compression=compression,
        size_bytes=image.size_bytes,
        inode_count=image.inode_count,
        source_digest=source_digest,
        uuid=uuid,
    )


@contextlib.contextmanager
def _tree(source: str | os.PathLike[str], cancel: Deadline | None) -> Iterator[tuple[Node, str]]:
    with DirectorySource(source) as directory:
        root = directory.read_tree(cancel=cancel)
        yield root, "sha256:" + digest_tree(root, cancel=cancel).hex()
