"""The guest-side layer-mount agent, and the host's handle on it."""

__version__ = "0.1.0"
