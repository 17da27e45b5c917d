"""What is known of one path: status, target, extended attributes, room."""

import errno
import os
import stat

from guestagent.api.devices import SECTOR_BYTES
from guestagent.api.inspect import (
    AclEntry,
    AclReply,
    ExistsReply,
    FsAclGetFile,
    PathRequest,
    ReadlinkReply,
    StatReply,
    StatvfsReply,
    Xattr,
    XattrsReply,
)
from guestagent.inspect.acl import from_mode, parse_acl, show_acl
from guestagent.inspect.place import Place, show_path
from guestagent.inspect.walk import in_64_bits, letter_of, rdev_of
from guestagent.storage.mountinfo import find_mount
from vsock.errors import CallError

__all__ = ("acl", "exists", "lstat", "readlink", "statvfs", "xattrs", "xattrs_of")

#: Names take at most 64 KiB in all (XATTR_LIST_MAX), but each value may be as long again.
_MAX_XATTR_BYTES = 1024 * 1024
_ST_RDONLY = 1
_NO_XATTRS = (errno.ENODATA, errno.EOPNOTSUPP)


def lstat(place: Place, request: PathRequest) -> StatReply:
    """Describe what is at a path, a symlink itself and not what it leads to."""
    with _Opened(place, request.path_bytes, follow=False) as opened:
        status = os.fstat(opened.fd)
        is_link = stat.S_ISLNK(status.st_mode)
        target = os.fsencode(os.readlink("", dir_fd=opened.fd)) if is_link else None
    return StatReply(
        kind=letter_of(status.st_mode),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size_bytes=status.st_size,
        allocated_bytes=status.st_blocks * SECTOR_BYTES,
        links=status.st_nlink,
        inode=status.st_ino,
        dev=f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}",
        rdev=rdev_of(status),
        atime_ns=in_64_bits(status.st_atime_ns),
        mtime_ns=in_64_bits(status.st_mtime_ns),
        ctime_ns=in_64_bits(status.st_ctime_ns),
        target=target,
    )


def readlink(place: Place, request: PathRequest) -> ReadlinkReply:
    """Return where a symlink leads, as it is written there."""
    path = request.path_bytes
    with _Opened(place, path, follow=False) as opened:
        if not stat.S_ISLNK(os.fstat(opened.fd).st_mode):
            raise OSError(errno.EINVAL, "not a symbolic link", path)
        return ReadlinkReply(target=os.fsencode(os.readlink("", dir_fd=opened.fd)))


def exists(place: Place, request: PathRequest) -> ExistsReply:
    """Say whether something is there, symlinks followed."""
    try:
        os.close(place.root.resolve(request.path_bytes))
    except (FileNotFoundError, NotADirectoryError):
        return ExistsReply(exists=False)
    except OSError as error:
        raise place.error_of(error, request.path_bytes) from error
    return ExistsReply(exists=True)


def xattrs(place: Place, request: PathRequest) -> XattrsReply:
    """Return all extended attributes of what is at a path, of a symlink itself."""
    path = request.path_bytes
    with _Opened(place, path, follow=False) as opened:
        found = xattrs_of(opened.fd)
    if sum(len(name) + len(value) for name, value in found) > _MAX_XATTR_BYTES:
        raise CallError(
            "resource",
            f"the extended attributes of {show_path(path)} take more than {_MAX_XATTR_BYTES} bytes",
            object=show_path(path),
        )
    return XattrsReply(xattrs=tuple(Xattr(name=name, value=value) for name, value in found))


def xattrs_of(path_fd: int) -> list[tuple[bytes, bytes]]:
    """Return names and values, sorted, of what an O_PATH descriptor stands for.

    Raises:
        OSError: as listxattr(2); none at all is no error.
    """
    way = f"/proc/self/fd/{path_fd}"
    found = []
    try:
        for name in sorted(os.listxattr(way)):
            try:
                found.append((os.fsencode(name), os.getxattr(way, name)))
            except OSError as error:
                if error.errno not in _NO_XATTRS:
                    raise
    except OSError as error:
        if error.errno not in _NO_XATTRS:
            raise
    return found


def acl(place: Place, request: FsAclGetFile) -> AclReply:
    """Return an access control list, made up from the mode where there is none."""
    with _Opened(place, request.path_bytes, follow=True) as opened:
        name = f"system.posix_acl_{request.acl}"
        try:
            entries = parse_acl(os.getxattr(f"/proc/self/fd/{opened.fd}", name))
        except OSError as error:
            if error.errno not in _NO_XATTRS:
                raise
            is_access = request.acl == "access"
            entries = from_mode(os.fstat(opened.fd).st_mode) if is_access else ()
    return AclReply(
        entries=tuple(
            AclEntry(tag=tag, id=number, permissions=permissions)
            for tag, number, permissions in entries
        ),
        text=show_acl(entries, "\n"),
    )


def statvfs(place: Place, request: PathRequest) -> StatvfsReply:
    """Say how large and how full the file system below a path is."""
    with _Opened(place, request.path_bytes, follow=True) as opened:
        found = os.statvfs(f"/proc/self/fd/{opened.fd}")
    mount = find_mount(place.mount_point)
    return StatvfsReply(
        filesystem=mount.filesystem if mount else "",
        size_bytes=found.f_blocks * found.f_frsize,
        free_bytes=found.f_bfree * found.f_frsize,
        available_bytes=found.f_bavail * found.f_frsize,
        block_size=found.f_frsize,
        inodes=found.f_files,
        free_inodes=found.f_ffree,
        name_max_bytes=found.f_namemax,
        readonly=bool(found.f_flag & _ST_RDONLY),
    )


class _Opened:
    """An O_PATH descriptor of a path; OSErrors in the block are told as the place's. A context
    manager."""

    def __init__(self, place: Place, path: bytes, *, follow: bool) -> None:
        self._place = place
        self._path = path
        with place.errors(path):
            self.fd = place.root.resolve(path, follow=follow)

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        os.close(self.fd)
        if isinstance(error, OSError):
            raise self._place.error_of(error, self._path) from error
