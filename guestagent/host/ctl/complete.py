"""Completing names that only the agent knows: asked quickly, or not at all."""

from collections.abc import Callable, Iterable

import click

from guestagent.host.client import GuestAgent
from guestagent.host.ctl.profiles import resolve
from vsock.errors import RpcError

__all__ = ("complete_devices", "complete_layers", "complete_overlays")

#: A person waits for the completion of a word no longer than this.
_SECONDS = 1.0

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def _completer(names: Callable[[GuestAgent], Iterable[str]]) -> Complete:
    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
        address = _address(context)
        try:
            text = resolve(address)
            if text is None:
                return []
            with GuestAgent(text, connect_seconds=_SECONDS, deadline_ms=1000) as guest:
                return sorted(name for name in names(guest) if name.startswith(incomplete))
        except (RpcError, OSError, ValueError, click.UsageError):
            return []

    return complete


def _address(context: click.Context) -> str | None:
    """Return what --connect says, behind the command or before it."""
    place: click.Context | None = context
    while place is not None:
        address = place.params.get("address")
        if isinstance(address, str):
            return address
        place = place.parent
    return None


complete_layers = _completer(lambda guest: (layer.layer_id for layer in guest.layer_list()))
complete_overlays = _completer(lambda guest: (one.overlay_id for one in guest.overlay_list()))
complete_devices = _completer(lambda guest: (device.name for device in guest.dm_list().devices))
