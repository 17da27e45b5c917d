r"""Overlays of up to 500 layers, right on every kernel or refused.

mount(2) hands the kernel one page of options and the kernel cuts what is longer, without an error:
the overlay then lacks its lower layers. So there are three ways here:

- fsconfig ``lowerdir+``, one call for each layer; by descriptor since Linux 6.13, by path of at
  most 255 bytes since 6.7. No limit but the kernel's 500 layers, no escaping.
- mount(2) with ``lowerdir=`` and all paths, where they fit into 4095 bytes.
- mount(2) with short names: a directory of symbolic links ``0``, ``1``, ... stands in for the
  paths, and a thread that has left the shared working directory (unshare CLONE_FS, so that no
  other thread moves) mounts from within it. The directory is the overlay's ``source`` in
  mountinfo, which keeps the layers readable later.

After each mount what the kernel shows is compared with what was asked.
"""

import contextlib
import errno
import os
from collections.abc import Sequence

from guestagent.api import OverlayOptions
from guestagent.storage import syscalls
from guestagent.storage.fscontext import (
    FsContext,
    FsContextError,
    attach,
    flag_bits,
    is_supported,
)
from guestagent.storage.mountinfo import find_mount, lowerdirs_of
from vsock.errors import CallError
from vsock.record import Record

__all__ = (
    "MAX_LAYERS",
    "OverlayMount",
    "available_ways",
    "lowerdirs_of",
    "mount_overlay",
    "open_plain",
    "remove_links",
)

#: OVL_MAX_STACK of fs/overlayfs.
MAX_LAYERS = 500
_FSCONFIG_VALUE_MAX_BYTES = 255
_NO_OPTIONS = OverlayOptions()

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BY_FD, BY_PATH, BY_MOUNT = "fsconfig-fd", "fsconfig-path", "mount"


class OverlayMount(Record):
    """How an overlay was mounted. ``method`` is fsconfig or mount, ``way`` which kind of it;
    ``lowerdirs`` as the kernel shows them, topmost first; ``links`` is the directory of symbolic
    links that stands in for them, to be removed after the unmount; ``padded`` says that an empty
    directory was added below a single layer, which alone the kernel would refuse."""

    method: str
    way: str
    lowerdirs: tuple[str, ...]
    links: str | None
    padded: bool


class _Plan(Record):
    """Everything that a mount needs, checked."""

    name: str
    lowerdirs: tuple[str, ...]
    upperdir: str | None
    workdir: str | None
    options: tuple[tuple[str, str | None], ...]
    flags: tuple[str, ...]
    links: str


def option_list(options: OverlayOptions) -> tuple[tuple[str, str | None], ...]:
    """Return the kernel's options as (key, value), or (key, None) for flags."""
    pairs: list[tuple[str, str | None]] = []
    for key in ("metacopy", "redirect_dir", "xino"):
        value = getattr(options, key)
        if value is not None:
            pairs.append((key, value))
    if options.volatile:
        pairs.append(("volatile", None))
    if options.userxattr:
        pairs.append(("userxattr", None))
    return tuple(pairs)


def escape(path: str) -> str:
    """Escape what overlayfs would take for the end of a path or of an option."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


_ways: tuple[str, ...] | None = None


def available_ways() -> tuple[str, ...]:
    """Return what the kernel can do, best first; found by trying on a context that is thrown away.

    Raises:
        FsContextError: ENODEV, the kernel has no overlayfs.
    """
    global _ways
    if _ways is None:
        _ways = _probe_ways() if is_supported() else (BY_MOUNT,)
    return _ways


def _probe_ways() -> tuple[str, ...]:
    with FsContext("overlay") as context:
        if _accepts(lambda: context.set("no-such-option")):
            return (BY_MOUNT,)  # before 6.5 every word is stored and read at the mount only
        ways = []
        root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _accepts(lambda: context.set_fd("lowerdir+", root_fd)):
                ways.append(BY_FD)
        finally:
            os.close(root_fd)
        if _accepts(lambda: context.set("lowerdir+", "/")):
            ways.append(BY_PATH)
        return (*ways, BY_MOUNT)


def _accepts(action: "Callable[[], None]") -> bool:
    try:
        action()
    except OSError:
        return False
    return True


def open_plain(path: str) -> int:
    """Open a directory with O_PATH, following no link; the caller owns the descriptor."""
    resolve = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    flags = os.O_PATH | os.O_DIRECTORY
    return syscalls.openat2(syscalls.AT_FDCWD, path, flags, resolve=resolve)


def mount_overlay(
    *,
    name: str,
    lowerdirs: Sequence[str],
    target: "int | str",
    upperdir: str | None = None,
    workdir: str | None = None,
    options: OverlayOptions = _NO_OPTIONS,
    flags: Sequence[str] | None = None,
    runtime_directory: str = "/run/guestagent",
    way: str | None = None,
    open_directory: "Callable[[str], int]" = open_plain,
) -> OverlayMount:
    """Mount an overlay and check that the kernel has the layers that were asked for.

    Args:
        name: a plain word, unique among overlays; names the directory of links if one is needed.
        lowerdirs: 1 to 500 absolute paths of directories, topmost first.
        target: a directory as an open descriptor, or its path.
        upperdir, workdir: both or none; without them the overlay is read-only.
        flags: as of ``mount_filesystem``; by default nodev,nosuid, and ro without an upperdir.
        runtime_directory: where the empty directory and the links may be kept.
        way: forces one of ``available_ways``.
        open_directory: opens one of the directories with O_PATH, or raises if it is not what it
            must be. Where the kernel takes no descriptors each is opened before and after.

    Raises:
        FsContextError: the kernel refused; ``log`` says why where it is told.
        OSError: a directory is not there (ENOENT), or a link is in its path (ELOOP).
        CallError: ``unsupported``, the layers cannot be told to this kernel; ``integrity``, the
            kernel shows others than were asked for (the overlay is unmounted again).
    """
    plan = _plan(name, lowerdirs, upperdir, workdir, options, flags, runtime_directory)
    chosen = way or _choose(plan)
    if chosen != BY_FD:  # which opens each of them in any case
        _check_directories(plan, open_directory)
    if chosen == BY_MOUNT:
        links = _mount_by_mount2(plan, target)
    elif chosen in (BY_FD, BY_PATH):
        links = None
        _mount_by_fsconfig(plan, target, open_directory if chosen == BY_FD else None)
    else:
        raise ValueError(f"no such way to mount an overlay: {chosen!r}")
    shown = _read_back(plan, target, links)
    if chosen != BY_FD:
        try:
            _check_directories(plan, open_directory)
        except BaseException:
            _take_back(target, links)
            raise
    return OverlayMount(
        method="mount" if chosen == BY_MOUNT else "fsconfig",
        way=chosen,
        lowerdirs=shown,
        links=links,
        padded=len(plan.lowerdirs) > len(lowerdirs),
    )


def _plan(
    name: str,
    lowerdirs: Sequence[str],
    upperdir: str | None,
    workdir: str | None,
    options: OverlayOptions,
    flags: Sequence[str] | None,
    runtime_directory: str,
) -> _Plan:
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"overlay name must be a plain word, got {name!r}")
    if not 1 <= len(lowerdirs) <= MAX_LAYERS:
        raise ValueError(f"an overlay has 1 to {MAX_LAYERS} layers, got {len(lowerdirs)}")
    paths = (*lowerdirs, *(path for path in (upperdir, workdir) if path is not None))
    for path in paths:
        if not path.startswith("/"):
            raise ValueError(f"overlay directories must be absolute paths, got {path!r}")
    if (upperdir is None) != (workdir is None):
        raise ValueError("upperdir and workdir go together")
    lower = tuple(lowerdirs)
    if upperdir is None and len(lower) == 1:
        lower = (*lower, _empty_directory(runtime_directory))
    if flags is None:
        flags = ("nodev", "nosuid") if upperdir is not None else ("ro", "nodev", "nosuid")
    return _Plan(
        name=name,
        lowerdirs=lower,
        upperdir=upperdir,
        workdir=workdir,
        options=option_list(options),
        flags=tuple(flags),
        links=f"{runtime_directory}/links/{name}",
    )


def _empty_directory(runtime_directory: str) -> str:
    path = f"{runtime_directory}/empty"
    os.makedirs(path, 0o700, exist_ok=True)
    if os.listdir(path):
        raise OSError(errno.ENOTEMPTY, "the directory for an empty layer has entries", path)
    return path


def _choose(plan: _Plan) -> str:
    ways = available_ways()
    longest = max(
        len(os.fsencode(path))
        for path in (*plan.lowerdirs, plan.upperdir or "", plan.workdir or "")
    )
    if ways[0] == BY_PATH and longest > _FSCONFIG_VALUE_MAX_BYTES:
        return BY_MOUNT
    return ways[0]


def _mount_by_fsconfig(
    plan: _Plan, target: "int | str", open_directory: "Callable[[str], int] | None"
) -> None:
    attributes, _ = flag_bits(plan.flags)
    with FsContext("overlay") as context:
        context.set("source", "overlay")
        if "ro" in plan.flags:
            context.set("ro")
        for key, path in _directories(plan):
            if open_directory is not None:
                fd = open_directory(path)
                try:
                    context.set_fd(key, fd)
                finally:
                    os.close(fd)
            else:
                # the kernel reads backslashes in the writable directories alone as escapes
                plain = key == "lowerdir+"
                context.set(key, path if plain else path.replace("\\", "\\\\"))
        for option, value in plan.options:
            context.set(option, value)
        context.create(plan.name)
        mount_fd = context.mount(attributes, plan.name)
    try:
        attach(mount_fd, target)
    finally:
        os.close(mount_fd)


def _directories(plan: _Plan) -> list[tuple[str, str]]:
    pairs = [("lowerdir+", path) for path in plan.lowerdirs]
    if plan.upperdir is not None and plan.workdir is not None:
        pairs += [("upperdir", plan.upperdir), ("workdir", plan.workdir)]
    return pairs


def _mount_by_mount2(plan: _Plan, target: "int | str") -> str | None:
    """Mount by mount(2); return the directory of links if one was needed."""
    path = f"/proc/self/fd/{target}" if isinstance(target, int) else target
    data = _mount_data(plan, [escape(lower) for lower in plan.lowerdirs])
    if len(data) <= syscalls.MOUNT_DATA_MAX_BYTES:
        _mount2("overlay", path, plan, data)
        return None
    data = _mount_data(plan, [str(index) for index in range(len(plan.lowerdirs))])
    if len(data) > syscalls.MOUNT_DATA_MAX_BYTES:
        raise CallError(
            "unsupported",
            f"cannot tell this kernel {len(plan.lowerdirs)} layers: the options take {len(data)} "
            f"bytes of {syscalls.MOUNT_DATA_MAX_BYTES}",
            step="mount-option",
            object=plan.name,
            hint="shorter upperdir and workdir paths, or Linux 6.7",
        )
    with contextlib.ExitStack() as undo:
        undo.callback(remove_links, plan.links)
        _make_links(plan)
        _run_in(plan.links, lambda: _mount2(plan.links, path, plan, data))
        undo.pop_all()
    return plan.links


def _mount_data(plan: _Plan, lower_names: list[str]) -> bytes:
    words = ["lowerdir=" + ":".join(lower_names)]
    if plan.upperdir is not None and plan.workdir is not None:
        words += [f"upperdir={escape(plan.upperdir)}", f"workdir={escape(plan.workdir)}"]
    words += [key if value is None else f"{key}={value}" for key, value in plan.options]
    return os.fsencode(",".join(words))


def _mount2(source: str, path: str, plan: _Plan, data: bytes) -> None:
    _, bits = flag_bits(plan.flags)
    try:
        syscalls.mount(source, path, "overlay", bits, data)
    except OSError as error:
        error.filename = plan.name
        raise FsContextError.of("mount-create", error) from error


def _make_links(plan: _Plan) -> None:
    remove_links(plan.links)
    os.makedirs(plan.links, 0o700)
    for index, path in enumerate(plan.lowerdirs):
        os.symlink(path, f"{plan.links}/{index}")


def remove_links(directory: str) -> None:
    """Remove a directory of links, and nothing but links. Idempotent."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in names:
        path = f"{directory}/{name}"
        if not os.path.islink(path):
            raise OSError(errno.ENOTEMPTY, "the directory of links holds something else", path)
        os.unlink(path)
    os.rmdir(directory)


def _run_in(directory: str, action: "Callable[[], None]") -> None:
    """Run ``action`` with another working directory, which no other thread gets to see."""

    def run() -> None:
        os.chdir(directory)
        action()

    syscalls.run_apart(run)


def _read_back(plan: _Plan, target: "int | str", links: str | None) -> tuple[str, ...]:
    """Compare the layers that the kernel shows with the plan; unmount if they differ."""
    path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
    mounted = find_mount(path)
    shown = lowerdirs_of(mounted) if mounted is not None else ()
    if mounted is not None and mounted.filesystem == "overlay" and shown == plan.lowerdirs:
        return shown
    _take_back(target, links)
    raise CallError(
        "integrity",
        f"overlay {plan.name!r} was asked for {len(plan.lowerdirs)} layers, the kernel shows "
        f"{len(shown)}: {shown!r}",
        step="mount-check",
        object=path,
    )


def _check_directories(plan: _Plan, open_directory: "Callable[[str], int]") -> None:
    for _, path in _directories(plan):
        os.close(open_directory(path))


def _take_back(target: "int | str", links: str | None) -> None:
    path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
    syscalls.umount2(path, syscalls.UMOUNT_NOFOLLOW)
    if links is not None:
        remove_links(links)
