"""The host's side: a handle on an agent for threads and one for asyncio, and ``guestctl``.

    from guestagent.host import GuestAgent, AsyncGuestAgent

Each name is loaded when it is first used: most programs need one of the two handles.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guestagent.host.client.aio import AsyncGuestAgent
    from guestagent.host.client.events import ALL_EVENTS, EVENT_BITS, HANDLE_EVENTS, event_mask
    from guestagent.host.client.handle import GuestAgent
    from vsock.client import ClosedHandleError

__all__ = (
    "ALL_EVENTS",
    "EVENT_BITS",
    "HANDLE_EVENTS",
    "AsyncGuestAgent",
    "ClosedHandleError",
    "GuestAgent",
    "event_mask",
)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "AsyncGuestAgent":
        from guestagent.host.client import aio

        return aio.AsyncGuestAgent
    from guestagent.host import client

    return getattr(client, name)
