"""Decompressing zstd by the ``zstd`` program: a stream in, a stream out, nothing left behind.

Python 3.11 has no zstd of its own. The program decompresses on another core meanwhile.
"""

import os
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator

from rootfs.image.tree import CHUNK_BYTES
from rootfs.imagefile.errors import from_os_error
from vsock.errors import CallError
from vsock.threads import start_thread

__all__ = ("ZSTD_MAGIC", "decompress_zstd")

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
#: A frame that needs a larger window is refused by the program: bounds its memory.
_MAX_WINDOW = "--memory=512MB"


def decompress_zstd(
    source: Iterator[bytes], *, stop: Callable[[], None]
) -> Generator[bytes, None, None]:
    """Yield what the pieces of ``source`` decompress to. Closing the iterator ends the program.
    ``source`` is read in a thread; ``stop`` is called in the end and must wake it from any wait.

    Raises:
        CallError: ``integrity``, damaged or cut; ``unsupported``, there is no such program; what
            ``source`` raises.
    """
    try:
        program = subprocess.Popen(
            ["zstd", "--decompress", "--stdout", "--quiet", _MAX_WINDOW],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as problem:
        raise CallError(
            "unsupported",
            "cannot read the zstd stream: there is no program zstd",
            errno=problem.errno,
            step="start zstd",
            object="zstd",
            hint="install the package zstd",
        ) from problem
    except OSError as problem:
        raise from_os_error(problem, step="start", object="zstd") from problem
    with program:
        feeder = _Feeder(program, source)
        start_thread(feeder)
        try:
            assert program.stdout is not None
            while piece := os.read(program.stdout.fileno(), CHUNK_BYTES):
                yield piece
            feeder.join()
            _check(program, feeder)
        finally:
            program.kill()
            stop()
            feeder.join()


class _Feeder(threading.Thread):
    """Writes the source to the program, and keeps what went wrong."""

    def __init__(self, program: "subprocess.Popen[bytes]", source: Iterator[bytes]) -> None:
        super().__init__(name="zstd-feeder", daemon=True)
        self._program = program
        self._source = source
        self.problem: CallError | OSError | None = None

    def run(self) -> None:
        assert self._program.stdin is not None
        try:
            with self._program.stdin as pipe:
                for piece in self._source:
                    pipe.write(piece)
        except BrokenPipeError:
            pass  # the program ended first; its exit status says why
        except (CallError, OSError) as problem:
            self.problem = problem


def _check(program: "subprocess.Popen[bytes]", feeder: _Feeder) -> None:
    assert program.stderr is not None
    said = program.stderr.read(4096).decode(errors="replace").strip()
    status = program.wait()
    if feeder.problem is not None:
        raise feeder.problem
    if status:
        reason = said.splitlines()[0] if said else f"zstd ended with status {status}"
        raise CallError(
            "integrity",
            f"cannot read the zstd stream: {reason}",
            step="read the source",
            object="zstd",
        )
