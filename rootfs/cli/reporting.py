"""How the host's commands print values and errors. Exit status 1 with a message, 2 for usage."""

import functools
import json
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import click

from guestagent.host.ctl.style import plain
from vsock.errors import CallError, errno_name

__all__ = ("emit", "hex_bytes", "reports_errors")

Command = TypeVar("Command", bound=Callable[..., None])


def hex_bytes(text: str) -> bytes:
    """Read bytes in hexadecimal; ``-`` is none at all, as for veritysetup.

    Raises:
        click.BadParameter: it is not hexadecimal.
    """
    if text == "-":
        return b""
    if not text or len(text) % 2 or not all(c in "0123456789abcdefABCDEF" for c in text):
        raise click.BadParameter(f"{text!r} is not hexadecimal")
    return bytes.fromhex(text)


def reports_errors(function: Command) -> Command:
    """End the program with status 1 and a message on a CallError."""

    @functools.wraps(function)
    def wrapper(*args: object, as_json: bool, **options: object) -> None:
        session = click.get_current_context().obj
        as_json = as_json or bool(getattr(session, "as_json", False))
        try:
            function(*args, as_json=as_json, **options)
        except CallError as problem:
            _fail(problem, as_json)

    return wrapper  # type: ignore[return-value]  # the same but for its errors


def _fail(problem: CallError, as_json: bool) -> NoReturn:
    if as_json:
        emit({"error": problem.to_wire()})
    else:
        click.echo(f"guestctl: {plain(str(problem))}", err=True)
        details = {
            "object": problem.object,
            "errno": errno_name(problem.errno),
            "hint": problem.hint,
        }
        for name, value in details.items():
            if value is not None:
                click.echo(f"  {name}: {plain(value)}", err=True)
    sys.exit(1)


def emit(value: object) -> None:
    """Print JSON; bytes as hexadecimal."""
    click.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
