"""Images of a pack: layers merged into one file system, with one hash tree composed of theirs.

Merged metadata and the composed tree are all that an image adds to a pack; the data of a layer are
shared by every image that has the layer, and by the layer itself. What is mounted is put together
from ranges of the pack (``ManifestImage``).
"""

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from guestagent.storage.filesystems import check_size
from guestagent.storage.verity import SUPERBLOCK_BYTES, VerityParameters
from rootfs.image.erofs_merge import LayerFile, merge_layers
from rootfs.image.tree import Progress
from rootfs.imagefile.ranges import FileRange
from rootfs.pack.manifest import Manifest, ManifestImage, ManifestLayer
from rootfs.verity.compose import NewPart, Part, compose_tree, composed_parameters
from rootfs.verity.formatter import derive_uuid, tree_file
from rootfs.verity.verifiedread import VerifiedReader
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("ImageTree", "check_image", "check_mergeable", "check_padding", "merged_metadata")

_COMPARED_BYTES = 1 << 20


def check_mergeable(layers: Sequence[ManifestLayer]) -> None:
    """Refuse layers that cannot be merged as they lie in the pack.

    Raises:
        CallError: ``invalid``; ``object`` is the layer.
    """
    if not layers:
        raise CallError("invalid", "cannot merge an image of no layers", step="merge an image")
    seen: set[str] = set()
    for layer in layers:
        if layer.layer_id in seen:
            raise _unfit(layer, "it is named twice")
        seen.add(layer.layer_id)
        if layer.filesystem != "erofs":
            raise _unfit(layer, f"it is {layer.filesystem}, not erofs")
        if layer.verity is None:
            raise _unfit(layer, "it has no hash tree")
        if layer.part_range is None:
            raise _unfit(layer, "its hash area lies where an earlier version put it; add it again")


def check_padding(fd: int, layer: ManifestLayer) -> None:
    """See that zeros are between the data of a layer and where it ends as a part of an image.

    Raises:
        CallError: ``integrity``.
    """
    if layer.part_range is None:
        return
    assert layer.verity is not None  # of what has no hash tree no part is made
    start, end = layer.offset_bytes + layer.verity.data_size_bytes, layer.part_range.end_bytes
    found = os.pread(fd, end - start, start)  # less than 512 KiB
    if found.strip(b"\0"):
        raise CallError(
            "integrity",
            f"layer {layer.layer_id!r} has something else than zeros behind its data",
            step="check a layer",
            object=layer.layer_id,
        )


def _unfit(layer: ManifestLayer, problem: str) -> CallError:
    return CallError(
        "invalid",
        f"cannot merge layer {layer.layer_id!r}: {problem}",
        step="merge an image",
        object=layer.layer_id,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _VerifiedLayer(LayerFile):
    """A layer of a pack, of which nothing is read but what was hashed."""

    reader: VerifiedReader

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        return self.reader.read(offset_bytes, size_bytes)


@contextlib.contextmanager
def merged_metadata(
    fd: int,
    path: Path,
    layers: Sequence[ManifestLayer],
    progress: Progress | None,
    cancel: Deadline | None,
) -> Iterator[int]:
    """Merge layers of the pack ``fd``, topmost first, in a file beside its ``path``; yield that.

    Killed meanwhile, the process leaves a directory ``.merge-XXXX`` there.

    Raises:
        CallError: as ``merge_layers`` and ``check_padding``; ``integrity``, a layer is not what its
            hash tree says.
    """
    files = []
    for layer in layers:
        verity = layer.verity
        assert verity is not None
        check_padding(fd, layer)
        reader = VerifiedReader(
            fd, verity, base_offset_bytes=layer.offset_bytes, name=layer.layer_id
        )
        files.append(
            _VerifiedLayer(
                name=layer.layer_id,
                fd=fd,
                offset_bytes=layer.offset_bytes,
                size_bytes=verity.data_size_bytes,
                reader=reader,
            )
        )
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=path.parent) as directory:
        merged = merge_layers(files, Path(directory, "metadata"), progress=progress, cancel=cancel)
        with merged.path.open("rb") as file:
            yield file.fileno()


class ImageTree:
    """The hash tree over merged metadata, a range of the pack ``fd`` (borrowed), and the data of
    layers, topmost first as in the device table.

    Raises:
        CallError: ``invalid``, the trees of the layers cannot be composed; ``object`` is the layer.
    """

    def __init__(
        self,
        fd: int,
        metadata: FileRange,
        layers: Sequence[ManifestLayer],
        *,
        superblock: bool = True,
    ) -> None:
        self._parts: list[Part | NewPart] = [
            NewPart(fd=fd, offset_bytes=metadata.offset_bytes, padded_bytes=metadata.size_bytes)
        ]
        content = hashlib.sha256()
        for layer in layers:
            assert layer.verity is not None
            content.update(layer.verity.root_digest)
            self._parts.append(
                Part(
                    name=layer.layer_id,
                    fd=fd,
                    parameters=layer.verity,
                    base_offset_bytes=layer.offset_bytes,
                )
            )
        self._uuid = derive_uuid(content.digest())
        self.parameters = composed_parameters(self._parts, superblock=superblock)

    @property
    def hash_area_bytes(self) -> int:
        return self.parameters.end_bytes - self.parameters.hash_offset_bytes

    def write(self, fd: int, offset_bytes: int, deadline: Deadline | None) -> VerityParameters:
        """Write the hash area over the zeros at ``offset_bytes`` of ``fd``; return all parameters.

        Raises:
            CallError, OSError: as ``compose_tree``.
        """
        own = self.parameters
        tree_offset_bytes = offset_bytes + own.tree_offset_bytes - own.hash_offset_bytes
        root = compose_tree(self._parts, own, fd, tree_offset_bytes, deadline=deadline)
        if own.superblock:
            os.pwrite(fd, own.pack_superblock(self._uuid.bytes), offset_bytes)
        return own.replace(root_digest=root)


def check_image(
    fd: int, path: str, manifest: Manifest, image: ManifestImage, deadline: Deadline | None
) -> None:
    """See that the hash tree of an image is over its metadata and its layers, and say so what it
    should. The layers themselves are checked apart. ``path`` is that of the pack ``fd``.

    Raises:
        CallError: ``integrity``, or as ``ImageTree``: it is not.
        OSError: as read(2).
    """
    layers = manifest.layers_of(image)
    tree = ImageTree(fd, image.metadata_range, layers, superblock=image.verity.superblock)
    with tree_file(tree.hash_area_bytes, path) as made_fd:
        made = tree.write(made_fd, 0, deadline)
        if made != image.verity:
            raise _wrong(
                image,
                f"it has the root digest {made.root_digest.hex()}, the manifest says "
                f"{image.verity.root_digest.hex()}"
                if made.replace(root_digest=image.verity.root_digest) == image.verity
                else "the manifest has other parameters than the hash trees of its layers",
            )
        # what is before the tree is the superblock, whose UUID may be any
        skipped = made.tree_offset_bytes - made.hash_offset_bytes
        place = image.hash_range.offset_bytes
        for at in range(skipped, tree.hash_area_bytes, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, tree.hash_area_bytes - at)
            if os.pread(fd, count, place + at) != os.pread(made_fd, count, at):
                raise _wrong(image, "its hash tree differs from that of its layers")
    if made.superblock:
        VerityParameters.from_request(
            made,
            hash_offset_bytes=made.hash_offset_bytes,
            superblock=os.pread(fd, SUPERBLOCK_BYTES, place),
        )
    metadata = image.metadata_range

    def read_at(offset_bytes: int, size_bytes: int) -> bytes:
        wanted = min(size_bytes, max(0, metadata.size_bytes - offset_bytes))
        return os.pread(fd, wanted, metadata.offset_bytes + offset_bytes).ljust(size_bytes, b"\0")

    check_size("erofs", read_at, made.data_size_bytes)


def _wrong(image: ManifestImage, problem: str) -> CallError:
    return CallError("integrity", problem, step="check an image", object=image.image_id)
