"""Whether mounts can be tested on the kernel of this machine.

``python -m tests.beds.host_kernel`` prints why not, and nothing where they can.

User Mode Linux has a kernel from before the interfaces that take an overlay's layers one by one;
a newer kernel outside of it is where those are tried.
"""

import os
import sys

from guestagent.storage.fscontext import FsContext
from guestagent.storage.overlayfs import BY_MOUNT, available_ways


def why_not() -> str:
    """Return why this kernel is of no use, in a few words; empty if it is."""
    if os.geteuid() != 0:
        return "not root"
    if not os.path.exists("/dev/loop-control"):
        return "no loop devices"
    try:
        for filesystem in ("erofs", "overlay"):
            FsContext(filesystem).close()
        if available_ways() == (BY_MOUNT,):
            return f"Linux {os.uname().release} takes layers by mount(2) only, as that in UML does"
    except OSError as problem:
        return str(problem)
    return ""


if __name__ == "__main__":
    sys.stdout.write(why_not())
