"""``guestagent``: the agent outside of an initramfs, as a plain root process.

    guestagent listen=unix:///run/guestagent.sock log=debug

Settings are those of the kernel command line without their prefix; ``guestagent --help`` lists
them. Run as PID 1, this is ``guestagent.boot.early``.
"""

import os
import sys

from guestagent import __version__, agent
from guestagent.boot.early import main as boot
from guestagent.config import KEYS, read_settings
from guestagent.observe.sinks import open_sinks

__all__ = ("main",)

_USAGE_STATUS = 2


def main() -> None:
    """Entry point of the console script."""
    if os.getpid() == 1:
        boot()
    sys.exit(_main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    if arguments in (["--help"], ["-h"]):
        _print(_help())
        return 0
    if arguments == ["--version"]:
        _print(f"guestagent {__version__}")
        return 0
    settings = tuple(_setting(argument) for argument in arguments)
    config, problems = read_settings(settings)
    if problems:
        for problem in problems:
            _print(f"guestagent: {problem.text.removeprefix('guestagent.')}", 2)
        _print("guestagent: `guestagent --help` lists the settings", 2)
        return _USAGE_STATUS
    open_sinks(config, is_machine=False)
    try:
        return agent.run(config, boot={"pid1": False})
    except OSError as error:
        _print(f"guestagent: {error}", 2)
        return agent.EXIT_FAILED


def _setting(argument: str) -> tuple[str, str]:
    name, _, value = argument.removeprefix("--").partition("=")
    return name.replace("-", "_"), value


def _help() -> str:
    lines = [
        "usage: guestagent [NAME=VALUE]...",
        "",
        "Serves layer-mount requests. Settings (on a kernel command line: guestagent.NAME=VALUE):",
        *(f"  {key.name:15} {key.summary}" for key in KEYS),
    ]
    return "\n".join(lines)


def _print(text: str, fd: int = 1) -> None:
    os.write(fd, (text + "\n").encode())


if __name__ == "__main__":
    main()
