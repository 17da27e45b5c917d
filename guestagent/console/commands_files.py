"""Commands about files: in a layer or overlay (``ID:/path``), or in the guest (``/path``).

Each sends ``fs.`` requests and prints the answers. They open regular files and directories only,
below a root that no path leads out of. A block device is read where its node is named.
"""

import codecs
import os
import stat
import time
from collections.abc import Callable, Iterator

from guestagent.api.inspect import (
    CHECKSUM_ALGORITHMS,
    ENTRY_TYPES,
    REPLY_DATA_BYTES,
    DirectoryEntry,
    FsChecksum,
    FsExists,
    FsFind,
    FsGetxattrs,
    FsLstat,
    FsPread,
    FsReaddir,
    FsStatvfs,
)
from guestagent.api.inspect_devices import FsChecksumDevice, FsMountpoints
from guestagent.console.command import Access, Group, Run, Usage, checked, not_found, number
from guestagent.console.commands_layers import block_devices, mounted_ids
from guestagent.console.screen import show, size_text
from vsock.errors import CallError

__all__ = ("FILES",)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestagent.api.inspect import StreamRequest
    from guestagent.api.request import Request
    from guestagent.console.command import Answers, Item, R

MAX_ENTRIES = 10_000
MAX_CAT_BYTES = 1024 * 1024
MAX_DUMP_BYTES = 1024 * 1024
_DUMP_BYTES = 256
_DUMP_WIDTH = 16
_TYPE_MARKS = {"d": "/", "l": "@", "p": "|", "s": "=", "b": "%", "c": "%"}


class _Where:
    """A path, and what answers requests about it."""

    def __init__(self, access: Access, answers: "Answers", path: str, **place: str) -> None:
        """``place`` is the layer_id or overlay_id of the requests."""
        self._answers = answers
        self._deadline = access.deadline
        self._fields: dict[str, object] = {"path": os.fsencode(path), **place}

    def ask(self, kind: "Callable[..., Request[R]]", /, **fields: object) -> "R":
        """As ``Access.ask``, about this path."""
        request = checked(kind, **self._fields, **fields)
        return self._answers.call(request, deadline=self._deadline)

    def entries(
        self, kind: "Callable[..., StreamRequest[R, Item]]", /, **fields: object
    ) -> "tuple[list[Item], bool]":
        """Return the entries of an answer, and whether it had more than ``MAX_ENTRIES``."""
        entries: list[Item] = []
        full = CallError("resource", f"more than {MAX_ENTRIES} entries")

        def take(entry: "Item") -> None:
            if len(entries) == MAX_ENTRIES:
                raise full
            entries.append(entry)

        request = checked(kind, **self._fields, **fields)
        try:
            self._answers.stream(request, take, deadline=self._deadline)
        except CallError as error:
            if error is not full:
                raise
        return entries, len(entries) == MAX_ENTRIES


def _resolve(access: Access, word: str) -> _Where:
    """Say where a path leads. A layer goes before an overlay of the same id, which
    ``overlay:ID:/path`` names.

    Raises:
        CallError: ``not_found``, there is no such layer or overlay.
        Usage: it is no path.
    """
    if word.startswith("/"):
        return _Where(access, access.guest.root, word, layer_id="guest")
    head, colon, path = word.partition(":/") if ":/" in word else word.rpartition(":")
    if not colon:
        raise Usage(f"{word!r} is no path: ID:/path in a layer or overlay, /path in the guest")
    kind, _, name = head.rpartition(":")
    for place in ("layer", "overlay"):
        if kind in ("", place) and _is_mounted(access, **{f"{place}_id": name}):
            return _Where(access, access.guest.service, f"/{path}", **{f"{place}_id": name})
    raise not_found(
        f"there is no layer or overlay {head!r}", "`layers` and `overlays` list what is mounted"
    )


def _is_mounted(access: Access, **place: str) -> bool:
    try:
        return access.ask(FsExists, path="/", **place).exists
    except CallError as error:
        if error.code != "not_found":
            raise
        return False


def _complete_path(access: Access, word: str) -> list[str]:
    """Return the paths that begin as a word does, up to its last slash."""
    if "/" not in word:
        return ["/", *(f"{name}:/" for name in mounted_ids(access))]
    head = word[: word.rindex("/") + 1]
    entries, _ = _resolve(access, head).entries(FsReaddir)
    return [
        head + os.fsdecode(entry.name) + ("/" if entry.kind == "d" else "") for entry in entries
    ]


FILES = Group("Files: ID:/path in a layer or overlay, /path in the guest", {"PATH": _complete_path})


# --- directories


@FILES.command("ls [-l] [PATH...]", "list a directory; -l in detail")
def _ls(run: Run) -> None:
    for word in run.words or ("/",):
        if len(run.words) > 1:
            run.screen.line(f"{word}:")
        where = _resolve(run, word)
        if where.ask(FsLstat).kind not in "dl":
            _describe(run, word, where)
            continue
        entries, is_cut = where.entries(FsReaddir)
        entries.sort(key=lambda entry: entry.name)
        if "l" in run.options:
            header = ("MODE", "UID", "GID", "SIZE", "MODIFIED", "NAME")
            run.screen.table(header, [_long_row(entry) for entry in entries])
        else:
            run.screen.lines(show(e.name) + _TYPE_MARKS.get(e.kind, "") for e in entries)
        _tell_cut(run, is_cut)


def _long_row(entry: DirectoryEntry) -> tuple[str, ...]:
    arrow = f" -> {show(entry.target)}" if entry.target is not None else ""
    return (
        f"{'-' if entry.kind == 'f' else entry.kind}{_mode_text(entry.mode)}",
        str(entry.uid),
        str(entry.gid),
        str(entry.rdev or entry.size_bytes),
        _clock(entry.mtime_ns),
        show(entry.name) + arrow,
    )


def _tell_cut(run: Run, is_cut: bool) -> None:
    if is_cut:
        run.screen.line(f"... cut after {MAX_ENTRIES} entries")


def _mode_text(mode: int) -> str:
    return stat.filemode(stat.S_IFREG | mode)[1:]


def _clock(time_ns: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(time_ns // 1_000_000_000))
    except (OverflowError, ValueError, OSError):  # a layer may say any time
        return str(time_ns // 1_000_000_000)


@FILES.command("stat PATH...", "describe a file")
def _stat(run: Run) -> None:
    for word in run.words:
        _describe(run, word, _resolve(run, word))


def _describe(run: Run, word: str, where: _Where) -> None:
    found = where.ask(FsLstat)
    run.screen.fields(
        [
            ("path", word),
            ("type", ENTRY_TYPES[found.kind]),
            ("target", show(found.target) if found.target is not None else None),
            ("mode", f"{found.mode:04o} ({_mode_text(found.mode)})"),
            ("owner", f"{found.uid}:{found.gid}"),
            ("size", f"{found.size_bytes} bytes, {found.allocated_bytes} allocated"),
            ("links", found.links),
            ("inode", f"{found.inode} on {found.dev}"),
            ("device", found.rdev),
            ("modified", _clock(found.mtime_ns)),
        ]
    )
    for xattr in where.ask(FsGetxattrs).xattrs:
        run.screen.line(f"xattr {show(xattr.name)} = {show(xattr.value[:256])}")


@FILES.command(
    "find [--type LETTER] [--depth N] PATH [PATTERN]",
    "list what is below a directory; the pattern may have * and ?",
)
def _find(run: Run) -> None:
    word, *patterns = run.words
    entries, is_cut = _resolve(run, word).entries(
        FsFind,
        name=os.fsencode(patterns[0]) if patterns else None,
        kind=run.options.get("type"),
        max_depth=run.number("depth", 4095) if "depth" in run.options else None,
    )
    head = show(word.rstrip("/"))
    run.screen.lines(f"{head}/{show(e.path)}{_TYPE_MARKS.get(e.kind, '')}" for e in entries)
    _tell_cut(run, is_cut)


@FILES.command("df [PATH...]", "say how full file systems are")
def _df(run: Run) -> None:
    rows = []
    for word in run.words or [mount.target for mount in run.ask(FsMountpoints).mounts]:
        run.deadline.check("ask file systems for their sizes")
        try:
            found = _resolve(run, word).ask(FsStatvfs)
        except CallError:
            if run.words:
                raise
            continue  # unmounted meanwhile, or below another mount
        size, free = found.size_bytes, found.available_bytes
        if run.words or size:
            share = f"{100 * (size - free) // max(1, size)}%"
            sizes = (size_text(size), size_text(size - free), size_text(free))
            rows.append((word, found.filesystem, *sizes, share))
    run.screen.table(("WHERE", "TYPE", "SIZE", "USED", "FREE", "USE%"), rows)


# --- content


def _pieces(run: Run, word: str, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of a regular file, or of a block device of the guest, in a range."""
    where = _resolve(run, word)
    is_device = _is_block_device(run, word)
    while start < end:
        run.deadline.check("read")
        size_bytes = min(REPLY_DATA_BYTES, end - start)
        if is_device:
            data = _read_device(word, start, size_bytes)
        else:
            data = where.ask(FsPread, offset_bytes=start, size_bytes=size_bytes).data
        yield data
        start += len(data)
        if len(data) < size_bytes:
            return


def _is_block_device(run: Run, word: str) -> bool:
    return word.startswith("/dev/") and any(info.node == word for info in block_devices(run))


def _read_device(node: str, offset_bytes: int, size_bytes: int) -> bytes:
    fd = os.open(node, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size_bytes, offset_bytes)
    except OSError as error:
        text = f"cannot read {node!r} at byte {offset_bytes}: {error.strerror}"
        raise CallError("device", text, errno=error.errno, object=node) from error
    finally:
        os.close(fd)


@FILES.command("cat [-n BYTES] PATH...", "print files, what is not printable as \\xNN")
def _cat(run: Run) -> None:
    most = run.number("n", MAX_CAT_BYTES, high=MAX_CAT_BYTES)
    for word in run.words:
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        left, last = most, "\n"
        for piece in _pieces(run, word, 0, most + 1):
            text = decoder.decode(piece[:left])
            run.screen.write(text)
            last = text[-1:] or last
            left -= len(piece)
        rest = decoder.decode(b"", final=True)
        run.screen.write(rest)
        if (rest or last) != "\n":
            run.screen.line()
        if left < 0:
            run.screen.line(f"... cut after {most} bytes; hexdump takes an offset")


@FILES.command("hexdump PATH [OFFSET [LENGTH]]", "print bytes of a file or block device")
def _hexdump(run: Run) -> None:
    at = number(run.words[1], "OFFSET") if len(run.words) > 1 else 0
    length = _DUMP_BYTES
    if len(run.words) > 2:
        length = number(run.words[2], "LENGTH", low=1, high=MAX_DUMP_BYTES)
    for piece in _pieces(run, run.words[0], at, at + length):
        for start in range(0, len(piece), _DUMP_WIDTH):
            run.screen.line(_dump_row(at, piece[start : start + _DUMP_WIDTH]))
            at += _DUMP_WIDTH


def _dump_row(offset: int, data: bytes) -> str:
    halves = (data[:8].hex(" "), data[8:].hex(" "))
    shown = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in data)
    return f"{offset:08x}  {halves[0]:23}  {halves[1]:23}  |{shown}|"


@FILES.command("checksum [-a sha256|sha512|sha1] PATH...", "hash files or block devices")
def _checksum(run: Run) -> int | None:
    algorithm = run.options.get("a", CHECKSUM_ALGORITHMS[0])
    if algorithm not in CHECKSUM_ALGORITHMS:
        raise Usage(f"-a takes one of {', '.join(CHECKSUM_ALGORITHMS)}, not {algorithm!r}")
    status = 0
    for word in run.words:
        try:
            if _is_block_device(run, word):
                found = run.ask(FsChecksumDevice, device=word, algorithm=algorithm)
            else:
                found = _resolve(run, word).ask(FsChecksum, algorithm=algorithm)
        except CallError as error:
            if error.code in ("cancelled", "timeout") or len(run.words) == 1:
                raise
            run.screen.error(f"checksum: {error.message}")
            status = 1
            continue
        run.screen.line(f"{found.digest}  {show(word)}")
    return status
