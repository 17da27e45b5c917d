"""``guestctl``: an agent's methods and the host's tools, for a person at a terminal or a script.

Exit status: 0 done, 1 it failed (the error says what to do next), 2 wrong usage.
"""

from guestagent.host.ctl.main import main

__all__ = ("main",)
