"""Images from sources: the front door of the image tools.

The same source gives the same bytes: the UUIDs of the file system and of a hash tree over it derive
from the source's digest, and the salt of the hash tree is one for all layers. Nothing is seen under
a final name before it is whole.
"""

import contextlib
import gc
import hashlib
import os
import sys
import uuid as uuid_module
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Unpack

from guestagent.storage.verity import VerityParameters, VerityTerms
from rootfs.image import mkfs
from rootfs.image.erofs import ErofsImage
from rootfs.image.ext4 import Ext4Image
from rootfs.image.source import Source, SourceChoices, SourceLayer, SourceOptions, open_source
from rootfs.image.spool import DEFAULT_MAX_BYTES
from rootfs.image.tree import Node, Progress, TreeDigest, whiteout_kind
from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.output import check_output, new_file
from rootfs.imagefile.ranges import round_up
from rootfs.imagefile.vhd import append_footer
from rootfs.verity import formatter
from rootfs.verity.formatter import LAYER_SALT, format_image
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = (
    "FILESYSTEMS",
    "BuildOptions",
    "ImageResult",
    "build_image",
    "build_layers",
    "collector_paused",
    "derive_uuid",
)

FILESYSTEMS = ("erofs", "squashfs", "ext4")
#: Images are whole blocks of a hash tree and whole pages.
_BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """A finished image. ``size_bytes`` is of the whole file, hash area and footer included.

    ``source_digest`` is ``sha256:HEX``: of the uncompressed tar (a layer's diff_id), of the tree a
    directory holds (``rootfs.image.tree.digest_tree``), or the ChainID of the layers that were
    merged. ``whiteouts`` is the form of its whiteouts (``whiteout_kind`` of rootfs.image.tree).
    """

    path: Path
    filesystem: str
    compression: str | None
    size_bytes: int
    inode_count: int
    source_digest: str
    uuid: uuid_module.UUID
    whiteouts: str
    verity: VerityParameters | None = None

    @property
    def verity_salt(self) -> bytes:
        """The salt to format a hash tree with, so that it is reproducible; 32 bytes."""
        return LAYER_SALT

    @property
    def verity_uuid(self) -> uuid_module.UUID:
        """The UUID for the superblock of that hash tree."""
        return formatter.derive_uuid(bytes.fromhex(self.source_digest.removeprefix("sha256:")))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """What to make of a tree. ``inline_tails`` is of EROFS: False lets every file be mapped."""

    filesystem: str = "erofs"
    compression: str | None = None
    inline_tails: bool = True
    verity: bool = False
    vhd_footer: bool = False
    max_bytes: int = DEFAULT_MAX_BYTES
    progress: Progress | None = None
    cancel: Deadline | None = None

    def __post_init__(self) -> None:
        if self.filesystem not in FILESYSTEMS:
            known = ", ".join(FILESYSTEMS)
            raise CallError(
                "invalid",
                f"cannot build the image: filesystem {self.filesystem!r} is none of {known}",
                step="build the image",
                object="filesystem",
            )
        mkfs.check_compression(self.filesystem, self.compression)

    def uuid(self, source_digest: str) -> uuid_module.UUID:
        return derive_uuid(source_digest, self.filesystem)


def derive_uuid(source_digest: str, purpose: str) -> uuid_module.UUID:
    """Return a UUID (version 8, RFC 9562) that depends on nothing but the arguments."""
    raw = bytearray(hashlib.sha256(f"uuid\0{purpose}\0{source_digest}".encode()).digest()[:16])
    raw[6] = raw[6] & 0x0F | 0x80
    raw[8] = raw[8] & 0x3F | 0x80
    return uuid_module.UUID(bytes=bytes(raw))


class BuildOptions(SourceChoices, total=False):
    """What a caller of ``build_image`` and ``build_layers`` may choose, beside the source.

    filesystem: one of ``FILESYSTEMS``; erofs unless said otherwise.
    compression: as the file system has it (``lz4hc``, ``zstd``...); None is uncompressed.
    inline_tails: False starts every file of an EROFS image at a block (for DAX).
    verity: put a dm-verity hash area behind it, with a UUID from the source's digest.
    vhd_footer: end the file as a fixed VHD; with ext4 and ``verity`` it is a layer of hcsshim.
    """

    filesystem: str
    compression: str | None
    inline_tails: bool
    verity: bool
    vhd_footer: bool


def build_image(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    **options: Unpack[BuildOptions],
) -> ImageResult:
    """Build one file system image from a directory, a tar or a container image.

    ``source`` is a path, or ``-`` for a tar on the standard input. A container image of several
    layers becomes one image of them all; see ``build_layers`` for the other way.

    Raises:
        CallError: ``invalid``, a wrong argument or source; ``integrity``, a damaged source;
            ``unsupported``, what the format cannot hold; ``resource``, a full disk or a limit;
            ``denied``; ``conflict``, the source changed; ``cancelled``, ``timeout`` by ``cancel``.
    """
    recipe = _Recipe(**_chosen(options, _Recipe))
    check_output(output, inputs=_inputs(source))
    with (
        collector_paused(),
        _opened(source, Path(output).parent, options) as opened,
        opened.tree() as layer,
    ):
        return _write(layer, output, recipe, _inputs(source))


def _opened(
    source: str | os.PathLike[str], spool_directory: Path, options: BuildOptions
) -> contextlib.AbstractContextManager[Source]:
    chosen = _chosen(options, SourceOptions)
    return open_source(source, SourceOptions(spool_directory=spool_directory, **chosen))


def _inputs(source: str | os.PathLike[str]) -> tuple[str | os.PathLike[str] | int, ...]:
    return (sys.stdin.fileno() if os.fspath(source) == "-" else source,)


def build_layers(
    source: str | os.PathLike[str],
    output_directory: str | os.PathLike[str],
    **options: Unpack[BuildOptions],
) -> tuple[ImageResult, ...]:
    """Build one image for each layer of a container image, the lowest first.

    The images are ``HEX.FILESYSTEM`` in ``output_directory``, HEX being the layer's diff_id. A
    layer that comes more than once is built once, for its highest place. After an error the images
    of earlier layers are there, each whole.

    Raises:
        CallError: as ``build_image``.
    """
    recipe = _Recipe(**_chosen(options, _Recipe))
    directory = Path(output_directory)
    results = []
    with collector_paused(), _opened(source, directory, options) as opened:
        for each in opened.layers():
            layer = each.digested(progress=recipe.progress, cancel=recipe.cancel)
            assert layer.digest is not None
            name = f"{layer.digest.removeprefix('sha256:')}.{recipe.filesystem}"
            results.append(_write(layer, directory / name, recipe, _inputs(source)))
    return tuple(results)


def _chosen(options: BuildOptions, kind: type[_Recipe | SourceOptions]) -> dict[str, Any]:
    """Return those of the options that are fields of ``kind``."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in options.items() if name in names}


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """A tree of many inodes is all alive until the end; looking for garbage in it, again and again
    as it grows, costs an eighth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _write(
    layer: SourceLayer,
    output: str | os.PathLike[str],
    recipe: _Recipe,
    inputs: tuple[str | os.PathLike[str] | int, ...],
) -> ImageResult:
    with OsErrors("write", output), new_file(output, inputs=inputs) as (fd, temporary):
        result = _make_filesystem(layer, fd, temporary, recipe)
        parameters = _add_hash_area(temporary, result, recipe) if recipe.verity else None
        if recipe.vhd_footer:
            with temporary.open("r+b") as image:
                append_footer(image.fileno(), derive_uuid(result.source_digest, "vhd"))
        size_bytes = temporary.stat().st_size
    return replace(result, path=Path(output), size_bytes=size_bytes, verity=parameters)


def _make_filesystem(layer: SourceLayer, fd: int, path: Path, recipe: _Recipe) -> ImageResult:
    """Write the file system to ``fd``, which is ``path``."""
    if recipe.filesystem == "erofs" and recipe.compression is None:
        return _make_erofs(layer, fd, path, recipe)
    layer = layer.digested(progress=recipe.progress, cancel=recipe.cancel)
    assert layer.digest is not None
    if recipe.filesystem == "ext4":
        image = Ext4Image(layer.root, recipe.uuid(layer.digest))
        image.write(fd, progress=recipe.progress, cancel=recipe.cancel)
        return _result(path, recipe, layer.root, layer.digest, image.inode_count)
    inodes = mkfs.make_image(
        layer.root,
        path,
        filesystem=recipe.filesystem,
        compression=recipe.compression,
        uuid=recipe.uuid(layer.digest),
        max_hole_bytes=recipe.max_bytes,
        cancel=recipe.cancel,
    )
    size_bytes = path.stat().st_size
    os.truncate(path, round_up(size_bytes, _BLOCK_BYTES))
    return _result(path, recipe, layer.root, layer.digest, inodes)


def _make_erofs(layer: SourceLayer, fd: int, path: Path, recipe: _Recipe) -> ImageResult:
    image = ErofsImage(layer.root, inline_tails=recipe.inline_tails)
    digest = TreeDigest()  # taken of what has none yet

    def source_digest() -> str:
        return layer.digest or "sha256:" + digest.digest().hex()

    image.write(
        fd,
        lambda: recipe.uuid(source_digest()),
        digest=None if layer.digest else digest,
        progress=recipe.progress,
        cancel=recipe.cancel,
    )
    return _result(path, recipe, layer.root, source_digest(), image.inode_count)


def _result(
    path: Path, recipe: _Recipe, root: Node, source_digest: str, inodes: int
) -> ImageResult:
    return ImageResult(
        path=path,
        filesystem=recipe.filesystem,
        compression=recipe.compression,
        size_bytes=0,
        inode_count=inodes,
        source_digest=source_digest,
        uuid=recipe.uuid(source_digest),
        whiteouts=whiteout_kind(root),
    )


def _add_hash_area(path: Path, result: ImageResult, recipe: _Recipe) -> VerityParameters:
    # told, not found: the last file of the tree may be a formatted image
    data_blocks = path.stat().st_size // _BLOCK_BYTES
    return format_image(
        path,
        terms=VerityTerms(salt=result.verity_salt, data_blocks=data_blocks),
        uuid=result.verity_uuid,
        progress=recipe.progress,
        deadline=recipe.cancel,
    ).parameters
