"""The boot hook: layers named on the kernel command line become the root of the system.

The same engine as for requests does the mounting. What is missing, unverified or contradictory ends
the boot; nothing is guessed.
"""
