"""The files in /etc that say how names are looked up: /etc/resolv.conf and /etc/hosts.

They are replaced as a whole, by rename(2), below a root that may not be this process's own.
"""

import contextlib
import errno
import os
import stat

from guestagent.api.net import Dns, HostsEntry
from guestagent.storage import syscalls
from vsock.closeable import FdOwner
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("HOSTS", "RESOLV_CONF", "Etc", "NameFile", "hosts_text", "resolv_conf_text")

RESOLV_CONF, HOSTS = "resolv.conf", "hosts"
_MAX_BYTES = 1 << 20
_DRAFT = ".guestagent-"


class NameFile(Record):
    """A file, link or absence of both. ``mode`` is that of a file."""

    name: str
    content: bytes | None = None
    link: str | None = None
    mode: int = 0o644
    uid: int = 0
    gid: int = 0

    @classmethod
    def read(cls, etc_fd: int, name: str) -> "NameFile":
        """Read what is there.

        Raises:
            OSError: it cannot be read.
            CallError: ``resource``, it is too large to be kept; ``invalid``, it is no file.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(name, flags, dir_fd=etc_fd)
        except FileNotFoundError:
            return cls(name=name)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return cls(name=name, link=os.readlink(name, dir_fd=etc_fd))
        with open(fd, "rb") as stream:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise CallError("invalid", f"/etc/{name} is no file", object=f"/etc/{name}")
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            text = f"/etc/{name} is larger than {_MAX_BYTES} bytes"
            raise CallError("resource", text, object=f"/etc/{name}")
        mode = stat.S_IMODE(info.st_mode)
        return cls(name=name, content=content, mode=mode, uid=info.st_uid, gid=info.st_gid)

    def says(self, content: bytes) -> bool:
        return self.link is None and self.content == content

    def write(self, etc_fd: int) -> None:
        """Make the directory hold this instead of what is there.

        Raises:
            OSError: it cannot be written; what was there is there still.
        """
        if self.link is None and self.content is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.name, dir_fd=etc_fd)
            return
        draft = _DRAFT + self.name
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft, dir_fd=etc_fd)
        try:
            if self.link is not None:
                os.symlink(self.link, draft, dir_fd=etc_fd)
            else:
                self._write_content(etc_fd, draft)
            os.rename(draft, self.name, src_dir_fd=etc_fd, dst_dir_fd=etc_fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(draft, dir_fd=etc_fd)
            raise

    def _write_content(self, etc_fd: int, draft: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(draft, flags, 0o600, dir_fd=etc_fd), "wb") as stream:
            stream.write(self.content or b"")
            stream.flush()
            os.fchown(stream.fileno(), self.uid, self.gid)
            os.fchmod(stream.fileno(), self.mode)
            os.fsync(stream.fileno())


class Etc(FdOwner):
    """The directory /etc below ``root``, held open; links are followed as a process in there does.

    Raises:
        OSError: there is no such directory.
    """

    def __init__(self, root: str) -> None:
        root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
            self._fd = syscalls.openat2(root_fd, "etc", flags, resolve=resolve)
        finally:
            os.close(root_fd)

    @property
    def fd(self) -> int:
        return self._fd


def resolv_conf_text(dns: Dns) -> bytes:
    """Return the content of resolv.conf(5)."""
    lines = [f"search {' '.join(dns.search)}"] if dns.search else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    return "".join(f"{line}\n" for line in lines).encode("ascii")


def hosts_text(entries: tuple[HostsEntry, ...]) -> bytes:
    """Return the content of hosts(5), which says localhost even where no entry does."""
    lines = []
    if not any("localhost" in entry.names for entry in entries):
        lines = ["127.0.0.1 localhost", "::1 localhost"]
    lines += [f"{entry.address} {' '.join(entry.names)}" for entry in entries]
    return "".join(f"{line}\n" for line in lines).encode("ascii")
