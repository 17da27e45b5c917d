"""Programs that end with the process that started them, however that ends."""

import os
from collections.abc import Sequence

__all__ = ("ending_with_us",)

# The signal is requested before the parent is checked, so that its end cannot be missed.
# The shell is replaced by exec, so that the pid is the program's.
_BECOME = '[ "$PPID" = "$0" ] && exec "$@"'


def ending_with_us(argv: Sequence[str], *, signal: str = "KILL") -> list[str]:
    """Return a command that becomes ``argv``, and gets ``signal`` when this thread ends.

    prctl(2) sends the signal when the thread ends that started the program, not only when its
    process ends. So start it from a thread that lives for as long as the program is to live, such
    as the main thread. A program with more privilege than ours (set-user-ID) gets no signal.

    It runs setpriv of util-linux. Without that, starting the command fails with FileNotFoundError;
    if ``argv`` is not found, the exit status is 127.
    """
    become = ["sh", "-c", _BECOME, str(os.getpid())]
    return ["setpriv", "--pdeathsig", signal, *become, *argv]
