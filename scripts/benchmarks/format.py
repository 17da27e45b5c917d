"""Hash trees side by side with veritysetup, in one run, on this machine.

Every round runs each contender once on the same warm file, so that what else the machine does hits
all alike; a run that others disturbed is made again, up to two times. Rows give the median and
the 99th percentile of the rounds. ``ratio`` is how many times faster than ``versus`` (by medians).
veritysetup is timed as it is used: as a program.
"""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

from rootfs import crew, multibuffer
from rootfs.verify import Terms, verify_image
from rootfs.verity import format_image

__all__ = ("format_rows",)

BED = "host"
PEER = "veritysetup"
MIB = 1 << 20
SALT = bytes(range(32))
IDENTITY = UUID("12345678-1234-5678-9abc-123456789abc")
DENSE_BYTES = 512 * MIB
SPARSE_BYTES = 1024 * MIB
HUGE_BYTES = 16384 * MIB
LAYERS = 64
_ATTEMPTS = 3
_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
LAYER_BYTES = MIB

Row = dict[str, object]
Contender = Callable[[], object]


def format_rows(rounds: int = 9) -> list[Row]:
    """Return one row for each contender and task.

    Raises:
        RuntimeError: veritysetup is not installed, or it made another tree.
    """
    if shutil.which(PEER) is None:
        raise RuntimeError("veritysetup is not installed (Debian: cryptsetup-bin)")
    with tempfile.TemporaryDirectory(prefix="bench-format-", dir=_memory_directory()) as name:
        directory = Path(name)
        return [
            *_dense(directory, rounds),
            *_sparse(directory, rounds),
            *_small_layers(directory, rounds),
            *_memory(directory),
        ]


def _memory_directory() -> str | None:
    """Return where files are memory, so that no disk is measured; None if there is no room."""
    place = "/dev/shm"
    with contextlib.suppress(OSError):
        room = os.statvfs(place)
        if room.f_bavail * room.f_frsize > 2 * SPARSE_BYTES:
            return place
    return None


def _dense(directory: Path, rounds: int) -> list[Row]:
    image = directory / "dense"
    _fill(image, DENSE_BYTES)
    cores = crew.available_cores()
    contenders: dict[str, Contender] = {PEER: lambda: _veritysetup(image, DENSE_BYTES)}
    for workers in sorted({1, cores}):
        for accelerate in (False, True):
            if accelerate and multibuffer.library_version() is None:
                continue
            name = f"{workers} worker{'s' * (workers > 1)}, {_engine(accelerate)}"
            contenders[name] = _formatter(image, DENSE_BYTES, workers, accelerate)
    contenders["guestctl layer format"] = lambda: _command_line(image, DENSE_BYTES)
    _same_root(image, DENSE_BYTES)
    rows = _rows("format 512 MiB", contenders, rounds, scale=DENSE_BYTES / MIB)
    return rows + _verify(image, rounds)


def _verify(image: Path, rounds: int) -> list[Row]:
    result = format_image(image, salt=SALT, uuid=IDENTITY)
    command = [PEER, "verify", str(image), str(image), result.root_digest.hex()]
    command.append(f"--hash-offset={DENSE_BYTES}")
    terms = Terms(root_digest=result.root_digest)

    def verify() -> None:
        if not verify_image(image, terms=terms).intact:
            raise RuntimeError("the image is corrupt")

    contenders: dict[str, Contender] = {
        PEER: lambda: subprocess.run(command, check=True),
        f"{crew.available_cores()} workers": verify,
    }
    rows = _rows("verify 512 MiB", contenders, rounds, scale=DENSE_BYTES / MIB)
    image.unlink()
    return rows


def _sparse(directory: Path, rounds: int) -> list[Row]:
    image = directory / "sparse"
    with image.open("wb") as file:
        file.truncate(SPARSE_BYTES)
        for extent in range(0, SPARSE_BYTES, 10 * MIB):
            file.seek(extent)
            file.write(os.urandom(MIB))
    _same_root(image, SPARSE_BYTES)
    rows = _rows(
        "format 1 GiB, a tenth of it data",
        {
            PEER: lambda: _veritysetup(image, SPARSE_BYTES),
            "all cores": _formatter(image, SPARSE_BYTES, None, True),
        },
        rounds,
    )
    image.unlink()
    return rows


def _small_layers(directory: Path, rounds: int) -> list[Row]:
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

    return _rows("format 64 layers of 1 MiB", {PEER: peer, "in process": own}, rounds)


def _memory(directory: Path) -> Iterator[Row]:
    image = directory / "huge"
    with image.open("wb") as file:
        file.truncate(HUGE_BYTES)
    script = (
        "import sys, resource\n"
        "from rootfs.verity import format_image\n"
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
    for name, unit, value in (("time", "s", seconds), ("peak memory", "MiB", peak_mib)):
        yield _row(f"format 16 GiB of nothing: {name}", unit, [value], None, None)


def _rows(
    task: str, contenders: dict[str, Contender], rounds: int, *, scale: float | None = None
) -> list[Row]:
    """Time all contenders, round by round; in MiB/s if ``scale`` says how many MiB it is."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name].append(_quiet_seconds(contender))
    peer = statistics.median(seconds[PEER])
    rows = []
    for name, samples in seconds.items():
        ratio = None if name == PEER else peer / statistics.median(samples)
        values = samples if scale is None else [scale / sample for sample in samples]
        unit = "s" if scale is None else "MiB/s"
        rows.append(_row(f"{task}: {name}", unit, values, None if ratio is None else PEER, ratio))
    return rows


def _quiet_seconds(contender: Contender) -> float:
    """Time it; again, a few times, while others take more than a tenth of a core from it."""
    seconds = 0.0
    for _ in range(_ATTEMPTS):
        busy, own, begin = _busy_seconds(), _own_seconds(), time.perf_counter()
        contender()
        seconds = time.perf_counter() - begin
        others = _busy_seconds() - busy - (_own_seconds() - own)
        if others < 0.1 * seconds + 2 * _TICK_SECONDS:
            break
    return seconds


def _busy_seconds() -> float:
    """Return the seconds that all cores have worked since boot."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICK_SECONDS


def _own_seconds() -> float:
    """Return the seconds of this process and of its finished children."""
    return sum(os.times()[:4])


def _row(name: str, unit: str, values: list[float], versus: str | None, ratio: float | None) -> Row:
    # the bad end of a rate is its low one
    ordered = sorted(values, reverse=unit.endswith("/s"))
    return {
        "bed": BED,
        "name": name,
        "unit": unit,
        "median": statistics.median(values),
        "p99": ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))],
        "n": len(values),
        "versus": versus,
        "ratio": ratio,
    }


def _engine(accelerate: bool) -> str:
    return f"libIPSec_MB {multibuffer.library_version()}" if accelerate else "hashlib"


def _formatter(image: Path, size_bytes: int, workers: int | None, accelerate: bool) -> Contender:
    def run() -> None:
        format_image(image, salt=SALT, uuid=IDENTITY, workers=workers, accelerate=accelerate)
        os.truncate(image, size_bytes)

    return run


def _veritysetup(image: Path, size_bytes: int) -> str:
    command = [PEER, "format", str(image), str(image), f"--hash-offset={size_bytes}"]
    command += [f"--uuid={IDENTITY}", f"--salt={SALT.hex()}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    os.truncate(image, size_bytes)
    return output.split("Root hash:")[1].split()[0]


def _command_line(image: Path, size_bytes: int) -> None:
    script = "from rootfs.layer_cli import format_command; format_command()"
    command = [sys.executable, "-c", script, "--salt", SALT.hex(), str(image)]
    subprocess.run(command, capture_output=True, check=True)
    os.truncate(image, size_bytes)


def _same_root(image: Path, size_bytes: int) -> None:
    theirs = _veritysetup(image, size_bytes)
    ours = format_image(image, salt=SALT, uuid=IDENTITY).root_digest.hex()
    os.truncate(image, size_bytes)
    if ours != theirs:
        raise RuntimeError(f"{image}: veritysetup computes {theirs}, we {ours}")


def _fill(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(0, size_bytes, MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    for row in format_rows():
        ratio = row["ratio"]
        times = f"{ratio:6.2f}x" if isinstance(ratio, float) else ""
        print(f"{row['name']:55} {row['median']:10.3f} {row['unit']:6} {times}")
