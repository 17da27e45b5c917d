"""How a failed system call of the image tools becomes an error with code, step and object."""

import errno
import os

from vsock.errors import CallError

__all__ = ("DROP_XATTRS_HINT", "OsErrors", "cannot_hold", "from_os_error", "shown_path")

#: For attributes that an image cannot hold.
DROP_XATTRS_HINT = "--drop-xattrs takes patterns of attributes to leave out"

#: How much of a path a message shows.
_MAX_PATH_BYTES = 200

_CODES = {
    errno.ENOENT: "not_found",
    errno.ENOSPC: "resource",
    errno.EDQUOT: "resource",
    errno.EFBIG: "resource",
    errno.EMFILE: "resource",
    errno.ENFILE: "resource",
    errno.ENOMEM: "resource",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.EROFS: "denied",
    errno.EBUSY: "busy",
    errno.ETXTBSY: "busy",
    errno.EWOULDBLOCK: "busy",
    errno.EEXIST: "conflict",
    errno.ENAMETOOLONG: "invalid",
    errno.ENOTDIR: "invalid",
    errno.EISDIR: "invalid",
    errno.ELOOP: "invalid",
    errno.EINVAL: "invalid",
}


def from_os_error(
    problem: OSError, *, step: str, object: str | os.PathLike[str] | None = None
) -> CallError:
    """Return the CallError that says what was tried, on what, and why it failed.

    Full disks are ``resource``, missing permission and read-only file systems ``denied``, anything
    without a code of its own ``device``.
    """
    name = os.fspath(object) if object is not None else problem.filename
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    reason = problem.strerror or str(problem)
    number = problem.errno
    label = f" ({errno.errorcode.get(number, number)})" if number is not None else ""
    return CallError(
        _CODES.get(number or 0, "device"),
        f"cannot {step} {name!r}: {reason}{label}" if name else f"cannot {step}: {reason}{label}",
        errno=number,
        step=step,
        object=str(name) if name is not None else None,
    )


class OsErrors:
    """Raises an OSError of its ``with`` block as the CallError that ``from_os_error`` returns."""

    def __init__(self, step: str, object: str | os.PathLike[str] | None = None) -> None:
        self._step = step
        self._object = object

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: object, problem: BaseException | None, _trace: object) -> None:
        if isinstance(problem, OSError):
            raise from_os_error(problem, step=self._step, object=self._object) from problem


def cannot_hold(
    image: str, path: tuple[bytes, ...], what: str, *, hint: str | None = None
) -> CallError:
    """Return the ``unsupported`` error for a file that an image, "an ext4 image", cannot hold.

    ``path`` is of the file.
    """
    name = shown_path(path)
    return CallError(
        "unsupported",
        f"cannot put {name!r} into {image}: it has {what}",
        step="lay out the image",
        object=name,
        hint=hint,
    )


def shown_path(path: tuple[bytes, ...]) -> str:
    """Return a path for a message, a long one by its start and end."""
    name = os.fsdecode(b"/".join(path)) or "/"
    if len(name) > _MAX_PATH_BYTES:
        return f"{name[: _MAX_PATH_BYTES // 2]}...{name[-_MAX_PATH_BYTES // 2 :]}"
    return name
