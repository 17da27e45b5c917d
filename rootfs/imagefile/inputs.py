"""Small input files: documents that are read whole, and are bounded."""

import errno
import os
import stat

from rootfs.imagefile.errors import OsErrors

__all__ = ("read_input",)


def read_input(path: str | os.PathLike[str], max_bytes: int, *, step: str) -> bytes:
    """Return the content of a regular file of at most ``max_bytes``.

    Raises:
        CallError: ``invalid``, no regular file; ``resource``, it is larger; by errno. ``step`` is
            what was being done.
    """
    with OsErrors(step, path):
        # a pipe must not keep us waiting for a writer
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
            raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise OSError(errno.EFBIG, f"over {max_bytes} bytes", os.fspath(path))
        return raw
