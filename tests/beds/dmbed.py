"""What kernel tests stand on: loop devices, images, a device-mapper that must be empty afterwards.

Everything is a context manager that takes down what it made, and ``no_leaks`` fails a test that
leaves a device, a mount, a loop device, a descriptor or a thread behind.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from guestagent.storage import syscalls
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.mountinfo import read_mounts
from tests.beds import loopbed
from tests.beds.calls import run as run
from vsock.deadline import Deadline
from vsock.retry import retry

_SETTLED_SECONDS = 2.0
_UNLOADED_SECONDS = 20.0


@contextlib.contextmanager
def loop_device(image: Path, *, readonly: bool = True) -> Iterator[str]:
    """A loop device over ``image``; yields its node."""
    node, fd = loopbed.attach(image, readonly=readonly)
    os.close(fd)  # so that none of the device's users is us
    try:
        yield node
    finally:
        loopbed.detach(os.open(node, os.O_RDONLY | os.O_CLOEXEC))


@contextlib.contextmanager
def scsi_debug(*parameters: str) -> Iterator[None]:
    """Hosts of SCSI disks in memory, by a module of the kernel; it is unloaded at the end, so that
    the parameters are those of one user."""
    run("modprobe", "sd_mod")
    run("modprobe", "scsi_debug", *parameters)
    try:
        yield
    finally:
        with contextlib.closing(Deadline(_UNLOADED_SECONDS)) as deadline:
            retry(
                lambda: run("modprobe", "-r", "scsi_debug"),
                deadline,
                when=lambda error: isinstance(error, AssertionError),  # busy after a probe
                step="unload scsi_debug",
            )


def dev_of(node: str) -> str:
    number = os.stat(node).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def erofs_image(directory: Path, name: str, files: dict[str, bytes]) -> Path:
    """An EROFS image that holds ``files``, padded to whole 4 KiB blocks."""
    tree = directory / f"{name}.d"
    tree.mkdir()
    for path, data in files.items():
        (tree / path).write_bytes(data)
    image = directory / f"{name}.erofs"
    run("mkfs.erofs", "-T0", "-U00000000-0000-0000-0000-000000000001", image, tree)
    size = (image.stat().st_size + 4095) & ~4095
    os.truncate(image, size)
    return image


class VerityImage:
    """An image with its hash tree behind it, made by veritysetup."""

    def __init__(self, image: Path, *, salt: str = "ab" * 32) -> None:
        self.path = image
        self.data_bytes = image.stat().st_size
        self.data_blocks = self.data_bytes // 4096
        options = ["--data-blocks", self.data_blocks, "--hash-offset", self.data_bytes]
        text = run("veritysetup", "format", "--salt", salt, *options, image, image)
        root = next(line.split()[-1] for line in text.splitlines() if "Root hash" in line)
        self.root_digest = bytes.fromhex(root)
        self.salt = bytes.fromhex(salt)
        self.hash_start_block = self.data_blocks + 1
        self.size_bytes = (image.stat().st_size + 511) & ~511
        os.truncate(image, self.size_bytes)


def open_free_disk(node: str) -> int:
    """Open a disk for ourselves, which no device-mapper device has any more.

    Before Linux 6.9 it is free once the device has gone; since then a tick later (delayed fput).
    """
    major, minor = os.uname().release.split(".")[:2]
    is_late = (int(major), int(minor)) >= (6, 9)
    until = time.monotonic() + (_SETTLED_SECONDS if is_late else 0.0)
    while True:
        try:
            return os.open(node, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
        time.sleep(0.001)


def _open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the directory's own descriptor
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found


def _bound_loops() -> set[str]:
    return {str(path.parent.parent) for path in Path("/sys/block").glob("loop*/loop/backing_file")}


@contextlib.contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if anything is there at the end that was not there at the beginning."""

    def look() -> dict[str, set[str]]:
        state = {
            "mounts": {f"{mount.mount_id} {mount.target}" for mount in read_mounts()},
            "threads": {thread.name for thread in threading.enumerate()},
        }
        if os.path.exists("/proc/misc") and "device-mapper" in Path("/proc/misc").read_text():
            with Control() as control:
                # where there is none this may be a machine whose loop devices others use, too
                state["loop devices"] = _bound_loops()
                state["dm devices"] = {name for name, _, _ in control.list_devices()}
        state["descriptors"] = _open_files()
        return state

    before = look()
    yield
    # since Linux 6.9 the kernel closes the disk of a device that was removed by deferral a tick
    # later (delayed fput), and then only is a loop device detached
    until = time.monotonic() + _SETTLED_SECONDS
    while True:
        left = {kind: found - before.get(kind, set()) for kind, found in look().items()}
        kinds = [kind for kind, found in left.items() if found]
        if kinds != ["loop devices"] or time.monotonic() > until:
            break
        time.sleep(0.01)
    for kind, found in left.items():
        assert found == set(), f"{kind} left behind: {found}"


def isolate_mounts() -> None:
    """Give the process its own mount namespace, once, so that no mount escapes from a test."""
    if not _isolated:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        _isolated.append(True)


_isolated: list[bool] = []
