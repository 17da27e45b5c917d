"""Running a program of the distribution to its end: killed on cancel, its complaints kept."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO

from rootfs.imagefile.errors import from_os_error
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("feed", "missing", "run")

_MAX_SAID_BYTES = 64 << 20
#: Variables by which the programs would write something else: what they make depends on their
#: command line and input alone.
_FOREIGN_VARIABLES = ("SOURCE_DATE_EPOCH", "MKE2FS_", "E2FSPROGS_", "EXT2FS_")


def run(
    command: list[str],
    cancel: Deadline | None,
    *,
    environment: dict[str, str] | None = None,
) -> None:
    """Run a program to its end; it is killed when ``cancel`` says so.

    ``environment`` is added to this process's, without what changes images.

    Raises:
        CallError: ``unsupported``, there is no such program; ``device``, it failed; ``resource``,
            it says that the disk is full, or a limit on files ended it.
    """
    with _started(command, subprocess.DEVNULL, environment) as (program, said):
        _finish(program, said, command, cancel)


def feed(
    command: list[str],
    pieces: Iterator[bytes],
    cancel: Deadline | None,
    *,
    environment: dict[str, str] | None = None,
) -> None:
    """Run a program with a stream as its input.

    Raises:
        CallError: as ``run``; what ``pieces`` raises.
    """
    with _started(command, subprocess.PIPE, environment) as (program, said):
        assert program.stdin is not None
        with contextlib.suppress(BrokenPipeError), program.stdin as pipe:
            for piece in pieces:
                if cancel is not None:
                    cancel.check(f"run {command[0]}")
                pipe.write(piece)
        _finish(program, said, command, cancel)


@contextlib.contextmanager
def _started(
    command: list[str], stdin: int, environment: dict[str, str] | None
) -> Iterator[tuple["subprocess.Popen[bytes]", IO[bytes]]]:
    """Start a program; what it says goes to a file, so that it never waits for a reader."""
    with tempfile.TemporaryFile() as said:
        try:
            program = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=said,
                stderr=said,
                env={**_environment(), **(environment or {})},
            )
        except FileNotFoundError as problem:
            raise missing(command[0], problem) from problem
        except OSError as problem:
            raise from_os_error(problem, step="start", object=command[0]) from problem
        with program:
            try:
                yield program, said
            finally:
                program.kill()


def _environment() -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN_VARIABLES)
    }
    return {**kept, "LC_ALL": "C"}


def _finish(
    program: "subprocess.Popen[bytes]",
    said: IO[bytes],
    command: list[str],
    cancel: Deadline | None,
) -> None:
    """Wait for the program's end, and judge its exit status."""
    process_fd = os.pidfd_open(program.pid)
    try:
        if cancel is not None:
            cancel.wait([process_fd], f"run {command[0]}")
        status = program.wait()
    finally:
        os.close(process_fd)
    if status == 0:
        return
    said.seek(0)
    text = said.read(_MAX_SAID_BYTES).decode(errors="replace").strip()
    full = status == -signal.SIGXFSZ or "No space left" in text or "File too large" in text
    how = f"status {status}" if status >= 0 else f"signal {-status}"
    raise CallError(
        "resource" if full else "device",
        f"cannot make the image: {command[0]} ended with {how}: {text[-2000:]}",
        step=f"run {command[0]}",
        object=command[0],
    )


def missing(program: str, problem: OSError) -> CallError:
    """Return the error for a program that is not installed."""
    return CallError(
        "unsupported",
        f"cannot make the image: there is no program {program}",
        errno=problem.errno,
        step=f"run {program}",
        object=program,
    )
