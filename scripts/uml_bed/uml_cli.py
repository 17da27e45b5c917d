"""The command line of ``scripts.uml_bed.uml``: scripts/uml [OPTIONS] COMMAND [ARGUMENT...]."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from scripts.uml_bed.uml import UmlBootError, UmlSpec, UmlTimeoutError, run_spec

__all__ = ("main", "stop_signals")

STATUS_TIMEOUT = 124
STATUS_BOOT_FAILED = 125

_EPILOG = f"""\
The exit status is that of COMMAND: 128+N when signal N ended it, 126 and 127 when it cannot be run.
{STATUS_TIMEOUT} means that the time was over, {STATUS_BOOT_FAILED} that the kernel did not come up
or died.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(argv)
    with stop_signals():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        return run_spec(_spec(options), stdout=1, stderr=2).returncode
    except UmlTimeoutError as problem:
        _complain(str(problem), problem.console)
        return STATUS_TIMEOUT
    except UmlBootError as problem:
        _complain(str(problem), problem.console)
        return STATUS_BOOT_FAILED
    except (OSError, ValueError) as problem:
        _complain(str(problem), b"")
        return STATUS_BOOT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """End the program in order, by SystemExit, on SIGTERM, and on SIGHUP of a closed terminal."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _complain(message: str, console: bytes) -> None:
    lines = console.decode(errors="replace").splitlines()[-60:]
    text = "".join(f"uml: console: {line}\n" for line in lines) + f"uml: {message}\n"
    sys.stderr.write(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uml",
        description="Run COMMAND under a real kernel with device-mapper, verity and vsock; what it "
        "writes is thrown away.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--bind",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="directory of the host that stays writable (repeat for more)",
    )
    add("--memory", metavar="MIB", type=int, default=512, help="memory of the guest (default 512)")
    add("--timeout", metavar="SECONDS", type=float, help="kill it after so long")
    add("--vsock", metavar="SOCKET", type=Path, help="vhost-user socket of a vsock device")
    add(
        "--ubd",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="disk /dev/ubda, then /dev/ubdb, ...; written to in place",
    )
    add(
        "--append",
        metavar="WORD",
        action="append",
        default=[],
        help="add to the kernel command line",
    )
    add(
        "-i",
        "--input",
        action="store_true",
        help="read standard input to its end and give it to COMMAND (a terminal is passed through "
        "without this)",
    )
    add("command", metavar="COMMAND", nargs=argparse.REMAINDER)
    return parser


def _spec(options: argparse.Namespace) -> UmlSpec:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    return UmlSpec(
        argv=tuple(command),
        memory_mib=options.memory,
        binds=tuple(options.bind),
        vsock_socket=options.vsock,
        disks=tuple(options.ubd),
        append=tuple(options.append),
        stdin=sys.stdin.buffer.read() if options.input else b"",
        terminal=not options.input and os.isatty(0) and os.isatty(1),
        timeout_seconds=options.timeout,
    )
