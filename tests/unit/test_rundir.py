"""Directories of runs, and what is left of killed ones."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rootfs.machine.rundir import run_directory

_RUN = """
import os, signal, subprocess, sys
from rootfs.machine.rundir import run_directory
with run_directory("bed-") as run:
    (run.path / "file").touch()
    inherited = (run.lock_fd,) if "handed-down" in sys.argv else ()
    child = subprocess.Popen(["cat"], stdout=subprocess.DEVNULL, pass_fds=inherited)
    print(run.path, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def killed_run(temporary: Path, stdin: int, *words: str) -> Path:
    """Start a run that is killed at once, while its child reads ``stdin``."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *words],
        stdin=stdin, stdout=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "TMPDIR": str(temporary)}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    return Path(done.stdout.strip())


def test_run_directory_is_removed_with_the_run(temporary: Path) -> None:
    with run_directory("bed-") as run:
        (run.path / "file").touch()
        assert run.path.parent == temporary
    assert list(temporary.iterdir()) == []


def test_next_run_removes_directory_of_killed_run(temporary: Path) -> None:
    left = killed_run(temporary, subprocess.DEVNULL)
    assert (left / "file").exists()
    with run_directory("bed-") as run:
        assert list(temporary.iterdir()) == [run.path]


def test_run_directory_stays_while_a_program_of_the_run_lives(temporary: Path) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as living:
        left = killed_run(temporary, reader, "handed-down")
        with run_directory("bed-"):
            assert left.exists()
        living.close()
        wait_until_unlocked(left)
    with run_directory("bed-"):
        assert not left.exists()


def wait_until_unlocked(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.close(fd)


def test_run_directory_leaves_foreign_directories_and_links(temporary: Path) -> None:
    """Directories of living processes, of other names, and links that pose as one."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    target = temporary / "target"
    for path in (target, temporary / f"bed-{os.getppid()}-x", temporary / "bed-", temporary / "b"):
        path.mkdir()
        (path / "file").touch()
    (temporary / f"bed-{dead.pid}-link").symlink_to(target)
    (temporary / f"bed-{dead.pid}-file").touch()
    before = sorted(temporary.rglob("*"))
    with run_directory("bed-"):
        pass
    assert sorted(temporary.rglob("*")) == before
