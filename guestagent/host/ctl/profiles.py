"""Names for agents: ``guestctl connect NAME ADDRESS``, then ``--connect NAME``."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import click

from guestagent.host.client import GuestAgent
from guestagent.host.ctl.session import Session, pass_session
from guestagent.host.ctl.table import table
from vsock.address import parse_address
from vsock.errors import CallError

__all__ = ("Profiles", "complete_profiles", "connect", "resolve")

_VERSION = 1


class Profiles:
    """The profiles of this user: name -> address, and which of them is meant when none is said.

    In $XDG_CONFIG_HOME/guestctl/profiles.json, by default ~/.config/guestctl/profiles.json.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read the file, if there is one.

        Raises:
            CallError: ``invalid``, it cannot be understood, or ``denied``, not be read.
        """
        self.path = path or _default_path()
        self.addresses: dict[str, str] = {}
        self.default: str | None = None
        try:
            self._take(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return
        except (ValueError, TypeError, KeyError) as problem:
            raise CallError(
                "invalid",
                f"the profiles in {str(self.path)!r} cannot be understood: {problem}",
                object=str(self.path),
                hint="mend the file, or move it away",
            ) from problem
        except OSError as problem:
            text = f"the profiles in {str(self.path)!r} cannot be read: {problem.strerror}"
            raise CallError("denied", text, errno=problem.errno) from problem

    def _take(self, content: dict[str, object]) -> None:
        addresses = content["profiles"]
        if not isinstance(addresses, dict) or content.get("version") != _VERSION:
            raise ValueError(f"this is no profile file of version {_VERSION}")
        self.addresses = {str(name): str(parse_address(text)) for name, text in addresses.items()}
        default = content.get("default")
        self.default = default if isinstance(default, str) and default in addresses else None

    def save(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = {"version": _VERSION, "default": self.default, "profiles": self.addresses}
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)


def _default_path() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "guestctl" / "profiles.json"


def resolve(text: str | None) -> str | None:
    """Return the address that is meant by an address, a profile's name, or nothing at all.

    Raises:
        UsageError: there is no profile of that name.
        CallError: the profiles cannot be read.
    """
    if text is not None and "://" in text:
        return text
    profiles = Profiles()
    if text is None:
        return profiles.addresses.get(profiles.default) if profiles.default else None
    if text in profiles.addresses:
        return profiles.addresses[text]
    known = ", ".join(sorted(profiles.addresses)) or "none"
    raise click.UsageError(
        f"address {text!r} is none, and no profile's name either (profiles: {known}); "
        f"`guestctl connect {text} ADDRESS` makes one"
    )


def complete_profiles(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Complete the name of a profile."""
    try:
        names: Iterable[str] = Profiles().addresses
    except CallError:
        return []
    return sorted(name for name in names if name.startswith(incomplete))


@click.command()
@click.argument("name", required=False, shell_complete=complete_profiles)
@click.argument("address", required=False)
@click.option("--no-check", is_flag=True, help="Do not ask the agent whether it is there.")
@click.option("--delete", is_flag=True, help="Forget NAME.")
@pass_session
def connect(
    session: Session, name: str | None, address: str | None, no_check: bool, delete: bool
) -> None:
    """Give an agent a name, or choose or list those that have one.

    With NAME and ADDRESS the name is kept, and used where no --connect is given. With NAME alone
    that one is used from now on; with neither, all are listed.
    """
    profiles = Profiles()
    if name is None:
        _list(session, profiles)
        return
    if "://" in name:
        raise click.UsageError(f"{name!r} is an address: say `guestctl connect NAME {name}`")
    if address is None and name not in profiles.addresses:
        resolve(name)
    if delete:
        del profiles.addresses[name]
        profiles.default = None if profiles.default == name else profiles.default
        _keep(profiles)
        session.say({"deleted": name}, f"{name} is forgotten")
        return
    if address is not None:
        _add(session, profiles, name, address, check=not no_check)
    profiles.default = name
    _keep(profiles)
    kept = profiles.addresses[name]
    session.say({"name": name, "address": kept}, f"{name} is {kept}, from now on without --connect")


def _add(session: Session, profiles: Profiles, name: str, address: str, *, check: bool) -> None:
    try:
        profiles.addresses[name] = str(parse_address(address))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if check:
        with GuestAgent(address, connect_seconds=session.connect_seconds) as guest:
            about = f"{address}: agent {guest.hello.agent} on Linux {guest.hello.kernel}"
        if not session.as_json:
            click.echo(about, err=True)


def _keep(profiles: Profiles) -> None:
    try:
        profiles.save()
    except OSError as problem:
        text = f"cannot write {str(profiles.path)!r}: {problem.strerror}"
        raise CallError("denied", text, errno=problem.errno, object=str(profiles.path)) from problem


def _list(session: Session, profiles: Profiles) -> None:
    if session.as_json:
        value = {"default": profiles.default, "profiles": profiles.addresses}
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
        return
    rows = [
        ("*" if name == profiles.default else "", name, address)
        for name, address in sorted(profiles.addresses.items())
    ]
    click.echo(table(("", "NAME", "ADDRESS"), rows))
