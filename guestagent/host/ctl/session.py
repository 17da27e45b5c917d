"""The frame of every command: the agent, the output, and how an error ends the program.

Exit status: 0 success, 1 with a message on the standard error (or as JSON), 2 wrong usage.
"""

import errno
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Concatenate, NoReturn, ParamSpec, TypeVar

import click

from guestagent.api.request import Request
from guestagent.host.client import GuestAgent
from guestagent.host.ctl.profiles import resolve
from guestagent.host.ctl.style import guarded, plain
from vsock.address import HybridAddress, UnixAddress, VsockAddress, parse_address
from vsock.errors import CallError, ConnectionClosed, RpcError, errno_name
from vsock.record import Record
from vsock.threads import Waker

__all__ = (
    "Session",
    "cannot_write",
    "emit",
    "fail",
    "noted_interrupt",
    "pass_session",
    "reports_errors",
    "uses_session",
    "wait_for_interrupt",
    "with_options",
    "wrong_usage",
)

P = ParamSpec("P")
R = TypeVar("R")
Reply = TypeVar("Reply", bound=Record)
Command = TypeVar("Command", bound=Callable[..., object])

#: A longer text of an error is shown by its first and last characters; so are the kernel's lines.
_SHOWN_END = 1000
_KERNEL_LINES = 32
#: Error code -> what a person does next, for errors that do not say it themselves.
_NEXT_STEPS = {
    "invalid": "`guestctl {command} --help` says what it takes",
    "unsupported": "`guestctl hello` lists what this agent and its kernel can do",
    "not_found": "`guestctl layer list`, `overlay list` and `dm list` show what exists",
    "conflict": "`guestctl layer list` and `overlay list` show what uses it",
    "busy": "end the processes that use it and try again; `guestctl layer list` has USED BY",
    "integrity": "`guestctl layer verify` on the host tells whether the digest is the image's",
    "timeout": "--deadline gives it more time; `guestctl log` says what it was waiting for",
    "device": "`guestctl fs devices` lists the disks of the guest",
    "mount": "`guestctl log --level debug` has the steps; the kernel's lines are above, if any",
    "resource": "`guestctl status` and `guestctl top` show what is in use",
    "internal": "`guestctl crashes` and `guestctl log` of the agent have the details",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The options that stand before the command.

    agent_name: an address, the name of a profile, or None for the default profile.
    """

    agent_name: str | None
    as_json: bool
    connect_seconds: float
    deadline_ms: int
    traceparent: str | None = None

    @property
    def address(self) -> str | None:
        """The address that ``agent_name`` means; profiles are read only where they are needed.

        Raises:
            UsageError: there is no profile of that name.
            CallError: the profiles cannot be read.
        """
        return resolve(self.agent_name)

    @contextmanager
    def agent(self, *, reconnect: bool = False) -> Iterator[GuestAgent]:
        """Connect to the agent that ``--connect`` names."""
        address = self.address
        if address is None:
            raise click.UsageError(
                "which agent? give --connect ADDRESS, such as hybrid:///run/vm.vsock:1023, "
                "set GUESTCTL_CONNECT, or keep the address: guestctl connect NAME ADDRESS"
            )
        with wrong_usage():
            handle = GuestAgent(
                address,
                connect_seconds=self.connect_seconds,
                deadline_ms=self.deadline_ms,
                reconnect=reconnect,
                traceparent=self.traceparent,
            )
        with handle:
            yield handle

    def ask(self, kind: type[Request[Reply]], /, **fields: object) -> Reply:
        """Send a request; a field that is refused is wrong usage."""
        with wrong_usage():
            request = kind(**fields)
        with self.agent() as guest:
            return guest.call(request)

    def tell(
        self, kind: type[Request[Reply]], text: Callable[[Reply], str], /, **fields: object
    ) -> None:
        """Send a request and print the reply, as ``ask`` and ``show`` do."""
        reply = self.ask(kind, **fields)
        self.show(reply, lambda: text(reply))

    def show(self, value: Record, text: Callable[[], str]) -> None:
        """Print a reply: as JSON where asked, else what ``text`` makes of it."""
        if self.as_json:
            emit(value.to_wire())
        else:
            click.echo(guarded(text()))

    def say(self, value: object, text: str) -> None:
        """Print a plain value as JSON where asked, else ``text``."""
        if self.as_json:
            emit(value)
        else:
            click.echo(guarded(text))


@contextmanager
def wrong_usage() -> Iterator[None]:
    """Tell of a wrong command line where what it says raises ValueError."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def with_options(*parts: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return a decorator that adds options and arguments to a command, in this order."""

    def add(command: Command) -> Command:
        for part in reversed(parts):
            command = part(command)
        return command

    return add


def cannot_write(error: OSError, path: str) -> CallError:
    """Return the error of a file on this host that could not be written."""
    code = "resource" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "denied"
    text = f"cannot write {path!r}: {error.strerror}"
    return CallError(code, text, errno=error.errno, step="write", object=path)


def emit(value: object, *, is_line: bool = False) -> None:
    """Print a value as JSON, bytes as hexadecimal; ``is_line`` for one line of many."""
    click.echo(json.dumps(value, default=_json, indent=None if is_line else 2))
    if is_line:
        sys.stdout.flush()


def pass_session(function: Callable[Concatenate[Session, P], R]) -> Callable[P, R]:
    """Pass the session to a command that talks to an agent; end the program on its errors."""

    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        session = click.get_current_context().find_object(Session)
        assert session is not None
        try:
            return function(session, *args, **kwargs)
        except CallError as error:
            fail(error, as_json=session.as_json, next_step=_next_step(error))
        except ConnectionClosed as error:
            hint = _unreachable(session.address)
            lost = CallError("device", str(error), step="talk to the agent", hint=hint)
            fail(lost, as_json=session.as_json)
        except BrokenPipeError:  # the reader of our output has gone; click ends the program quietly
            raise
        except (RpcError, OSError) as error:
            broken = CallError("internal", f"cannot talk to the agent: {error}")
            fail(broken, as_json=session.as_json)

    update_wrapper(wrapper, function)
    wrapper.uses_session = True  # type: ignore[attr-defined]
    return wrapper


def uses_session(command: click.Command) -> bool:
    """Return whether ``pass_session`` wraps the command."""
    return getattr(command.callback, "uses_session", False) is True


def reports_errors(function: Command) -> Command:
    """Give a command of the host its ``as_json``, and end the program on a CallError."""

    def wrapper(*args: object, as_json: bool, **options: object) -> None:
        session = click.get_current_context().find_object(Session)
        as_json = as_json or (session is not None and session.as_json)
        try:
            function(*args, as_json=as_json, **options)
        except CallError as error:
            fail(error, as_json=as_json)

    wrapped = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(wrapper)
    return update_wrapper(wrapped, function)  # type: ignore[return-value]  # but for its errors


def fail(error: CallError, *, as_json: bool, next_step: str | None = None) -> NoReturn:
    """Print an error for a person, or as JSON, and exit with status 1.

    ``next_step`` is for an error without a hint.
    """
    if as_json:
        emit({"error": error.to_wire()})
        sys.exit(1)
    click.echo(f"guestctl: {_shown(str(error))}", err=True)
    details = (
        ("step", error.step),
        ("object", error.object),
        ("errno", errno_name(error.errno)),
        ("hint", error.hint),
    )
    for name, value in details:
        if value is not None:
            click.echo(f"  {name}: {_shown(value)}", err=True)
    for line in error.kernel_log[-_KERNEL_LINES:]:
        click.echo(f"  kernel: {_shown(line)}", err=True)
    if next_step is not None and error.hint is None:
        click.echo(f"  next: {next_step}", err=True)
    sys.exit(1)


def _shown(text: str) -> str:
    """Return a text of an error for a terminal: what it tells may be as long as a peer, or the
    writer of an archive, wants."""
    if len(text) > 2 * _SHOWN_END:
        text = f"{text[:_SHOWN_END]}...{text[-_SHOWN_END:]}"
    return plain(text)


def _json(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def _next_step(error: CallError) -> str | None:
    """Return what a person does next after an agent's error, None where the code does not say."""
    command = click.get_current_context().command_path.partition(" ")[2]
    text = _NEXT_STEPS.get(error.code)
    return None if text is None else text.format(command=command)


def _unreachable(address: str | None) -> str:
    """Return what to check when no agent answers at an address."""
    try:
        place = parse_address(address or "")
    except ValueError:
        return "check the address"
    if isinstance(place, (HybridAddress, UnixAddress)):
        if not os.path.exists(place.path):
            return f"there is no socket {place.path!r}: is the machine running?"
        return "the machine may still be booting (--wait), or its agent be on another port"
    if isinstance(place, VsockAddress):
        if not os.path.exists("/dev/vsock"):
            return "this host has no vsock (/dev/vsock): use the VMM's hybrid:// socket"
        return "the machine may still be booting (--wait), or have another CID or port"
    return "is the other end of the line connected?"


@contextmanager
def noted_interrupt() -> Iterator[int]:
    """Yield a descriptor that becomes readable at Ctrl-C, which raises nothing in the block.

    For a loop in the main thread that ends between two turns.
    """
    with Waker() as waker:
        former = signal.signal(signal.SIGINT, lambda number, frame: None)
        before = signal.set_wakeup_fd(waker.signal_fd, warn_on_full_buffer=False)
        try:
            yield waker.fd
        finally:
            signal.set_wakeup_fd(before)
            signal.signal(signal.SIGINT, former)


def wait_for_interrupt() -> None:
    """Wait for Ctrl-C in the main thread.

    Waiting for a lock would miss a signal that arrives after the interpreter checked for signals
    and before it sleeps, which a busy machine makes likely. Here the signal writes a byte that
    ends the wait.
    """
    with Waker() as waker:
        before = signal.set_wakeup_fd(waker.signal_fd, warn_on_full_buffer=False)
        try:
            while True:
                select.select([waker.fd], [], [])
                waker.clear()  # another signal; its own handler has run
        except KeyboardInterrupt:
            return
        finally:
            signal.set_wakeup_fd(before)
