"""Hash trees side by side with veritysetup, which is timed as it is used: as a program."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import UUID

from guestagent.storage.verity import VerityTerms
from rootfs.verity import multibuffer
from rootfs.verity.compose import Part, compose_tree, composed_parameters
from rootfs.verity.formatter import format_image
from rootfs.verity.verifier import verify_image
from rootfs.verity.workers import available_cores
from scripts.benchmarks.contest import BED, Contender, contest
from scripts.benchmarks.rows import Row, row

__all__ = ("format_rows",)

PEER = "veritysetup"
MIB = 1 << 20
SALT = bytes(range(32))
IDENTITY = UUID("12345678-1234-5678-9abc-123456789abc")
DENSE_BYTES = 512 * MIB
SPARSE_BYTES = 1024 * MIB
HUGE_BYTES = 16384 * MIB
LAYERS = 64
LAYER_BYTES = MIB


def format_rows() -> list[Row]:
    """Return one row for each contender and task.

    Raises:
        RuntimeError: veritysetup is not installed, or it made another tree.
    """
    if shutil.which(PEER) is None:
        raise RuntimeError("veritysetup is not installed (Debian: cryptsetup-bin)")
    with tempfile.TemporaryDirectory(prefix="bench-format-", dir=_memory_directory()) as name:
        directory = Path(name)
        return [
            *_dense(directory),
            *_sparse(directory),
            *_small_layers(directory),
            *_huge(directory),
            *_composed(directory),
        ]


def _memory_directory() -> str | None:
    """Return where files are memory, so that no disk is measured; None if there is no room."""
    place = "/dev/shm"
    with contextlib.suppress(OSError):
        room = os.statvfs(place)
        if room.f_bavail * room.f_frsize > 2 * SPARSE_BYTES:
            return place
    return None


def _dense(directory: Path) -> list[Row]:
    image = directory / "dense"
    _fill(image, DENSE_BYTES)
    cores = available_cores()
    contenders: dict[str, Contender] = {PEER: lambda: _veritysetup(image, DENSE_BYTES)}
    for workers in sorted({1, cores}):
        for accelerate in (False, True):
            if accelerate and multibuffer.library_version() is None:
                continue
            name = f"{workers} worker{'s' * (workers > 1)}, {_engine(accelerate)}"
            contenders[name] = _formatter(image, DENSE_BYTES, workers, accelerate)
    contenders["guestctl layer format"] = lambda: _command_line(image, DENSE_BYTES)
    _same_root(image, DENSE_BYTES)
    rows = contest("format 512 MiB", contenders, amount=DENSE_BYTES / MIB, unit="MiB")
    rows += _memory("format 512 MiB", image)
    os.truncate(image, DENSE_BYTES)
    return rows + _verify(image)


def _verify(image: Path) -> list[Row]:
    result = format_image(image, terms=VerityTerms(salt=SALT), uuid=IDENTITY)
    command = [PEER, "verify", str(image), str(image), result.root_digest.hex()]
    command.append(f"--hash-offset={DENSE_BYTES}")
    terms = VerityTerms(root_digest=result.root_digest)

    def verify() -> None:
        if not verify_image(image, terms=terms).intact:
            raise RuntimeError("the image is corrupt")

    contenders: dict[str, Contender] = {
        PEER: lambda: subprocess.run(command, check=True),
        f"{available_cores()} workers": verify,
    }
    rows = contest("verify 512 MiB", contenders, amount=DENSE_BYTES / MIB, unit="MiB")
    image.unlink()
    return rows


def _sparse(directory: Path) -> list[Row]:
    image = directory / "sparse"
    with image.open("wb") as file:
        file.truncate(SPARSE_BYTES)
        for extent in range(0, SPARSE_BYTES, 10 * MIB):
            file.seek(extent)
            file.write(os.urandom(MIB))
    _same_root(image, SPARSE_BYTES)
    rows = contest(
        "format 1 GiB, a tenth of it data",
        {
            PEER: lambda: _veritysetup(image, SPARSE_BYTES),
            "all cores": _formatter(image, SPARSE_BYTES, None, True),
        },
        amount=SPARSE_BYTES / MIB,
        unit="MiB",
    )
    image.unlink()
    return rows


def _small_layers(directory: Path) -> list[Row]:
    images = [directory / f"layer-{number}" for number in range(LAYERS)]
    for image in images:
        _fill(image, LAYER_BYTES)
    _same_root(images[0], LAYER_BYTES)

    def peer() -> None:
        for image in images:
            _veritysetup(image, LAYER_BYTES)

    def own() -> None:
        for image in images:
            _formatter(image, LAYER_BYTES, None, True)()

    contenders = {PEER: peer, "in process": own}
    return contest("format 64 layers of 1 MiB", contenders, amount=LAYERS, unit="layers")


def _huge(directory: Path) -> list[Row]:
    image = directory / "huge"
    with image.open("wb") as file:
        file.truncate(HUGE_BYTES)
    rows = _memory("format 16 GiB of nothing", image)
    image.unlink()
    return rows


def _composed(directory: Path) -> list[Row]:
    """Hash an image of 64 layers as a whole, and compose its tree of theirs."""
    image, hashes, tree = (directory / name for name in ("image", "hashes", "tree"))
    part_bytes = DENSE_BYTES // LAYERS
    _fill(image, part_bytes)
    terms = VerityTerms(salt=SALT)
    made = format_image(image, terms=terms, hash_file=hashes)
    image.write_bytes(image.read_bytes() * LAYERS)
    with hashes.open("rb") as file, tree.open("w+b") as target:
        part = Part(name="layer", fd=file.fileno(), parameters=made.parameters)
        parts = [part] * LAYERS
        parameters = composed_parameters(parts)

        def compose() -> bytes:
            return compose_tree(parts, parameters, target.fileno(), 0)

        def whole() -> bytes:
            name = directory / "whole"
            return format_image(image, terms=terms, hash_file=name, force=True).root_digest

        if compose() != whole():
            raise RuntimeError("the composed tree is not that of the whole image")
        contenders: dict[str, Contender] = {"hashing the whole": whole, "composing": compose}
        task = "tree of 512 MiB in 64 layers"
        return contest(task, contenders, amount=DENSE_BYTES / MIB, unit="MiB")


def _memory(task: str, image: Path) -> list[Row]:
    """Format once in a process of its own; return what it took at most, the largest worker too."""
    script = (
        "import sys, resource\n"
        "from rootfs.verity.formatter import format_image\n"
        "format_image(sys.argv[1])\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    begin = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", script, image], capture_output=True, text=True, check=True
    ).stdout
    seconds = time.perf_counter() - begin
    peak_mib = max(map(int, output.split())) / 1024
    return [
        row(BED, f"{task}: time", "s", [seconds]),
        row(BED, f"{task}: peak memory", "MiB", [peak_mib]),
    ]


def _engine(accelerate: bool) -> str:
    return f"libIPSec_MB {multibuffer.library_version()}" if accelerate else "hashlib"


def _formatter(image: Path, size_bytes: int, workers: int | None, accelerate: bool) -> Contender:
    def run() -> None:
        format_image(
            image,
            terms=VerityTerms(salt=SALT),
            uuid=IDENTITY,
            workers=workers,
            accelerate=accelerate,
        )
        os.truncate(image, size_bytes)

    return run


def _veritysetup(image: Path, size_bytes: int) -> str:
    command = [PEER, "format", str(image), str(image), f"--hash-offset={size_bytes}"]
    command += [f"--uuid={IDENTITY}", f"--salt={SALT.hex()}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    os.truncate(image, size_bytes)
    return output.split("Root hash:")[1].split()[0]


def _command_line(image: Path, size_bytes: int) -> None:
    script = "from rootfs.cli.layer import format_command; format_command()"
    command = [sys.executable, "-c", script, "--salt", SALT.hex(), str(image)]
    subprocess.run(command, capture_output=True, check=True)
    os.truncate(image, size_bytes)


def _same_root(image: Path, size_bytes: int) -> None:
    expected = _veritysetup(image, size_bytes)
    computed = format_image(image, terms=VerityTerms(salt=SALT), uuid=IDENTITY).root_digest.hex()
    os.truncate(image, size_bytes)
    if computed != expected:
        raise RuntimeError(f"{image}: veritysetup computes {expected}, we {computed}")


def _fill(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(0, size_bytes, MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
