"""The host's handle on an agent; see ``guestagent.client.handle``, for asyncio ``.aio``."""

from guestagent.client.events import ALL_EVENTS, EVENT_BITS, event_mask
from guestagent.client.handle import GuestAgent
from vsock.client import ClosedHandleError

__all__ = ("ALL_EVENTS", "EVENT_BITS", "ClosedHandleError", "GuestAgent", "event_mask")
