"""The command line of guestctl, run in this process as a user runs it."""

import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from guestagent.host.ctl import main
from tests.beds.imagebed import write_crowd

#: The command line in a process of its own.
GUESTCTL = (sys.executable, "-c", "from guestagent.host.ctl import main; main()")
#: The same; its last line on stderr is the most memory that it had, in KiB. The ru_maxrss of a
#: process is at least what the one had that started it.
_MEASURED = (
    sys.executable,
    "-c",
    "import sys\n"
    "from guestagent.host.ctl import main\n"
    "try:\n"
    "    main()\n"
    "finally:\n"
    "    said = open('/proc/self/status').read()\n"
    "    print(said.split('VmHWM:')[1].split()[0], file=sys.stderr)\n",
)
#: Takes the words of a command and the exit status that it must have; returns what it prints.
Run = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a command left: its exit status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def guestctl(place: Path, *words: str, limit_bytes: int | None = None) -> Done:
    """Run a command line; ``limit_bytes`` ends every file there, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(place))
        stack.enter_context(mock.patch.object(sys, "argv", ["guestctl", "--json", *words]))
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        if limit_bytes is not None:
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        ended = stack.enter_context(pytest.raises(SystemExit))
        main()
    return Done(
        returncode=int(ended.value.code or 0), stdout=stdout.getvalue(), stderr=stderr.getvalue()
    )


def runner_in(place: Path) -> Run:
    """Return what runs guestctl with --json in a directory, as a process, and reads its output."""

    def run(*words: str, status: int = 0) -> Any:
        done = subprocess.run(
            [*GUESTCTL, "--json", *words], cwd=place, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, f"{words}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout) if done.stdout else None

    return run


@dataclass(frozen=True)
class Built:
    """What building an image took: seconds, and the largest memory of the process."""

    seconds: float
    peak_mib: float
    inode_count: int


def build_crowd(output: Path, count: int, filesystem: str) -> Built:
    """Have guestctl build an image with a hash tree of ``count`` entries, from a tar that is made
    while it reads."""
    words = ("layer", "build", "-", str(output), "--filesystem", filesystem, "--verity")
    begin = time.monotonic()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        builder = subprocess.Popen(
            [*_MEASURED, "--json", *words], stdin=subprocess.PIPE, stdout=said, stderr=errors
        )
        assert builder.stdin is not None
        with builder.stdin as tar:
            write_crowd(tar, count)
        builder.wait()
        seconds = time.monotonic() - begin
        said.seek(0)
        errors.seek(0)
        complaints = errors.read().decode()
        assert builder.returncode == 0, complaints
        return Built(seconds, int(complaints.split()[-1]) / 1024, json.load(said)["inodes"])
