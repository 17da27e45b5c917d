"""What an image can be made from: a directory, a tar, an OCI layout, a ``docker save`` archive.

A source that holds several layers can be read in two ways: all layers in one tree, or layer by
layer, each with its whiteouts in overlayfs form.
"""

import contextlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from rootfs.image import docker_archive, oci
from rootfs.image.directory import DirectorySource
from rootfs.image.filestore import AmbiguousError, ArchiveStore, DirectoryStore, FileStore
from rootfs.image.oci import LayerBlob
from rootfs.image.platform import default_platform
from rootfs.image.spool import DEFAULT_MAX_BYTES, Spool, spooled
from rootfs.image.tar import TarEntry, TarReader
from rootfs.image.tarlower import LowerLayers, LowerTree
from rootfs.image.tartree import TarTree, Whiteouts, overlay_names
from rootfs.image.tree import Node, Progress, digest_tree, without_xattrs
from rootfs.imagefile.errors import OsErrors
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("FORMATS", "Source", "SourceChoices", "SourceLayer", "SourceOptions", "open_source")

FORMATS = ("auto", "directory", "tar", "oci", "docker")


class SourceChoices(TypedDict, total=False):
    """What a caller may choose.

    source_format: one of ``FORMATS``; ``auto`` unless said otherwise.
    whiteouts: what markers in a tar become.
    platform: which image of an index, ``linux/amd64``; this machine's when there are several.
    reference: which image of a layout or archive, by its name there.
    max_bytes: what each stream of the source may grow to when it is decompressed, and what holes
        may grow to where a program is to read them.
    drop_xattrs: shell patterns of extended attributes that are left out.
    progress: called with bytes done and in all, from the start for each phase of the work.
    cancel: ends the work, by its time or from outside.
    """

    source_format: str
    whiteouts: Whiteouts
    platform: str | None
    reference: str | None
    max_bytes: int
    drop_xattrs: tuple[str, ...]
    progress: Progress | None
    cancel: Deadline | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """How to read a source: the choices, and ``spool_directory``, where streams go that are
    decompressed."""

    source_format: str = "auto"
    whiteouts: Whiteouts = Whiteouts.OVERLAY
    platform: str | None = None
    reference: str | None = None
    max_bytes: int = DEFAULT_MAX_BYTES
    drop_xattrs: tuple[str, ...] = ()
    spool_directory: str | os.PathLike[str] = field(default="")
    progress: Progress | None = None
    cancel: Deadline | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLayer:
    """One tree, readable until the next is asked for. ``digest`` (``sha256:HEX``) tells its
    content: of the uncompressed tar, or of the tree itself. None: not computed yet."""

    root: Node
    digest: str | None

    def digested(
        self, *, progress: Progress | None = None, cancel: Deadline | None = None
    ) -> "SourceLayer":
        """Return it with its digest, reading the tree if that is not known.

        Raises:
            CallError: as ``digest_tree``.
        """
        if self.digest is not None:
            return self
        found = digest_tree(self.root, progress=progress, cancel=cancel)
        return SourceLayer(root=self.root, digest="sha256:" + found.hex())


class Source:
    """An opened source; made by ``open_source``."""

    def __init__(
        self,
        options: SourceOptions,
        *,
        directory: DirectorySource | None = None,
        tar: tuple[Spool, list[TarEntry]] | None = None,
        store: FileStore | None = None,
        blobs: tuple[LayerBlob, ...] = (),
    ) -> None:
        self._options = options
        self._directory = directory
        self._tar = tar
        self._store = store
        self._blobs = blobs

    @property
    def is_layered(self) -> bool:
        return self._store is not None

    @contextlib.contextmanager
    def tree(self) -> Iterator[SourceLayer]:
        """Yield everything as one tree: layers one over the other, whiteouts applied.

        Raises:
            CallError: what the readers of the formats raise; ``integrity``, a digest differs.
        """
        if self._directory is not None:
            yield self._read_directory()
        elif self._tar is not None:
            yield self._read_tar()
        else:
            with contextlib.ExitStack() as stack:
                tree = TarTree(Whiteouts.APPLY)
                for blob in self._blobs:
                    spool = stack.enter_context(self._spool(blob))
                    members = self._members(spool)
                    tree.add_layer(
                        members, spool.fd, layer=blob.diff_id, cancel=self._options.cancel
                    )
                yield SourceLayer(root=tree.root, digest=_chain_digest(self._blobs))

    def layers(self) -> Iterator[SourceLayer]:
        """Yield the layers, the lowest first. A layer that comes several times is yielded once, at
        its highest place: an overlay takes no directory twice.

        Raises:
            CallError: as ``tree``.
        """
        if not self.is_layered:
            with self.tree() as only:
                yield only
            return
        merged = LowerTree()
        lower_layers = self._lower_layers()
        cancel = self._options.cancel
        last = {blob.diff_id: index for index, blob in enumerate(self._blobs)}
        # an overlay has each layer once: what a lower copy holds is below the layers between in the
        # image, and not in the overlay
        mounted = None if len(last) == len(self._blobs) else Node(stat.S_IFDIR | 0o755)
        for index, blob in enumerate(self._blobs):
            with self._spool(blob) as spool:
                members = list(self._members(spool))
                tree = TarTree(self._options.whiteouts, below=merged.root, shown=mounted)
                if last[blob.diff_id] == index:
                    merged.apply_whiteouts(members)
                    tree.add_layer(members, spool.fd, layer=blob.diff_id, cancel=cancel)
                # before it is built: what is refused in an image of all layers leaves none of this
                merged.add_layer(members, spool.fd, layer=blob.diff_id, cancel=cancel)
                if last[blob.diff_id] == index:
                    if mounted is not None:
                        overlay_names(mounted, tree.root)
                    with lower_layers.copied(tree.borrowed.values()):
                        yield SourceLayer(root=tree.root, digest=blob.diff_id)

    def _lower_layers(self) -> LowerLayers:
        blobs = {blob.diff_id: blob for blob in self._blobs}
        return LowerLayers(
            lambda diff_id: self._spool(blobs[diff_id]),
            directory=self._options.spool_directory,
            max_bytes=self._options.max_bytes,
            cancel=self._options.cancel,
        )

    def _read_directory(self) -> SourceLayer:
        assert self._directory is not None
        tree = self._directory.read_tree(
            cancel=self._options.cancel, drop_xattrs=self._options.drop_xattrs
        )
        return SourceLayer(root=tree, digest=None)

    def _read_tar(self) -> SourceLayer:
        assert self._tar is not None
        spool, members = self._tar
        tree = TarTree(self._options.whiteouts)
        tree.add_layer(self._kept(members), spool.fd, cancel=self._options.cancel)
        return SourceLayer(root=tree.root, digest=spool.digest)

    def _members(self, spool: Spool) -> Iterator[TarEntry]:
        """Yield the members of a layer; its diff_id says that it is whole, and some writers leave
        out the end marker."""
        reader = TarReader(
            spool.fd,
            start_bytes=spool.start_bytes,
            size_bytes=spool.size_bytes,
            needs_end=False,
        )
        return self._kept(_cancellable(reader, self._options.cancel))

    def _kept(self, members: Iterable[TarEntry]) -> Iterator[TarEntry]:
        """Yield members without the attributes that are to be left out."""
        for entry in members:
            entry.xattrs = without_xattrs(entry.xattrs, self._options.drop_xattrs)
            yield entry

    @contextlib.contextmanager
    def _spool(self, blob: LayerBlob) -> Iterator[Spool]:
        """Yield the tar of a layer, proven to be what the image says."""
        assert self._store is not None
        with self._store.open(blob.name) as file:
            if blob.size_bytes is not None and file.size_bytes != blob.size_bytes:
                raise _mismatch(blob, f"has {file.size_bytes} bytes, not {blob.size_bytes}")
            with spooled(
                file.fd,
                directory=self._options.spool_directory,
                start_bytes=file.start_bytes,
                size_bytes=file.size_bytes,
                max_bytes=self._options.max_bytes,
                progress=self._options.progress,
                cancel=self._options.cancel,
            ) as spool:
                if blob.digest is not None and spool.source_digest != blob.digest:
                    raise _mismatch(blob, f"has the digest {spool.source_digest}")
                if spool.digest != blob.diff_id:
                    raise _mismatch(blob, f"has the diff_id {spool.digest}, not {blob.diff_id}")
                yield spool


@contextlib.contextmanager
def open_source(source: str | os.PathLike[str], options: SourceOptions) -> Iterator[Source]:
    """Open a source; ``-`` is the standard input.

    Raises:
        CallError: ``invalid``, it is not of the format asked for; by errno.
    """
    if options.source_format not in FORMATS:
        known = ", ".join(FORMATS)
        raise CallError("invalid", f"source format {options.source_format!r} is none of {known}")
    with contextlib.ExitStack() as stack:
        if os.fspath(source) != "-" and os.path.isdir(source):
            yield _open_directory(source, options, stack)
        else:
            yield _open_archive(source, options, stack)


def _open_directory(
    source: str | os.PathLike[str], options: SourceOptions, stack: contextlib.ExitStack
) -> Source:
    store = DirectoryStore(source)
    found = options.source_format
    if found == "auto":
        if not os.path.isdir(Path(source) / "blobs"):
            found = "directory"
        elif oci.is_layout(store):
            found = "oci"
        else:
            oci.refuse_incomplete(store)
            found = "directory"
    if found == "directory":
        return Source(options, directory=stack.enter_context(DirectorySource(source)))
    return _layered(source, store, found, options)


def _open_archive(
    source: str | os.PathLike[str], options: SourceOptions, stack: contextlib.ExitStack
) -> Source:
    if options.source_format == "directory":
        raise _not_of_format(source, "directory")
    fd = _open_file(source, stack)
    spool = stack.enter_context(
        spooled(
            fd,
            directory=options.spool_directory,
            max_bytes=options.max_bytes,
            progress=options.progress,
            cancel=options.cancel,
        )
    )
    reader = TarReader(spool.fd, start_bytes=spool.start_bytes, size_bytes=spool.size_bytes)
    members = list(_cancellable(reader, options.cancel))
    store = ArchiveStore(spool.fd, members)
    found = _format_of(store) if options.source_format == "auto" else options.source_format
    if found == "tar":
        return Source(options, tar=(spool, members))
    return _layered(source, store, found, options)


def _cancellable(reader: TarReader, cancel: Deadline | None) -> Iterator[TarEntry]:
    for entry in reader:
        if cancel is not None:
            cancel.check("read the tar")
        yield entry


def _format_of(store: FileStore) -> str:
    if oci.is_layout(store):
        return "oci"
    if docker_archive.is_archive(store):
        return "docker"
    docker_archive.refuse_legacy(store)
    oci.refuse_incomplete(store)
    return "tar"


def _layered(
    source: str | os.PathLike[str], store: FileStore, found: str, options: SourceOptions
) -> Source:
    if found == "oci" and oci.is_layout(store):
        blobs = _layout_layers(store, options)
    elif found == "docker" and docker_archive.is_archive(store):
        blobs = docker_archive.find_layers(
            store, platform=options.platform, reference=options.reference
        )
    else:
        raise _not_of_format(source, found)
    if not blobs:
        raise CallError(
            "invalid",
            f"cannot read the image {os.fspath(source)!r}: it has no layers",
            step="read the image",
            object=os.fspath(source),
        )
    return Source(options, store=store, blobs=blobs)


def _layout_layers(store: FileStore, options: SourceOptions) -> tuple[LayerBlob, ...]:
    """Return the layers by the layout, or, where that lists no image, by Docker's manifest.json.

    Docker 25.0 wrote layouts without a list of manifests, and manifests without layers. Where both
    list an image and the caller has not said which to read, it must be the same.
    """
    try:
        blobs = oci.find_layers(store, platform=options.platform, reference=options.reference)
        if options.source_format == "auto":
            _refuse_another(store, blobs, options)
        return blobs
    except AmbiguousError:
        raise
    except CallError as problem:
        if problem.code not in ("invalid", "not_found") or not docker_archive.is_archive(store):
            raise
        return docker_archive.find_layers(
            store, platform=options.platform, reference=options.reference
        )


def _refuse_another(store: FileStore, blobs: tuple[LayerBlob, ...], options: SourceOptions) -> None:
    if not docker_archive.is_archive(store):
        return
    platform = options.platform or default_platform()
    try:
        others = docker_archive.find_layers(store, platform=platform, reference=options.reference)
    except AmbiguousError:
        raise
    except CallError:  # it does not list this image
        return
    if [each.diff_id for each in others] != [each.diff_id for each in blobs]:
        raise AmbiguousError(
            "invalid",
            "cannot read the image: the one of index.json is not the image of manifest.json",
            step="read the image",
            object="index.json",
            hint="--format oci or docker says which one to read",
        )


def _open_file(source: str | os.PathLike[str], stack: contextlib.ExitStack) -> int:
    if os.fspath(source) == "-":
        return sys.stdin.fileno()
    with OsErrors("open", source):
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise _not_of_format(source, "tar")
    return fd


def _chain_digest(blobs: tuple[LayerBlob, ...]) -> str:
    """Return the ChainID of the OCI specification: one digest for layers one over the other."""
    import hashlib

    chain = blobs[0].diff_id
    for blob in blobs[1:]:
        chain = "sha256:" + hashlib.sha256(f"{chain} {blob.diff_id}".encode()).hexdigest()
    return chain


def _mismatch(blob: LayerBlob, what: str) -> CallError:
    return CallError(
        "integrity",
        f"cannot read the layer {blob.name!r}: it {what}",
        step="check the layer",
        object=blob.name,
    )


def _not_of_format(source: str | os.PathLike[str], wanted: str) -> CallError:
    return CallError(
        "invalid",
        f"cannot read {os.fspath(source)!r}: it is not of the format {wanted}",
        step="open the source",
        object=os.fspath(source),
    )
