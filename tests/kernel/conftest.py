"""Block devices, images and a check for leaks, for tests on a real kernel (scripts/test kernel)."""

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.beds import loopbed
from tests.beds.agentbed import EngineBed, Pack, attached_pack
from tests.beds.calls import run
from tests.beds.veritybed import VerityImage, make_verity_image

# linux/dm-ioctl.h: _IOWR(0xfd, 2, struct dm_ioctl), asked for without the code under test
DM_LIST_DEVICES = 0xC138FD02
_DM_HEADER_BYTES = 312
_DM_BUFFER_BYTES = 64 * 1024
_SETTLE_SECONDS = 3.0

#: Where the agent makes directories, which go with what is in them.
_ROOTS = tuple(f"/run/{name}" for name in ("layers", "overlays", "volumes", "shares", "devtrees"))

Tree = Mapping[str, bytes]


@pytest.fixture(scope="module")
def pack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pack]:
    """Attach a pack of as many layers as the test module's ``PACK_LAYERS``."""
    with attached_pack(tmp_path_factory.mktemp("pack"), request.module.PACK_LAYERS) as pack:
        yield pack


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[EngineBed]:
    """Open an engine without layers."""
    with EngineBed(tmp_path / "state") as bed:
        yield bed


@pytest.fixture(scope="session", autouse=True)
def _real_kernel() -> None:
    try:
        os.close(os.open("/dev/mapper/control", os.O_RDWR))
    except OSError as problem:
        pytest.exit(
            f"no device-mapper on this kernel ({problem.strerror}): run `scripts/test kernel`", 3
        )


@dataclass(frozen=True, slots=True)
class _Holdings:
    """What a test can leave behind in the kernel."""

    dm_devices: frozenset[str]
    mounts: frozenset[tuple[str, str]]
    loops: frozenset[str]
    directories: frozenset[str]

    @classmethod
    def now(cls) -> "_Holdings":
        blocks = Path("/sys/block")
        loops = (path.parts[3] for path in blocks.glob("loop*/loop/backing_file"))
        with open("/proc/self/mountinfo") as file:
            mounts = frozenset((line.split()[0], line.split()[4]) for line in file)
        directories = frozenset(filter(os.path.lexists, _ROOTS))
        return cls(frozenset(_dm_devices()), mounts, frozenset(loops), directories)

    def beyond(self, before: "_Holdings") -> list[str]:
        return [
            *(f"device {name}" for name in sorted(self.dm_devices - before.dm_devices)),
            *(f"mount at {path}" for _, path in sorted(self.mounts - before.mounts)),
            *(f"loop device {name}" for name in sorted(self.loops - before.loops)),
            *(f"directory {path}" for path in sorted(self.directories - before.directories)),
        ]


def _dm_devices() -> Iterator[str]:
    """Yield the names of all devices, those without a table too, which sysfs does not show."""
    buffer = bytearray(_DM_BUFFER_BYTES)
    struct.pack_into("<5I", buffer, 0, 4, 0, 0, len(buffer), _DM_HEADER_BYTES)
    with open("/dev/mapper/control", "rb") as control:
        fcntl.ioctl(control, DM_LIST_DEVICES, buffer)
    offset = struct.unpack_from("<I", buffer, 16)[0]
    while True:
        dev, step = struct.unpack_from("<QI", buffer, offset)
        if dev == 0:
            return
        yield buffer[offset + 12 : buffer.index(b"\0", offset + 12)].decode()
        if step == 0:
            return
        offset += step


@pytest.fixture(autouse=True)
def _no_leaks(_real_kernel: None) -> Iterator[None]:
    """Fail a test that leaves a dm device, a mount, a loop device or a directory of the agent
    behind, and clean up."""
    before = _Holdings.now()
    yield
    leaks = _settled(before)
    if leaks:
        _clean_up(before)
        pytest.fail("left behind: " + ", ".join(leaks))


def _settled(before: _Holdings) -> list[str]:
    # deferred removal and autoclear end in a worker of the kernel, shortly after the last close
    end = time.monotonic() + _SETTLE_SECONDS
    while True:
        leaks = _Holdings.now().beyond(before)
        if not leaks or time.monotonic() > end:
            return leaks
        time.sleep(0.01)


def _clean_up(before: _Holdings) -> None:
    now = _Holdings.now()
    paths = [path for _, path in sorted(now.mounts - before.mounts, key=lambda m: -int(m[0]))]
    for path in paths:
        subprocess.run(["umount", "-l", path], capture_output=True, check=False)
    for name in now.dm_devices - before.dm_devices:
        command = ["dmsetup", "remove", "--force", "--deferred", name]
        subprocess.run(command, capture_output=True, check=False)
    for root in now.directories - before.directories:
        for path, _, _ in os.walk(root, topdown=False):
            with contextlib.suppress(OSError):  # what is in it is the test's
                os.rmdir(path)


@pytest.fixture
def loop_device() -> Iterator[Callable[..., str]]:
    """A factory: ``loop_device(image, readonly=True) -> "/dev/loopN"``, detached after the test."""
    with contextlib.ExitStack() as stack:

        def attach(image: Path | str, *, readonly: bool = True, block_size_bytes: int = 512) -> str:
            path, fd = loopbed.attach(
                Path(image), readonly=readonly, block_size_bytes=block_size_bytes, autoclear=True
            )
            # autoclear alone would wait for the last user; this makes one that stays show as a leak
            stack.callback(loopbed.detach, fd)
            return path

        yield attach


@pytest.fixture
def erofs_image(tmp_path: Path) -> Callable[[Tree], Path]:
    """A factory: ``erofs_image({"etc/motd": b"hello\\n"}) -> path``, made by mkfs.erofs."""
    count = 0

    def make(tree: Tree) -> Path:
        nonlocal count
        count += 1
        source, image = tmp_path / f"tree{count}", tmp_path / f"layer{count}.erofs"
        source.mkdir()
        for name, content in tree.items():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        run("mkfs.erofs", "-T0", "--all-root", str(image), str(source))
        return image

    return make


@pytest.fixture
def verity_image() -> Callable[..., VerityImage]:
    """A factory: ``verity_image(image, *veritysetup_options)``; the tree goes into the same file.

    The data is padded to whole blocks of 4096 bytes first.
    """
    return make_verity_image
