"""The host's handle on an agent: ``handle`` for threads, ``aio`` for asyncio."""

from guestagent.host.client.events import ALL_EVENTS, EVENT_BITS, HANDLE_EVENTS, event_mask
from guestagent.host.client.handle import GuestAgent
from vsock.client import ClosedHandleError

__all__ = (
    "ALL_EVENTS",
    "EVENT_BITS",
    "HANDLE_EVENTS",
    "ClosedHandleError",
    "GuestAgent",
    "event_mask",
)
