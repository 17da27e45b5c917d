"""Many layers in one raw image, for a VPMem, NVDIMM or disk device of a virtual machine.

A layer (a file system image with its hash tree behind it) lies at an aligned offset; freed ranges
are used again, first fit. Between the data of a verified layer and its hash area are zeros (a hole)
up to whole 512 KiB, so that the data can be a part of an image as they lie there. The file is a
whole number of 2 MiB. The manifest beside it says what lies where, and is only ever replaced whole:
a process that dies leaves, at worst, bytes in a range that no layer claims.

A shared flock(2) on the image is held while it is attached to a machine, an exclusive lock while it
is changed; no lock is waited for.
"""

import contextlib
import dataclasses
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from guestagent.storage.verity import (
    PART_STEP_BYTES,
    SUPERBLOCK_BYTES,
    FieldError,
    VerityParameters,
    check_tree_spines,
)
from rootfs.image.images import BuildOptions, build_layers
from rootfs.image.tree import Progress, work_off
from rootfs.imagefile.attached import refuse_attached
from rootfs.imagefile.errors import OsErrors, from_os_error
from rootfs.imagefile.imagelock import open_locked
from rootfs.imagefile.output import check_output, new_file, sync_directory
from rootfs.imagefile.ranges import (
    FileRange,
    copy_range,
    data_extents,
    first_fit,
    punch_hole,
    round_up,
)
from rootfs.pack.manifest import IMAGE_STEP_BYTES, Manifest, ManifestImage, ManifestLayer
from rootfs.pack.merging import ImageTree, check_mergeable, merged_metadata
from rootfs.pack.mounting import check_whiteouts
from rootfs.pack.packcheck import PackReport, check_pack, digest_range
from vsock.closeable import Closeable
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = (
    "DAX_ALIGNMENT_BYTES",
    "PAGE_ALIGNMENT_BYTES",
    "Pack",
    "build_pack",
    "manifest_path_of",
    "new_pack",
)

#: Enough to map a layer; what dm-linear and dm-verity need.
PAGE_ALIGNMENT_BYTES = 4096
#: Lets the guest map a layer with huge pages.
DAX_ALIGNMENT_BYTES = 2 << 20
#: Of the diff_id of a layer: its id in a pack of a container image.
_ID_DIGITS = 16


def manifest_path_of(image: str | os.PathLike[str]) -> Path:
    """Return where the manifest of an image is by custom: IMAGE.json."""
    return Path(os.fspath(image) + ".json")


class Pack(Closeable):
    """An open pack, locked until ``close``. Use as a context manager.

    Not for several threads at once.
    """

    def __init__(self, fd: int, manifest_path: Path, manifest: Manifest, *, writable: bool) -> None:
        """Take over ``fd`` (consumed); ``create`` and ``open`` are the ways to get a pack."""
        self._fd = fd
        self._manifest_path = manifest_path
        self._manifest = manifest
        self._writable = writable

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        manifest_path: str | os.PathLike[str] | None = None,
        alignment_bytes: int = PAGE_ALIGNMENT_BYTES,
    ) -> "Pack":
        """Make an empty pack and open it for writing.

        Raises:
            CallError: ``conflict``, one of the files exists; ``invalid``, an argument; by errno.
        """
        image, beside = Path(path), _beside(path, manifest_path)
        try:
            manifest = Manifest(image=image.name, size_bytes=0, alignment_bytes=alignment_bytes)
        except FieldError as problem:
            raise _invalid("create a pack", image, str(problem)) from None
        check_output(beside, replace=False)
        with new_file(image, replace=False):
            pass
        fd = open_locked(image, writable=True)
        pack = cls(fd, beside, manifest, writable=True)
        try:
            manifest.save(beside, replace=False)
        except BaseException:
            pack.close()
            image.unlink()
            raise
        return pack

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        manifest_path: str | os.PathLike[str] | None = None,
        *,
        writable: bool = False,
    ) -> "Pack":
        """Open the pack whose image is ``path``.

        Raises:
            CallError: ``busy``, someone holds it in a way that excludes this; ``invalid`` or
                ``unsupported``, its manifest; by errno.
        """
        image, beside = Path(path), _beside(path, manifest_path)
        fd = open_locked(image, writable=writable)
        try:
            if writable:
                refuse_attached(fd, str(image))
                check_output(beside)
            manifest = Manifest.load(beside)
            if manifest.image != image.name:
                raise _invalid("open the pack", beside, f"it is the manifest of {manifest.image!r}")
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, beside, manifest, writable=writable)

    def close(self) -> None:
        """Give up the lock. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def layers(self) -> tuple[ManifestLayer, ...]:
        """The layers, topmost first."""
        return self._manifest.layers

    @property
    def path(self) -> Path:
        return self._manifest_path.with_name(self._manifest.image)

    def add(
        self,
        layer_image: str | os.PathLike[str],
        layer_id: str,
        *,
        filesystem: str = "erofs",
        verity: VerityParameters | None = None,
        source_digest: str | None = None,
        whiteouts: str | None = None,
        position: int = 0,
        progress: Progress | None = None,
        cancel: Deadline | None = None,
    ) -> ManifestLayer:
        """Copy a layer into the image; ``position`` counts from the top of the overlay.

        With ``verity`` the layer's tree must be in the file, at ``verity.hash_offset_bytes``; in
        the pack it is at that of the result. ``whiteouts`` is that of the ``ImageResult``.

        Raises:
            CallError: ``conflict``, the id is taken, or the layer is being changed; ``invalid``, an
                argument; ``integrity``, the tree does not match; ``resource``, the disk is full; by
                errno.
        """
        self._require_writable("add to the pack")
        self._refuse_taken(layer_id, "add to the pack")
        source = _open_layer(layer_image)
        try:
            file_bytes = os.fstat(source).st_size
            layer = self._describe(
                source, file_bytes, layer_id, filesystem, verity, source_digest, whiteouts
            )
            if os.fstat(source).st_size != file_bytes:
                # what is copied must be what was described
                raise CallError(
                    "conflict",
                    f"cannot copy layer {layer_id!r}: its size changed while it was read",
                    step="copy the layer",
                    object=layer_id,
                )
            with self._growing(layer.range):
                self._copy_in(source, file_bytes, layer, verity, progress, cancel)
        except OSError as problem:
            raise from_os_error(problem, step="copy the layer", object=layer_image) from problem
        finally:
            os.close(source)
        layers = list(self._manifest.layers)
        layers.insert(position, layer)
        self._commit(layers=tuple(layers), size_bytes=self._size_with(layer.range))
        return layer

    def _refuse_taken(self, name: str, step: str) -> None:
        if self._manifest.find(name) is not None or self._manifest.find_image(name) is not None:
            raise CallError(
                "conflict",
                f"cannot {step}: the pack {str(self.path)!r} has {name!r} already",
                step=step,
                object=name,
            )

    def _describe(
        self,
        source: int,
        file_bytes: int,
        layer_id: str,
        filesystem: str,
        verity: VerityParameters | None,
        source_digest: str | None,
        whiteouts: str | None,
    ) -> ManifestLayer:
        if not file_bytes:
            raise _invalid("add to the pack", layer_id, "the layer is empty")
        content_digest = None
        if verity is None:
            size_bytes = round_up(file_bytes, PAGE_ALIGNMENT_BYTES)
            content_digest = digest_range(
                source,
                FileRange(offset_bytes=0, size_bytes=file_bytes),
                padding_bytes=size_bytes - file_bytes,
            )
        else:
            check_tree_spines(verity, lambda at, size: os.pread(source, size, at))
            padded_bytes = round_up(verity.data_size_bytes, PART_STEP_BYTES)
            verity = verity.replace(hash_offset_bytes=padded_bytes)
            size_bytes = round_up(max(padded_bytes, verity.end_bytes), PAGE_ALIGNMENT_BYTES)
        try:
            return ManifestLayer(
                layer_id=layer_id,
                offset_bytes=self._place_for(size_bytes),
                size_bytes=size_bytes,
                filesystem=filesystem,
                verity=verity,
                source_digest=source_digest,
                content_digest=content_digest,
                whiteouts=whiteouts,
            )
        except FieldError as problem:
            raise _invalid("add to the pack", layer_id, str(problem)) from None

    def merge(
        self,
        image_id: str,
        layer_ids: Sequence[str],
        *,
        progress: Progress | None = None,
        cancel: Deadline | None = None,
    ) -> ManifestImage:
        """Merge layers of the pack, topmost first, into an image; only its metadata and its hash
        tree are added to the file.

        What is read of the layers is compared with their hash trees, and these with their root
        digests.

        Raises:
            CallError: ``conflict``, the id is taken; ``not_found``, no such layer; ``invalid`` or
                ``unsupported``, layers that cannot be merged; ``integrity``, a layer changed since
                it was added; ``resource``, the disk is full; by errno. ``object`` is the layer.
        """
        self._require_writable("merge an image")
        self._refuse_taken(image_id, "merge an image")
        layers = tuple(self._layer(layer_id, "merge an image") for layer_id in layer_ids)
        check_mergeable(layers)
        check_whiteouts(layers, userxattr=False)
        with (
            OsErrors("merge an image", self.path),
            merged_metadata(self._fd, self.path, layers, progress, cancel) as metadata_fd,
        ):
            image = self._append_image(image_id, layers, metadata_fd, cancel)
        size_bytes = max(self._size_with(extent) for extent in image.own_ranges)
        self._commit(images=(*self._manifest.images, image), size_bytes=size_bytes)
        return image

    def _append_image(
        self,
        image_id: str,
        layers: tuple[ManifestLayer, ...],
        metadata_fd: int,
        cancel: Deadline | None,
    ) -> ManifestImage:
        """Write the metadata and, behind them, the hash area."""
        file_bytes = os.fstat(metadata_fd).st_size
        size_bytes = round_up(file_bytes, PART_STEP_BYTES)
        metadata = FileRange(offset_bytes=0, size_bytes=size_bytes)
        hash_area_bytes = ImageTree(self._fd, metadata, layers).hash_area_bytes
        offset_bytes = self._place_for(size_bytes + hash_area_bytes)
        metadata = FileRange(offset_bytes=offset_bytes, size_bytes=size_bytes)
        hash_area = FileRange(offset_bytes=metadata.end_bytes, size_bytes=hash_area_bytes)
        with self._growing(
            FileRange(offset_bytes=offset_bytes, size_bytes=size_bytes + hash_area_bytes)
        ):
            for extent in data_extents(metadata_fd, file_bytes):
                place = offset_bytes + extent.offset_bytes
                for _ in copy_range(metadata_fd, extent, self._fd, place):
                    pass
            tree = ImageTree(self._fd, metadata, layers)
            verity = tree.write(self._fd, hash_area.offset_bytes, cancel)
        parts = [layer.part_range for layer in layers if layer.part_range is not None]
        try:
            return ManifestImage(
                image_id=image_id,
                layers=tuple(layer.layer_id for layer in layers),
                ranges=(metadata, *parts, hash_area),
                verity=verity,
            )
        except FieldError as problem:
            raise _invalid("merge an image", image_id, str(problem)) from None

    def _layer(self, layer_id: str, step: str) -> ManifestLayer:
        layer = self._manifest.find(layer_id)
        if layer is None:
            raise CallError(
                "not_found",
                f"cannot {step}: the pack {str(self.path)!r} has no layer {layer_id!r}",
                step=step,
                object=layer_id,
            )
        return layer

    def _place_for(self, size_bytes: int) -> int:
        manifest = self._manifest
        return first_fit(manifest.used_ranges, size_bytes, manifest.alignment_bytes)

    def _size_with(self, extent: FileRange) -> int:
        """Return how large the pack is when it holds ``extent`` too."""
        return max(self._manifest.size_bytes, round_up(extent.end_bytes, IMAGE_STEP_BYTES))

    @contextlib.contextmanager
    def _growing(self, extent: FileRange) -> Iterator[None]:
        """Make ``extent`` a range of zeros to write to, before the manifest tells of it.

        At the end the disk has what was written; on failure the range is zeros again, and the file
        has its old size.
        """
        old_bytes = os.fstat(self._fd).st_size
        try:
            os.ftruncate(self._fd, max(old_bytes, self._size_with(extent)))
            punch_hole(self._fd, extent)
            yield
            os.fsync(self._fd)
        except BaseException:
            os.ftruncate(self._fd, old_bytes)
            punch_hole(self._fd, extent)
            raise

    def _copy_in(
        self,
        source: int,
        file_bytes: int,
        layer: ManifestLayer,
        verity: VerityParameters | None,
        progress: Progress | None,
        cancel: Deadline | None,
    ) -> None:
        """Copy the layer, and its hash area from where ``verity`` says to where ``layer`` says."""
        pieces = [
            (extent, extent.offset_bytes)
            for extent in data_extents(
                source, file_bytes if verity is None else verity.data_size_bytes
            )
        ]
        if verity is not None:
            assert layer.verity is not None
            pieces += _hash_area_pieces(verity, layer.verity)
        copied = (
            count
            for extent, place in pieces
            for count in copy_range(source, extent, self._fd, layer.offset_bytes + place)
        )
        total_bytes = sum(extent.size_bytes for extent, _ in pieces)
        work_off(copied, total_bytes, "copy the layer", progress, cancel)

    def remove(self, name: str, *, trim: bool = False) -> ManifestLayer | ManifestImage:
        """Take a layer or an image out and free what only it has; ``trim`` also cuts free space off
        the end of the file.

        Raises:
            CallError: ``not_found``; ``conflict``, an image needs the layer; by errno.
        """
        self._require_writable("remove from the pack")
        manifest = self._manifest
        removed = manifest.find(name) or manifest.find_image(name)
        if removed is None:
            raise CallError(
                "not_found",
                f"cannot remove {name!r}: the pack {str(self.path)!r} has neither a layer nor an "
                "image of that id",
                step="remove from the pack",
                object=name,
            )
        needing = [image.image_id for image in manifest.images if name in image.layers]
        if needing:
            raise CallError(
                "conflict",
                f"cannot remove layer {name!r}: image {needing[0]!r} needs it",
                step="remove from the pack",
                object=name,
                hint="remove the image first",
            )
        rest = dataclasses.replace(
            manifest,
            layers=tuple(layer for layer in manifest.layers if layer is not removed),
            images=tuple(image for image in manifest.images if image is not removed),
        )
        size_bytes = manifest.size_bytes
        if trim:
            ends = (round_up(used.end_bytes, IMAGE_STEP_BYTES) for used in rest.used_ranges)
            size_bytes = max(ends, default=0)
        self._commit(layers=rest.layers, images=rest.images, size_bytes=size_bytes)
        freed = (removed.range,) if isinstance(removed, ManifestLayer) else removed.own_ranges
        with OsErrors("free the range of", name):
            for extent in freed:
                punch_hole(self._fd, extent)
            if trim:
                os.ftruncate(self._fd, size_bytes)
            os.fsync(self._fd)
        return removed

    def sign(self, signatures: Mapping[str, bytes]) -> None:
        """Put signatures of root digests into the manifest, by the ids of layers and images; what
        is not named has none afterwards.

        Raises:
            CallError: ``invalid``, a layer is not verified, or a signature is empty or too long;
                ``not_found``, no such layer or image; by errno.
        """
        step = "sign the pack"
        self._require_writable(step)
        manifest = self._manifest
        for name in signatures:
            if manifest.find_image(name) is None:
                self._layer(name, step)
        try:
            layers = tuple(
                dataclasses.replace(layer, signature=signatures.get(layer.layer_id))
                for layer in manifest.layers
            )
            images = tuple(
                dataclasses.replace(image, signature=signatures.get(image.image_id))
                for image in manifest.images
            )
        except FieldError as problem:
            raise _invalid(step, self.path, str(problem)) from None
        self._commit(layers=layers, images=images, size_bytes=manifest.size_bytes)

    def check(
        self, *, progress: Progress | None = None, cancel: Deadline | None = None
    ) -> PackReport:
        """Read all layers and images and compare them with the manifest.

        Raises:
            CallError: by errno; ``cancelled``, ``timeout`` by ``cancel``. What is wrong with the
                pack is in the report.
        """
        with OsErrors("check the pack", self.path):
            return check_pack(
                self._fd, str(self.path), self._manifest, progress=progress, cancel=cancel
            )

    def _commit(
        self,
        *,
        size_bytes: int,
        layers: tuple[ManifestLayer, ...] | None = None,
        images: tuple[ManifestImage, ...] | None = None,
    ) -> None:
        manifest = dataclasses.replace(
            self._manifest,
            size_bytes=size_bytes,
            layers=self._manifest.layers if layers is None else layers,
            images=self._manifest.images if images is None else images,
        )
        manifest.save(self._manifest_path)
        self._manifest = manifest

    def _require_writable(self, step: str) -> None:
        if self._fd < 0 or not self._writable:
            state = "closed" if self._fd < 0 else "open for reading only"
            raise CallError("invalid", f"cannot {step}: it is {state}", step=step)


@contextlib.contextmanager
def new_pack(
    path: str | os.PathLike[str], *, alignment_bytes: int = PAGE_ALIGNMENT_BYTES
) -> Iterator[Pack]:
    """Make a pack and fill it in a ``with`` block; it takes its name when that ends without error.

    Killed meanwhile, the process leaves a directory ``.pack-XXXX`` beside the name.

    Raises:
        CallError: as ``Pack.create``.
    """
    image, manifest = Path(path), manifest_path_of(path)
    for output in (image, manifest):
        check_output(output, replace=False)
    with OsErrors("create a directory in", image.parent):
        holder = tempfile.TemporaryDirectory(prefix=".pack-", dir=image.parent)
    with holder as directory:
        made = Path(directory, image.name)
        with Pack.create(made, alignment_bytes=alignment_bytes) as pack:
            yield pack
        with OsErrors("create", image):
            # the manifest last: without it the image is no pack
            os.link(made, image)
            try:
                os.link(manifest_path_of(made), manifest)
            except BaseException:
                image.unlink()
                raise
            sync_directory(image.parent)


def build_pack(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    alignment_bytes: int = PAGE_ALIGNMENT_BYTES,
    **options: Unpack[BuildOptions],
) -> Manifest:
    """Make a pack of all layers of a container image, each under the start of its diff_id.

    Raises:
        CallError: as ``new_pack`` and ``build_layers``.
    """
    with (
        new_pack(path, alignment_bytes=alignment_bytes) as pack,
        tempfile.TemporaryDirectory(prefix="layers-", dir=pack.path.parent) as directory,
    ):
        for result in build_layers(source, directory, **options):
            pack.add(
                result.path,
                result.source_digest.removeprefix("sha256:")[:_ID_DIGITS],
                verity=result.verity,
                source_digest=result.source_digest,
                whiteouts=result.whiteouts,
                progress=options.get("progress"),
                cancel=options.get("cancel"),
            )
            result.path.unlink()
        return pack.manifest


def _beside(path: Path | str | os.PathLike[str], manifest: str | os.PathLike[str] | None) -> Path:
    """Return the manifest's path; it names its image by file name, so both share a directory."""
    image = Path(path)
    if manifest is None:
        return manifest_path_of(image)
    beside = Path(manifest)
    if beside.parent.resolve() != image.parent.resolve():
        raise _invalid("use the manifest", beside, f"it is not in the directory of {str(image)!r}")
    return beside


def _hash_area_pieces(
    source: VerityParameters, target: VerityParameters
) -> Iterator[tuple[FileRange, int]]:
    """Yield what to copy, and to where, so that the hash area ``source`` becomes ``target``."""
    if source.superblock:
        header = FileRange(offset_bytes=source.hash_offset_bytes, size_bytes=SUPERBLOCK_BYTES)
        yield header, target.hash_offset_bytes
    if source.levels:
        size_bytes = source.end_bytes - source.tree_offset_bytes
        tree = FileRange(offset_bytes=source.tree_offset_bytes, size_bytes=size_bytes)
        yield tree, target.tree_offset_bytes


def _open_layer(path: str | os.PathLike[str]) -> int:
    with OsErrors("open the layer", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _invalid("open the layer", path, "not a regular file")
    return fd


def _invalid(step: str, object: str | os.PathLike[str], why: str) -> CallError:
    name = os.fspath(object)
    return CallError("invalid", f"cannot {step} {name!r}: {why}", step=step, object=name)
