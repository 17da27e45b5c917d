"""The guest's own /dev, as nodes are taken from it. Nothing is opened to see what it is."""

import errno
import os
import stat

from guestagent.devtree.closure import Look, Node, Seen
from guestagent.storage import syscalls
from vsock.errors import CallError

__all__ = ("Guest", "kind_of", "open_source", "rdev_of")

_RESOLVE = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_KINDS = {
    stat.S_IFLNK: "link",
    stat.S_IFBLK: "block",
    stat.S_IFCHR: "character",
    stat.S_IFDIR: "directory",
    stat.S_IFREG: "file",
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "fifo",
}
#: Access control lists and security labels: what of a file's attributes decides on its use.
_ATTRIBUTES = (
    "system.posix_acl_access",
    "system.posix_acl_default",
    "security.selinux",
    "security.SMACK64",
)
#: The file has no such attribute, or its file system has none at all.
NO_ATTRIBUTE = (errno.ENODATA, errno.ENOTSUP)


class Guest(Look):
    """The guest that the agent runs in."""

    def at(self, path: str) -> Seen | None:
        try:
            fd = _open(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _changed(error, path) from error
        try:
            found = os.fstat(fd)
            kind = kind_of(found)
            return Seen(
                kind=kind,
                mode=stat.S_IMODE(found.st_mode),
                uid=found.st_uid,
                gid=found.st_gid,
                rdev=rdev_of(found),
                target=_link_text(fd, path) if kind == "link" else None,
                attributes=_attributes(fd),
            )
        finally:
            os.close(fd)

    def below(self, rdev: str) -> tuple[str, ...]:
        """Kernel names have ``!`` where a node has a directory, as of cciss!c0d0."""
        try:
            names = sorted(os.listdir(f"/sys/dev/block/{rdev}/slaves"))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTDIR):
                raise
            return ()
        return tuple(f"/dev/{name.replace('!', '/')}" for name in names)


def open_source(node: Node) -> int:
    """Open what a node is to be a bind of, with O_PATH; the caller owns the descriptor.

    Raises:
        CallError: ``not_found``, it has vanished; ``conflict``, another file is there by now.
    """
    try:
        fd = _open(node.path)
    except FileNotFoundError as error:
        text = f"{node.path!r} has vanished meanwhile"
        raise CallError("not_found", text, errno=errno.ENOENT, object=node.path) from error
    except OSError as error:
        raise _changed(error, node.path) from error
    found = os.fstat(fd)
    if (kind_of(found), rdev_of(found)) != (node.seen.kind, node.seen.rdev):
        os.close(fd)
        raise CallError("conflict", f"{node.path!r} is another file by now", object=node.path)
    return fd


def kind_of(found: os.stat_result) -> str:
    return _KINDS[stat.S_IFMT(found.st_mode)]


def rdev_of(found: os.stat_result) -> str | None:
    """Return MAJOR:MINOR of a device, None of anything else."""
    if not (stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode)):
        return None
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def _open(path: str) -> int:
    flags = os.O_PATH | os.O_NOFOLLOW
    return syscalls.openat2(syscalls.AT_FDCWD, path, flags, resolve=_RESOLVE)


def _changed(error: OSError, path: str) -> "CallError | OSError":
    """A directory on the way was one a moment ago: what is there now is another."""
    if error.errno not in (errno.ELOOP, errno.ENOTDIR):
        return error
    text = f"what leads to {path!r} has changed meanwhile"
    return CallError("conflict", text, errno=error.errno, object=path)


def _link_text(fd: int, path: str) -> str:
    text = os.readlink("", dir_fd=fd)
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = f"the link {path!r} leads to a name that is not UTF-8: {text!r}"
        raise CallError("unsupported", problem, object=path) from None
    return text


def _attributes(fd: int) -> dict[str, bytes]:
    found = {}
    for name in _ATTRIBUTES:
        try:
            # the link below /proc leads to the very file, without opening it
            found[name] = os.getxattr(f"/proc/self/fd/{fd}", name)
        except OSError as error:
            if error.errno not in NO_ATTRIBUTE:
                raise
    return found
