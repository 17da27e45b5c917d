"""Programs that do not outlive the process that started them, however that ends."""

import os
from collections.abc import Sequence

__all__ = ("ending_with_us",)

# The signal is asked for first and the parent looked at second: it cannot end in between unseen.
# The process stays the same one through all of this, so that its number is that of the program.
_BECOME = '[ "$PPID" = "$0" ] && exec "$@"'


def ending_with_us(argv: Sequence[str], *, signal: str = "KILL") -> list[str]:
    """Return a command that becomes ``argv``, and gets ``signal`` when we end.

    We are the THREAD that starts it, not only its process: prctl(2) has it that the signal comes
    when that thread ends. Start it from a thread that lives for as long as the program shall; the
    main thread is one. A program with more privilege than ours (set-user-ID) gets no signal.

    Takes setpriv of util-linux. Without it, starting the command fails with FileNotFoundError; what
    is not found later is exit status 127.
    """
    become = ["sh", "-c", _BECOME, str(os.getpid())]
    return ["setpriv", "--pdeathsig", signal, *become, *argv]
