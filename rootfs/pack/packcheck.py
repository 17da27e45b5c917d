"""Checking a pack: that manifest and file fit, and that layers and images are what they should."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from guestagent.storage.filesystems import check_size
from guestagent.storage.verity import SUPERBLOCK_BYTES, VerityParameters, check_root
from rootfs.image.tree import CHUNK_BYTES, Progress
from rootfs.imagefile.ranges import FileRange, free_ranges
from rootfs.pack.manifest import Manifest, ManifestLayer
from rootfs.pack.merging import check_image, check_padding
from rootfs.verity.treecompare import compare_tree
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("Finding", "PackReport", "check_pack", "digest_range")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something wrong with a layer or an image, whose id is ``layer_id``; None: with the pack."""

    layer_id: str | None
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What a check found. ``unchecked`` names layers with neither hash tree nor digest.

    ``unclaimed_bytes`` are behind what the manifest knows: left by an addition that did not end.
    """

    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...]
    used_bytes: int
    free_bytes: int
    largest_free_bytes: int
    allocated_bytes: int
    unclaimed_bytes: int

    @property
    def is_sound(self) -> bool:
        return not self.findings


def check_pack(
    fd: int,
    path: str,
    manifest: Manifest,
    *,
    progress: Progress | None = None,
    cancel: Deadline | None = None,
) -> PackReport:
    """Read all layers and images of the pack ``fd`` (borrowed), whose name is ``path``, and compare
    them with the manifest, which is valid already.

    Raises:
        CallError: ``cancelled``, ``timeout`` by ``cancel``.
        OSError: as read(2).
    """
    facts = os.fstat(fd)
    findings = []
    if facts.st_size < manifest.size_bytes:
        findings.append(
            Finding(
                layer_id=None,
                problem=f"the image has {facts.st_size} bytes, its manifest says "
                f"{manifest.size_bytes}: it is cut short",
            )
        )
    total = sum(layer.size_bytes for layer in manifest.layers)
    done = 0
    for layer in manifest.layers:
        problem = _problem_of(functools.partial(_check_layer, fd, layer, cancel))
        if problem is not None:
            findings.append(Finding(layer_id=layer.layer_id, problem=problem))
        done += layer.size_bytes
        if progress is not None:
            progress(done, total)
    for image in manifest.images:
        problem = _problem_of(functools.partial(check_image, fd, path, manifest, image, cancel))
        if problem is not None:
            findings.append(Finding(layer_id=image.image_id, problem=problem))
    free = free_ranges(manifest.used_ranges, manifest.size_bytes)
    return PackReport(
        findings=tuple(findings),
        unchecked=tuple(
            layer.layer_id
            for layer in manifest.layers
            if layer.verity is None and layer.content_digest is None
        ),
        used_bytes=sum(used.size_bytes for used in manifest.used_ranges),
        free_bytes=sum(gap.size_bytes for gap in free),
        largest_free_bytes=max((gap.size_bytes for gap in free), default=0),
        allocated_bytes=facts.st_blocks * 512,
        unclaimed_bytes=max(0, facts.st_size - manifest.size_bytes),
    )


def _problem_of(check: Callable[[], None]) -> str | None:
    try:
        check()
    except CallError as problem:
        if problem.code in ("cancelled", "timeout"):
            raise
        return problem.message
    return None


def _check_layer(fd: int, layer: ManifestLayer, cancel: Deadline | None) -> None:
    if layer.content_digest is not None:
        found = digest_range(fd, layer.range, cancel=cancel)
        if found != layer.content_digest:
            raise _wrong(layer, f"its bytes hash to {found}, not {layer.content_digest}")
    if layer.verity is not None:
        _check_tree(fd, layer, cancel)
        if layer.verity.superblock:
            _check_superblock(fd, layer, layer.verity)
        check_padding(fd, layer)
    _check_filesystem(fd, layer)


def _wrong(layer: ManifestLayer, problem: str) -> CallError:
    return CallError("integrity", problem, step="check a layer", object=layer.layer_id)


def _check_tree(fd: int, layer: ManifestLayer, cancel: Deadline | None) -> None:
    """Hash every block of the layer, on all cores, and compare with its tree.

    Raises:
        CallError: ``integrity``.
    """
    assert layer.verity is not None
    base = layer.offset_bytes

    def read_at(offset_bytes: int, size_bytes: int) -> bytes:
        return os.pread(fd, size_bytes, base + offset_bytes)

    check_root(layer.verity, read_at)
    mismatches = compare_tree(
        layer.verity,
        fd,
        fd,
        base_offset_bytes=base,
        deadline=cancel or Deadline(),
    )
    for number, differing in enumerate(mismatches):
        if differing:
            what = "data" if number == 0 else f"tree level {number - 1}"
            raise _wrong(
                layer,
                f"its {what} does not match its hash tree: {sum(differing[1::2])} blocks, "
                f"first {min(differing[::2])}",
            )


def _check_superblock(fd: int, layer: ManifestLayer, verity: VerityParameters) -> None:
    """See that the superblock says what the manifest says, as the guest does.

    Raises:
        CallError: ``integrity``; ``object`` is the field.
    """
    VerityParameters.from_request(
        verity,
        hash_offset_bytes=verity.hash_offset_bytes,
        superblock=os.pread(fd, SUPERBLOCK_BYTES, layer.offset_bytes + verity.hash_offset_bytes),
    )


def _check_filesystem(fd: int, layer: ManifestLayer) -> None:
    """See that the file system is what the manifest says and fits, as the guest does.

    Raises:
        CallError: ``mount``.
    """
    size_bytes = layer.size_bytes if layer.verity is None else layer.verity.data_size_bytes

    def read_at(offset_bytes: int, length_bytes: int) -> bytes:
        wanted = min(length_bytes, max(0, size_bytes - offset_bytes))
        return os.pread(fd, wanted, layer.offset_bytes + offset_bytes).ljust(length_bytes, b"\0")

    check_size(layer.filesystem, read_at, size_bytes)


def digest_range(
    fd: int, extent: FileRange, *, padding_bytes: int = 0, cancel: Deadline | None = None
) -> str:
    """Return ``sha256:HEX`` of a range of a file with ``padding_bytes`` zeros after it.

    Raises:
        CallError: ``integrity``, the file ends before the range does; by ``cancel``.
    """
    digest = hashlib.sha256()
    for piece in _pieces(fd, extent):
        if cancel is not None:
            cancel.check("hash a layer")
        digest.update(piece)
    digest.update(bytes(padding_bytes))
    return "sha256:" + digest.hexdigest()


def _pieces(fd: int, extent: FileRange) -> Iterator[bytes]:
    at = extent.offset_bytes
    while at < extent.end_bytes:
        piece = os.pread(fd, min(CHUNK_BYTES, extent.end_bytes - at), at)
        if not piece:
            raise CallError(
                "integrity",
                f"cannot hash a layer: the file ends at {at}, the layer at {extent.end_bytes}",
                step="hash a layer",
            )
        yield piece
        at += len(piece)
