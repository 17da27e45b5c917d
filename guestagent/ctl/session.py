"""What every command shares: which agent, which output, and how an error ends the program."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Concatenate, NoReturn, ParamSpec, TypeVar

import click

from guestagent.client import GuestAgent
from vsock.errors import CallError, RpcError, errno_name
from vsock.record import Record

__all__ = ("Session", "fail", "pass_session")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The options that stand before the command."""

    address: str | None
    as_json: bool
    connect_seconds: float
    deadline_ms: int

    @contextmanager
    def agent(self) -> Iterator[GuestAgent]:
        """Connect to the agent that ``--connect`` names."""
        if self.address is None:
            raise click.UsageError(
                "which agent? say --connect ADDRESS or set GUESTCTL_CONNECT, "
                "e.g. --connect hybrid:///run/vm.vsock:1024"
            )
        try:
            handle = GuestAgent(
                self.address, connect_seconds=self.connect_seconds, deadline_ms=self.deadline_ms
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        with handle:
            yield handle

    def show(self, value: Record, text: Callable[[], str]) -> None:
        """Print a reply: as JSON where asked, else what ``text`` makes of it."""
        if self.as_json:
            click.echo(json.dumps(value.to_wire(), default=_json, indent=2))
        else:
            click.echo(text())


def pass_session(function: Callable[Concatenate[Session, P], R]) -> Callable[P, R]:
    """Hand the session to a command, and end the program on the errors of a call."""

    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        session = click.get_current_context().find_object(Session)
        assert session is not None
        try:
            return function(session, *args, **kwargs)
        except CallError as error:
            fail(session, error)
        except (RpcError, OSError) as error:
            fail(session, CallError("internal", f"cannot talk to the agent: {error}"))

    update_wrapper(wrapper, function)
    return wrapper


def fail(session: Session, error: CallError) -> NoReturn:
    """Print an error for a person, or as JSON, and exit with status 1."""
    if session.as_json:
        click.echo(json.dumps({"error": error.to_wire()}, default=_json, indent=2))
        sys.exit(1)
    click.echo(f"guestctl: {error}", err=True)
    details = (
        ("step", error.step),
        ("object", error.object),
        ("errno", errno_name(error.errno)),
        ("hint", error.hint),
    )
    for name, value in details:
        if value is not None:
            click.echo(f"  {name}: {value}", err=True)
    for line in error.kernel_log:
        click.echo(f"  kernel: {line}", err=True)
    sys.exit(1)


def _json(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
