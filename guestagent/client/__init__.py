"""The host's handle on an agent; see ``guestagent.client.handle``."""

from guestagent.client.handle import GuestAgent

__all__ = ("GuestAgent",)
