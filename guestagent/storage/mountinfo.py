r"""What is mounted, as the kernel tells it: /proc/self/mountinfo, parsed once and typed.

Paths are text with undecodable bytes kept as surrogates (``os.fsdecode``), the kernel's octal
escapes resolved. What a file system escaped once more for itself (overlayfs: ``\:``) stays so.

Source: Documentation/filesystems/proc.rst, section 3.5.
"""

import os
from collections.abc import Callable, Iterable

from vsock.record import Record

__all__ = (
    "Mount",
    "describe_space",
    "filesystem_at",
    "find_mount",
    "is_reused",
    "lowerdirs_of",
    "mounts_of_dev",
    "parse",
    "read_mounts",
    "read_text",
    "split_lowerdir",
    "whereabouts",
)

MOUNTINFO_PATH = "/proc/self/mountinfo"
#: The kernel gives no more than a page of this file at once; a buffer that is larger by far would
#: be taken from the heap for each, and most of it left there as a hole.
_READ_BYTES = 8 * 1024
_OCTAL = frozenset("01234567")
#: What the kernel escapes in a path.
_ESCAPED = frozenset(" \t\n\\")


class Mount(Record):
    """One mount. ``dev`` is MAJOR:MINOR, ``options`` those of the mount, ``super_options`` those
    of the file system; ``root`` is what of the file system is mounted."""

    mount_id: int
    parent_id: int
    dev: str
    root: str
    target: str
    options: tuple[str, ...]
    filesystem: str
    source: str
    super_options: tuple[str, ...]


def unescape(text: str) -> str:
    r"""Resolve the kernel's ``\040`` for space, and the like."""
    if "\\" not in text:
        return text
    parts = text.split("\\")
    out = [parts[0]]
    for part in parts[1:]:
        if len(part) >= 3 and _OCTAL.issuperset(part[:3]) and part[0] < "4":
            out.append(os.fsdecode(bytes([int(part[:3], 8)])))
            out.append(part[3:])
        else:
            out.append("\\" + part)
    # bytes above 127 are never escaped, so that the pieces join to what they were
    return "".join(out)


def parse_line(line: str) -> Mount:
    """Parse one line.

    Raises:
        ValueError: it is not a line of mountinfo.
    """
    words = line.split(" ")
    try:
        dash = words.index("-", 6)  # any number of optional fields comes before
        mount_id, parent_id, dev, root, target, options = words[:6]
        filesystem, source, super_options = words[dash + 1 : dash + 4]
        return Mount(
            mount_id=int(mount_id),
            parent_id=int(parent_id),
            dev=dev,
            root=unescape(root),
            target=unescape(target),
            options=tuple(options.split(",")),
            filesystem=unescape(filesystem),
            source=unescape(source),
            super_options=tuple(unescape(option) for option in super_options.split(",")),
        )
    except ValueError as error:
        raise ValueError(f"not a line of mountinfo: {line!r}") from error


def parse(text: str) -> tuple[Mount, ...]:
    """Parse a whole file's text."""
    return tuple(parse_line(line) for line in text.split("\n") if line)


def read_text(path: str = MOUNTINFO_PATH) -> str:
    """Return the file as it is, for ``find_mount`` and ``mounts_of_dev`` to look into."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = []
        while chunk := os.read(fd, _READ_BYTES):
            chunks.append(chunk)
    finally:
        os.close(fd)
    return os.fsdecode(b"".join(chunks))


def read_mounts(path: str = MOUNTINFO_PATH) -> tuple[Mount, ...]:
    """Return every mount of this mount namespace (or of the process whose file it is)."""
    return parse(read_text(path))


def find_mount(target: str, path: str = MOUNTINFO_PATH, *, text: str | None = None) -> Mount | None:
    """Return the topmost mount at exactly ``target``; None if that is no mount point. ``text`` is a
    fresh ``read_text``.

    Only lines that mention the target are parsed: with 500 layers this is called 500 times.
    """
    escaped = _escaped(target)
    text = read_text(path) if text is None else text
    lines = [line for line in text.split("\n") if f" {escaped} " in line]
    return _topmost([mount for mount in map(parse_line, lines) if mount.target == target])


def _escaped(target: str) -> str:
    if _ESCAPED.isdisjoint(target):
        return target
    return "".join(f"\\{ord(char):03o}" if char in _ESCAPED else char for char in target)


def mounts_by_target(
    targets: Iterable[str] | None = None, *, path: str = MOUNTINFO_PATH
) -> dict[str, Mount]:
    """Return the topmost mount of each target, or of each of ``targets`` that is a mount point, by
    one reading."""
    lines = [line for line in read_text(path).split("\n") if line]
    if targets is not None:
        wanted = {_escaped(target) for target in targets}
        lines = [line for line in lines if line.split(" ", 5)[4] in wanted]
    stacks: dict[str, list[Mount]] = {}
    for mount in map(parse_line, lines):
        stacks.setdefault(mount.target, []).append(mount)
    tops = {target: _topmost(stack) for target, stack in stacks.items()}
    return {target: top for target, top in tops.items() if top is not None}


def _topmost(stack: list[Mount]) -> Mount | None:
    covered = {mount.parent_id for mount in stack}
    top = [mount for mount in stack if mount.mount_id not in covered]
    return top[-1] if top else None


def mounts_of_dev(
    dev: str, path: str = MOUNTINFO_PATH, *, text: str | None = None
) -> tuple[Mount, ...]:
    """Return the mounts of the file system on device ``dev`` (MAJOR:MINOR). ``text`` is a fresh
    ``read_text``."""
    text = read_text(path) if text is None else text
    lines = [line for line in text.split("\n") if f" {dev} " in line]
    return tuple(mount for mount in map(parse_line, lines) if mount.dev == dev)


def whereabouts(target: str, dev: str, mount_id: int, path: str = MOUNTINFO_PATH) -> str:
    """Say what became of a mount that is not what is seen at ``target`` any more."""
    mounts = read_mounts(path)
    found = next((m for m in mounts if m.mount_id == mount_id and m.dev == dev), None)
    if found is None:
        return f"no longer mounted at {target!r}"
    if found.target != target:
        return f"no longer mounted at {target!r}: it was moved to {found.target!r}"
    top = _topmost([mount for mount in mounts if mount.target == target])
    what = f"{top.filesystem} of {top.source!r} ({top.dev})" if top else "another mount"
    return f"covered at {target!r} by {what}"


def split_lowerdir(value: str) -> tuple[str, ...]:
    r"""Split ``lowerdir=`` at its colons, and resolve the backslashes that overlayfs reads.

    ``::`` parts data-only layers, which are listed too.
    """
    if "\\" not in value:
        return tuple(path for path in value.split(":") if path)
    paths = [""]
    letters = iter(value)
    for letter in letters:
        if letter == "\\":
            paths[-1] += next(letters, "")
        elif letter == ":":
            paths.append("")
        else:
            paths[-1] += letter
    return tuple(path for path in paths if path)


def lowerdirs_of(mount: Mount) -> tuple[str, ...]:
    """Return the lower directories of a mounted overlay, topmost first.

    Short names are looked up in the directory of links that is the overlay's source; where that is
    gone they are returned as they are.
    """
    paths: list[str] = []
    for option in mount.super_options:
        key, _, value = option.partition("=")
        if key == "lowerdir":
            paths.extend(split_lowerdir(value))
        elif key == "lowerdir+":
            paths.append(value)
    return tuple(_resolve_link(mount.source, path) for path in paths)


def _resolve_link(source: str, path: str) -> str:
    if path.startswith("/") or not source.startswith("/"):
        return path
    try:
        return os.readlink(f"{source}/{path}")
    except OSError:
        return path


def filesystem_at(path: str) -> tuple[str, str]:
    """Return (mount point, type) of the file system that an absolute path is on."""
    while (mount := find_mount(path)) is None:
        if path == "/":
            return "/", "unknown"
        path = os.path.dirname(path)
    return mount.target, mount.filesystem


def describe_space(path: str) -> str:
    """Say how much room there is where ``path`` is, or would be."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    target, kind = filesystem_at(path)
    space = os.statvfs(path)
    text = f"{kind} at {target!r} has {space.f_frsize * space.f_bavail} of "
    text += f"{space.f_frsize * space.f_blocks} bytes free"
    if space.f_files:
        text += f", {space.f_favail} of {space.f_files} inodes"
    return text


def is_reused(dev: str, filesystem: str, is_target: Callable[[str], bool]) -> bool:
    """Return whether ``dev``, the number of a file system that was unmounted, is another one's.

    The kernel gives the number of a file system that is gone to the next one. It has done so where
    a mount of that number has another type than ``filesystem``, or is at one of our targets.
    """
    return any(
        mount.filesystem != filesystem or is_target(mount.target) for mount in mounts_of_dev(dev)
    )
