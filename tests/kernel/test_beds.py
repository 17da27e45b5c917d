"""The test bed itself: its kernel, its fixtures, and that a leak does not go unnoticed."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.beds.calls import run

_CID_LOCAL = 1  # VMADDR_CID_LOCAL, linux/vm_sockets.h

_LEAKY = """\
import subprocess

def test_leaves_a_device_behind():
    subprocess.run(["dmsetup", "create", "leak", "--notable"], check=True)

def test_leaves_a_mount_behind(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "leak", tmp_path], check=True)

def test_leaves_nothing_behind():
    pass
"""


def _mounted(image: str, target: Path, kind: str) -> None:
    target.mkdir()
    run("mount", "-t", kind, "-o", "ro", image, target)


@pytest.mark.parametrize("target", ["linear", "verity"])
def test_kernel_has_target(target: str) -> None:
    output = subprocess.run(["dmsetup", "targets"], capture_output=True, text=True, check=True)
    assert any(line.split()[0] == target for line in output.stdout.splitlines())


@pytest.mark.parametrize("kind", ["erofs", "squashfs", "overlay", "ext4", "tmpfs"])
def test_kernel_has_file_system(kind: str) -> None:
    kinds = Path("/proc/filesystems").read_text().split()
    assert kind in kinds


def test_vsock_loops_back() -> None:
    with socket.socket(socket.AF_VSOCK) as listener, socket.socket(socket.AF_VSOCK) as client:
        listener.bind((_CID_LOCAL, socket.VMADDR_PORT_ANY))
        listener.listen()
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            client.sendall(b"ping")
            assert server.recv(4) == b"ping"


def test_loopback_interface_is_up() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        socket.create_connection(listener.getsockname(), timeout=5).close()


def test_upper_layer_may_lie_in_tmp(tmp_path: Path) -> None:
    lower, upper, work, merged = (tmp_path / name for name in ("l", "u", "w", "m"))
    for path in (lower, upper, work, merged):
        path.mkdir()
    (lower / "file").write_text("below")
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    run("mount", "-t", "overlay", "-o", options, "overlay", merged)
    (merged / "file").write_text("above")
    run("umount", merged)
    assert (upper / "file").read_text() == "above"


def test_erofs_image_on_a_loop_device(
    tmp_path: Path,
    erofs_image: Callable[[dict[str, bytes]], Path],
    loop_device: Callable[..., str],
) -> None:
    device = loop_device(erofs_image({"etc/motd": b"hello\n"}))
    target = tmp_path / "mnt"
    _mounted(device, target, "erofs")
    content = (target / "etc/motd").read_bytes()
    run("umount", target)
    assert content == b"hello\n"


def test_loop_device_is_read_only_unless_asked(
    erofs_image: Callable[[dict[str, bytes]], Path], loop_device: Callable[..., str]
) -> None:
    image = erofs_image({"a": b"a"})
    for readonly in (True, False):
        name = Path(loop_device(image, readonly=readonly)).name
        assert Path("/sys/block", name, "ro").read_text() == f"{int(readonly)}\n"


def test_verity_image_is_what_veritysetup_verifies(
    erofs_image: Callable[[dict[str, bytes]], Path], verity_image: Callable[..., Any]
) -> None:
    image = verity_image(erofs_image({"a": os.urandom(100_000)}), "--salt", "ab" * 32)
    command = ["veritysetup", "verify", f"--hash-offset={image.hash_offset_bytes}"]
    command += [str(image.path), str(image.path), image.root_digest.hex()]
    assert subprocess.run(command, check=False).returncode == 0
    assert image.salt == b"\xab" * 32
    assert image.size_bytes > image.hash_offset_bytes == image.data_blocks * 4096


def test_leaks_are_found(tmp_path: Path) -> None:
    bed = Path(__file__).with_name("conftest.py").read_text()
    patience = "_SETTLE_SECONDS = 3.0"
    assert patience in bed
    # these leaks are meant to stay, so that all patience is in vain
    (tmp_path / "conftest.py").write_text(bed.replace(patience, "_SETTLE_SECONDS = 0.05"))
    (tmp_path / "test_leaky.py").write_text(_LEAKY)
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", "."]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert "left behind: device leak" in result.stdout
    assert "left behind: mount at" in result.stdout
    assert "3 passed, 2 errors" in result.stdout
