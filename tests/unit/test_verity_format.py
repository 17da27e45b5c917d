"""The formatter: veritysetup's bytes, and an image that survives everything that goes wrong."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from uuid import UUID

import pytest

from guestagent.storage.verity import VerityTerms
from rootfs.image.images import build_image
from rootfs.imagefile import attached as busy
from rootfs.imagefile.hasharea import find_hash_area
from rootfs.verity import hashtree, multibuffer
from rootfs.verity import workers as parallel
from rootfs.verity.formatter import FormatResult, derive_uuid, format_image
from rootfs.verity.hashing import BlockHash, HashlibHasher
from rootfs.verity.verifier import read_layer, verify_image
from tests.beds.calls import call_error
from vsock.deadline import Deadline
from vsock.errors import CallError

needs_veritysetup = pytest.mark.skipif(
    shutil.which("veritysetup") is None, reason="veritysetup is not installed"
)
needs_multibuffer = pytest.mark.skipif(
    multibuffer.library_version() is None, reason="no checked version of libIPSec_MB is installed"
)

IDENTITY = UUID("12345678-1234-5678-9abc-123456789abc")
RANDOM = random.Random(7)
NOISE = RANDOM.randbytes(700 * 4096)


def veritysetup_format(
    image: Path, hash_file: Path, result: FormatResult, size_bytes: int
) -> tuple[str, bytes]:
    """Format with the terms of ``result``; return the root digest and the hash file."""
    terms = result.parameters
    command = [
        "veritysetup",
        "format",
        str(image),
        str(hash_file),
        f"--format={terms.hash_type}",
        f"--hash={terms.algorithm}",
        f"--salt={terms.salt.hex() or '-'}",
        f"--data-block-size={terms.data_block_size}",
        f"--hash-block-size={terms.hash_block_size}",
        f"--data-blocks={terms.data_blocks}",
        f"--hash-offset={terms.hash_offset_bytes}",
    ]
    command += [f"--uuid={result.uuid}"] if terms.superblock else ["--no-superblock"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return output.split("Root hash:")[1].split()[0], hash_file.read_bytes()


def combinations() -> Iterator[tuple[VerityTerms, int, int, bool]]:
    """Yield a sample in which every value meets most others, then the sizes around each level."""
    everything = list(
        itertools.product(
            (1, 0),
            ("sha256", "sha512", "sha1"),
            (512, 1024, 4096),
            (512, 1024, 4096),
            (True, False),
            (0, 1, 32, 255, 256),
            (1, 2, 127, 128, 129, 700),
            (True, False),
        )
    )
    for hash_type, algorithm, data, hash_, superblock, salt, blocks, apart in RANDOM.sample(
        everything, 60
    ):
        choices = VerityTerms(
            algorithm=algorithm,
            hash_type=hash_type,
            data_block_size=data,
            hash_block_size=hash_,
            superblock=superblock,
        )
        if blocks == 1 and superblock and data < hash_ and not apart:
            continue  # veritysetup cannot write a superblock right behind so little data
        yield choices, salt, blocks, apart
    small = VerityTerms(data_block_size=512)
    for blocks, apart in itertools.product((16383, 16384, 16385), (True, False)):
        yield small, 32, blocks, apart


def describe(value: object) -> str:
    if isinstance(value, VerityTerms):
        return (
            f"{value.algorithm}-type{value.hash_type}-{value.data_block_size}"
            f"-{value.hash_block_size}-{'sb' if value.superblock else 'bare'}"
        )
    return str(value)


@needs_veritysetup
@pytest.mark.parametrize(
    ("choices", "salt_size", "blocks", "apart"), list(combinations()), ids=describe
)
def test_the_bytes_are_those_of_veritysetup(
    tmp_path: Path, choices: VerityTerms, salt_size: int, blocks: int, apart: bool
) -> None:
    size_bytes = blocks * (choices.data_block_size or 4096)
    data = (NOISE * (1 + size_bytes // len(NOISE)))[:size_bytes]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(data)
    theirs.write_bytes(data)
    our_hashes = tmp_path / "ours.hash" if apart else None
    result = format_image(
        ours,
        terms=choices.replace(salt=NOISE[:salt_size]),
        uuid=IDENTITY,
        hash_file=our_hashes,
    )
    their_hashes = tmp_path / "theirs.hash" if apart else theirs
    root, content = veritysetup_format(theirs, their_hashes, result, size_bytes)
    assert result.root_digest.hex() == root
    assert (our_hashes or ours).read_bytes() == content
    if apart:
        assert ours.read_bytes() == data
    elif choices.superblock:
        fd = os.open(ours, os.O_RDONLY)
        assert find_hash_area(fd, len(content)) == result.parameters.hash_offset_bytes
        os.close(fd)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(NOISE)
    return path


def formatted(path: Path, **choices: object) -> bytes:
    path.unlink(missing_ok=True)
    path.write_bytes(NOISE)
    format_image(path, terms=VerityTerms(salt=b"s"), uuid=IDENTITY, **choices)  # type: ignore[arg-type]
    return path.read_bytes()


def sparse_file(path: Path, size_bytes: int, islands: list[tuple[int, bytes]]) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for offset_bytes, data in islands:
            file.seek(offset_bytes)
            file.write(data)


@needs_veritysetup
@pytest.mark.parametrize(("hash_type", "algorithm"), [(1, "sha256"), (0, "sha1")])
def test_holes_are_zeros(tmp_path: Path, hash_type: int, algorithm: str) -> None:
    # islands that leave holes unaligned to hash blocks, and one hole over whole subtrees
    islands = [
        (0, NOISE[:4096]),
        (1000 * 512, NOISE[:70000]),
        (20000 * 512 + 100, b"x"),
        (39999 * 512, b"end"),
    ]
    size_bytes = 40000 * 512
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    sparse_file(sparse, size_bytes, islands)
    dense.write_bytes(sparse.read_bytes())
    fd = os.open(sparse, os.O_RDONLY)
    runs = hashtree.holes(fd, 40000, 512)
    os.close(fd)
    assert sum(run.count for run in runs) > 39000
    choices = VerityTerms(algorithm=algorithm, hash_type=hash_type, data_block_size=512)
    result = format_image(sparse, terms=choices.replace(salt=b"salt"), uuid=IDENTITY)
    root, content = veritysetup_format(dense, dense, result, size_bytes)
    assert result.root_digest.hex() == root
    assert sparse.read_bytes() == content


def test_a_file_of_holes_only(tmp_path: Path) -> None:
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    sparse_file(sparse, 1000 * 4096, [])
    dense.write_bytes(bytes(1000 * 4096))
    assert (
        format_image(sparse, terms=VerityTerms(salt=b"")).root_digest
        == format_image(dense, terms=VerityTerms(salt=b"")).root_digest
    )


def test_memory_stays_flat_for_a_huge_sparse_image(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    sparse_file(path, 16 << 30, [(5 << 30, NOISE)])
    script = (
        "import resource, sys\n"
        "from guestagent.storage.verity import VerityTerms\n"
        "from rootfs.verity.formatter import format_image\n"
        "format_image(sys.argv[1], terms=VerityTerms(salt=b''))\n"
        # of this program only: ru_maxrss remembers what the process was before it
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert max(map(int, output.split())) < 64 * 1024
    assert path.stat().st_size > (16 << 30) + (128 << 20)


def sha256_blocks(salt: bytes, block_size_bytes: int, *, salt_first: bool = True) -> BlockHash:
    return BlockHash(
        algorithm="sha256",
        salt=salt,
        salt_first=salt_first,
        block_size_bytes=block_size_bytes,
        slot_size_bytes=32,
        max_batch_blocks=128,
    )


@needs_multibuffer
@pytest.mark.parametrize("salt_size", [0, 7, 32, 256])
@pytest.mark.parametrize("salt_first", [True, False])
def test_the_accelerator_hashes_like_hashlib(image: Path, salt_size: int, salt_first: bool) -> None:
    block_hash = sha256_blocks(NOISE[:salt_size], 512, salt_first=salt_first)
    assert multibuffer.is_usable(block_hash)
    fast, slow = multibuffer.MultiBufferHasher(block_hash), HashlibHasher(block_hash)
    fd = os.open(image, os.O_RDONLY)
    for first, count in ((0, 128), (5, 1), (9, 37), (100, 128), (3, 127), (0, 128)):
        assert fast.slots(fd, first * 512, count) == slow.slots(fd, first * 512, count)
    os.close(fd)


@needs_multibuffer
def test_an_accelerator_that_hashes_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    block_hash = sha256_blocks(b"odd one", 1024)
    right = multibuffer._Burst.run
    monkeypatch.setattr(
        multibuffer._Burst, "run", lambda burst, count: right(burst, count)[:-1] + b"\0"
    )
    multibuffer._agrees_with_hashlib.cache_clear()
    assert not multibuffer.is_usable(block_hash)
    assert isinstance(multibuffer.open_hasher(block_hash, 1 << 20), HashlibHasher)
    multibuffer._agrees_with_hashlib.cache_clear()


@pytest.mark.parametrize("version", [b"1.2.0", b"1.4.0", b"2.0.0", b""])
def test_an_unchecked_library_is_not_used(monkeypatch: pytest.MonkeyPatch, version: bytes) -> None:
    class Library:
        @staticmethod
        def imb_get_version_str() -> bytes:
            return version

    monkeypatch.setattr(multibuffer, "_library", Library)
    assert multibuffer.library_version() is None


@pytest.fixture
def always_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashtree, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(hashtree, "_SPAN_BYTES", 64 * 4096)


@contextlib.contextmanager
def another_thread() -> Iterator[None]:
    """Run a second thread, beside which forking is out of the question."""
    stop = threading.Event()
    other = threading.Thread(target=stop.wait, args=(30,))
    other.start()
    try:
        yield
    finally:
        stop.set()
        other.join()


@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("accelerate", [True, False])
def test_workers_do_not_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerate: bool
) -> None:
    monkeypatch.setattr(multibuffer, "_ACCELERATION_BLOCKS", 1)
    alone = formatted(tmp_path / "image", workers=1, accelerate=False)
    assert threading.enumerate() == [threading.main_thread()]
    assert formatted(tmp_path / "image", workers=3, accelerate=accelerate) == alone
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked beside a thread"))
    with another_thread():
        assert formatted(tmp_path / "image", workers=3, accelerate=accelerate) == alone


@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("workers", [1, 2])
def test_progress_ends_at_the_whole(image: Path, workers: int) -> None:
    reports: list[tuple[int, int]] = []
    format_image(image, workers=workers, progress=lambda *report: reports.append(report))
    assert len(reports) > 5
    assert reports == sorted(reports)
    assert reports[-1] == (len(NOISE), len(NOISE))


@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("apart", [True, False])
def test_a_cancel_leaves_everything_as_it_was(
    image: Path, tmp_path: Path, workers: int, apart: bool
) -> None:
    with contextlib.closing(Deadline()) as deadline, call_error("cancelled"):
        format_image(
            image,
            workers=workers,
            hash_file=tmp_path / "hashes" if apart else None,
            progress=lambda done, total: deadline.cancel(),
            deadline=deadline,
        )
    assert image.read_bytes() == NOISE
    assert os.listdir(tmp_path) == ["image"]
    with pytest.raises(ChildProcessError):  # no worker is left
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_deadline_in_the_past_ends_the_work(image: Path, workers: int) -> None:
    with contextlib.closing(Deadline(0.0)) as deadline, call_error("timeout"):
        format_image(image, workers=workers, deadline=deadline)
    assert image.read_bytes() == NOISE


@pytest.mark.usefixtures("always_parallel")
def test_an_image_that_shrinks_while_it_is_read_is_an_error(image: Path) -> None:
    with call_error("integrity", match="was it truncated"):
        format_image(image, workers=1, progress=lambda done, total: os.truncate(image, 4096))


@pytest.mark.parametrize("apart", [True, False])
def test_an_image_that_changes_while_it_is_read_gets_no_tree(
    image: Path, tmp_path: Path, apart: bool
) -> None:
    def write(done: int, total: int) -> None:
        image.write_bytes(NOISE[::-1])

    with call_error("conflict", match="it changed while it was read"):
        format_image(image, progress=write, hash_file=tmp_path / "hashes" if apart else None)
    assert image.read_bytes() == NOISE[::-1]
    assert os.listdir(tmp_path) == ["image"]


def run_workers(
    tasks: Iterable[int],
    work: Callable[[int], bytes],
    take: Callable[[int, bytes], object],
    workers: int = 2,
) -> None:
    with contextlib.closing(Deadline(20)) as deadline:
        parallel.run(tasks, lambda: work, take, workers=workers, deadline=deadline, step="test")


def die(task: int) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def test_a_worker_that_dies_is_reported() -> None:
    with call_error("internal", match="a worker died while: test"):
        run_workers([1, 2, 3], die, lambda index, result: None)


def test_a_worker_that_dies_while_tasks_are_handed_in_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pool then refuses the next task; hundreds are handed in, of which the first ends it."""
    submit = ProcessPoolExecutor.submit

    def slowly(executor: ProcessPoolExecutor, *arguments: object) -> "Future[object]":
        future = submit(executor, *arguments)  # type: ignore[arg-type]
        future.exception(20)  # it is broken before the next one comes
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", slowly)
    with pytest.raises(CallError, match="a worker died while: test"):
        run_workers([1, 2, 3], die, lambda index, result: None)


def test_every_task_is_done_once() -> None:
    done: list[int] = []
    run_workers(
        range(5000),
        lambda task: task.to_bytes(4, "little"),
        lambda index, result: done.append(int.from_bytes(result, "little")),
        workers=4,
    )
    assert sorted(done) == list(range(5000))


@pytest.mark.parametrize("threads", [True, False])
def test_results_and_errors_come_back_from_workers(threads: bool) -> None:
    results: dict[int, bytes] = {}

    def work(task: int) -> bytes:
        if task < 0:
            raise OSError(5, "bad disk", "name")
        return bytes(task)

    with another_thread() if threads else contextlib.nullcontext():
        run_workers([3, 0, 200_000, 7], work, results.__setitem__)
        assert results == {0: bytes(3), 1: b"", 2: bytes(200_000), 3: bytes(7)}
        with pytest.raises(OSError, match="bad disk") as caught:
            run_workers([1, 1, -1, 1], work, results.__setitem__)
        assert (caught.value.errno, caught.value.filename) == (5, "name")


@pytest.mark.parametrize("apart", [True, False])
def test_a_full_disk_leaves_everything_as_it_was(image: Path, tmp_path: Path, apart: bool) -> None:
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the tree of 700 blocks has seven; let the disk be full after three
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 4096 if apart else len(NOISE) + 3 * 4096, hard))
    try:
        with call_error("resource", match="File too large"):
            format_image(image, hash_file=tmp_path / "hashes" if apart else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert image.read_bytes() == NOISE
    assert os.listdir(tmp_path) == ["image"]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_fault_in_the_last_step_is_undone(
    image: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)

    def fail_on_image(fd: int, *arguments: object) -> int:
        if os.path.samestat(os.fstat(fd), image.stat()):
            raise OSError(errno.EIO, "Input/output error")
        result: int = real(fd, *arguments)
        return result

    monkeypatch.setattr(os, call, fail_on_image)
    with call_error("device", match="Input/output error"):
        format_image(image, workers=1)
    assert image.read_bytes() == NOISE


def test_room_is_reserved_before_an_old_hash_area_is_overwritten(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format_image(image)
    content = image.read_bytes()

    def fail(fd: int, offset_bytes: int, size_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with call_error("resource", match="No space left"):
        format_image(image, force=True, terms=VerityTerms(hash_block_size=512))
    assert image.read_bytes() == content


def test_short_reads_lose_nothing(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = format_image(image, terms=VerityTerms(salt=b"s"), accelerate=False).root_digest
    real = os.preadv

    def interrupted(fd: int, buffers: list[memoryview], offset_bytes: int) -> int:
        read: int = real(fd, buffers[:3], offset_bytes)
        return read if len(buffers) < 3 else read - 100  # within the third block

    monkeypatch.setattr(os, "preadv", interrupted)
    again = format_image(image, terms=VerityTerms(salt=b"s"), accelerate=False, force=True)
    assert again.root_digest == whole


def test_a_formatted_image_is_refused_unless_forced(image: Path) -> None:
    first = format_image(image, terms=VerityTerms(salt=b"a"), uuid=IDENTITY)
    content = image.read_bytes()
    with call_error("conflict", match="has a hash area at 2867200 already"):
        format_image(image)
    assert image.read_bytes() == content
    assert (
        format_image(image, terms=VerityTerms(salt=b"b"), force=True).root_digest
        != first.root_digest
    )
    assert format_image(image, terms=VerityTerms(salt=b"a"), uuid=IDENTITY, force=True) == first
    assert image.read_bytes() == content


def test_bytes_after_the_data_are_kept_unless_forced(image: Path) -> None:
    with call_error("conflict", match="would overwrite"):
        format_image(image, terms=VerityTerms(data_blocks=600))
    assert image.read_bytes() == NOISE
    result = format_image(image, terms=VerityTerms(data_blocks=600), force=True)
    assert result.parameters.data_blocks == 600
    assert image.stat().st_size == result.parameters.end_bytes


@pytest.fixture
def outer(tmp_path: Path) -> Path:
    """An EROFS image whose last file is an image with a hash area."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "noise").write_bytes(NOISE[:1_000_000])
    (tmp_path / "b").mkdir()
    build_image(tmp_path / "a", tmp_path / "b" / "inner", verity=True)
    build_image(tmp_path / "b", tmp_path / "outer")
    return tmp_path / "outer"


def test_a_formatted_file_at_the_end_of_an_image_is_data(outer: Path, tmp_path: Path) -> None:
    data = outer.read_bytes()
    with open(outer, "rb") as file:
        assert find_hash_area(file.fileno(), len(data)) is None
    with pytest.raises(CallError, match="no verity superblock"):
        read_layer(outer)
    result = format_image(outer)
    assert result.parameters.data_size_bytes == len(data)
    with pytest.raises(CallError, match=f"has a hash area at {len(data)} already"):
        format_image(outer)
    assert format_image(outer, force=True).parameters.data_size_bytes == len(data)
    assert read_layer(outer).parameters.data_size_bytes == len(data)
    assert outer.read_bytes()[: len(data)] == data
    assert verify_image(outer).intact


def test_an_image_is_built_and_formatted_over_a_formatted_file(outer: Path, tmp_path: Path) -> None:
    built = build_image(tmp_path / "b", tmp_path / "again", verity=True)
    assert built.verity is not None
    assert built.verity.data_size_bytes == outer.stat().st_size
    assert verify_image(tmp_path / "again").intact


def test_a_file_system_is_not_overwritten_even_if_forced(outer: Path) -> None:
    data = outer.read_bytes()
    blocks = len(data) // 4096
    with pytest.raises(CallError, match="would overwrite its file system"):
        format_image(outer, terms=VerityTerms(data_blocks=blocks - 1), force=True)
    with pytest.raises(CallError, match="would overwrite its file system"):
        format_image(outer, terms=VerityTerms(data_blocks=1, hash_offset_bytes=8192), force=True)
    assert outer.read_bytes() == data
    terms = VerityTerms(data_blocks=blocks)
    assert format_image(outer, terms=terms).parameters.data_blocks == blocks


def test_a_hash_area_in_bytes_of_no_file_system_is_not_guessed_at(image: Path) -> None:
    format_image(image)
    inner = image.read_bytes()
    image.write_bytes(NOISE[:4096] + inner)
    for force in (False, True):
        with call_error("conflict", match="cannot tell where the data of") as caught:
            format_image(image, force=force)
        assert caught.value.hint == "say data_blocks"
    assert image.read_bytes() == NOISE[:4096] + inner
    image.write_bytes(NOISE[:4096] + inner + bytes(-len(inner) % 4096))
    blocks = image.stat().st_size // 4096
    terms = VerityTerms(data_blocks=blocks)
    assert format_image(image, terms=terms).parameters.data_blocks == blocks


def test_an_existing_hash_file_is_kept_unless_forced(image: Path, tmp_path: Path) -> None:
    hashes = tmp_path / "hashes"
    hashes.write_bytes(b"precious")
    with call_error("conflict"):
        format_image(image, hash_file=hashes)
    assert hashes.read_bytes() == b"precious"
    result = format_image(image, hash_file=hashes, force=True)
    assert hashes.stat().st_size == result.parameters.end_bytes


@pytest.mark.parametrize(
    ("choices", "field"),
    [
        ({"data_blocks": 701}, "data_blocks"),
        ({"data_blocks": 1 << 50}, "data_blocks"),
        ({"hash_offset_bytes": 100}, "hash_offset_bytes"),
        ({"hash_offset_bytes": 512}, "hash_offset_bytes"),
        ({"hash_offset_bytes": (1 << 63) - 512}, "hash_offset_bytes"),
    ],
)
def test_impossible_choices_are_refused_by_name(
    image: Path, choices: dict[str, object], field: str
) -> None:
    with call_error("invalid", object=field):
        format_image(image, terms=VerityTerms(**choices))  # type: ignore[arg-type]
    assert image.read_bytes() == NOISE


def test_a_size_that_is_no_multiple_is_refused_with_a_remedy(image: Path) -> None:
    os.truncate(image, 5000)
    with pytest.raises(CallError, match="no multiple of 4096") as caught:
        format_image(image)
    assert caught.value.hint == "truncate -s %4096 fills it up with zeros"
    os.truncate(image, 0)
    with pytest.raises(CallError, match="it is empty"):
        format_image(image)


def test_missing_file_directory_and_device_node_are_refused(tmp_path: Path) -> None:
    with call_error("not_found"):
        format_image(tmp_path / "missing")
    with call_error("invalid"):
        format_image(tmp_path)
    with call_error("invalid"):
        format_image("/dev/null")


def test_a_locked_image_is_busy(image: Path) -> None:
    with image.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_SH)
        with call_error("busy"):
            format_image(image)
    assert image.read_bytes() == NOISE


def test_an_attached_image_is_busy(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attribute = tmp_path / "sys/loop7/loop/backing_file"
    attribute.parent.mkdir(parents=True)
    partitions = tmp_path / "partitions"
    partitions.write_text("major minor  #blocks  name\n\n   7  7  2800 loop7\n 7 0 9 loop0\n")
    monkeypatch.setattr(busy, "_PARTITIONS", str(partitions))
    attribute.write_text(f"{image}\n")
    monkeypatch.setattr(busy, "_BLOCK_DEVICES", str(tmp_path / "sys"))
    with image.open("rb"), call_error("busy", match="attached to /dev/loop7"):
        format_image(image)


def test_format_image_accepts_image_open_for_reading(image: Path) -> None:
    with image.open("rb"):
        assert format_image(image).parameters.data_blocks == 700


def test_format_image_skips_mount_search_if_image_is_not_open(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(image, os.O_RDWR)
    alone = not busy._is_open_elsewhere(fd)
    with image.open("rb"):
        assert busy._is_open_elsewhere(fd)
    os.close(fd)
    if alone:  # the file system of the tests has leases
        monkeypatch.setattr(busy, "_refuse_mount", lambda *_: pytest.fail("looked for mounts"))
        format_image(image)


def test_a_mounted_image_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "an image"
    image.write_bytes(NOISE)
    mountinfo = tmp_path / "mountinfo"
    escaped = str(image).replace(" ", "\\040")
    mountinfo.write_text(
        "21 1 0:20 / /sys rw - sysfs sysfs rw\n"
        f"90 1 0:50 / /mnt ro,relatime shared:1 - erofs {escaped} ro\n"
    )
    monkeypatch.setattr(busy, "_MOUNTINFO", str(mountinfo))
    link = tmp_path / "link"
    link.symlink_to(image)
    for name in (image, link):
        with image.open("rb"), call_error("busy", match="mounted on '/mnt'"):
            format_image(name)


def test_the_uuid_follows_from_content_alone() -> None:
    digest = hashlib.sha256(b"content").digest()
    identity = derive_uuid(digest)
    assert identity == derive_uuid(digest)
    assert identity.version == 5
    assert identity != derive_uuid(hashlib.sha256(b"other").digest())
    with pytest.raises(ValueError, match="empty"):
        derive_uuid(b"")


def test_salt_and_uuid_are_random_unless_given(image: Path, tmp_path: Path) -> None:
    one = format_image(image, hash_file=tmp_path / "one")
    two = format_image(image, hash_file=tmp_path / "two")
    assert len(one.parameters.salt) == 32
    assert one.parameters.salt != two.parameters.salt
    assert one.uuid != two.uuid
