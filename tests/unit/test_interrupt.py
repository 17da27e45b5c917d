"""Ctrl-C in the middle of the work: the program ends at once, and nothing half made stays."""

import contextlib
import gzip
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.beds.imagebed import Member, make_tar, zstd

SECONDS = 30
COMMANDS = (
    "import click; from rootfs.cli import image, layer;"
    "click.Group('guestctl', commands=[*image.COMMANDS, *layer.LAYER_COMMANDS,"
    " *image.LAYER_COMMANDS])()"
)
TAR = make_tar([Member("noise", os.urandom(4 << 20))])


@contextlib.contextmanager
def started(place: Path, *words: str, **streams: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMANDS, *words],
        cwd=place,
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])},
        # whoever runs the tests may have told us to ignore it, which is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **streams,  # type: ignore[call-overload]
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.mark.parametrize(
    "words",
    [
        ("build", "-", "image"),
        ("build", "-", "image", "--verity", "--sidecar"),
        ("pack", "build", "-", "pack.img", "--format", "tar"),
    ],
    ids=" ".join,
)
def test_while_the_source_still_comes(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "image").write_bytes(b"old")
    before = contents(tmp_path)
    pipe = subprocess.PIPE
    with started(tmp_path, *words, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        process.stdin.write(TAR[: 2 << 20])
        process.stdin.flush()  # more than a pipe holds: it is reading
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 1
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "how", [(), ("--workers", "1", "--hash-file", "hashes")], ids=["in place", "apart"]
)
def test_while_blocks_are_hashed(tmp_path: Path, how: tuple[str, ...]) -> None:
    noise = os.urandom(1 << 20)
    with (tmp_path / "image").open("wb") as file:
        for _ in range(48):
            file.write(noise)
    before = contents(tmp_path)
    slow = ("--hash", "sha512", "--data-block-size", "512", "--hash-block-size", "512")
    leader, follower = pty.openpty()
    try:
        words = ("format", *slow, *how, "image")
        with started(tmp_path, *words, stdout=subprocess.DEVNULL, stderr=follower) as process:
            os.close(follower)
            shown = b""
            while b"hashing" not in shown:  # the first that the bar shows
                shown += os.read(leader, 65536)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # EIO: nobody is left who could write
                while piece := os.read(leader, 65536):
                    shown += piece
            assert process.wait(SECONDS) == 1
    finally:
        os.close(leader)
    assert b"Aborted" in shown
    assert b"Traceback" not in shown
    assert contents(tmp_path) == before


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_while_a_compressed_source_does_not_come(tmp_path: Path, compression: str) -> None:
    """Whoever waits for more, in whatever thread, must not keep the program from ending."""
    packed = gzip.compress(TAR) if compression == "gzip" else zstd(TAR)
    pipe = subprocess.PIPE
    with started(tmp_path, "build", "-", "image", stdin=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        process.stdin.write(packed[: 2 << 20])
        process.stdin.flush()
        spool_is_filled(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 1
    assert contents(tmp_path) == {}


def spool_is_filled(pid: int) -> None:
    """Wait until the program has decompressed what came: it then waits for more."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "(deleted)" in os.readlink(link) and link.stat().st_size > 1 << 20:
                    return
        time.sleep(0.02)
    raise AssertionError("nothing was decompressed")
