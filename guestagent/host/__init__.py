"""The host's side: a handle on an agent, and guestctl. Never in a boot image."""
