"""Commands about files: in a layer or overlay (``ID:/path``), or in the guest (``/path``).

Reading goes the way of the inspection: below a root that no path leads out of, regular files and
directories only. Block devices are read where they are named by their node.
"""

import codecs
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guestagent.api.inspect import CHECKSUM_ALGORITHMS, ENTRY_TYPES, FsFind, PathRequest
from guestagent.console.command import Group, Guest, Run, Usage, not_found, number
from guestagent.console.commands_layers import size_text
from guestagent.console.screen import show
from guestagent.inspect import listing, metadata
from guestagent.inspect.place import Place
from guestagent.inspect.reading import WHOLE, Meter, Reader
from guestagent.inspect.sink import Sink
from guestagent.inspect.walk import walk
from guestagent.storage.openat import Root
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("FILES",)


MAX_ENTRIES = 10_000
MAX_CAT_BYTES = 1024 * 1024
MAX_DUMP_BYTES = 1024 * 1024
_DUMP_BYTES = 256
_DUMP_WIDTH = 16
_TYPE_MARKS = {"d": "/", "l": "@", "p": "|", "s": "=", "b": "%", "c": "%"}
_MAX_COMPLETED = 2000


class _GuestRoot(Root):
    """The guest's own root, with everything that is mounted below it.

    Still nothing but regular files and directories is opened, and no magic link followed.
    """

    def __init__(self) -> None:
        self._directory_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.fd = os.dup(self._directory_fd)
        self.is_clone = False


class _GuestPlace(Place):
    """The guest as a place to look into, as a layer is one."""

    def __init__(self) -> None:
        self.name = "the guest"
        self.mount_point = "/"
        self._layers = ()
        self.root = _GuestRoot()


class Named:
    """A path and where it leads. ``request`` is what the inspection's functions want to have."""

    def __init__(self, guest: Guest, path: bytes, request: PathRequest | None) -> None:
        self.path = path
        self._guest = guest
        self._request = request

    @property
    def is_guest(self) -> bool:
        """Whether it is the guest's own path, not one of a layer or overlay."""
        return self._request is None

    @property
    def request(self) -> PathRequest:
        return self._request or PathRequest(layer_id="guest", path=self.path)

    @contextmanager
    def open(self) -> Iterator[Place]:
        """Open the place.

        Raises:
            CallError: ``not_found``, it is not mounted any more.
        """
        if self._request is None:
            place: Place = _GuestPlace()
        else:
            place = self._guest.debug.place(self._request)
        with place:
            yield place


def resolve(guest: Guest, word: str) -> Named:
    """Say what a path leads to. A layer goes before an overlay of the same id, which
    ``overlay:ID:/path`` names.

    Raises:
        CallError: ``not_found``, there is no such layer or overlay.
        Usage: it is no path.
    """
    if word.startswith("/"):
        return Named(guest, os.fsencode(word), None)
    head, colon, path = word.rpartition(":") if ":/" not in word else _split(word)
    if not colon:
        raise Usage(f"{word!r} is no path: ID:/path in a layer or overlay, /path in the guest")
    kind, _, name = head.rpartition(":")
    encoded = os.fsencode(path or "/")
    if kind in ("", "layer") and name in guest.debug.layer_ids():
        return Named(guest, encoded, PathRequest(layer_id=name, path=encoded))
    if kind in ("", "overlay") and name in guest.debug.overlay_ids():
        return Named(guest, encoded, PathRequest(overlay_id=name, path=encoded))
    raise not_found(
        f"there is no layer or overlay {head!r}", "`layers` and `overlays` list what is mounted"
    )


def _split(word: str) -> tuple[str, str, str]:
    head, _, path = word.partition(":/")
    return head, ":", "/" + path


def complete_path(guest: Guest, word: str, deadline: Deadline) -> list[str]:
    """Return the paths that begin as a word does, up to its last slash."""
    if "/" not in word:
        ids = (*guest.debug.layer_ids(), *guest.debug.overlay_ids())
        return ["/", *(f"{name}:/" for name in ids)]
    head = word[: word.rindex("/") + 1]
    name = resolve(guest, head)
    found = []
    with name.open() as place, place.errors(name.path):
        for entry in walk(place.root.open_directory(name.path), max_depth=1):
            deadline.check("complete a path")
            is_directory = entry.entry.is_dir(follow_symlinks=False)
            found.append(head + os.fsdecode(entry.path) + ("/" if is_directory else ""))
            if len(found) >= _MAX_COMPLETED:
                break
    return found


FILES = Group("Files: ID:/path in a layer or overlay, /path in the guest", {"PATH": complete_path})


class _Full(Exception):
    """A list is as long as it may be."""


class _Entries(Sink):
    """Hands entries on, up to a bound."""

    def __init__(self, take: Callable[..., None], most: int) -> None:
        self._take = take
        self._left = most

    def entry(self, *fields: object) -> None:
        if not self._left:
            raise _Full
        self._left -= 1
        self._take(*fields)

    def data(self, data: "bytes | memoryview") -> None:
        raise AssertionError("a list has no data")

    def finish(self) -> int:
        return 0

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        return


class _Nowhere(_Entries):
    """For what answers by its result alone."""

    def __init__(self) -> None:
        super().__init__(lambda *fields: None, MAX_ENTRIES)


def _place_words(run: Run, default: str | None = None) -> tuple[str, ...]:
    return run.words or ((default,) if default else ())


# --- directories


@FILES.command("ls [-l] [PATH...]", "list a directory; -l in detail")
def _ls(run: Run) -> int | None:
    for word in _place_words(run, "/"):
        if len(run.words) > 1:
            run.screen.line(f"{word}:")
        named = resolve(run.guest, word)
        with named.open() as place:
            if metadata.lstat(place, named.request).kind not in "dl":
                _stat_word(run, word)
                continue
            _list(run, place, named.request)
    return None


def _list(run: Run, place: Place, request: PathRequest) -> None:
    """List a directory in the order of its names."""
    entries: list[tuple[object, ...]] = []
    sink = _Entries(lambda *fields: entries.append(fields), MAX_ENTRIES)
    is_long = "l" in run.options
    is_cut = False
    try:
        listing.readdir(place, request, run.operation(), sink)
    except _Full:
        is_cut = True
    entries.sort(key=lambda entry: bytes(entry[0]))  # type: ignore[call-overload]
    if is_long:
        rows = [_long_row(entry) for entry in entries]
        run.screen.table(("MODE", "UID", "GID", "SIZE", "MODIFIED", "NAME"), rows)
    else:
        for name, kind, *_ in entries:
            assert isinstance(name, bytes)
            run.screen.line(show(name) + _TYPE_MARKS.get(str(kind), ""))
    if is_cut:
        run.screen.line(f"... and more than these {MAX_ENTRIES}")


def _long_row(entry: tuple[object, ...]) -> tuple[str, ...]:
    name, kind, mode, uid, gid, size_bytes, _links, _inode, mtime_ns, rdev, target = entry
    assert isinstance(name, bytes)
    assert isinstance(mode, int)
    assert isinstance(mtime_ns, int)
    arrow = f" -> {show(target)}" if isinstance(target, bytes) else ""
    return (
        f"{'-' if kind == 'f' else kind}{_mode_text(mode)}",
        str(uid),
        str(gid),
        str(rdev or size_bytes),
        _clock(mtime_ns),
        show(name) + arrow,
    )


def _mode_text(mode: int) -> str:
    letters = "".join(
        letter if mode & (0o400 >> position) else "-" for position, letter in enumerate("rwxrwxrwx")
    )
    for bit, position, letter in ((0o4000, 2, "s"), (0o2000, 5, "s"), (0o1000, 8, "t")):
        if mode & bit:
            mark = letter if letters[position] == "x" else letter.upper()
            letters = letters[:position] + mark + letters[position + 1 :]
    return letters


def _clock(time_ns: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(time_ns // 1_000_000_000))
    except (OverflowError, ValueError, OSError):  # a layer may say any time
        return str(time_ns // 1_000_000_000)


@FILES.command("stat PATH...", "describe a file")
def _stat(run: Run) -> int | None:
    for word in run.words:
        _stat_word(run, word)
    return None


def _stat_word(run: Run, word: str) -> None:
    named = resolve(run.guest, word)
    with named.open() as place:
        found = metadata.lstat(place, named.request)
        xattrs = metadata.xattrs(place, named.request).xattrs
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
    for xattr in xattrs:
        run.screen.line(f"xattr {show(xattr.name)} = {show(xattr.value[:256])}")


@FILES.command(
    "find [--type LETTER] [--depth N] PATH [PATTERN]",
    "list what is below a directory; the pattern may have * and ?",
)
def _find(run: Run) -> int | None:
    word, *patterns = run.words
    named = resolve(run.guest, word)
    request = named.request
    try:
        find = FsFind(
            layer_id=request.layer_id,
            overlay_id=request.overlay_id,
            path=request.path,
            name=os.fsencode(patterns[0]) if patterns else None,
            kind=run.options.get("type"),
            max_depth=run.number("depth", 4095) if "depth" in run.options else None,
        )
    except ValueError as error:
        raise Usage(str(error)) from None
    head = word.rstrip("/")

    def take(path: object, kind: object) -> None:
        assert isinstance(path, bytes)
        run.screen.line(f"{show(head)}/{show(path)}{_TYPE_MARKS.get(str(kind), '')}")

    with named.open() as place:
        try:
            listing.find(place, find, run.operation(), _Entries(take, MAX_ENTRIES))
        except _Full:
            run.screen.line(f"... and more than these {MAX_ENTRIES}")
    return None


@FILES.command("df [PATH...]", "say how full file systems are")
def _df(run: Run) -> int | None:
    rows = []
    if run.words:
        for word in run.words:
            named = resolve(run.guest, word)
            with named.open() as place:
                found = metadata.statvfs(place, named.request)
            rows.append((word, found.filesystem, found.size_bytes, found.available_bytes))
    else:
        for mount in run.guest.inspection.devices.mountpoints().mounts:
            run.deadline.check("ask file systems for their sizes")
            try:
                status = os.statvfs(mount.target)
            except OSError:  # unmounted meanwhile, or below another mount
                continue
            if status.f_blocks:
                size_bytes = status.f_blocks * status.f_frsize
                available_bytes = status.f_bavail * status.f_frsize
                rows.append((mount.target, mount.filesystem, size_bytes, available_bytes))
    table = [
        (where, kind, size_text(size), size_text(size - free), size_text(free), _share(size, free))
        for where, kind, size, free in rows
    ]
    run.screen.table(("WHERE", "TYPE", "SIZE", "USED", "FREE", "USE%"), table)
    return None


def _share(size_bytes: int, free_bytes: int) -> str:
    return f"{100 * (size_bytes - free_bytes) // max(1, size_bytes)}%"


# --- content


class _Source:
    """A file or block device, open. ``pieces`` yields its bytes."""

    def __init__(self, run: Run, reader: Reader, fd: int, path: bytes) -> None:
        self._reader = reader
        self._fd = fd
        self._path = path

    def pieces(self, offset_bytes: int = 0, end_bytes: int = WHOLE) -> Iterator[memoryview]:
        return self._reader.pieces(self._fd, self._path, offset_bytes, end_bytes)

    def digest(self, algorithm: str) -> tuple[int, str]:
        return self._reader.digest(self._fd, self._path, algorithm)


@contextmanager
def _opened(run: Run, word: str) -> Iterator[_Source]:
    """Open a regular file, or a block device of the guest, for reading."""
    named = resolve(run.guest, word)
    with named.open() as place:
        is_device = named.is_guest and word.startswith("/dev/") and _is_block_device(run, word)
        with place.errors(named.path):
            if is_device:
                fd = os.open(named.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
            else:
                fd = place.root.open_file(named.path)
        try:
            reader = Reader(place.error_of, run.operation(), Meter(_Nowhere()))
            yield _Source(run, reader, fd, named.path)
        finally:
            os.close(fd)


def _is_block_device(run: Run, node: str) -> bool:
    devices = run.guest.inspection.devices
    infos = (*devices.list_devices().devices, *devices.list_partitions().devices)
    return any(info.node == node for info in infos)


@FILES.command("cat [-n BYTES] PATH...", "print files, what is not printable as \\xNN")
def _cat(run: Run) -> int | None:
    most = run.number("n", MAX_CAT_BYTES, high=MAX_CAT_BYTES)
    for word in run.words:
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        with _opened(run, word) as source:
            left, last = most, "\n"
            for piece in source.pieces(0, most + 1):
                text = decoder.decode(bytes(piece[:left]))
                run.screen.write(text)
                last = text[-1:] or last
                left -= len(piece)
        rest = decoder.decode(b"", final=True)
        run.screen.write(rest)
        if (rest or last) != "\n":
            run.screen.line()
        if left < 0:
            run.screen.line(f"... cut after {most} bytes; hexdump takes an offset")
    return None


@FILES.command("hexdump PATH [OFFSET [LENGTH]]", "print bytes of a file or block device")
def _hexdump(run: Run) -> int | None:
    offset = number(run.words[1], "OFFSET") if len(run.words) > 1 else 0
    length = _DUMP_BYTES
    if len(run.words) > 2:
        length = number(run.words[2], "LENGTH", low=1, high=MAX_DUMP_BYTES)
    with _opened(run, run.words[0]) as source:
        row, at = bytearray(), offset
        for piece in source.pieces(offset, offset + length):
            row += piece
            while len(row) >= _DUMP_WIDTH:
                run.screen.line(_dump_row(at, bytes(row[:_DUMP_WIDTH])))
                del row[:_DUMP_WIDTH]
                at += _DUMP_WIDTH
        if row:
            run.screen.line(_dump_row(at, bytes(row)))
    return None


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
            with _opened(run, word) as source:
                _, digest = source.digest(algorithm)
        except CallError as error:
            if error.code in ("cancelled", "timeout") or len(run.words) == 1:
                raise
            run.screen.error(f"checksum: {error.message}")
            status = 1
            continue
        run.screen.line(f"{digest}  {show(word)}")
    return status
