"""Mounted layers and overlays, and the transactions that mount and unmount them."""
