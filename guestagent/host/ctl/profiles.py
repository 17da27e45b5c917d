"""Profiles: names for addresses of agents, kept by ``guestctl connect`` for ``--connect NAME``."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import click

from guestagent.host.output import atomic_write
from vsock.address import parse_address
from vsock.errors import CallError

__all__ = ("Profiles", "complete_profiles", "resolve")

_VERSION = 1


class Profiles:
    """The profiles of this user: name -> address, and the default profile.

    In $XDG_CONFIG_HOME/guestctl/profiles.json, by default ~/.config/guestctl/profiles.json.
    """

    def __init__(self) -> None:
        """Read the file, if it exists.

        Raises:
            CallError: ``invalid``, it has another form; ``denied``, it cannot be read.
        """
        home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        self.path = Path(home) / "guestctl" / "profiles.json"
        self.addresses: dict[str, str] = {}
        self.default: str | None = None
        try:
            self._take(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return
        except (ValueError, TypeError, KeyError) as problem:
            raise CallError(
                "invalid",
                f"the profiles in {str(self.path)!r} are not valid: {problem}",
                object=str(self.path),
                hint="correct the file, or move it away",
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
            CallError: ``invalid``, something else than a file is there.
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = {"version": _VERSION, "default": self.default, "profiles": self.addresses}
        with atomic_write(self.path) as file:
            file.write(json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")


def resolve(text: str | None) -> str | None:
    """Return the address of a text: an address, the name of a profile, or None for the default.

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
        f"{text!r} is neither an address nor the name of a profile (profiles: {known}); "
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
