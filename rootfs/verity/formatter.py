"""Make an image a dm-verity layer: superblock and hash tree behind the data, or in a file apart.

The bytes are those of ``veritysetup format`` with the same salt and UUID. The tree grows in a file
without a name; the image is touched only when the tree is whole, and is cut back to its size if
that last step fails. Killed in that step (milliseconds), an image may keep a tail without a
superblock: format it again with ``data_blocks`` and ``force``.
"""

import contextlib
import dataclasses
import hashlib
import os
import secrets
import stat
import tempfile
import uuid as uuid_module
from collections.abc import Iterator
from pathlib import Path

from guestagent.storage.verity import VerityParameters, VerityTerms, hash_area_offset
from rootfs.imagefile.attached import refuse_attached
from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.hasharea import data_end, filesystem_size
from rootfs.imagefile.imagelock import open_locked
from rootfs.imagefile.output import check_output, new_file, unnamed_file
from rootfs.imagefile.ranges import FileRange, copy_range
from rootfs.verity.hashtree import Progress, build_tree
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("LAYER_SALT", "FormatResult", "derive_uuid", "format_image", "opened", "tree_file")

#: A tree up to this size (that of a 2 GiB image) grows in memory, a larger one beside the image.
_TREE_IN_MEMORY_BYTES = 16 * 1024 * 1024
_SALT_BYTES = 32
#: The salt of every hash tree that is to be reproducible. It is one for all layers, because only
#: trees of one salt can be composed (``rootfs.verity.compose``); see docs/security.md.
LAYER_SALT = hashlib.sha256(b"verity salt of the layers of a pack, version 2").digest()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FormatResult:
    """What was made. ``uuid`` is None without a superblock, ``hash_file`` when it was appended."""

    image: str
    hash_file: str | None
    parameters: VerityParameters
    uuid: uuid_module.UUID | None

    @property
    def root_digest(self) -> bytes:
        return self.parameters.root_digest


def derive_uuid(content_digest: bytes) -> uuid_module.UUID:
    """Return a UUID that follows from a digest of the content alone.

    With ``LAYER_SALT`` the same content always gives the same layer, byte for byte.
    """
    if not content_digest:
        raise ValueError("the digest of the content is empty")
    seed = hashlib.sha256(b"verity layer uuid\0" + content_digest).digest()
    return uuid_module.UUID(bytes=seed[:16], version=5)


def format_image(
    image: str | os.PathLike[str],
    *,
    terms: VerityTerms | None = None,
    uuid: uuid_module.UUID | None = None,
    hash_file: str | os.PathLike[str] | None = None,
    force: bool = False,
    durable: bool = False,
    workers: int | None = None,
    accelerate: bool = True,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> FormatResult:
    """Add a hash area to ``image`` in place, or write it to ``hash_file``.

    Args:
        terms: the choices of the format. Left open, the salt is random (32 bytes), the file is
            hashed up to the hash area that it has or else as a whole (see
            ``rootfs.imagefile.hasharea``), the hash area starts behind the data (at 0 in a
            ``hash_file``), and the rest is as veritysetup chooses. What is behind ``data_blocks``
            and in the way of the hash area is lost only with ``force``, and a file system never.
        uuid: for the superblock; random when None.
        force: format again what has a hash area already, and replace ``hash_file``.
        durable: wait until the disk has it (a ``hash_file`` always does).
        workers: processes or threads; one for each core when None.
        deadline: ends the work when it passes or is cancelled; the image is then as before.

    Raises:
        CallError: ``invalid`` (``object`` names the parameter), ``conflict`` (formatted already),
            ``busy`` (mounted, attached, locked), ``resource`` (disk full), ``denied``,
            ``not_found``, ``timeout``, ``cancelled``.
    """
    path, apart = os.fspath(image), None if hash_file is None else os.fspath(hash_file)
    terms = terms or VerityTerms()
    with contextlib.ExitStack() as cleanup:
        fd = cleanup.enter_context(opened(path, writable=apart is None))
        if apart is not None:
            check_output(apart, replace=force, inputs=(fd,))
        size_bytes, before = os.lseek(fd, 0, os.SEEK_END), os.fstat(fd)
        if terms.data_blocks is None and apart is None:
            size_bytes = _size_without_hash_area(path, fd, size_bytes, force)
        parameters = _parameters(path, size_bytes, terms, apart is not None, force)
        if apart is None:
            _refuse_data_loss(path, fd, parameters.hash_offset_bytes)
        with OsErrors("format", apart or path):
            tree_bytes = parameters.end_bytes - parameters.tree_offset_bytes
            tree_fd = cleanup.enter_context(tree_file(tree_bytes, path))
            root_digest = build_tree(
                parameters,
                fd,
                tree_fd,
                0,
                workers=workers,
                accelerate=accelerate,
                deadline=deadline or Deadline(),
                progress=progress,
            )
            _refuse_change(path, before, os.fstat(fd))
            parameters = parameters.replace(root_digest=root_digest)
            uuid = (uuid or uuid_module.uuid4()) if parameters.superblock else None
            header = parameters.pack_superblock(uuid.bytes) if uuid is not None else b""
            if apart is not None:
                with new_file(apart, replace=force, inputs=(fd,)) as (hash_fd, _):
                    _store(hash_fd, parameters, header, tree_fd)
            else:
                _append(fd, parameters, header, tree_fd, durable=durable)
    return FormatResult(
        image=path,
        hash_file=apart,
        parameters=parameters,
        uuid=uuid,
    )


@contextlib.contextmanager
def opened(path: str, *, writable: bool) -> Iterator[int]:
    """Open and lock an image; a block device (to read only) has no lock.

    Raises:
        CallError: ``busy``, ``invalid``, or by errno.
    """
    if not writable and _is_block_device(path):
        with OsErrors("open", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    else:
        fd = open_locked(Path(path), writable=writable)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(os.close, fd)
        if writable:
            refuse_attached(fd, path)
        with contextlib.suppress(OSError):  # advice only; devices may not take it
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield fd


def _is_block_device(path: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISBLK(os.stat(path).st_mode)
    return False


def _size_without_hash_area(path: str, fd: int, size_bytes: int, force: bool) -> int:
    found = data_end(fd, size_bytes, path)
    if found < size_bytes and not force:
        raise CallError(
            "conflict",
            f"cannot format {path!r}: it has a hash area at {found} already",
            step="format",
            object=path,
            hint="force replaces it",
        )
    return found


def _refuse_data_loss(path: str, fd: int, hash_offset_bytes: int) -> None:
    """See that the hash area is not written over a file system's own bytes, forced or not."""
    needed_bytes = filesystem_size(fd)
    if needed_bytes is not None and hash_offset_bytes < min(needed_bytes, os.fstat(fd).st_size):
        raise _refused(
            path,
            "data_blocks",
            f"a hash area at {hash_offset_bytes} would overwrite its file system, which ends at "
            f"{needed_bytes}",
        )


def _parameters(
    path: str, size_bytes: int, terms: VerityTerms, is_apart: bool, force: bool
) -> VerityParameters:
    salt, data_blocks = terms.salt, terms.data_blocks
    if data_blocks is None:
        data_blocks = _whole_blocks(path, size_bytes, terms.data_block_size or 4096)
    if salt is None:
        salt = secrets.token_bytes(_SALT_BYTES)
    terms = terms.replace(salt=salt, data_blocks=data_blocks)
    hash_offset_bytes = hash_area_offset(terms, separate=is_apart)
    assert hash_offset_bytes is not None  # it follows from data_blocks
    try:
        parameters = VerityParameters.from_request(terms, hash_offset_bytes=hash_offset_bytes)
    except CallError as problem:
        raise _refused(path, problem.object or "", problem.message) from None
    data_size_bytes = parameters.data_size_bytes
    if data_size_bytes > size_bytes:
        raise _refused(
            path, "data_blocks", f"{data_size_bytes} bytes of data, but it has {size_bytes}"
        )
    if not is_apart and hash_offset_bytes < data_size_bytes:
        raise _refused(path, "hash_offset_bytes", f"{hash_offset_bytes} lies within the data")
    if not is_apart and hash_offset_bytes < size_bytes and not force:
        raise CallError(
            "conflict",
            f"cannot format {path!r}: a hash area at {hash_offset_bytes} would overwrite what is "
            f"there up to {size_bytes}",
            step="format",
            object=path,
            hint="force gives that up",
        )
    return parameters


def _refuse_change(path: str, before: os.stat_result, after: os.stat_result) -> None:
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CallError(
            "conflict",
            f"cannot format {path!r}: it changed while it was read",
            step="format",
            object=path,
        )


def _whole_blocks(path: str, size_bytes: int, block_size_bytes: int) -> int:
    if not size_bytes:
        raise _refused(path, "image", "it is empty")
    if size_bytes % block_size_bytes:
        raise _refused(
            path,
            "data_block_size",
            f"its {size_bytes} bytes are no multiple of {block_size_bytes}",
            hint=f"truncate -s %{block_size_bytes} fills it up with zeros",
        )
    return size_bytes // block_size_bytes


def _refused(path: str, field: str, problem: str, *, hint: str | None = None) -> CallError:
    return CallError(
        "invalid", f"cannot format {path!r}: {problem}", step="format", object=field, hint=hint
    )


@contextlib.contextmanager
def tree_file(size_bytes: int, path: str) -> Iterator[int]:
    """Open a file of zeros without a name: in memory, or if it is large, beside the image ``path``.

    Raises:
        OSError: there is no room.
    """
    with contextlib.ExitStack() as cleanup:
        if size_bytes <= _TREE_IN_MEMORY_BYTES:
            fd = os.memfd_create("verity-tree", os.MFD_CLOEXEC)
            cleanup.callback(os.close, fd)
        else:
            fd = _spool_file(os.path.dirname(path) or ".", cleanup)
        os.ftruncate(fd, size_bytes)
        yield fd


def _spool_file(directory: str, cleanup: contextlib.ExitStack) -> int:
    try:
        return cleanup.enter_context(unnamed_file(directory))
    except CallError:  # a directory or a file system that takes none
        return cleanup.enter_context(tempfile.TemporaryFile()).fileno()


def _append(
    fd: int, parameters: VerityParameters, header: bytes, tree_fd: int, *, durable: bool
) -> None:
    old_size_bytes = os.fstat(fd).st_size
    with contextlib.ExitStack() as undo:
        undo.callback(os.ftruncate, fd, old_size_bytes)
        _store(fd, parameters, header, tree_fd)
        if durable:
            os.fsync(fd)
        undo.pop_all()


def _store(fd: int, parameters: VerityParameters, header: bytes, tree_fd: int) -> None:
    """Write tree and superblock, the superblock last: where it is, all is.

    The room is reserved first, so that a full disk is known before anything is overwritten.
    """
    start, end = parameters.hash_offset_bytes, parameters.end_bytes
    if end == start:
        return
    os.posix_fallocate(fd, start, end - start)
    os.ftruncate(fd, end)
    os.pwrite(fd, bytes(parameters.tree_offset_bytes - start), start)
    if parameters.levels:
        tree = FileRange(offset_bytes=0, size_bytes=end - parameters.tree_offset_bytes)
        for _ in copy_range(tree_fd, tree, fd, parameters.tree_offset_bytes):
            pass
    if header:
        os.pwrite(fd, header, start)
