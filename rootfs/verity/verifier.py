"""Check an image against its hash tree, on all cores, and name every block that is wrong.

A hash block that is wrong proves nothing about what is below it: those data blocks are counted as
unproven, not as corrupt.
"""

import array
import bisect
import contextlib
import dataclasses
import itertools
import os
import uuid as uuid_module
from collections.abc import Iterator

from guestagent.storage.verity import (
    SUPERBLOCK_BYTES,
    VerityParameters,
    VerityTerms,
    block_digest,
    check_spare,
    hash_area_offset,
    superblock_uuid,
)
from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.hasharea import find_hash_area
from rootfs.imagefile.vhd import VhdFooter, find_footer
from rootfs.verity.formatter import opened
from rootfs.verity.hashtree import Progress
from rootfs.verity.runs import Run, covers, joined, outside
from rootfs.verity.treecompare import compare_tree
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("Layer", "VerifyResult", "open_layer", "read_layer", "verify_image")

#: A list of faults ends here; the counts are always of all.
_MAX_NAMED_RUNS = 65536


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """An open image and its hash area. Descriptors are borrowed.

    ``parameters.root_digest`` is the requested digest, or else the digest computed from the top of
    the tree; ``computed_root`` is always the latter. ``uuid`` is that of the superblock, if
    there is one, ``footer`` that of a VHD.
    """

    fd: int
    hash_fd: int
    uuid: uuid_module.UUID | None
    parameters: VerityParameters
    computed_root: bytes
    footer: VhdFooter | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What was checked (data blocks ``first_block`` to ``end_block - 1``) and what is wrong.

    ``corrupt_hash`` holds pairs (level, block in that level), level 0 being the one over the data;
    a wrong root is the only block of the highest level. Runs are ascending and apart; no more than
    65536 are listed, all are counted.
    """

    parameters: VerityParameters
    first_block: int
    end_block: int
    corrupt_data: tuple[Run, ...]
    corrupt_data_blocks: int
    corrupt_hash: tuple[tuple[int, int], ...]
    unproven_data: tuple[Run, ...]

    @property
    def intact(self) -> bool:
        return not self.corrupt_data_blocks and not self.corrupt_hash


@contextlib.contextmanager
def open_layer(
    image: str | os.PathLike[str],
    *,
    terms: VerityTerms | None = None,
    hash_file: str | os.PathLike[str] | None = None,
) -> Iterator[Layer]:
    """Open an image with its hash area, found by the superblock unless ``terms`` say more: at the
    end of the file, or before the footer of a VHD.

    Raises:
        CallError: ``integrity``, superblock and ``terms`` differ, or something is cut off;
            ``not_found``, no superblock; ``busy``, a process writes to it; by errno.
    """
    terms = terms or VerityTerms()
    path = os.fspath(image)
    with contextlib.ExitStack() as cleanup:
        fd = cleanup.enter_context(opened(path, writable=False))
        hash_path = path if hash_file is None else os.fspath(hash_file)
        hash_fd = (
            fd if hash_file is None else cleanup.enter_context(opened(hash_path, writable=False))
        )
        with OsErrors("read", hash_path):
            footer = find_footer(fd)
            end_bytes = None if hash_file is not None else _disk_bytes(fd, footer)
            uuid, parameters = _parameters(hash_fd, hash_path, terms, end_bytes)
            _refuse_short(fd, path, parameters.data_size_bytes, "the data")
            _refuse_short(hash_fd, hash_path, _needed_bytes(parameters), "the hash tree")
            computed_root = block_digest(parameters, _top_block(parameters, fd, hash_fd))
        if terms.root_digest is None:
            parameters = parameters.replace(root_digest=computed_root)
        yield Layer(
            fd=fd,
            hash_fd=hash_fd,
            uuid=uuid,
            parameters=parameters,
            computed_root=computed_root,
            footer=footer,
        )


def _disk_bytes(fd: int, footer: VhdFooter | None) -> int:
    return os.lseek(fd, 0, os.SEEK_END) if footer is None else footer.size_bytes


def read_layer(
    image: str | os.PathLike[str],
    *,
    terms: VerityTerms | None = None,
    hash_file: str | os.PathLike[str] | None = None,
) -> Layer:
    """Return what ``open_layer`` finds; the descriptors in it are closed.

    Raises:
        CallError: as ``open_layer``.
    """
    with open_layer(image, terms=terms, hash_file=hash_file) as layer:
        return dataclasses.replace(layer, fd=-1, hash_fd=-1)


def verify_image(
    image: str | os.PathLike[str],
    *,
    terms: VerityTerms | None = None,
    hash_file: str | os.PathLike[str] | None = None,
    first_block: int = 0,
    end_block: int | None = None,
    workers: int | None = None,
    accelerate: bool = True,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> VerifyResult:
    """Hash the data blocks of a range, and all hash blocks above them, and compare.

    Without a root digest in ``terms``, data and tree are compared with each other only.

    Raises:
        CallError: as ``open_layer``; ``invalid``, no such range; ``timeout``, ``cancelled``.
    """
    with open_layer(image, terms=terms, hash_file=hash_file) as layer:
        parameters = layer.parameters
        end_block = parameters.data_blocks if end_block is None else end_block
        if not 0 <= first_block < end_block <= parameters.data_blocks:
            raise CallError(
                "invalid",
                f"cannot verify blocks {first_block}:{end_block} of {os.fspath(image)!r}: it has "
                f"{parameters.data_blocks}",
                step="verify",
                object="range",
            )
        with OsErrors("verify", image):
            mismatches = compare_tree(
                parameters,
                layer.fd,
                layer.hash_fd,
                first_block=first_block,
                end_block=end_block,
                workers=workers,
                accelerate=accelerate,
                deadline=deadline or Deadline(),
                progress=progress,
            )
        result = _blame(layer, first_block, end_block, mismatches)
        if end_block == parameters.data_blocks:
            _check_last_blocks(layer, result.corrupt_hash)
        return result


def _parameters(
    fd: int, path: str, terms: VerityTerms, end_bytes: int | None
) -> tuple[uuid_module.UUID | None, VerityParameters]:
    """Read them from ``fd``; ``end_bytes`` is where the tree ends if it is behind the data."""
    if terms.superblock and terms.hash_offset_bytes is None and end_bytes is not None:
        offset_bytes = find_hash_area(fd, end_bytes)
    else:
        offset_bytes = hash_area_offset(terms, separate=end_bytes is None)
    if offset_bytes is None:
        raise CallError(
            "not_found",
            f"no verity superblock in {path!r}",
            step="find the hash area",
            object=path,
            hint="say hash_offset_bytes if something follows the hash tree",
        )
    raw = os.pread(fd, SUPERBLOCK_BYTES, offset_bytes) if terms.superblock else None
    try:
        parameters = VerityParameters.from_request(
            terms, hash_offset_bytes=offset_bytes, superblock=raw
        )
    except CallError as problem:
        where = f" (at {offset_bytes} in {path!r})" if raw is not None else ""
        raise CallError(
            problem.code, problem.message + where, step=problem.step, object=problem.object
        ) from None
    uuid = None if raw is None else uuid_module.UUID(bytes=superblock_uuid(raw))
    return uuid, parameters


def _needed_bytes(parameters: VerityParameters) -> int:
    return parameters.end_bytes if parameters.levels else 0


def _refuse_short(fd: int, path: str, needed_bytes: int, what: str) -> None:
    size_bytes = os.lseek(fd, 0, os.SEEK_END)
    if size_bytes < needed_bytes:
        raise CallError(
            "integrity",
            f"{path!r} is truncated: {what} would end at {needed_bytes}, it ends at {size_bytes}",
            step="read",
            object=path,
        )


def _top_block(parameters: VerityParameters, fd: int, hash_fd: int) -> bytes:
    if parameters.levels:
        size_bytes = parameters.hash_block_size
        return os.pread(hash_fd, size_bytes, parameters.tree_offset_bytes)
    return os.pread(fd, parameters.data_block_size, 0)


def _check_last_blocks(layer: Layer, corrupt_hash: tuple[tuple[int, int], ...]) -> None:
    """See, down the right edge as far as it is intact, that the tree is over so many blocks."""
    parameters = layer.parameters
    size_bytes = parameters.hash_block_size
    for level in reversed(range(parameters.levels)):
        last = parameters.level_blocks[level] - 1
        if (level, last) in corrupt_hash:
            return
        offset_bytes = parameters.level_offsets_bytes[level] + last * size_bytes
        check_spare(parameters, level, os.pread(layer.hash_fd, size_bytes, offset_bytes))


def _blame(
    layer: Layer, first_block: int, end_block: int, mismatches: list["array.array[int]"]
) -> VerifyResult:
    parameters = layer.parameters
    bits = parameters.hashes_per_block_bits
    corrupt_hash: list[tuple[int, int]] = []
    unproven: list[tuple[int, int]] = []  # [first, end) of data blocks, ascending, apart
    corrupt_data: list[tuple[int, int]] = []
    if layer.computed_root != parameters.root_digest:
        if parameters.levels:
            corrupt_hash.append((parameters.levels - 1, 0))
            unproven.append((0, parameters.data_blocks))
        else:
            corrupt_data.append((0, 1))
    for level in reversed(range(len(mismatches))):
        numbers = mismatches[level]
        runs = sorted(zip(numbers[::2], numbers[1::2], strict=True))
        if level:
            for block in itertools.chain.from_iterable(range(at, at + n) for at, n in runs):
                first = block << (bits * level)
                if not covers(unproven, first):
                    corrupt_hash.append((level - 1, block))
                    bisect.insort(unproven, (first, (block + 1) << (bits * level)))
        else:
            corrupt_data += [part for at, n in runs for part in outside(unproven, at, at + n)]
    return VerifyResult(
        parameters=parameters,
        first_block=first_block,
        end_block=end_block,
        corrupt_data=tuple(joined(corrupt_data))[:_MAX_NAMED_RUNS],
        corrupt_data_blocks=sum(end - first for first, end in corrupt_data),
        corrupt_hash=tuple(corrupt_hash)[:_MAX_NAMED_RUNS],
        unproven_data=tuple(
            joined(
                [
                    (max(first, first_block), min(end, end_block))
                    for first, end in unproven
                    if first < end_block and end > first_block
                ]
            )
        )[:_MAX_NAMED_RUNS],
    )
